// The products of a LoRA layer on panels: 64 rows by 64 columns of x, y or a gradient, in float32.
//
//   shrink: total += panel F        F (64, R): a part of s = x A^T, or of ds = dy B
//   outer:  G += s^T panel          G (R, 64): a part of dA^T's or dB's sum over rows
//   expand: y = drop(s F^T) + bias  written along whole rows: y's adapter, or dx's
//
// Each has one function a vector level, which has the level's target, so that what is inlined into
// it gets the level's registers; multiversion() cannot choose their sizes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/floats.h"
#include "cpu/lora_dropout.h"
#include "cpu/multiversion.h"
#ifdef HYDRA_X86_LEVELS
#include <immintrin.h>
#endif

namespace hydra::cpu::lora {

constexpr int kRows = 64;   // of a panel: 16 KB of the L1 cache
constexpr int kCols = 64;   // of a panel; a multiple of 8, since masks are bytes of 8 columns
constexpr int kAhead = 16;  // floats of a cache line
constexpr int kExpandChunk = 4096;  // floats of a factor: 16 KB
constexpr int kRankStep = 4;        // outer() takes so many ranks at once

// ---- vectors: W floats, loaded and stored wherever they lie

template <int W>
struct Vector {
  typedef float type __attribute__((vector_size(W * sizeof(float))));
  typedef float loose __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
};

// By reference: a vector that a function takes or gives by value has another ABI on each level.
template <int W>
HYDRA_INLINE void load(typename Vector<W>::type& v, const float* p) {
  v = *reinterpret_cast<const typename Vector<W>::loose*>(p);
}

template <int W>
HYDRA_INLINE void store(float* p, const typename Vector<W>::type& v) {
  *reinterpret_cast<typename Vector<W>::loose*>(p) = v;
}

template <int W>
HYDRA_INLINE void add(float* p, const typename Vector<W>::type& v) {
  *reinterpret_cast<typename Vector<W>::loose*>(p) += v;
}

// ---- what the functions are given

template <class T>
struct LoadTask {
  const T* const* rows;
  int num_rows;
  std::int64_t col;
  int width;                 // columns that there are, at most kCols
  const std::uint8_t* bits;  // (num_rows, groups), or null
  std::int64_t groups;
  float* panel;  // (kRows, kCols), zero where there is no column
};

struct ShrinkTask {
  const float* panel;
  int num_rows;
  const float* factor;  // (blocks of ranks, kCols, block), blocks apart by `stride`
  std::int64_t stride;
  int num_blocks;
  float* total;  // (blocks of ranks, kRows, lanes)
};

struct OuterTask {
  const float* panel;
  int num_rows;
  const float* s;  // (num_rows, lds), of which `ranks` columns, a multiple of kRankStep
  std::int64_t lds, ranks;
  float* g;  // (ranks, ldg), of which kCols columns
  std::int64_t ldg;
};

template <class T>
struct ExpandTask {
  const float* s;  // (num_rows, lds), of which `ranks` columns
  std::int64_t lds;
  int ranks, num_rows;
  const float* factor;       // (blocks of columns, ranks, block)
  const float* base;         // what s F^T is added to
  std::int64_t base_stride;  // of its rows; 0: one row for all, padded to whole blocks
  std::int64_t num_cols;
  const std::uint8_t* bits;
  std::int64_t groups;
  T* const* rows;  // of y
  float* packed;   // (kRows, ranks)
};

// ---- kernels: W floats a vector, NV vectors a block, MR rows at once

template <class T, bool kV4>
HYDRA_INLINE void load_panel(const LoadTask<T>& t) {
  for (int i = 0; i < t.num_rows; ++i) {
    const T* row = t.rows[i] + t.col;
    float* to = t.panel + i * kCols;
    if (t.width == kCols) {
      // The next panel's lines: a row gives each panel too few for the hardware to see a stream.
      for (int c = 0; c < kCols; c += kAhead * static_cast<int>(sizeof(float) / sizeof(T))) {
        __builtin_prefetch(row + kCols + c);
      }
#pragma omp simd
      for (int c = 0; c < kCols; ++c) to[c] = widen(row[c]);
    } else {
      for (int c = 0; c < t.width; ++c) to[c] = widen(row[c]);
      for (int c = t.width; c < kCols; ++c) to[c] = 0.0f;
    }
    if (t.bits != nullptr) drop<kV4>(to, t.width, t.bits + i * t.groups + t.col / 8);
  }
}

template <int W, int MR, int NV>
HYDRA_INLINE void shrink_panel(const ShrinkTask& t) {
  using V = typename Vector<W>::type;
  constexpr int kBlock = W * NV;
  static_assert(kRows % MR == 0);
  for (int b = 0; b < t.num_blocks; ++b) {
    const float* factor = t.factor + b * t.stride;
    for (int row = 0; row < t.num_rows; row += MR) {  // rows that are not there are not read later
      const float* rows = t.panel + row * kCols;
      V sum[MR][NV] = {};
      for (int k = 0; k < kCols; ++k) {
        V f[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) load<W>(f[v], factor + k * kBlock + v * W);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) sum[i][v] += rows[i * kCols + k] * f[v];
        }
      }
      float* total = t.total + (b * kRows + row) * kBlock;
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) add<W>(total + i * kBlock + v * W, sum[i][v]);
      }
    }
  }
}

#ifdef HYDRA_X86_LEVELS
// At most 8 ranks: a vector takes two columns k, k + 1 of x and of F, lane 2 j + i rank j of column
// k + i, so that it is full. total (kRows, 16) has the sums over even and odd columns.
HYDRA_TARGET_V4 inline void shrink_pairs_v4(const ShrinkTask& t) {
  constexpr int MR = 16;
  for (int row = 0; row < t.num_rows; row += MR) {
    const float* rows = t.panel + row * kCols;
    __m512 sum[MR];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) sum[i] = _mm512_setzero_ps();
    for (int k = 0; k < kCols; k += 2) {
      const __m512 f = _mm512_loadu_ps(t.factor + k * 8);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        double pair;
        std::memcpy(&pair, rows + i * kCols + k, sizeof pair);
        sum[i] = _mm512_fmadd_ps(_mm512_castpd_ps(_mm512_set1_pd(pair)), f, sum[i]);
      }
    }
    float* total = t.total + row * 16;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      _mm512_storeu_ps(total + i * 16, _mm512_add_ps(_mm512_loadu_ps(total + i * 16), sum[i]));
    }
  }
}
#endif

template <int W, int NV>
HYDRA_INLINE void outer_panel(const OuterTask& t) {
  using V = typename Vector<W>::type;
  static_assert(kCols % (W * NV) == 0);
  for (int col = 0; col < kCols; col += W * NV) {
    for (std::int64_t r = 0; r < t.ranks; r += kRankStep) {
      V sum[kRankStep][NV] = {};
      const float* s = t.s + r;
      const float* row = t.panel + col;
      for (int i = 0; i < t.num_rows; ++i, s += t.lds, row += kCols) {
        V f[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) load<W>(f[v], row + v * W);
#pragma GCC unroll 4
        for (int j = 0; j < kRankStep; ++j) {
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) sum[j][v] += s[j] * f[v];
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < kRankStep; ++j) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) add<W>(t.g + (r + j) * t.ldg + col + v * W, sum[j][v]);
      }
    }
  }
}

// MR rows of a block of columns; s (ranks, MR), factor (ranks, block)
template <int W, int MR, int NV>
HYDRA_INLINE void expand_tile(
    const float* s, const float* factor, int ranks, const float* base, std::int64_t ldb, float* y,
    std::int64_t ldy) {
  using V = typename Vector<W>::type;
  V sum[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) load<W>(sum[i][v], base + i * ldb + v * W);
  }
  for (int r = 0; r < ranks; ++r) {
    V f[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) load<W>(f[v], factor + r * W * NV + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[i][v] += s[r * MR + i] * f[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store<W>(y + i * ldy + v * W, sum[i][v]);
  }
}

// A chunk of columns at a time, whose factor stays in the L1 cache for all rows, and along the rows
// within it: down a block of columns, rows a power of two apart share a few sets of the cache and
// push each other out.
template <class T, int W, int MR, int NV, bool kV4>
HYDRA_INLINE void expand_rows(const ExpandTask<T>& t) {
  constexpr int kBlock = W * NV;
  alignas(64) float tile[MR * kBlock];
  for (int row = 0; row < t.num_rows; row += MR) {
    float* packed = t.packed + row * t.ranks;
    for (int i = 0; i < MR; ++i) {
      const bool inside = row + i < t.num_rows;
      const float* s = t.s + (inside ? row + i : row) * t.lds;
      for (int r = 0; r < t.ranks; ++r) packed[r * MR + i] = inside ? s[r] : 0.0f;
    }
  }
  const std::int64_t most = kExpandChunk / std::max(t.ranks, 1) / kBlock * kBlock;
  const std::int64_t chunk = std::max<std::int64_t>(most, kBlock);
  for (std::int64_t first = 0; first < t.num_cols; first += chunk) {
    const std::int64_t end = std::min(first + chunk, t.num_cols);
    for (int row = 0; row < t.num_rows; row += MR) {
      const float* packed = t.packed + row * t.ranks;
      const int here = std::min(MR, t.num_rows - row);
      bool alike = here == MR;  // rows are as far from each other as the first two
      const std::ptrdiff_t ldy = here > 1 ? t.rows[row + 1] - t.rows[row] : 0;
      for (int i = 1; i < here; ++i) alike &= t.rows[row + i] - t.rows[row + i - 1] == ldy;
      for (std::int64_t col = first; col < end; col += kBlock) {
        const int width = static_cast<int>(std::min<std::int64_t>(kBlock, t.num_cols - col));
        const float* factor = t.factor + col * t.ranks;
        const float* base = t.base + row * t.base_stride + col;
        if constexpr (sizeof(T) == sizeof(float)) {
          if (alike && width == kBlock && t.bits == nullptr) {
            float* to = t.rows[row] + col;
            // The next block's lines, which a store would wait for where the cache has lost them.
            for (int i = 0; i < MR; ++i) {
              for (int c = 0; c < kBlock; c += kAhead) {
                __builtin_prefetch(to + i * ldy + kBlock + c, 1);
              }
            }
            expand_tile<W, MR, NV>(packed, factor, t.ranks, base, t.base_stride, to, ldy);
            continue;
          }
        }
        if (t.base_stride == 0) {
          expand_tile<W, MR, NV>(packed, factor, t.ranks, base, 0, tile, kBlock);
        } else {  // rows and columns of a block that are not there are not read
          for (int i = 0; i < MR; ++i) {
            for (int c = 0; c < kBlock; ++c) {
              const bool inside = i < here && c < width;
              tile[i * kBlock + c] = inside ? base[i * t.base_stride + c] : 0.0f;
            }
          }
          expand_tile<W, MR, NV>(packed, factor, t.ranks, tile, kBlock, tile, kBlock);
        }
        for (int i = 0; i < here; ++i) {
          float* from = tile + i * kBlock;
          if (t.bits != nullptr) drop<kV4>(from, width, t.bits + (row + i) * t.groups + col / 8);
          T* to = t.rows[row + i] + col;
          if (width == kBlock) {
            for (int c = 0; c < kBlock; ++c) narrow(from[c], to + c);
          } else {
            for (int c = 0; c < width; ++c) narrow(from[c], to + c);
          }
        }
      }
    }
  }
}

// ---- the functions of a level

using Shrink = void (*)(const ShrinkTask&);

struct ShrinkShape {
  int block;  // ranks of a block of the factor
  int lanes;  // sums of a block; twice the ranks where they are taken in pairs of columns
  Shrink run;
};

#ifdef HYDRA_X86_LEVELS
#define HYDRA_LEVELS(X)         \
  X(HYDRA_TARGET_V4, v4, true)  \
  X(HYDRA_TARGET_V3, v3, false) \
  X(, baseline, false)
#else
#define HYDRA_LEVELS(X) X(, baseline, false)
#endif

#define HYDRA_LEVEL(TARGET, NAME, V4)                                           \
  template <int W, int MR, int NV>                                              \
  TARGET __attribute__((noinline)) void shrink_##NAME(const ShrinkTask& t) {    \
    shrink_panel<W, MR, NV>(t);                                                 \
  }                                                                             \
  template <int W, int NV>                                                      \
  TARGET __attribute__((noinline)) void outer_##NAME(const OuterTask& t) {      \
    outer_panel<W, NV>(t);                                                      \
  }                                                                             \
  template <class T>                                                            \
  TARGET __attribute__((noinline)) void load_##NAME(const LoadTask<T>& t) {     \
    load_panel<T, V4>(t);                                                       \
  }                                                                             \
  template <class T, int W, int MR, int NV>                                     \
  TARGET __attribute__((noinline)) void expand_##NAME(const ExpandTask<T>& t) { \
    expand_rows<T, W, MR, NV, V4>(t);                                           \
  }
HYDRA_LEVELS(HYDRA_LEVEL)
#undef HYDRA_LEVEL
#undef HYDRA_LEVELS

// 32 vector registers on v4, 16 below: MR * NV sums, NV columns and what the compiler needs.
inline ShrinkShape shrink_shape(std::int64_t ranks) {
#ifdef HYDRA_X86_LEVELS
  if (isa_level() == Isa::kV4) {
    if (ranks <= 8) return {8, 16, &shrink_pairs_v4};
    if (ranks <= 16) return {16, 16, &shrink_v4<16, 16, 1>};
    if (ranks <= 32) return {32, 32, &shrink_v4<16, 8, 2>};
    return {64, 64, &shrink_v4<16, 4, 4>};
  }
  if (isa_level() == Isa::kV3) {
    if (ranks <= 8) return {8, 8, &shrink_v3<8, 8, 1>};
    return {16, 16, &shrink_v3<8, 4, 2>};
  }
#endif
  (void)ranks;
  return {8, 8, &shrink_baseline<4, 4, 2>};
}

template <class T>
struct Level {
  void (*load)(const LoadTask<T>&);
  void (*outer)(const OuterTask&);
  void (*expand)(const ExpandTask<T>&);
  int block;  // columns of a block of expand's factor; divides kCols
};

template <class T>
Level<T> level() {
#ifdef HYDRA_X86_LEVELS
  if (isa_level() == Isa::kV4) {
    return {&load_v4<T>, &outer_v4<16, 4>, &expand_v4<T, 16, 4, 4>, 64};
  }
  if (isa_level() == Isa::kV3) {
    return {&load_v3<T>, &outer_v3<8, 2>, &expand_v3<T, 8, 4, 2>, 16};
  }
#endif
  return {&load_baseline<T>, &outer_baseline<4, 2>, &expand_baseline<T, 4, 4, 2>, 8};
}

}  // namespace hydra::cpu::lora
