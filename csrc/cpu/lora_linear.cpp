// The small products of a LoRA layer, each in one pass over its wide operand:
//
//   shrink: s = gate * (drop(x) F)         x (M, C), F (C, R), s (M, R)
//   expand: y = drop(s F^T) + bias         F (C, R), y (M, C)
//   outer:  G = s^T drop(x)                G (R, C)
//
// C columns are a layer's inputs (F = A^T) or its outputs (F = B). The wide products are torch's.
// drop() zeroes what Philox says, drawn again in every pass; its factor 1 / (1 - p) is in the gate.
// Everything is multiplied and summed in float32, whatever comes in, in an order that the number of
// threads does not change: sums of at most kDepth products, added up in order.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/entries.h"
#include "cpu/multiversion.h"
#ifdef HYDRA_X86_LEVELS
#include <immintrin.h>
#endif
#include "hydra/philox.h"

namespace hydra::cpu {
namespace {

constexpr int kDepth = 256;    // columns of x that are multiplied from one buffer
constexpr int kRowBlock = 96;  // rows of y for which a panel of F stays in the L1 cache
constexpr int kSumRows = 128;  // rows of x that outer() multiplies from one buffer
constexpr std::int64_t kParallel = 1 << 20;  // multiply-adds below which threads cost more

#define HYDRA_INLINE inline __attribute__((always_inline))

struct Factor {
  const void* at;
  std::int64_t rank, stride_rank, stride_col, owner;
  float scale;
};

struct Dropout {
  std::uint64_t threshold, seed, offset;  // threshold 0: nothing is dropped
};

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

// ---- rows in float32 and back

HYDRA_INLINE void widen(const float* from, std::int64_t n, float* to) {
  std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(float));
}

HYDRA_INLINE void widen(const std::uint16_t* from, std::int64_t n, float* to) {
  auto* bits = reinterpret_cast<std::uint32_t*>(to);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) bits[i] = static_cast<std::uint32_t>(from[i]) << 16;
}

HYDRA_INLINE void narrow(const float* from, std::int64_t n, float* to) {
  std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(float));
}

HYDRA_INLINE void narrow(const float* from, std::int64_t n, std::uint16_t* to) {
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    to[i] = static_cast<std::uint16_t>(nan ? 0x7FC0u : rounded);
  }
}

// ---- dropout

constexpr int kLanes = 64;  // groups of eight columns drawn at once

// Where a tile lies in the matrix: its columns are `col` on, a multiple of 8, of rows `row` on, of
// which the last is repeated past the end.
struct Place {
  std::int64_t row, last_row, col, num_cols;
};

struct Lanes {
  std::uint32_t low[kLanes], high[kLanes], drawn[4 * kLanes];
};

HYDRA_INLINE void count_groups(const Place& at, int first, int rows, int groups, Lanes& lanes) {
  for (int i = 0; i < rows; ++i) {
    const std::int64_t row = std::min(at.row + first + i, at.last_row);
    const auto base = static_cast<std::uint64_t>(row * ((at.num_cols + 7) / 8) + at.col / 8);
    const auto low = static_cast<std::uint32_t>(base);
    const auto high = static_cast<std::uint32_t>(base >> 32);
    for (int g = 0; g < groups; ++g) {
      const std::uint32_t sum = low + static_cast<std::uint32_t>(g);
      lanes.low[i * groups + g] = sum;
      lanes.high[i * groups + g] = high + (sum < low);
    }
  }
}

HYDRA_INLINE void draw(Lanes& lanes, const Dropout& d) {
  const auto c2 = static_cast<std::uint32_t>(d.offset);
  const auto c3 = static_cast<std::uint32_t>(d.offset >> 32);
  const auto k0 = static_cast<std::uint32_t>(d.seed);
  const auto k1 = static_cast<std::uint32_t>(d.seed >> 32);
#pragma omp simd
  for (int g = 0; g < kLanes; ++g) {
    const PhiloxWords words = philox_words(lanes.low[g], lanes.high[g], c2, c3, k0, k1);
    lanes.drawn[4 * g] = words.at[0];
    lanes.drawn[4 * g + 1] = words.at[1];
    lanes.drawn[4 * g + 2] = words.at[2];
    lanes.drawn[4 * g + 3] = words.at[3];
  }
}

HYDRA_INLINE void select(float* row, int width, const std::uint32_t* drawn, const Dropout& d) {
  const auto last_dropped = static_cast<std::uint16_t>(d.threshold - 1);
  for (int c = 0; c < width; ++c) {
    const auto half = static_cast<std::uint16_t>(drawn[c / 2] >> (c % 2 * 16));
    row[c] = half > last_dropped ? row[c] : 0.0f;
  }
}

#ifdef HYDRA_X86_LEVELS
// GCC multiplies 64-bit lanes here (vpmullq, three times the work); this is vpmuludq, which is what
// the 32-bit words need. Four vectors at once, since one round waits for the one before.
HYDRA_TARGET_V4 inline void draw_v4(Lanes& lanes, const Dropout& d) {
  constexpr int kVectors = kLanes / 16;
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  __m512i c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    c0[v] = _mm512_loadu_si512(lanes.low + 16 * v);
    c1[v] = _mm512_loadu_si512(lanes.high + 16 * v);
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
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    // Four vectors of one word of each lane become the four words of lane after lane.
    const __m512i a = _mm512_unpacklo_epi32(c0[v], c1[v]), b = _mm512_unpackhi_epi32(c0[v], c1[v]);
    const __m512i e = _mm512_unpacklo_epi32(c2[v], c3[v]), f = _mm512_unpackhi_epi32(c2[v], c3[v]);
    const __m512i lane0 = _mm512_unpacklo_epi64(a, e), lane1 = _mm512_unpackhi_epi64(a, e);
    const __m512i lane2 = _mm512_unpacklo_epi64(b, f), lane3 = _mm512_unpackhi_epi64(b, f);
    const __m512i p = _mm512_shuffle_i32x4(lane0, lane1, 0x44);  // lanes 0 4 1 5
    const __m512i q = _mm512_shuffle_i32x4(lane2, lane3, 0x44);  // lanes 2 6 3 7
    const __m512i r = _mm512_shuffle_i32x4(lane0, lane1, 0xEE);  // lanes 8 12 9 13
    const __m512i t = _mm512_shuffle_i32x4(lane2, lane3, 0xEE);  // lanes 10 14 11 15
    std::uint32_t* to = lanes.drawn + 64 * v;
    _mm512_storeu_si512(to, _mm512_shuffle_i32x4(p, q, 0x88));
    _mm512_storeu_si512(to + 16, _mm512_shuffle_i32x4(p, q, 0xDD));
    _mm512_storeu_si512(to + 32, _mm512_shuffle_i32x4(r, t, 0x88));
    _mm512_storeu_si512(to + 48, _mm512_shuffle_i32x4(r, t, 0xDD));
  }
}

HYDRA_TARGET_V4 inline void select_v4(
    float* row, int width, const std::uint32_t* drawn, const Dropout& d) {
  const __m256i last_dropped = _mm256_set1_epi16(static_cast<short>(d.threshold - 1));
  for (int c = 0; c < width; c += 16) {
    const auto inside = static_cast<__mmask16>(width - c >= 16 ? 0xFFFF : (1 << (width - c)) - 1);
    const auto* halves = reinterpret_cast<const __m256i*>(drawn + c / 2);
    const __mmask16 kept = _mm256_cmpgt_epu16_mask(_mm256_loadu_si256(halves), last_dropped);
    _mm512_mask_storeu_ps(row + c, inside, _mm512_maskz_loadu_ps(inside & kept, row + c));
  }
}
#endif

// Zeroes what is dropped of tile (rows, ld).
template <bool kV4>
HYDRA_INLINE void drop(
    float* tile, std::int64_t ld, int rows, int width, const Place& at, const Dropout& d) {
  const int groups = (width + 7) / 8;  // of a row; at most kLanes
  const int rows_at_once = kLanes / groups;
  Lanes lanes = {};
  for (int start = 0; start < rows; start += rows_at_once) {
    const int here = std::min(rows_at_once, rows - start);
    count_groups(at, start, here, groups, lanes);
#ifdef HYDRA_X86_LEVELS
    if constexpr (kV4) draw_v4(lanes, d);
#endif
    if constexpr (!kV4) draw(lanes, d);
    for (int i = 0; i < here; ++i) {
      float* row = tile + (start + i) * ld;
      const std::uint32_t* drawn = lanes.drawn + i * groups * 4;
#ifdef HYDRA_X86_LEVELS
      if constexpr (kV4) select_v4(row, width, drawn, d);
#endif
      if constexpr (!kV4) select(row, width, drawn, d);
    }
  }
}

// ---- kernels: W floats a vector, NV vectors a block, MR rows at once

template <class T, int W, int MR, int NV, bool kV4>
struct Kernels {
  using V = typename Vector<W>::type;
  static constexpr int kBlock = W * NV;

  // total[i] += rows[i] panel, for MR rows; panel (depth, kBlock)
  static HYDRA_INLINE void multiply(
      const float* rows, const float* panel, int depth, float* total) {
    V sum[MR][NV] = {};
    for (int k = 0; k < depth; ++k) {
      V f[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) load<W>(f[v], panel + k * kBlock + v * W);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[i][v] += rows[i * kDepth + k] * f[v];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        add<W>(total + i * kBlock + v * W, sum[i][v]);
      }
    }
  }

  // Rows m .. m + MR of s; panels (blocks, C, kBlock), gate (MR, blocks * kBlock).
  static HYDRA_INLINE void shrink(
      const T* x, std::int64_t ldx, std::int64_t num_cols, std::int64_t m, int rows,
      const float* panels, int num_blocks, const Dropout& d, float* buffer, float* total) {
    std::memset(total, 0, sizeof(float) * static_cast<std::size_t>(MR * num_blocks * kBlock));
    for (std::int64_t col = 0; col < num_cols; col += kDepth) {
      const int depth = static_cast<int>(std::min<std::int64_t>(kDepth, num_cols - col));
      for (int i = 0; i < MR; ++i) {
        const int from = std::min(i, rows - 1);  // a row that is not there repeats the last
        float* to = buffer + i * kDepth;
        widen(x + (m + from) * ldx + col, depth, to);
      }
      if (d.threshold != 0) {
        drop<kV4>(buffer, kDepth, MR, depth, {m, m + rows - 1, col, num_cols}, d);
      }
      for (int block = 0; block < num_blocks; ++block) {
        const float* panel = panels + (block * num_cols + col) * kBlock;
        multiply(buffer, panel, depth, total + block * MR * kBlock);
      }
    }
  }

  // MR rows of kBlock columns of y; s (rank, MR), panel (rank, kBlock)
  static HYDRA_INLINE void widen_rank(
      const float* s, const float* panel, int rank, const float* bias, float* y, std::int64_t ldy) {
    V sum[MR][NV];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) load<W>(sum[i][v], bias + v * W);
    }
    for (int r = 0; r < rank; ++r) {
      V f[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) load<W>(f[v], panel + r * kBlock + v * W);
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

  // Rows m .. m + rows of y; panels (blocks, rank, kBlock), bias padded to whole blocks.
  static HYDRA_INLINE void expand(
      const float* s, std::int64_t lds, int rank, std::int64_t m, int rows, const float* panels,
      const float* bias, std::int64_t num_cols, const Dropout& d, T* y, float* packed,
      float* tile) {
    const int tiles = (rows + MR - 1) / MR;
    for (int t = 0; t < tiles; ++t) {
      for (int r = 0; r < rank; ++r) {
        for (int i = 0; i < MR; ++i) {
          const int row = t * MR + i;
          packed[(t * rank + r) * MR + i] = row < rows ? s[(m + row) * lds + r] : 0.0f;
        }
      }
    }
    // Along the rows of y: down a block of columns, rows a power of two apart share a few sets of
    // the cache and push each other out.
    for (int t = 0; t < tiles; ++t) {
      const float* s_tile = packed + t * rank * MR;
      const int here = std::min(MR, rows - t * MR);
      for (std::int64_t col = 0; col < num_cols; col += kBlock) {
        const int width = static_cast<int>(std::min<std::int64_t>(kBlock, num_cols - col));
        const float* panel = panels + col * rank;
        T* to = y + (m + t * MR) * num_cols + col;
        if constexpr (sizeof(T) == sizeof(float)) {
          if (here == MR && width == kBlock && d.threshold == 0) {
            widen_rank(s_tile, panel, rank, bias + col, to, num_cols);
            continue;
          }
        }
        widen_rank(s_tile, panel, rank, bias + col, tile, kBlock);
        if (d.threshold != 0) {
          drop<kV4>(tile, kBlock, here, width, {m + t * MR, m + rows - 1, col, num_cols}, d);
        }
        for (int i = 0; i < here; ++i) narrow(tile + i * kBlock, width, to + i * num_cols);
      }
    }
  }

  // Columns col .. col + width of G, into g (ranks, kBlock); ranks a multiple of 4.
  static HYDRA_INLINE void outer(
      const float* s, std::int64_t ranks, const T* x, std::int64_t ldx, std::int64_t num_rows,
      std::int64_t col, int width, std::int64_t num_cols, const Dropout& d, float* buffer,
      float* g) {
    std::memset(g, 0, sizeof(float) * static_cast<std::size_t>(ranks * kBlock));
    std::memset(buffer, 0, sizeof(float) * kSumRows * kBlock);
    for (std::int64_t m = 0; m < num_rows; m += kSumRows) {
      const int rows = static_cast<int>(std::min<std::int64_t>(kSumRows, num_rows - m));
      for (int i = 0; i < rows; ++i) {
        widen(x + (m + i) * ldx + col, width, buffer + i * kBlock);
      }
      if (d.threshold != 0) {
        drop<kV4>(buffer, kBlock, rows, width, {m, num_rows - 1, col, num_cols}, d);
      }
      for (std::int64_t r = 0; r < ranks; r += 4) {
        V sum[4][NV] = {};
        const float* s_row = s + m * ranks + r;
        for (int i = 0; i < rows; ++i, s_row += ranks) {
          V f[NV];
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) load<W>(f[v], buffer + i * kBlock + v * W);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[j][v] += s_row[j] * f[v];
          }
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) {
            add<W>(g + (r + j) * kBlock + v * W, sum[j][v]);
          }
        }
      }
    }
  }
};

// ---- the same on each vector level. A level's function has its target, so that the kernels,
// always inlined, get its registers; multiversion() cannot choose their sizes.

template <class T>
struct ShrinkTask {
  const T* x;
  std::int64_t ldx, num_cols, m;
  int rows;
  const float* panels;
  int num_blocks;
  Dropout d;
  float *buffer, *total;
};

template <class T>
struct ExpandTask {
  const float* s;
  std::int64_t lds;
  int rank;
  std::int64_t m;
  int rows;
  const float *panels, *bias;
  std::int64_t num_cols;
  Dropout d;
  T* y;
  float *packed, *tile;
};

template <class T>
struct OuterTask {
  const float* s;
  std::int64_t ranks;
  const T* x;
  std::int64_t ldx, num_rows, col;
  int width;
  std::int64_t num_cols;
  Dropout d;
  float *buffer, *g;
};

template <class K, class T>
HYDRA_INLINE void run(const ShrinkTask<T>& t) {
  K::shrink(t.x, t.ldx, t.num_cols, t.m, t.rows, t.panels, t.num_blocks, t.d, t.buffer, t.total);
}

template <class K, class T>
HYDRA_INLINE void run(const ExpandTask<T>& t) {
  K::expand(
      t.s, t.lds, t.rank, t.m, t.rows, t.panels, t.bias, t.num_cols, t.d, t.y, t.packed, t.tile);
}

template <class K, class T>
HYDRA_INLINE void run(const OuterTask<T>& t) {
  K::outer(t.s, t.ranks, t.x, t.ldx, t.num_rows, t.col, t.width, t.num_cols, t.d, t.buffer, t.g);
}

#ifdef HYDRA_X86_LEVELS
template <class K, class Task>
HYDRA_TARGET_V4 __attribute__((noinline)) void run_level_v4(const Task& task) {
  run<K>(task);
}

template <class K, class Task>
HYDRA_TARGET_V3 __attribute__((noinline)) void run_level_v3(const Task& task) {
  run<K>(task);
}
#endif

template <class K, class Task>
__attribute__((noinline)) void run_level_baseline(const Task& task) {
  run<K>(task);
}

// Rows at once and columns of a block, and the function that runs a task with them.
template <class Task>
struct Shape {
  int rows, block;
  void (*run)(const Task&);
};

template <template <class> class Task, class T, int W, int MR, int NV>
Shape<Task<T>> shape_at(Isa isa) {
#ifdef HYDRA_X86_LEVELS
  if (isa == Isa::kV4) {
    return {MR, W * NV, &run_level_v4<Kernels<T, W, MR, NV, true>, Task<T>>};
  }
  if (isa == Isa::kV3) {
    return {MR, W * NV, &run_level_v3<Kernels<T, W, MR, NV, false>, Task<T>>};
  }
#endif
  return {MR, W * NV, &run_level_baseline<Kernels<T, W, MR, NV, false>, Task<T>>};
}

// 32 vector registers on v4, 16 below: MR * NV sums, NV columns and what the compiler needs.
template <class T>
Shape<ShrinkTask<T>> shrink_shape(std::int64_t ranks) {
  const Isa isa = isa_level();
  if (isa == Isa::kV4) {
    if (ranks <= 8) return shape_at<ShrinkTask, T, 8, 16, 1>(isa);
    if (ranks <= 16) return shape_at<ShrinkTask, T, 16, 16, 1>(isa);
    if (ranks <= 32) return shape_at<ShrinkTask, T, 16, 12, 2>(isa);
    return shape_at<ShrinkTask, T, 16, 6, 4>(isa);
  }
  if (isa == Isa::kV3) {
    if (ranks <= 8) return shape_at<ShrinkTask, T, 8, 8, 1>(isa);
    return shape_at<ShrinkTask, T, 8, 6, 2>(isa);
  }
  return shape_at<ShrinkTask, T, 4, 4, 2>(isa);
}

// The columns of a product over many columns are taken in wide blocks.
template <template <class> class Task, class T>
Shape<Task<T>> wide_shape() {
  const Isa isa = isa_level();
  if (isa == Isa::kV4) return shape_at<Task, T, 16, 6, 4>(isa);
  if (isa == Isa::kV3) return shape_at<Task, T, 8, 6, 2>(isa);
  return shape_at<Task, T, 4, 4, 2>(isa);
}

// ---- operands

struct Free {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer make_buffer(std::int64_t n) {
  const std::size_t bytes = static_cast<std::size_t>(std::max<std::int64_t>(n, 1)) * sizeof(float);
  return Buffer(static_cast<float*>(::operator new[](bytes, std::align_val_t(64))));
}

float factor_at(const void* p, std::int64_t i, bool is_bf16) {
  if (!is_bf16) return static_cast<const float*>(p)[i];
  const std::uint32_t bits = static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(p)[i])
                             << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// Five integers a factor: address, rank, stride along the rank, stride along the columns, owner.
std::vector<Factor> read_factors(
    const std::vector<std::int64_t>& flat, const std::vector<double>& scales) {
  std::vector<Factor> factors;
  for (std::size_t i = 0; 5 * i < flat.size(); ++i) {
    const std::int64_t* f = flat.data() + 5 * i;
    const float scale = i < scales.size() ? static_cast<float>(scales[i]) : 1.0f;
    factors.push_back({reinterpret_cast<const void*>(f[0]), f[1], f[2], f[3], f[4], scale});
  }
  return factors;
}

std::int64_t total_rank(const std::vector<Factor>& factors) {
  std::int64_t total = 0;
  for (const Factor& f : factors) total += f.rank;
  return total;
}

std::int64_t padded_rank(std::int64_t ranks) {
  return (ranks + 3) / 4 * 4;
}

Dropout make_dropout(double p, std::int64_t seed, std::int64_t offset) {
  const double words = p * 65536.0;
  auto threshold = static_cast<std::uint64_t>(words);
  const double rest = words - static_cast<double>(threshold);
  if (rest > 0.5 || (rest == 0.5 && threshold % 2 == 1)) ++threshold;  // to even, as Python rounds
  return {threshold, static_cast<std::uint64_t>(seed), static_cast<std::uint64_t>(offset)};
}

// ---- the three products

template <class T>
void shrink(
    const T* x, std::int64_t num_rows, std::int64_t num_cols, std::int64_t ldx,
    const std::vector<Factor>& factors, bool is_bf16, const std::int64_t* ids,
    std::int64_t rows_per_id, const Dropout& d, float* s) {
  const std::int64_t ranks = total_rank(factors), lds = padded_rank(ranks);
  const auto shape = shrink_shape<T>(ranks);
  const int block = shape.block, mr = shape.rows;
  const int num_blocks = static_cast<int>((ranks + block - 1) / block);
  const Buffer panels = make_buffer(num_blocks * num_cols * block);
  std::memset(
      panels.get(), 0, sizeof(float) * static_cast<std::size_t>(num_blocks * num_cols * block));
  std::vector<std::int64_t> owner(static_cast<std::size_t>(ranks));
  std::vector<float> scale(static_cast<std::size_t>(ranks));
  std::int64_t r = 0;
  for (const Factor& f : factors) {
    for (std::int64_t i = 0; i < f.rank; ++i, ++r) {
      owner[static_cast<std::size_t>(r)] = f.owner;
      scale[static_cast<std::size_t>(r)] = f.scale;
      float* to = panels.get() + (r / block) * num_cols * block + r % block;
      for (std::int64_t col = 0; col < num_cols; ++col) {
        to[col * block] = factor_at(f.at, i * f.stride_rank + col * f.stride_col, is_bf16);
      }
    }
  }
  const std::int64_t num_tiles = (num_rows + mr - 1) / mr;
  const bool parallel = num_rows * num_cols * ranks > kParallel;
#pragma omp parallel if (parallel)
  {
    const Buffer buffer = make_buffer(mr * kDepth), total = make_buffer(mr * num_blocks * block);
#pragma omp for schedule(static)
    for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
      const std::int64_t m = tile * mr;
      const int rows = static_cast<int>(std::min<std::int64_t>(mr, num_rows - m));
      bool any = ids == nullptr;
      for (int i = 0; i < rows && !any; ++i) any = ids[(m + i) / rows_per_id] >= 0;
      if (!any) {
        std::memset(s + m * lds, 0, sizeof(float) * static_cast<std::size_t>(rows * lds));
        continue;
      }
      shape.run(
          {x, ldx, num_cols, m, rows, panels.get(), num_blocks, d, buffer.get(), total.get()});
      for (int i = 0; i < rows; ++i) {
        const std::int64_t id = ids == nullptr ? 0 : ids[(m + i) / rows_per_id];
        float* to = s + (m + i) * lds;
        for (int b = 0; b < num_blocks; ++b) {
          const float* from = total.get() + (b * mr + i) * block;
          const std::int64_t c = static_cast<std::int64_t>(b) * block;
          const std::int64_t width = std::min<std::int64_t>(block, ranks - c);
          const std::int64_t* owns = owner.data() + c;
          const float* factor = scale.data() + c;
          for (std::int64_t j = 0; j < width; ++j) {
            const bool on = ids == nullptr || owns[j] == id;
            to[c + j] = on ? factor[j] * from[j] : 0.0f;
          }
        }
        for (std::int64_t c = ranks; c < lds; ++c) to[c] = 0.0f;
      }
    }
  }
}

template <class T>
void expand(
    const float* s, std::int64_t num_rows, std::int64_t num_cols,
    const std::vector<Factor>& factors, bool is_bf16, const T* bias, const Dropout& d, T* y) {
  const std::int64_t ranks = total_rank(factors), lds = padded_rank(ranks);
  const auto shape = wide_shape<ExpandTask, T>();
  const int block = shape.block, mr = shape.rows;
  const std::int64_t num_blocks = (num_cols + block - 1) / block;
  const Buffer panels = make_buffer(num_blocks * block * ranks);
  const Buffer wide_bias = make_buffer(num_blocks * block);
  std::memset(wide_bias.get(), 0, sizeof(float) * static_cast<std::size_t>(num_blocks * block));
  if (bias != nullptr) widen(bias, num_cols, wide_bias.get());
  std::int64_t r = 0;
  for (const Factor& f : factors) {
    for (std::int64_t i = 0; i < f.rank; ++i, ++r) {
      for (std::int64_t b = 0; b < num_blocks; ++b) {
        float* to = panels.get() + (b * ranks + r) * block;
        for (int j = 0; j < block; ++j) {
          const std::int64_t col = b * block + j;
          to[j] = col < num_cols ? factor_at(f.at, i * f.stride_rank + col * f.stride_col, is_bf16)
                                 : 0.0f;
        }
      }
    }
  }
  const std::int64_t num_tiles = (num_rows + kRowBlock - 1) / kRowBlock;
  const bool parallel = num_rows * num_cols * std::max<std::int64_t>(ranks, 4) > kParallel;
#pragma omp parallel if (parallel)
  {
    const Buffer packed = make_buffer((kRowBlock + mr) * ranks), tile = make_buffer(mr * block);
#pragma omp for schedule(static)
    for (std::int64_t t = 0; t < num_tiles; ++t) {
      const std::int64_t m = t * kRowBlock;
      const int rows = static_cast<int>(std::min<std::int64_t>(kRowBlock, num_rows - m));
      shape.run(
          {s, lds, static_cast<int>(ranks), m, rows, panels.get(), wide_bias.get(), num_cols, d, y,
           packed.get(), tile.get()});
    }
  }
}

template <class T>
void outer(
    const float* s, const T* x, std::int64_t num_rows, std::int64_t num_cols, std::int64_t ldx,
    const std::vector<Factor>& grads, const Dropout& d) {
  const std::int64_t ranks = padded_rank(total_rank(grads));
  const auto shape = wide_shape<OuterTask, T>();
  const int block = shape.block;
  const std::int64_t num_blocks = (num_cols + block - 1) / block;
  const bool parallel = num_rows * num_cols * ranks > kParallel;
#pragma omp parallel if (parallel)
  {
    const Buffer buffer = make_buffer(kSumRows * block), g = make_buffer(ranks * block);
#pragma omp for schedule(static)
    for (std::int64_t b = 0; b < num_blocks; ++b) {
      const std::int64_t col = b * block;
      const int width = static_cast<int>(std::min<std::int64_t>(block, num_cols - col));
      shape.run({s, ranks, x, ldx, num_rows, col, width, num_cols, d, buffer.get(), g.get()});
      const float* from = g.get();
      for (const Factor& f : grads) {
        auto* to = static_cast<float*>(const_cast<void*>(f.at));
        for (std::int64_t i = 0; i < f.rank; ++i, from += block) {
          for (int j = 0; j < width; ++j) {
            to[i * f.stride_rank + (col + j) * f.stride_col] = from[j];
          }
        }
      }
    }
  }
}

}  // namespace

bool lora_linear_shrink(
    std::uintptr_t x, bool x_is_bf16, std::int64_t num_rows, std::int64_t num_cols,
    std::int64_t ldx, const std::vector<std::int64_t>& factors, const std::vector<double>& scales,
    bool factors_are_bf16, std::uintptr_t ids, std::int64_t num_ids, std::int64_t num_adapters,
    double dropout, std::int64_t seed, std::int64_t offset, std::uintptr_t s) {
  const auto* id = reinterpret_cast<const std::int64_t*>(ids);
  bool any = id == nullptr;
  for (std::int64_t i = 0; id != nullptr && i < num_ids; ++i) {
    if (id[i] < -1 || id[i] >= num_adapters) {
      throw std::invalid_argument(
          "lora_linear: adapter_ids must be between -1 and " + std::to_string(num_adapters - 1) +
          ", got " + std::to_string(id[i]));
    }
    any = any || id[i] >= 0;
  }
  if (!any) return false;
  const std::int64_t rows_per_id = num_ids == 0 ? 1 : std::max<std::int64_t>(num_rows / num_ids, 1);
  const auto read = read_factors(factors, scales);
  const Dropout d = make_dropout(dropout, seed, offset);
  auto* to = reinterpret_cast<float*>(s);
  if (x_is_bf16) {
    shrink(
        reinterpret_cast<const std::uint16_t*>(x), num_rows, num_cols, ldx, read, factors_are_bf16,
        id, rows_per_id, d, to);
  } else {
    shrink(
        reinterpret_cast<const float*>(x), num_rows, num_cols, ldx, read, factors_are_bf16, id,
        rows_per_id, d, to);
  }
  return true;
}

void lora_linear_expand(
    std::uintptr_t s, std::int64_t num_rows, std::int64_t num_cols,
    const std::vector<std::int64_t>& factors, bool factors_are_bf16, std::uintptr_t bias,
    double dropout, std::int64_t seed, std::int64_t offset, std::uintptr_t y, bool y_is_bf16) {
  const auto read = read_factors(factors, {});
  const Dropout d = make_dropout(dropout, seed, offset);
  const auto* from = reinterpret_cast<const float*>(s);
  if (y_is_bf16) {
    expand(
        from, num_rows, num_cols, read, factors_are_bf16,
        reinterpret_cast<const std::uint16_t*>(bias), d, reinterpret_cast<std::uint16_t*>(y));
  } else {
    expand(
        from, num_rows, num_cols, read, factors_are_bf16, reinterpret_cast<const float*>(bias), d,
        reinterpret_cast<float*>(y));
  }
}

void lora_linear_outer(
    std::uintptr_t s, std::uintptr_t x, bool x_is_bf16, std::int64_t num_rows,
    std::int64_t num_cols, std::int64_t ldx, const std::vector<std::int64_t>& grads, double dropout,
    std::int64_t seed, std::int64_t offset) {
  const auto read = read_factors(grads, {});
  const Dropout d = make_dropout(dropout, seed, offset);
  const auto* from = reinterpret_cast<const float*>(s);
  if (x_is_bf16) {
    outer(from, reinterpret_cast<const std::uint16_t*>(x), num_rows, num_cols, ldx, read, d);
  } else {
    outer(from, reinterpret_cast<const float*>(x), num_rows, num_cols, ldx, read, d);
  }
}

}  // namespace hydra::cpu
