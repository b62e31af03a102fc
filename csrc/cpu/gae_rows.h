// Advantages and returns of a few rows, for gae.cpp and advantages.cpp.
#pragma once
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/multiversion.h"
#include "cpu/parallel.h"
#include "hydra/gae.h"
#include "hydra/where.h"

namespace hydra::cpu {

// Rows scanned side by side. One row is a chain of dependent multiply-adds, 4 cycles each; the
// chains of different rows overlap.
constexpr int kGAERows = 8;
// Tokens of a row between two passes of the vector loops: two arrays of 8 rows are 32 KB.
constexpr std::int64_t kGAEBlock = 512;

struct GAE {
  const float* rewards;      // (B, T)
  const float* values;       // (B, T)
  const std::uint8_t* mask;  // (B, T)
  const float* last_values;  // (B,) or null
  std::int64_t num_cols;     // T
  GAECoefs coefs;
  float* advantages;  // (B, T)
  float* returns;     // (B, T)
};

template <int kRows>
inline void gae_rows(const GAE in, std::int64_t first_row) {
  multiversion([=] {
    alignas(64) float scale[kRows][kGAEBlock];
    alignas(64) float shift[kRows][kGAEBlock];  // then the carry from the right of each token
    float carry[kRows];
    for (int r = 0; r < kRows; ++r) {
      const float last = in.last_values == nullptr ? 0.0f : in.last_values[first_row + r];
      carry[r] = gae_first_carry(last, in.coefs);
    }
    for (std::int64_t end = in.num_cols; end > 0; end -= kGAEBlock) {
      const std::int64_t begin = std::max<std::int64_t>(end - kGAEBlock, 0);
      const std::int64_t length = end - begin;
      for (int r = 0; r < kRows; ++r) {
        const std::int64_t at = (first_row + r) * in.num_cols + begin;
        const float* rewards = in.rewards + at;
        const float* values = in.values + at;
        const std::uint8_t* mask = in.mask + at;
        const GAECoefs coefs = in.coefs;
        float* scale_row = scale[r];
        float* shift_row = shift[r];
#pragma omp simd
        for (std::int64_t t = 0; t < length; ++t) {
          const AffineMap map = gae_map(mask[t] != 0, rewards[t], values[t], coefs);
          scale_row[t] = map.scale;
          shift_row[t] = map.shift;
        }
      }
      for (std::int64_t t = length - 1; t >= 0; --t) {
        for (int r = 0; r < kRows; ++r) {
          const float left = apply({scale[r][t], shift[r][t]}, carry[r]);
          shift[r][t] = carry[r];
          carry[r] = left;
        }
      }
      for (int r = 0; r < kRows; ++r) {
        const std::int64_t at = (first_row + r) * in.num_cols + begin;
        const float* rewards = in.rewards + at;
        const float* values = in.values + at;
        const std::uint8_t* mask = in.mask + at;
        const float* carry_row = shift[r];
        float* advantages = in.advantages + at;
        float* returns = in.returns + at;
#pragma omp simd
        for (std::int64_t t = 0; t < length; ++t) {
          const bool counts = mask[t] != 0;
          const float advantage = gae_advantage(rewards[t], values[t], carry_row[t]);
          advantages[t] = where(counts, advantage);
          returns[t] = where(counts, advantage + values[t]);
        }
      }
    }
    return 0;
  });
}

// Calls body(std::integral_constant<int, n>, first_row) on tiles of n = kGAERows rows while there
// are enough of them for every thread, and on single rows for the rest.
template <class Body>
inline void for_row_tiles(std::int64_t num_rows, std::int64_t num_cols, const Body& body) {
  const bool parallel = num_rows * num_cols >= kParallelTokens;
  const std::int64_t threads = parallel ? max_threads() : 1;
  const std::int64_t num_tiles = num_rows >= kGAERows * threads ? num_rows / kGAERows : 0;
#pragma omp parallel if (parallel)
  {
#pragma omp for schedule(static) nowait
    for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
      body(std::integral_constant<int, kGAERows>{}, tile * kGAERows);
    }
#pragma omp for schedule(static)
    for (std::int64_t row = num_tiles * kGAERows; row < num_rows; ++row) {
      body(std::integral_constant<int, 1>{}, row);
    }
  }
}

}  // namespace hydra::cpu
