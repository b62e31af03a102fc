// Products of a few rows with a matrix that is read once, and attention of a few queries.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/replay_rows.h"
#include "cpu/replay_words.h"

namespace hydra::cpu::replaying {

template <int W>
struct Vector {
  typedef float type __attribute__((vector_size(W * sizeof(float))));
  typedef float loose __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
  typedef std::int32_t lanes __attribute__((vector_size(W * sizeof(float))));
  typedef std::uint32_t words __attribute__((vector_size(W * sizeof(float))));
  typedef std::uint16_t halves
      __attribute__((vector_size(W * sizeof(std::uint16_t)), aligned(2), may_alias));
};

template <int W>
HYDRA_INLINE void load(typename Vector<W>::type& v, const float* p) {
  v = *reinterpret_cast<const typename Vector<W>::loose*>(p);
}

template <int W>
HYDRA_INLINE void load(typename Vector<W>::type& v, const BFloat16* p) {
  v = (typename Vector<W>::type)(
      __builtin_convertvector(
          *reinterpret_cast<const typename Vector<W>::halves*>(p), typename Vector<W>::words)
      << 16);
}

template <int W, class T>
HYDRA_INLINE void load_some(typename Vector<W>::type& v, const T* p, std::int64_t count) {
  float all[W] = {};
  for (std::int64_t i = 0; i < count; ++i) all[i] = widen(p[i]);
  load<W>(v, all);
}

template <int W>
HYDRA_INLINE void store(float* p, const typename Vector<W>::type& v) {
  *reinterpret_cast<typename Vector<W>::loose*>(p) = v;
}

// Lanes of a where bit S of the lane is 0, of b elsewhere, each with its neighbour at distance S
// added to it.
template <int W, int S, int... I>
HYDRA_INLINE void fold(
    typename Vector<W>::type& out, const typename Vector<W>::type& a,
    const typename Vector<W>::type& b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  out = __builtin_shufflevector(a, b, ((I & S) ? W + I : I)...) +
        __builtin_shufflevector(a, b, ((I & S) ? W + (I ^ S) : (I ^ S))...);
#else
  const typename Vector<W>::lanes own = {((I & S) ? W + I : I)...};
  const typename Vector<W>::lanes other = {((I & S) ? W + (I ^ S) : (I ^ S))...};
  out = __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
#endif
}

// sums[0]: in lane i the sum of all lanes of sums[i], for W vectors.
template <int W, int S = 1>
HYDRA_INLINE void sum_lanes(typename Vector<W>::type* sums) {
  if constexpr (S < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2 * S) {
      fold<W, S>(sums[i], sums[i], sums[i + S], std::make_integer_sequence<int, W>{});
    }
    sum_lanes<W, 2 * S>(sums);
  }
}

// Rows of x and rows of w, whose products are summed over `depth` columns.
template <class T>
struct Operands {
  const float* x;
  std::int64_t ldx;
  const T* w;
  std::int64_t ldw;
  std::int64_t depth;
};

// sums[i * NR + j] += lanes of x row i times w row j; w rows past `rows` repeat the last.
template <int W, int MR, int NR, class T>
HYDRA_INLINE void add_dots(
    typename Vector<W>::type (&sums)[W], const Operands<T>& o, std::int64_t m, std::int64_t n,
    std::int64_t rows, bool ahead) {
  using V = typename Vector<W>::type;
  const float* x[MR];
  const T* w[NR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) x[i] = o.x + (m + i) * o.ldx;
#pragma GCC unroll 16
  for (int j = 0; j < NR; ++j) w[j] = o.w + std::min(n + j, rows - 1) * o.ldw;
  std::int64_t k = 0;
  for (; k + W <= o.depth; k += W) {
    V a[MR];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) load<W>(a[i], x[i] + k);
#pragma GCC unroll 16
    for (int j = 0; j < NR; ++j) {
      V b;
      load<W>(b, w[j] + k);
      if (ahead) __builtin_prefetch(w[j] + k + NR * o.ldw);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) sums[i * NR + j] += a[i] * b;
    }
  }
  if (k < o.depth) {
    V a[MR];
    for (int i = 0; i < MR; ++i) load_some<W>(a[i], x[i] + k, o.depth - k);
#pragma GCC unroll 16
    for (int j = 0; j < NR; ++j) {
      V b;
      load_some<W>(b, w[j] + k, o.depth - k);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) sums[i * NR + j] += a[i] * b;
    }
  }
}

template <class T>
struct Product {
  Operands<T> main, extra;  // extra.depth 0: none
  const float* bias;        // of the outputs' columns, or none
  float alpha;
  bool accumulate;
  float* y;
  std::int64_t ldy;
};

template <int W, int MR, int NR, class T>
HYDRA_INLINE void dot_tile(
    const Product<T>& p, std::int64_t m, std::int64_t n, std::int64_t last, bool ahead) {
  typename Vector<W>::type sums[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) sums[i] = typename Vector<W>::type{};
  add_dots<W, MR, NR>(sums, p.main, m, n, last, ahead);
  if (p.extra.depth > 0) add_dots<W, MR, NR>(sums, p.extra, m, n, last, false);
  sum_lanes<W>(sums);
  float total[W];
  store<W>(total, sums[0] * p.alpha);
  float* y = p.y + m * p.ldy + n;
  if (p.bias == nullptr && !p.accumulate && last - n >= NR) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) std::memcpy(y + i * p.ldy, total + i * NR, NR * sizeof(float));
    return;
  }
  const int width = static_cast<int>(std::min<std::int64_t>(NR, last - n));
  for (int i = 0; i < MR; ++i, y += p.ldy) {
    for (int j = 0; j < width; ++j) {
      const float value = total[i * NR + j] + (p.bias == nullptr ? 0.0f : p.bias[n + j]);
      y[j] = p.accumulate ? y[j] + value : value;
    }
  }
}

// Columns first to last - 1 of y for `rows` rows: MR rows of x by W / MR rows of w at a time, so
// that a block of w is read from memory once and then from the L1 cache.
template <int W, int MR, class T>
HYDRA_INLINE void product(
    const Product<T>& p, std::int64_t rows, std::int64_t first, std::int64_t last) {
  constexpr int NR = W / MR;
  for (std::int64_t n = first; n < last; n += W) {
    std::int64_t m = 0;
    for (; m + MR <= rows; m += MR) {
      for (std::int64_t j = n; j < std::min(n + W, last); j += NR) {
        dot_tile<W, MR, NR>(p, m, j, last, m == 0);
      }
    }
    for (; m < rows; ++m) dot_tile<W, 1, W>(p, m, n, last, m == 0);
  }
}

// NV vectors of columns from n on of MR rows, w (depth, columns).
template <int W, int MR, int NV, class T>
HYDRA_INLINE void outer_tile(const Product<T>& p, std::int64_t m, std::int64_t n) {
  using V = typename Vector<W>::type;
  const Operands<T>& o = p.main;
  V sums[MR][NV] = {};
  for (std::int64_t k = 0; k < o.depth; ++k) {
    V b[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) load<W>(b[j], o.w + k * o.ldw + n + j * W);
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
      const float a = o.x[(m + i) * o.ldx + k];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sums[i][j] += a * b[j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
    float* y = p.y + (m + i) * p.ldy + n;
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      V value = sums[i][j] * p.alpha, more;
      if (p.bias != nullptr) {
        load<W>(more, p.bias + n + j * W);
        value += more;
      }
      if (p.accumulate) {
        load<W>(more, y + j * W);
        value += more;
      }
      store<W>(y + j * W, value);
    }
  }
}

template <int W, int NV, class T>
HYDRA_INLINE void outer_rows(const Product<T>& p, std::int64_t rows, std::int64_t n) {
  std::int64_t m = 0;
  for (; m + 4 <= rows; m += 4) outer_tile<W, 4, NV>(p, m, n);
  for (; m < rows; ++m) outer_tile<W, 1, NV>(p, m, n);
}

template <int W, class T>
HYDRA_INLINE void product_t(
    const Product<T>& p, std::int64_t rows, std::int64_t first, std::int64_t last) {
  constexpr int NV = W == 16 ? 4 : 2;  // with 4 rows, half of the vector registers
  std::int64_t n = first;
  for (; n + NV * W <= last; n += NV * W) outer_rows<W, NV>(p, rows, n);
  for (; n + W <= last; n += W) outer_rows<W, 1>(p, rows, n);
  for (; n < last; ++n) {
    for (std::int64_t m = 0; m < rows; ++m) {
      float sum = 0.0f;
      for (std::int64_t k = 0; k < p.main.depth; ++k) {
        sum += p.main.x[m * p.main.ldx + k] * widen(p.main.w[k * p.main.ldw + n]);
      }
      sum = p.alpha * sum + (p.bias == nullptr ? 0.0f : p.bias[n]);
      float* y = p.y + m * p.ldy + n;
      *y = p.accumulate ? *y + sum : sum;
    }
  }
}

template <int W, bool kTransposed, class T>
HYDRA_INLINE void linear_of(Words words, int thread, int threads) {
  Product<T> p{};
  const std::int64_t rows = words.next(), columns = words.next();
  p.main.depth = words.next();
  p.main.x = words.address();
  p.main.ldx = words.next();
  p.main.w = words.address<T>();
  p.main.ldw = words.next();
  p.extra.depth = words.next();
  p.extra.x = words.address();
  p.extra.ldx = words.next();
  p.extra.w = words.address<T>();
  p.extra.ldw = words.next();
  p.bias = words.address();
  p.y = words.address();
  p.ldy = words.next();
  p.alpha = words.number();
  p.accumulate = words.next() != 0;
  // Several matrices one after another, at these distances.
  const std::int64_t count = words.next();
  const std::int64_t step_x = words.next(), step_w = words.next(), step_y = words.next();
  const Part part = part_of(columns, W, thread, threads);
  for (std::int64_t i = 0; i < count; ++i) {
    if constexpr (kTransposed) {
      product_t<W>(p, rows, part.first, part.last);
    } else {
      product<W, W == 16 ? 4 : 2>(p, rows, part.first, part.last);
    }
    p.main.x += step_x;
    p.main.w += step_w;
    p.y += step_y;
  }
}

template <int W, bool kTransposed>
HYDRA_INLINE void run_linear(Words words, int thread, int threads) {
  if (words.next() != 0) {
    linear_of<W, kTransposed, BFloat16>(words, thread, threads);
  } else {
    linear_of<W, kTransposed, float>(words, thread, threads);
  }
}

// Row i of y is row i of x times matrix ids[i] of several, each of which is read once for all of
// its rows.
template <int W, class T>
HYDRA_INLINE void experts_of(
    Words words, int thread, int threads, std::vector<float>& scratch, std::atomic<bool>& strayed) {
  const bool transposed = words.next() != 0;
  const std::int64_t rows = words.next(), columns = words.next(), depth = words.next();
  const float* x = words.address();
  const std::int64_t ldx = words.next();
  const T* w = words.address<T>();
  const std::int64_t step = words.next(), ldw = words.next(), count = words.next();
  const auto* ids = words.address<std::int64_t>();
  float* y = words.address();
  const std::int64_t ldy = words.next();
  const Part part = part_of(columns, W, thread, threads);
  const auto needed = static_cast<std::size_t>(rows * (depth + columns));
  if (scratch.size() < needed) scratch.resize(needed);
  float *taken = scratch.data(), *made = taken + rows * depth;
  for (std::int64_t row = 0; row < rows; ++row) {
    if (std::find(ids, ids + row, ids[row]) != ids + row) continue;  // came with an earlier row
    if (ids[row] < 0 || ids[row] >= count) {
      strayed.store(true, std::memory_order_relaxed);
      continue;
    }
    std::int64_t same = 0;
    for (std::int64_t i = row; i < rows; ++i) {
      if (ids[i] == ids[row]) std::copy(x + i * ldx, x + i * ldx + depth, taken + same++ * depth);
    }
    Product<T> p{};
    p.main = {taken, depth, w + ids[row] * step, ldw, depth};
    p.alpha = 1.0f;
    p.y = made;
    p.ldy = columns;
    if (transposed) {
      product_t<W>(p, same, part.first, part.last);
    } else {
      product<W, W == 16 ? 4 : 2>(p, same, part.first, part.last);
    }
    const float* from = made;
    for (std::int64_t i = row; i < rows; ++i) {
      if (ids[i] != ids[row]) continue;
      std::copy(from + part.first, from + part.last, y + i * ldy + part.first);
      from += columns;
    }
  }
}

template <int W>
HYDRA_INLINE void run_experts(
    Words words, int thread, int threads, std::vector<float>& scratch, std::atomic<bool>& strayed) {
  if (words.next() != 0) {
    experts_of<W, BFloat16>(words, thread, threads, scratch, strayed);
  } else {
    experts_of<W, float>(words, thread, threads, scratch, strayed);
  }
}

// Attention of a few queries to keys and values, skipping what no query of a head sees

// What a mask holds where nothing is seen: the lowest float32, or -inf.
constexpr float kUnseen = -3.0e38f;

template <int W, class T>
HYDRA_INLINE void attention_of(Words words, int thread, int threads, std::vector<float>& scratch) {
  const std::int64_t batch = words.next(), heads = words.next(), kv_heads = words.next();
  const std::int64_t queries = words.next(), length = words.next(), width = words.next();
  const float* q = words.address();
  std::int64_t sq[3], sk[3], sv[3], sm[3], so[3];
  words.read(sq);
  const T* k = words.address<T>();
  words.read(sk);
  const T* v = words.address<T>();
  words.read(sv);
  const float* mask = words.address();
  words.read(sm);
  float* out = words.address();
  words.read(so);
  const float scale = words.number();
  if (scratch.size() < static_cast<std::size_t>(queries * length)) {
    scratch.resize(static_cast<std::size_t>(queries * length));
  }
  const Part part = part_of(batch * heads, 1, thread, threads);
  for (std::int64_t unit = part.first; unit < part.last; ++unit) {
    const std::int64_t b = unit / heads, h = unit % heads;
    std::int64_t first = 0, last = length;
    if (mask != nullptr) {
      first = length;
      last = 0;
      for (std::int64_t i = 0; i < (sm[2] == 0 ? 1 : queries); ++i) {
        const float* m = mask + b * sm[0] + h * sm[1] + i * sm[2];
        std::int64_t low = 0, high = length;
        while (low < length && m[low] < kUnseen) ++low;
        while (high > low && m[high - 1] < kUnseen) --high;
        first = std::min(first, low);
        last = std::max(last, high);
      }
      if (first >= last) {
        first = 0;
        last = length;
      }
    }
    const std::int64_t seen = last - first, kv = h / (heads / kv_heads);
    Product<T> p{};
    p.main = {
        q + b * sq[0] + h * sq[1], sq[2], k + b * sk[0] + kv * sk[1] + first * sk[2], sk[2], width};
    p.alpha = scale;
    p.y = scratch.data();
    p.ldy = length;
    product<W, W == 16 ? 4 : 2>(p, queries, 0, seen);
    for (std::int64_t i = 0; i < queries; ++i) {
      float* scores = p.y + i * length;
      if (mask != nullptr) {
        const float* m = mask + b * sm[0] + h * sm[1] + i * sm[2] + first;
#pragma omp simd
        for (std::int64_t l = 0; l < seen; ++l) scores[l] += m[l];
      }
      softmax_row(scores, seen, scores);
    }
    p.main = {p.y, length, v + b * sv[0] + kv * sv[1] + first * sv[2], sv[2], seen};
    p.alpha = 1.0f;
    p.y = out + b * so[0] + h * so[1];
    p.ldy = so[2];
    product_t<W>(p, queries, 0, width);
  }
}

template <int W>
HYDRA_INLINE void run_attention(Words words, int thread, int threads, std::vector<float>& scratch) {
  if (words.next() != 0) {
    attention_of<W, BFloat16>(words, thread, threads, scratch);
  } else {
    attention_of<W, float>(words, thread, threads, scratch);
  }
}

}  // namespace hydra::cpu::replaying
