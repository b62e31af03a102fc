// y += scale (x A^T) B^T of few rows, whose factors are read once and where they lie.
//
// A sum has the same order whatever the number of rows and threads: a row's bits are its own.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/floats.h"
#include "cpu/lora_panels.h"
#include "cpu/multiversion.h"

namespace hydra::cpu::lora {

// The rows that one adapter runs on.
struct FewRows {
  const std::int64_t* rows;  // where they are; null: row i is the i-th
  std::int64_t num_rows, rank, num_inputs, num_outputs;
  float scale;
  const float *x, *a, *b;  // (.., K), (rank, K), (N, rank), the numbers of a row side by side
  std::int64_t x_stride, a_stride, b_stride;
  float* s;          // (num_rows, rank)
  std::uintptr_t y;  // (.., N)
  std::int64_t y_stride;

  std::int64_t row(std::int64_t i) const { return rows == nullptr ? i : rows[i]; }
};

// ---- a square of W vectors, turned

// Column c of a step's lower and upper vector: those with bit D of c set come from the other one.
template <int W, int D, bool kUpper>
constexpr int source(int c) {
  const bool set = (c & D) != 0;
  if (kUpper) return set ? W + c : (c | D);
  return set ? W + (c ^ D) : c;
}

template <int W, int D, bool kUpper, int... C>
HYDRA_INLINE void mix(
    typename Vector<W>::type& to, const typename Vector<W>::type& a,
    const typename Vector<W>::type& b, std::integer_sequence<int, C...>) {
#if defined(__clang__)
  to = __builtin_shufflevector(a, b, source<W, D, kUpper>(C)...);
#else
  typedef int Indices __attribute__((vector_size(W * sizeof(int))));
  to = __builtin_shuffle(a, b, Indices{source<W, D, kUpper>(C)...});
#endif
}

template <int W, int D = W / 2>
HYDRA_INLINE void turn(typename Vector<W>::type (&v)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & D) continue;
    const typename Vector<W>::type low = v[i], high = v[i + D];
    mix<W, D, false>(v[i], low, high, std::make_integer_sequence<int, W>{});
    mix<W, D, true>(v[i + D], low, high, std::make_integer_sequence<int, W>{});
  }
  if constexpr (D > 1) turn<W, D / 2>(v);
}

// ---- shrink

// s of MR rows and NR ranks.
template <int W, int MR, int NR>
HYDRA_INLINE void shrink_few(const FewRows& t, std::int64_t row, std::int64_t rank) {
  using V = typename Vector<W>::type;
  const float *x[MR], *a = t.a + rank * t.a_stride;
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) x[i] = t.x + t.row(row + i) * t.x_stride;
  V sum[MR * NR] = {};
  std::int64_t k = 0;
  for (; k + W <= t.num_inputs; k += W) {
    V f[NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) load<W>(f[j], a + j * t.a_stride + k);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      V row_of_x;
      load<W>(row_of_x, x[i] + k);
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) sum[i * NR + j] += row_of_x * f[j];
    }
  }
  float rest[MR * NR] = {};
  for (; k < t.num_inputs; ++k) {
    for (int i = 0; i < MR; ++i) {
      for (int j = 0; j < NR; ++j) rest[i * NR + j] += x[i][k] * a[j * t.a_stride + k];
    }
  }
  float total[(MR * NR + W - 1) / W * W];
#pragma GCC unroll 16
  for (int first = 0; first < MR * NR; first += W) {
    V v[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = first + i < MR * NR ? sum[first + i] : V{};
    turn<W>(v);
#pragma GCC unroll 4
    for (int half = W / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) v[i] += v[i + half];
    }
    store<W>(total + first, v[0]);
  }
  for (int i = 0; i < MR; ++i) {
    float* s = t.s + (row + i) * t.rank + rank;
    for (int j = 0; j < NR; ++j) s[j] = t.scale * (total[i * NR + j] + rest[i * NR + j]);
  }
}

constexpr int kFewRows = 4, kFewRanks = 4;  // taken at once

// Ranks first .. first + kFewRanks, on all rows.
template <int W>
HYDRA_INLINE void shrink_some(const FewRows& t, std::int64_t first) {
  std::int64_t row = 0;
  const bool whole = first + kFewRanks <= t.rank;
  for (; row + kFewRows <= t.num_rows && whole; row += kFewRows) {
    shrink_few<W, kFewRows, kFewRanks>(t, row, first);
  }
  for (; row < t.num_rows && whole; ++row) shrink_few<W, 1, kFewRanks>(t, row, first);
  for (std::int64_t rank = first; rank < t.rank && !whole; ++rank) {
    for (row = 0; row < t.num_rows; ++row) shrink_few<W, 1, 1>(t, row, rank);
  }
}

// ---- expand

// Ranks rank .. rank + S of W columns of B, as (S, W), by squares of S.
template <int W, int S>
HYDRA_INLINE void turn_columns(const float* b, std::int64_t stride, float* turned) {
#pragma GCC unroll 4
  for (int col = 0; col < W; col += S) {
    typename Vector<S>::type v[S];
#pragma GCC unroll 16
    for (int i = 0; i < S; ++i) load<S>(v[i], b + (col + i) * stride);
    turn<S>(v);
#pragma GCC unroll 16
    for (int i = 0; i < S; ++i) store<S>(turned + i * W + col, v[i]);
  }
}

template <class T, int W, int MR>
HYDRA_INLINE void expand_few(
    const FewRows& t, std::int64_t row, std::int64_t col, int width, const float* turned) {
  typename Vector<W>::type sum[MR] = {}, f;
  const float* s = t.s + row * t.rank;
  for (std::int64_t r = 0; r < t.rank; ++r) {
    load<W>(f, turned + r * W);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) sum[i] += s[i * t.rank + r] * f;
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    float part[W];
    store<W>(part, sum[i]);
    T* y = reinterpret_cast<T*>(t.y) + t.row(row + i) * t.y_stride + col;
    // Rows are too far from each other for the hardware to see that they go on.
    __builtin_prefetch(y + 2 * kAhead * sizeof(float) / sizeof(T), 1);
    if (width == W) {
#pragma omp simd
      for (int c = 0; c < W; ++c) narrow(widen(y[c]) + part[c], y + c);
    } else {
      for (int c = 0; c < width; ++c) narrow(widen(y[c]) + part[c], y + c);
    }
  }
}

// W columns of y, on all rows; turned (rank, W) is scratch.
template <class T, int W>
HYDRA_INLINE void expand_some(const FewRows& t, std::int64_t col, float* turned) {
  const int width = static_cast<int>(std::min<std::int64_t>(W, t.num_outputs - col));
  const float* b = t.b + col * t.b_stride;
  std::int64_t r = 0;
  if (width == W) {
    for (; r + W <= t.rank; r += W) turn_columns<W, W>(b + r, t.b_stride, turned + r * W);
    if constexpr (W > 8) {
      for (; r + 8 <= t.rank; r += 8) turn_columns<W, 8>(b + r, t.b_stride, turned + r * W);
    }
    if constexpr (W > 4) {
      for (; r + 4 <= t.rank; r += 4) turn_columns<W, 4>(b + r, t.b_stride, turned + r * W);
    }
  }
  for (; r < t.rank; ++r) {
    for (int c = 0; c < W; ++c) turned[r * W + c] = c < width ? b[c * t.b_stride + r] : 0.0f;
  }
  std::int64_t row = 0;
  for (; row + kFewRows <= t.num_rows; row += kFewRows) {
    expand_few<T, W, kFewRows>(t, row, col, width, turned);
  }
  for (; row < t.num_rows; ++row) expand_few<T, W, 1>(t, row, col, width, turned);
}

// ---- a thread's share, part `mine` of `parts`: the sums of all are ready before any expands

#ifdef HYDRA_X86_LEVELS
#define HYDRA_LEVELS(X)      \
  X(HYDRA_TARGET_V4, v4, 16) \
  X(HYDRA_TARGET_V3, v3, 8)  \
  X(, baseline, 4)
#else
#define HYDRA_LEVELS(X) X(, baseline, 4)
#endif

#define HYDRA_LEVEL(TARGET, NAME, W)                                                     \
  TARGET __attribute__((noinline)) inline void shrink_few_##NAME(                        \
      const FewRows& t, std::int64_t mine, std::int64_t parts) {                         \
    const std::int64_t blocks = (t.rank + kFewRanks - 1) / kFewRanks;                    \
    for (std::int64_t i = blocks * mine / parts; i < blocks * (mine + 1) / parts; ++i) { \
      shrink_some<W>(t, i * kFewRanks);                                                  \
    }                                                                                    \
  }                                                                                      \
  template <class T>                                                                     \
  TARGET __attribute__((noinline)) void expand_few_##NAME(                               \
      const FewRows& t, std::int64_t mine, std::int64_t parts, float* turned) {          \
    const std::int64_t blocks = (t.num_outputs + W - 1) / W;                             \
    for (std::int64_t i = blocks * mine / parts; i < blocks * (mine + 1) / parts; ++i) { \
      expand_some<T, W>(t, i * W, turned);                                               \
    }                                                                                    \
  }
HYDRA_LEVELS(HYDRA_LEVEL)
#undef HYDRA_LEVEL
#undef HYDRA_LEVELS

inline void shrink_few_rows(const FewRows& t, std::int64_t mine, std::int64_t parts) {
#ifdef HYDRA_X86_LEVELS
  if (isa_level() == Isa::kV4) return shrink_few_v4(t, mine, parts);
  if (isa_level() == Isa::kV3) return shrink_few_v3(t, mine, parts);
#endif
  shrink_few_baseline(t, mine, parts);
}

constexpr std::int64_t kFewCols = 16;  // of a rank's scratch at most

template <class T>
void expand_few_rows(const FewRows& t, std::int64_t mine, std::int64_t parts, float* turned) {
#ifdef HYDRA_X86_LEVELS
  if (isa_level() == Isa::kV4) return expand_few_v4<T>(t, mine, parts, turned);
  if (isa_level() == Isa::kV3) return expand_few_v3<T>(t, mine, parts, turned);
#endif
  expand_few_baseline<T>(t, mine, parts, turned);
}

}  // namespace hydra::cpu::lora
