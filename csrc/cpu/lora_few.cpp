// lora_linear on so few rows that packing factors would cost more than its products. What
// csrc/cpu/lora_linear.cpp says in one place, here the rows of one adapter after those of another,
// and added to what the wide product has written, in float32 and rounded once: rows that are off
// keep its bits. Backward is for float32 alone, and takes one thread.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/arena.h"
#include "cpu/entries.h"
#include "cpu/floats.h"
#include "cpu/lora_few_rows.h"
#include "cpu/lora_layout.h"
#include "cpu/multiversion.h"
#include "cpu/parallel.h"

namespace hydra::cpu {
namespace {

using namespace lora;

// One adapter and the rows that it runs on.
struct Few {
  const std::int64_t* rows;
  std::int64_t num_rows, rank, num_inputs, num_outputs;
  float scale;
  const float *x, *a, *b;  // (.., K), (rank, K), (N, rank), the numbers of a row side by side
  std::int64_t x_stride, a_stride, b_stride;
  float *s, *ds;  // (num_rows, rank)
};

// ---- with A (rank, K): along its rows

// s = scale * x A^T
HYDRA_INLINE void shrink_a(const Few& t) {
  for (std::int64_t r = 0; r < t.rank; ++r) {
    const float* a = t.a + r * t.a_stride;
    for (std::int64_t i = 0; i < t.num_rows; ++i) {
      const float* x = t.x + t.rows[i] * t.x_stride;
      float total = 0.0f;
#pragma omp simd reduction(+ : total)
      for (std::int64_t k = 0; k < t.num_inputs; ++k) total += x[k] * a[k];
      t.s[i * t.rank + r] = t.scale * total;
    }
  }
}

HYDRA_INLINE void add_row(float* to, float factor, const float* from, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) to[i] += factor * from[i];
}

// dA = ds^T x
HYDRA_INLINE void outer_a(const Few& t, float* da) {
  const std::int64_t k = t.num_inputs;
  std::fill_n(da, t.rank * k, 0.0f);
  for (std::int64_t i = 0; i < t.num_rows; ++i) {
    for (std::int64_t r = 0; r < t.rank; ++r) {
      add_row(da + r * k, t.ds[i * t.rank + r], t.x + t.rows[i] * t.x_stride, k);
    }
  }
}

// dx += ds A
HYDRA_INLINE void expand_a(const Few& t, float* dx) {
  const std::int64_t k = t.num_inputs;
  for (std::int64_t i = 0; i < t.num_rows; ++i) {
    for (std::int64_t r = 0; r < t.rank; ++r) {
      add_row(dx + t.rows[i] * k, t.ds[i * t.rank + r], t.a + r * t.a_stride, k);
    }
  }
}

// ---- with B (N, rank), whose rows are short: kWide ranks at once

constexpr int kWide = 8;
using Lanes = Vector<kWide>::type;

// ds = scale * dy B
HYDRA_INLINE void shrink_b(const Few& t, const float* dy, std::int64_t stride) {
  constexpr int kTogether = 4;  // rows
  for (std::int64_t first = 0; first < t.num_rows; first += kTogether) {
    const std::int64_t here = std::min<std::int64_t>(kTogether, t.num_rows - first);
    const float* row[kTogether];
    for (int i = 0; i < kTogether; ++i) row[i] = dy + t.rows[first + (i < here ? i : 0)] * stride;
    std::int64_t r = 0;
    for (; r + kWide <= t.rank; r += kWide) {
      Lanes sum[kTogether] = {}, b;
      for (std::int64_t n = 0; n < t.num_outputs; ++n) {
        load<kWide>(b, t.b + n * t.b_stride + r);
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) sum[i] += row[i][n] * b;
      }
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) {
        if (i < here) store<kWide>(t.ds + (first + i) * t.rank + r, t.scale * sum[i]);
      }
    }
    for (; r < t.rank; ++r) {
      for (std::int64_t i = 0; i < here; ++i) {
        float total = 0.0f;
        for (std::int64_t n = 0; n < t.num_outputs; ++n) {
          total += row[i][n] * t.b[n * t.b_stride + r];
        }
        t.ds[(first + i) * t.rank + r] = t.scale * total;
      }
    }
  }
}

// dB = dy^T s
HYDRA_INLINE void outer_b(const Few& t, const float* dy, std::int64_t stride, float* db) {
  for (std::int64_t n = 0; n < t.num_outputs; ++n) {
    std::int64_t r = 0;
    for (; r + kWide <= t.rank; r += kWide) {
      Lanes sum = {}, s;
      for (std::int64_t i = 0; i < t.num_rows; ++i) {
        load<kWide>(s, t.s + i * t.rank + r);
        sum += dy[t.rows[i] * stride + n] * s;
      }
      store<kWide>(db + n * t.rank + r, sum);
    }
    for (; r < t.rank; ++r) {
      float total = 0.0f;
      for (std::int64_t i = 0; i < t.num_rows; ++i) {
        total += dy[t.rows[i] * stride + n] * t.s[i * t.rank + r];
      }
      db[n * t.rank + r] = total;
    }
  }
}

// Numbers of the factors times rows, and seven, below which threads cost more than they save.
constexpr std::int64_t kThreadsFrom = 1 << 18;

Arena& scratch() {
  static thread_local Arena arena;
  arena.start();
  return arena;
}

// A matrix as floats whose rows have their numbers side by side, copied where it is not.
template <class T>
const float* with_rows(
    std::uintptr_t matrix, std::int64_t num_rows, std::int64_t num_cols, std::int64_t stride_row,
    std::int64_t stride_col, Arena& arena, std::int64_t& stride) {
  const auto* from = reinterpret_cast<const T*>(matrix);
  stride = stride_row;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (stride_col == 1) return from;
  }
  float* to = arena.take(num_rows * num_cols);
  stride = num_cols;
  multiversion([=] {
    for (std::int64_t row = 0; row < num_rows; ++row) {
      const T* row_from = from + row * stride_row;
      float* row_to = to + row * num_cols;
      if (stride_col == 1) {
#pragma omp simd
        for (std::int64_t col = 0; col < num_cols; ++col) row_to[col] = widen(row_from[col]);
      } else {
        for (std::int64_t col = 0; col < num_cols; ++col) {
          row_to[col] = widen(row_from[col * stride_col]);
        }
      }
    }
  });
  return to;
}

// Runs f on each adapter's task, its x and factors in float32; ids are known to be in range.
template <class T, class F>
void each_adapter(
    std::uintptr_t x, std::int64_t num_rows, std::int64_t num_inputs, std::int64_t x_stride,
    const std::vector<std::int64_t>& adapters, const std::vector<double>& scales,
    const std::vector<std::int64_t>& projections, std::uintptr_t ids, std::int64_t num_ids,
    std::int64_t num_adapters, const F& f) {
  const auto* id = reinterpret_cast<const std::int64_t*>(ids);
  for (std::int64_t i = 0; i < num_ids; ++i) check_id(id[i], num_adapters);
  const std::int64_t rows_per_id = num_ids == 0 ? 0 : num_rows / num_ids;
  const auto to = read_projections(projections);
  Arena& arena = scratch();
  Few t{};
  t.num_inputs = num_inputs;
  t.x = with_rows<T>(x, num_rows, num_inputs, x_stride, 1, arena, t.x_stride);
  std::vector<std::int64_t> rows;
  rows.reserve(static_cast<std::size_t>(num_rows));
  for (const Adapter& adapter : read_adapters(adapters, scales)) {
    rows.clear();
    for (std::int64_t row = 0; row < num_rows; ++row) {
      if (id == nullptr || id[row / rows_per_id] == adapter.owner) rows.push_back(row);
    }
    const Projection& p = to[static_cast<std::size_t>(adapter.projection)];
    t.rows = rows.data();
    t.num_rows = static_cast<std::int64_t>(rows.size());
    t.rank = adapter.rank;
    t.num_outputs = p.num_outputs;
    t.scale = adapter.scale;
    if (t.num_rows > 0) {
      with_type(adapter.dtype, [&](auto zero) {
        using Factor = decltype(zero);
        t.a = with_rows<Factor>(
            adapter.a, t.rank, num_inputs, adapter.a_stride_rank, adapter.a_stride_col, arena,
            t.a_stride);
        t.b = with_rows<Factor>(
            adapter.b, t.num_outputs, t.rank, adapter.b_stride_col, adapter.b_stride_rank, arena,
            t.b_stride);
      });
    }
    t.s = arena.take(t.num_rows * t.rank);
    t.ds = arena.take(t.num_rows * t.rank);
    f(t, adapter, p, arena);
  }
  arena.finish();
}

template <class T>
void fwd(const Few& given, const Projection& p, Arena& arena) {
  FewRows t{given.rows,     given.num_rows, given.rank, given.num_inputs, given.num_outputs,
            given.scale,    given.x,        given.a,    given.b,          given.x_stride,
            given.a_stride, given.b_stride, given.s,    p.wide,           p.stride};
  // Factors come from memory once, which takes as long as seven rows' products with them.
  const std::int64_t numbers = t.rank * (t.num_inputs + t.num_outputs);
  const bool parallel = numbers * (t.num_rows + 7) > kThreadsFrom && max_threads() > 1;
  const std::int64_t size = round_up(t.rank * kFewCols, 16);
  float* turned = arena.take(size * (parallel ? max_threads() : 1));
  if (!parallel) {
    shrink_few_rows(t, 0, 1);
    expand_few_rows<T>(t, 0, 1, turned);
    return;
  }
#pragma omp parallel
  {
    const std::int64_t mine = thread(), parts = threads();
    shrink_few_rows(t, mine, parts);
#pragma omp barrier
    expand_few_rows<T>(t, mine, parts, turned + mine * size);
  }
}

}  // namespace

void lora_linear_few_fwd(
    std::uintptr_t x, std::int64_t x_dtype, std::int64_t num_rows, std::int64_t num_inputs,
    std::int64_t x_stride, const std::vector<std::int64_t>& adapters,
    const std::vector<double>& scales, const std::vector<std::int64_t>& projections,
    std::uintptr_t ids, std::int64_t num_ids, std::int64_t num_adapters) {
  with_type(static_cast<Dtype>(x_dtype), [&](auto zero) {
    using T = decltype(zero);
    const auto run = [](const Few& t, const Adapter&, const Projection& p, Arena& arena) {
      if (t.num_rows > 0) fwd<T>(t, p, arena);
    };
    each_adapter<T>(
        x, num_rows, num_inputs, x_stride, adapters, scales, projections, ids, num_ids,
        num_adapters, run);
  });
}

void lora_linear_few_bwd(
    std::uintptr_t x, std::int64_t num_rows, std::int64_t num_inputs, std::int64_t x_stride,
    const std::vector<std::int64_t>& adapters, const std::vector<double>& scales,
    const std::vector<std::int64_t>& projections, std::uintptr_t ids, std::int64_t num_ids,
    std::int64_t num_adapters, std::uintptr_t dx) {
  const auto run = [dx](const Few& given, const Adapter& adapter, const Projection& p, Arena&) {
    auto* da = reinterpret_cast<float*>(adapter.da);
    auto* db = reinterpret_cast<float*>(adapter.db);
    const auto* dy = reinterpret_cast<const float*>(p.wide);
    auto* to = reinterpret_cast<float*>(dx);
    if (dy == nullptr || given.num_rows == 0) {
      if (da != nullptr) std::fill_n(da, given.rank * given.num_inputs, 0.0f);
      if (db != nullptr) std::fill_n(db, given.rank * given.num_outputs, 0.0f);
      return;
    }
    const std::int64_t stride = p.stride;
    multiversion([t = given, da, db, dy, to, stride] {
      if (db != nullptr) {
        shrink_a(t);
        outer_b(t, dy, stride, db);
      }
      if (da == nullptr && to == nullptr) return;
      shrink_b(t, dy, stride);
      if (da != nullptr) outer_a(t, da);
      if (to != nullptr) expand_a(t, to);
    });
  };
  each_adapter<float>(
      x, num_rows, num_inputs, x_stride, adapters, scales, projections, ids, num_ids, num_adapters,
      run);
}

}  // namespace hydra::cpu
