// lora_linear on so few numbers that a call costs more than its products: one thread, no sorting of
// rows, no packing. What csrc/cpu/lora_linear.cpp says in one place, here the rows of one adapter
// after those of another, and added to what the wide product has written: rows that are off keep
// its bits.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/arena.h"
#include "cpu/entries.h"
#include "cpu/lora_layout.h"
#include "cpu/multiversion.h"

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

// ---- with B (N, rank), whose rows are short: kWide rows of y, or kWide ranks, at once

constexpr int kWide = 8;
using Lanes = Vector<kWide>::type;

// y += s B^T
HYDRA_INLINE void expand_b(const Few& t, float* y, std::int64_t stride, float* turned) {
  for (std::int64_t first = 0; first < t.num_rows; first += kWide) {
    const std::int64_t here = std::min<std::int64_t>(kWide, t.num_rows - first);
    for (std::int64_t r = 0; r < t.rank; ++r) {
      for (std::int64_t i = 0; i < kWide; ++i) {
        turned[r * kWide + i] = i < here ? t.s[(first + i) * t.rank + r] : 0.0f;
      }
    }
    for (std::int64_t n = 0; n < t.num_outputs; ++n) {
      const float* b = t.b + n * t.b_stride;
      Lanes even = {}, odd = {}, s;
      std::int64_t r = 0;
      for (; r + 1 < t.rank; r += 2) {
        load<kWide>(s, turned + r * kWide);
        even += b[r] * s;
        load<kWide>(s, turned + (r + 1) * kWide);
        odd += b[r + 1] * s;
      }
      if (r < t.rank) {
        load<kWide>(s, turned + r * kWide);
        even += b[r] * s;
      }
      even += odd;
      for (std::int64_t i = 0; i < here; ++i) y[t.rows[first + i] * stride + n] += even[i];
    }
  }
}

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

Arena& scratch() {
  static thread_local Arena arena;
  arena.start();
  return arena;
}

// A matrix whose rows have their numbers side by side, copied where they have not.
const float* with_rows(
    std::uintptr_t matrix, std::int64_t num_rows, std::int64_t num_cols, std::int64_t stride_row,
    std::int64_t stride_col, Arena& arena, std::int64_t& stride) {
  const auto* from = reinterpret_cast<const float*>(matrix);
  stride = stride_row;
  if (stride_col == 1) return from;
  float* to = arena.take(num_rows * num_cols);
  for (std::int64_t row = 0; row < num_rows; ++row) {
    for (std::int64_t col = 0; col < num_cols; ++col) {
      to[row * num_cols + col] = from[row * stride_row + col * stride_col];
    }
  }
  stride = num_cols;
  return to;
}

// Runs f on each adapter's task; ids are known to be in range.
template <class F>
void each_adapter(
    std::uintptr_t x, std::int64_t num_rows, std::int64_t num_inputs, std::int64_t x_stride,
    const std::vector<std::int64_t>& adapters, const std::vector<double>& scales,
    const std::vector<std::int64_t>& projections, std::uintptr_t ids, std::int64_t num_ids,
    std::int64_t num_adapters, const F& f) {
  const auto* id = reinterpret_cast<const std::int64_t*>(ids);
  for (std::int64_t i = 0; i < num_ids; ++i) check_id(id[i], num_adapters);
  const std::int64_t rows_per_id = num_ids == 0 ? 0 : num_rows / num_ids;
  const auto to = read_projections(projections);
  std::vector<std::int64_t> rows;
  rows.reserve(static_cast<std::size_t>(num_rows));
  for (const Adapter& adapter : read_adapters(adapters, scales)) {
    rows.clear();
    for (std::int64_t row = 0; row < num_rows; ++row) {
      if (id == nullptr || id[row / rows_per_id] == adapter.owner) rows.push_back(row);
    }
    const Projection& p = to[static_cast<std::size_t>(adapter.projection)];
    Arena& arena = scratch();
    const auto size = static_cast<std::int64_t>(rows.size()) * adapter.rank;
    Few t{};
    t.rows = rows.data();
    t.num_rows = static_cast<std::int64_t>(rows.size());
    t.rank = adapter.rank;
    t.num_inputs = num_inputs;
    t.num_outputs = p.num_outputs;
    t.scale = adapter.scale;
    t.x = reinterpret_cast<const float*>(x);
    t.x_stride = x_stride;
    if (t.num_rows > 0) {
      t.a = with_rows(
          adapter.a, t.rank, num_inputs, adapter.a_stride_rank, adapter.a_stride_col, arena,
          t.a_stride);
      t.b = with_rows(
          adapter.b, t.num_outputs, t.rank, adapter.b_stride_col, adapter.b_stride_rank, arena,
          t.b_stride);
    }
    t.s = arena.take(size);
    t.ds = arena.take(size);
    f(t, adapter, p, arena);
    arena.finish();
  }
}

}  // namespace

void lora_linear_few_fwd(
    std::uintptr_t x, std::int64_t num_rows, std::int64_t num_inputs, std::int64_t x_stride,
    const std::vector<std::int64_t>& adapters, const std::vector<double>& scales,
    const std::vector<std::int64_t>& projections, std::uintptr_t ids, std::int64_t num_ids,
    std::int64_t num_adapters) {
  const auto run = [](const Few& given, const Adapter&, const Projection& p, Arena& arena) {
    if (given.num_rows == 0) return;
    auto* y = reinterpret_cast<float*>(p.wide);
    float* turned = arena.take(given.rank * kWide);
    const std::int64_t stride = p.stride;
    multiversion([t = given, y, stride, turned] {
      shrink_a(t);
      expand_b(t, y, stride, turned);
    });
  };
  each_adapter(
      x, num_rows, num_inputs, x_stride, adapters, scales, projections, ids, num_ids, num_adapters,
      run);
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
  each_adapter(
      x, num_rows, num_inputs, x_stride, adapters, scales, projections, ids, num_ids, num_adapters,
      run);
}

}  // namespace hydra::cpu
