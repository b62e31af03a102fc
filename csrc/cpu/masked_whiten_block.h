// Moments of the counted elements of a stretch of memory, for masked_whiten.cpp and advantages.cpp.
#pragma once
#include <cstdint>

#include "cpu/multiversion.h"
#include "hydra/where.h"
#include "hydra/whiten.h"

namespace hydra::cpu {

// Elements that are whitened from a buffer: three arrays of it stay in the first-level cache.
constexpr std::int64_t kWhitenChunk = 1024;

// Two passes over at most kWhitenChunk elements: the mean, then the deviations from it, in double.
inline Moments chunk_moments(const float* x, const std::uint8_t* mask, std::int64_t length) {
  return multiversion([=] {
    const float* elements = x;
    const std::uint8_t* keep = mask;
    const std::int64_t n = length;
    // Floats first: vectors of bytes widen to vectors of double through four steps, floats in one.
    alignas(64) float value[kWhitenChunk];
    alignas(64) float weight[kWhitenChunk];
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      value[i] = where(keep[i] != 0, elements[i]);
      weight[i] = where(keep[i] != 0, 1.0f);
    }
    float count = 0.0f;
    double sum = 0.0;
#pragma omp simd reduction(+ : count)
    for (std::int64_t i = 0; i < n; ++i) count += weight[i];
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(value[i]);
    const double mean = count > 0.0f ? sum / static_cast<double>(count) : 0.0;
    double m2 = 0.0;
#pragma omp simd reduction(+ : m2)
    for (std::int64_t i = 0; i < n; ++i) {
      const double deviation =
          (static_cast<double>(value[i]) - mean) * static_cast<double>(weight[i]);
      m2 += deviation * deviation;
    }
    return Moments{static_cast<double>(count), mean, m2};
  });
}

inline Moments masked_moments(const float* x, const std::uint8_t* mask, std::int64_t length) {
  Moments total{0.0, 0.0, 0.0};
  for (std::int64_t begin = 0; begin < length; begin += kWhitenChunk) {
    const std::int64_t rest = length - begin;
    const std::int64_t chunk = rest < kWhitenChunk ? rest : kWhitenChunk;
    total = merge(total, chunk_moments(x + begin, mask + begin, chunk));
  }
  return total;
}

inline void store(Moments moments, double* out) {
  out[0] = moments.count;
  out[1] = moments.mean;
  out[2] = moments.m2;
}

}  // namespace hydra::cpu
