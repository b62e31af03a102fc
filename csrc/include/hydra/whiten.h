// Mean and variance that merge, and whitening by them.
//
// Source of the merge: Chan, Golub, LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for
// Computing Sample Variances", eq. 2.1. Of the whitening: TRL's masked_whiten.
#pragma once
#include <cmath>

#include "hydra/host_device.h"

namespace hydra {

constexpr double kWhitenEps = 1e-8;  // TRL's, added to the variance

struct Moments {
  double count;
  double mean;
  double m2;  // sum of the squares of the deviations from the mean
};

HYDRA_HOST_DEVICE Moments merge(Moments a, Moments b) {
  const double count = a.count + b.count;
  const double share = count > 0.0 ? b.count / count : 0.0;
  const double apart = b.mean - a.mean;
  return {count, a.mean + apart * share, a.m2 + b.m2 + apart * apart * a.count * share};
}

// Moments of a stream, for a thread that cannot keep its elements for a second pass. Sums about one
// of the elements, which is as far from the mean as the others are: nothing cancels, as it would in
// sums about zero.
struct ShiftedSums {
  float shift;
  double count;
  double sum;
  double square;
};

HYDRA_HOST_DEVICE void add(ShiftedSums& sums, float x) {
  if (sums.count == 0.0) sums.shift = x;
  // In double from here on: rounded to float, deviations of 1e20 would bury a mean of 1e13.
  const double deviation = static_cast<double>(x) - static_cast<double>(sums.shift);
  sums.count += 1.0;
  sums.sum += deviation;
  sums.square += deviation * deviation;
}

HYDRA_HOST_DEVICE Moments moments_of(const ShiftedSums& sums) {
  if (sums.count == 0.0) return {0.0, 0.0, 0.0};
  const double apart = sums.sum / sums.count;
  const double m2 = sums.square - sums.sum * apart;
  return {sums.count, static_cast<double>(sums.shift) + apart, m2 > 0.0 ? m2 : 0.0};
}

// (x - mean) / sqrt(variance + eps) + offset, with the mean as the sum of two floats: one float of
// a mean far from zero would be wrong by more than the deviations.
struct Whitening {
  float mean_high;
  float mean_low;
  float scale;
  float offset;
};

HYDRA_HOST_DEVICE Whitening whitening(Moments moments, bool shift_mean) {
  // One element has no unbiased variance: 0 then, which leaves it at its mean.
  const double variance = moments.m2 / (moments.count > 2.0 ? moments.count - 1.0 : 1.0);
  Whitening w;
  w.mean_high = static_cast<float>(moments.mean);
  w.mean_low = static_cast<float>(moments.mean - static_cast<double>(w.mean_high));
  w.scale = static_cast<float>(1.0 / sqrt(variance + kWhitenEps));
  w.offset = shift_mean ? 0.0f : w.mean_high;
  return w;
}

HYDRA_HOST_DEVICE float whiten(float x, Whitening w) {
  return ((x - w.mean_high) - w.mean_low) * w.scale + w.offset;
}

}  // namespace hydra
