// Dropout masks of a few rows, as bits: drawn once, read by every product of those rows.
//
// Byte g of a row holds its columns 8 g .. 8 g + 7, the first in the lowest bit; 1 is kept.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/multiversion.h"
#ifdef HYDRA_X86_LEVELS
#include <immintrin.h>
#endif
#include "hydra/philox.h"

namespace hydra::cpu::lora {

struct Dropout {
  std::uint64_t threshold, seed, offset;  // threshold 0: nothing is dropped
};

inline Dropout make_dropout(double p, const std::int64_t* seed_and_offset) {
  const double words = p * 65536.0;
  auto threshold = static_cast<std::uint64_t>(words);
  const double rest = words - static_cast<double>(threshold);
  if (rest > 0.5 || (rest == 0.5 && threshold % 2 == 1)) ++threshold;  // to even, as Python rounds
  if (threshold == 0) return {0, 0, 0};
  return {
      threshold, static_cast<std::uint64_t>(seed_and_offset[0]),
      static_cast<std::uint64_t>(seed_and_offset[1])};
}

constexpr int kLanes = 64;  // groups of eight columns drawn at once

struct Lanes {
  alignas(64) std::uint32_t low[kLanes], high[kLanes], drawn[4 * kLanes];
};

inline std::int64_t mask_bytes(std::int64_t num_rows, std::int64_t groups) {
  return (num_rows * groups + kLanes - 1) / kLanes * kLanes;
}

HYDRA_INLINE void draw_lanes(Lanes& lanes, const Dropout& d, std::uint8_t* bits) {
  const auto c2 = static_cast<std::uint32_t>(d.offset);
  const auto c3 = static_cast<std::uint32_t>(d.offset >> 32);
  const auto k0 = static_cast<std::uint32_t>(d.seed);
  const auto k1 = static_cast<std::uint32_t>(d.seed >> 32);
  const auto last_dropped = static_cast<std::uint16_t>(d.threshold - 1);
  auto* drawn = lanes.drawn;
#pragma omp simd
  for (int g = 0; g < kLanes; ++g) {
    const PhiloxWords words = philox_words(lanes.low[g], lanes.high[g], c2, c3, k0, k1);
    drawn[g] = words.at[0];
    drawn[kLanes + g] = words.at[1];
    drawn[2 * kLanes + g] = words.at[2];
    drawn[3 * kLanes + g] = words.at[3];
  }
  for (int g = 0; g < kLanes; ++g) {
    unsigned byte = 0;
    for (int w = 0; w < 4; ++w) {
      const std::uint32_t word = drawn[w * kLanes + g];
      byte |= static_cast<unsigned>(static_cast<std::uint16_t>(word) > last_dropped) << (2 * w);
      byte |= static_cast<unsigned>(static_cast<std::uint16_t>(word >> 16) > last_dropped)
              << (2 * w + 1);
    }
    bits[g] = static_cast<std::uint8_t>(byte);
  }
}

#ifdef HYDRA_X86_LEVELS
HYDRA_TARGET_V3 inline void draw_lanes_v3(Lanes& lanes, const Dropout& d, std::uint8_t* bits) {
  draw_lanes(lanes, d, bits);
}

// GCC multiplies 64-bit lanes here (vpmullq, three times the work); this is vpmuludq, which is what
// the 32-bit words need. Four vectors at once, since one round waits for the one before.
HYDRA_TARGET_V4 inline void draw_lanes_v4(Lanes& lanes, const Dropout& d, std::uint8_t* bits) {
  constexpr int kVectors = kLanes / 16;
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  __m512i c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    c0[v] = _mm512_load_si512(lanes.low + 16 * v);
    c1[v] = _mm512_load_si512(lanes.high + 16 * v);
    c2[v] = _mm512_set1_epi32(static_cast<int>(d.offset));
    c3[v] = _mm512_set1_epi32(static_cast<int>(d.offset >> 32));
  }
  auto k0 = static_cast<std::uint32_t>(d.seed), k1 = static_cast<std::uint32_t>(d.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m512i key0 = _mm512_set1_epi32(static_cast<int>(k0));
    const __m512i key1 = _mm512_set1_epi32(static_cast<int>(k1));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const __m512i even0 = _mm512_mul_epu32(c0[v], m0);
      const __m512i odd0 = _mm512_mul_epu32(_mm512_srli_epi64(c0[v], 32), m0);
      const __m512i even1 = _mm512_mul_epu32(c2[v], m1);
      const __m512i odd1 = _mm512_mul_epu32(_mm512_srli_epi64(c2[v], 32), m1);
      const __m512i high0 = _mm512_mask_shuffle_epi32(odd0, 0x5555, even0, _MM_PERM_DDBB);
      const __m512i high1 = _mm512_mask_shuffle_epi32(odd1, 0x5555, even1, _MM_PERM_DDBB);
      c0[v] = _mm512_ternarylogic_epi32(high1, c1[v], key0, 0x96);  // exclusive or of the three
      c2[v] = _mm512_ternarylogic_epi32(high0, c3[v], key1, 0x96);
      c1[v] = _mm512_mask_shuffle_epi32(even1, 0xAAAA, odd1, _MM_PERM_CCAA);
      c3[v] = _mm512_mask_shuffle_epi32(even0, 0xAAAA, odd0, _MM_PERM_CCAA);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const __m512i last_dropped = _mm512_set1_epi16(static_cast<short>(d.threshold - 1));
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    // Four vectors of one word of each lane become the four words of lane after lane, which are the
    // draws of its columns in their order.
    const __m512i a = _mm512_unpacklo_epi32(c0[v], c1[v]), b = _mm512_unpackhi_epi32(c0[v], c1[v]);
    const __m512i e = _mm512_unpacklo_epi32(c2[v], c3[v]), f = _mm512_unpackhi_epi32(c2[v], c3[v]);
    const __m512i lane0 = _mm512_unpacklo_epi64(a, e), lane1 = _mm512_unpackhi_epi64(a, e);
    const __m512i lane2 = _mm512_unpacklo_epi64(b, f), lane3 = _mm512_unpackhi_epi64(b, f);
    const __m512i p = _mm512_shuffle_i32x4(lane0, lane1, 0x44);  // lanes 0 4 1 5
    const __m512i q = _mm512_shuffle_i32x4(lane2, lane3, 0x44);  // lanes 2 6 3 7
    const __m512i r = _mm512_shuffle_i32x4(lane0, lane1, 0xEE);  // lanes 8 12 9 13
    const __m512i t = _mm512_shuffle_i32x4(lane2, lane3, 0xEE);  // lanes 10 14 11 15
    auto* to = reinterpret_cast<std::uint32_t*>(bits + 16 * v);
    to[0] = _mm512_cmpgt_epu16_mask(_mm512_shuffle_i32x4(p, q, 0x88), last_dropped);
    to[1] = _mm512_cmpgt_epu16_mask(_mm512_shuffle_i32x4(p, q, 0xDD), last_dropped);
    to[2] = _mm512_cmpgt_epu16_mask(_mm512_shuffle_i32x4(r, t, 0x88), last_dropped);
    to[3] = _mm512_cmpgt_epu16_mask(_mm512_shuffle_i32x4(r, t, 0xDD), last_dropped);
  }
}
#endif

#ifdef HYDRA_X86_LEVELS
HYDRA_TARGET_V4 inline void drop_v4(float* row, int width, const std::uint8_t* bits) {
  for (int c = 0; c < width; c += 16) {
    const int left = width - c;
    const unsigned low = bits[c / 8], high = left > 8 ? bits[c / 8 + 1] : 0;
    const unsigned inside = left >= 16 ? 0xFFFFu : (1u << left) - 1;
    const auto kept = static_cast<__mmask16>((low | high << 8) & inside);
    const __m512 v = _mm512_maskz_loadu_ps(kept, row + c);
    _mm512_mask_storeu_ps(row + c, static_cast<__mmask16>(inside), v);
  }
}
#endif

// Zeroes the columns of a row whose bits are 0.
template <bool kV4>
HYDRA_INLINE void drop(float* row, int width, const std::uint8_t* bits) {
#ifdef HYDRA_X86_LEVELS
  if constexpr (kV4) drop_v4(row, width, bits);
#endif
  if constexpr (!kV4) {
    for (int c = 0; c < width; ++c) row[c] = (bits[c / 8] >> (c % 8) & 1) != 0 ? row[c] : 0.0f;
  }
}

// bits (num_rows, groups), with room for mask_bytes(); a row of the matrix has that many groups.
inline void draw_mask(
    const std::int64_t* rows, int num_rows, std::int64_t groups, const Dropout& d,
    std::uint8_t* bits) {
  const std::int64_t total = num_rows * groups;
  Lanes lanes = {};
  int row = 0;
  std::int64_t group = 0;
  for (std::int64_t start = 0; start < total; start += kLanes) {
    const int here = static_cast<int>(std::min<std::int64_t>(kLanes, total - start));
    for (int lane = 0; lane < here;) {
      const int run = static_cast<int>(std::min<std::int64_t>(here - lane, groups - group));
      const auto base = static_cast<std::uint64_t>(rows[row] * groups + group);
      const auto low = static_cast<std::uint32_t>(base);
      const auto high = static_cast<std::uint32_t>(base >> 32);
      for (int g = 0; g < run; ++g) {
        const std::uint32_t sum = low + static_cast<std::uint32_t>(g);
        lanes.low[lane + g] = sum;
        lanes.high[lane + g] = high + (sum < low);
      }
      lane += run;
      group += run;
      if (group == groups) {
        group = 0;
        ++row;
      }
    }
#ifdef HYDRA_X86_LEVELS
    if (isa_level() == Isa::kV4) {
      draw_lanes_v4(lanes, d, bits + start);
      continue;
    }
    if (isa_level() == Isa::kV3) {
      draw_lanes_v3(lanes, d, bits + start);
      continue;
    }
#endif
    draw_lanes(lanes, d, bits + start);
  }
}

}  // namespace hydra::cpu::lora
