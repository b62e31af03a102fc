// One call of lora_linear, what it packs, and the steps that a thread takes with 64 rows.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/arena.h"
#include "cpu/floats.h"
#include "cpu/lora_dropout.h"
#include "cpu/lora_layout.h"
#include "cpu/lora_panels.h"

namespace hydra::cpu::lora {

constexpr std::int64_t kParallelWork = 1 << 20;  // multiply-adds below which threads cost more

struct Call {
  std::int64_t num_rows, num_inputs, x_stride;
  std::vector<Adapter> adapters;
  std::vector<Projection> projections;
  Dropout dropout;
  Layout layout;

  std::int64_t groups() const { return (num_inputs + 7) / 8; }
  bool parallel() const {
    return layout.first_off * num_inputs * layout.most_ranks > kParallelWork;
  }
};

// ---- packing the factors that rows need, all columns in parallel

struct Pack {
  Class* of;
  std::ptrdiff_t projection;  // -1: A
  std::int64_t col;
};

inline std::vector<Pack> plan_packs(
    Call& call, bool a_narrow, bool a_wide, bool b_narrow, bool b_wide, Arena& arena) {
  std::vector<Pack> packs;
  for (Class& c : call.layout.classes) {
    if (c.num_rows == 0) continue;
    if (a_narrow || a_wide) {
      make_packed(c.a, call.num_inputs, c.num_ranks, a_narrow, a_wide, arena);
      for (std::int64_t col = 0; col < call.num_inputs; col += kCols) {
        packs.push_back({&c, -1, col});
      }
    }
    c.b.resize(call.projections.size());
    for (std::size_t p = 0; p < c.b.size() && (b_narrow || b_wide); ++p) {
      const std::int64_t n = call.projections[p].num_outputs;
      make_packed(c.b[p], n, c.ranks[p].count, b_narrow, b_wide, arena);
      for (std::int64_t col = 0; col < n; col += kCols) {
        packs.push_back({&c, static_cast<std::ptrdiff_t>(p), col});
      }
    }
  }
  return packs;
}

inline void pack_one(const Call& call, const Pack& task, int wide_block) {
  Class& c = *task.of;
  const bool of_a = task.projection < 0;
  const auto p = static_cast<std::size_t>(task.projection);
  Packed& packed = of_a ? c.a : c.b[p];
  const std::int64_t ranks = of_a ? c.num_ranks : c.ranks[p].count;
  const std::int64_t num_cols = of_a ? call.num_inputs : call.projections[p].num_outputs;
  const int width = static_cast<int>(std::min<std::int64_t>(kCols, num_cols - task.col));
  clear_columns(ranks, task.col, packed);
  for (std::size_t i = 0; i < c.adapters.size(); ++i) {
    const Adapter& f = call.adapters[c.adapters[i]];
    with_type(f.dtype, [&](auto zero) {
      using T = decltype(zero);
      if (of_a) {
        pack_columns(
            reinterpret_cast<const T*>(f.a), f.a_stride_rank, f.a_stride_col, f.rank, c.at[i],
            ranks, task.col, width, wide_block, packed);
      } else if (f.projection == task.projection) {
        pack_columns(
            reinterpret_cast<const T*>(f.b), f.b_stride_rank, f.b_stride_col, f.rank,
            c.at[i] - c.ranks[p].start, ranks, task.col, width, wide_block, packed);
      }
    });
  }
}

// ---- what a thread works with

template <class T>
struct Worker {
  const Call& call;
  const Level<T> fn = level<T>();
  Buffer panel = make_buffer(kRows * kCols);
  Buffer total, s, ds, packed;
  std::vector<std::uint8_t> mask;
  const std::int64_t* index = nullptr;  // of the rows
  int num_rows = 0;
  T* rows[kRows];  // of whichever matrix

  explicit Worker(const Call& c) : call(c) {
    const std::int64_t most = c.layout.most_ranks;
    total = make_buffer(kRows * round_up(most, 64));
    s = make_buffer(kRows * most);
    ds = make_buffer(kRows * most);
    packed = make_buffer(kRows * most);
    std::memset(panel.get(), 0, sizeof(float) * kRows * kCols);
    if (c.dropout.threshold != 0) {
      mask.resize(static_cast<std::size_t>(mask_bytes(kRows, c.groups())));
    }
  }

  void take(std::int64_t first, std::int64_t count) {
    index = call.layout.order.data() + first;
    num_rows = static_cast<int>(count);
  }

  void point(std::uintptr_t at, std::int64_t stride) {
    for (int i = 0; i < num_rows; ++i) rows[i] = reinterpret_cast<T*>(at) + index[i] * stride;
  }

  const std::uint8_t* drawn() const { return mask.empty() ? nullptr : mask.data(); }

  void draw() {
    if (!mask.empty()) draw_mask(index, num_rows, call.groups(), call.dropout, mask.data());
  }

  void load(std::int64_t col, std::int64_t num_cols, const std::uint8_t* bits) {
    const int width = static_cast<int>(std::min<std::int64_t>(kCols, num_cols - col));
    fn.load({rows, num_rows, col, width, bits, call.groups(), panel.get()});
  }

  void start(const Packed& factor) {
    std::memset(
        total.get(), 0,
        sizeof(float) * static_cast<std::size_t>(factor.num_blocks * kRows * factor.shape.lanes));
  }

  void shrink(const Packed& factor, std::int64_t col) {
    factor.shape.run(
        {panel.get(), num_rows, factor.narrow + col * factor.shape.block, factor.stride,
         factor.num_blocks, total.get()});
  }

  // The sums of shrink() times their scale, into columns at .. at + count of `to`.
  void finish(
      const Packed& factor, const Class& c, std::int64_t at, std::int64_t count, float* to) const {
    const int block = factor.shape.block, lanes = factor.shape.lanes;
    for (int b = 0; b < factor.num_blocks; ++b) {
      const std::int64_t first = at + static_cast<std::int64_t>(b) * block;
      const int width = static_cast<int>(std::min<std::int64_t>(block, at + count - first));
      const float* scale = c.scale.data() + first;
      const float* from = total.get() + b * kRows * lanes;
      for (int i = 0; i < num_rows; ++i, from += lanes) {
        float* row = to + i * c.num_ranks + first;
        if (lanes == block) {
          for (int r = 0; r < width; ++r) row[r] = scale[r] * from[r];
        } else {
          for (int r = 0; r < width; ++r) row[r] = scale[r] * (from[2 * r] + from[2 * r + 1]);
        }
      }
    }
  }

  void make_s(const Class& c, std::uintptr_t x) {
    point(x, call.x_stride);
    start(c.a);
    for (std::int64_t col = 0; col < call.num_inputs; col += kCols) {
      load(col, call.num_inputs, drawn());
      shrink(c.a, col);
    }
    finish(c.a, c, 0, c.num_ranks, s.get());
  }

  void expand(
      const float* from, std::int64_t stride, std::int64_t ranks, const Packed* factor,
      const float* bias, std::int64_t num_cols, const std::uint8_t* bits) {
    fn.expand(
        {from, stride, static_cast<int>(ranks), num_rows,
         factor == nullptr ? nullptr : factor->wide, bias, 0, num_cols, bits, call.groups(), rows,
         packed.get()});
  }
};

}  // namespace hydra::cpu::lora
