// Moments of the counted elements of a stretch of memory, for masked_whiten.cpp and advantages.cpp.
#pragma once
#include <cstdint>

#include "cpu/multiversion.h"
#include "hydra/whiten.h"

namespace hydra::cpu {

// Two passes over the stretch, which should fit in a cache: the mean, then the deviations from it.
inline Moments masked_moments(const float* x, const std::uint8_t* mask, std::int64_t length) {
  return multiversion([=] {
    std::int64_t count = 0;
    double sum = 0.0;
#pragma omp simd reduction(+ : count, sum)
    for (std::int64_t i = 0; i < length; ++i) {
      count += mask[i] != 0;
      sum += static_cast<double>(mask[i] != 0 ? x[i] : 0.0f);
    }
    Moments moments{static_cast<double>(count), 0.0, 0.0};
    if (count == 0) return moments;
    const double mean = sum / moments.count;
    double m2 = 0.0;
#pragma omp simd reduction(+ : m2)
    for (std::int64_t i = 0; i < length; ++i) {
      const double deviation = mask[i] != 0 ? static_cast<double>(x[i]) - mean : 0.0;
      m2 += deviation * deviation;
    }
    moments.mean = mean;
    moments.m2 = m2;
    return moments;
  });
}

inline void store(Moments moments, double* out) {
  out[0] = moments.count;
  out[1] = moments.mean;
  out[2] = moments.m2;
}

}  // namespace hydra::cpu
