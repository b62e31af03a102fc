// What a call of lora_linear multiplies with what: rows sorted by their adapter, factors packed.
//
// A class is the adapters that run on the same rows: those of one id, or all of them in a call
// without ids. Its rows are taken together, so that a row is multiplied with its own adapters alone
// and the cost does not depend on how many others there are.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/arena.h"
#include "cpu/floats.h"
#include "cpu/lora_panels.h"

namespace hydra::cpu::lora {

struct Adapter {
  std::uintptr_t a, b;  // (rank, K) and (N, rank)
  std::int64_t a_stride_rank, a_stride_col, b_stride_col, b_stride_rank, rank, owner, projection;
  std::uintptr_t da, db;  // contiguous; 0 where not asked for
  Dtype dtype;
  float scale;
};

struct Projection {
  std::int64_t num_outputs;
  std::uintptr_t wide;  // y, or dy, which may be absent
  std::int64_t stride;  // of its rows
  std::uintptr_t bias;
};

// As Python flattens them: 12 integers an adapter in the order of the fields, 4 a projection.
inline std::vector<Adapter> read_adapters(
    const std::vector<std::int64_t>& flat, const std::vector<double>& scales) {
  std::vector<Adapter> adapters;
  for (std::size_t i = 0; i < scales.size(); ++i) {
    const std::int64_t* f = flat.data() + 12 * i;
    adapters.push_back(
        {static_cast<std::uintptr_t>(f[0]), static_cast<std::uintptr_t>(f[1]), f[2], f[3], f[4],
         f[5], f[6], f[7], f[8], static_cast<std::uintptr_t>(f[9]),
         static_cast<std::uintptr_t>(f[10]), static_cast<Dtype>(f[11]),
         static_cast<float>(scales[i])});
  }
  return adapters;
}

inline std::vector<Projection> read_projections(const std::vector<std::int64_t>& flat) {
  std::vector<Projection> projections;
  for (std::size_t i = 0; 4 * i < flat.size(); ++i) {
    const std::int64_t* f = flat.data() + 4 * i;
    projections.push_back(
        {f[0], static_cast<std::uintptr_t>(f[1]), f[2], static_cast<std::uintptr_t>(f[3])});
  }
  return projections;
}

inline std::int64_t round_up(std::int64_t n, std::int64_t to) {
  return (n + to - 1) / to * to;
}

// Columns of s that belong to one projection: `count` ranks from `start` on.
struct Ranks {
  std::int64_t start, count;
  std::int64_t padded() const { return round_up(count, kRankStep); }
};

// A factor F (C, R) for shrink() in blocks of ranks, and for expand() in blocks of columns.
struct Packed {
  ShrinkShape shape{};
  std::int64_t stride = 0;  // of a block of ranks
  int num_blocks = 0;
  float *narrow = nullptr, *wide = nullptr;
};

struct Class {
  std::vector<std::size_t> adapters;         // in the order of their ranks
  std::vector<std::int64_t> at;              // first column of s of each of them
  std::vector<Ranks> ranks;                  // of each projection
  std::vector<float> scale;                  // of each column of s, 0 where it is padding
  std::int64_t num_ranks = 0;                // with the padding
  std::int64_t first_row = 0, num_rows = 0;  // in Layout::order
  Packed a;                                  // F = A^T, all ranks
  std::vector<Packed> b;                     // F = B of each projection
};

struct Layout {
  std::vector<Class> classes;
  std::vector<std::int64_t> order;  // rows, class after class, those that are off last
  std::int64_t first_off = 0;       // in order
  std::int64_t most_ranks = 0;      // of a class
};

inline void check_id(std::int64_t id, std::int64_t num_adapters) {
  if (id < -1 || id >= num_adapters) {
    throw std::invalid_argument(
        "lora_linear: adapter_ids must be between -1 and " + std::to_string(num_adapters - 1) +
        ", got " + std::to_string(id));
  }
}

// Throws for an id out of range; returns false where no row has an adapter.
inline bool sort_rows(
    const std::int64_t* ids, std::int64_t num_ids, std::int64_t num_adapters, std::int64_t num_rows,
    Layout& layout) {
  auto& classes = layout.classes;
  const std::int64_t rows_per_id = num_ids == 0 ? 0 : num_rows / num_ids;
  const auto class_of = [&](std::int64_t id) -> Class* {
    if (id < 0) return nullptr;
    Class& c = classes[static_cast<std::size_t>(id)];
    return c.num_ranks > 0 ? &c : nullptr;
  };
  if (ids == nullptr) {
    if (classes[0].num_ranks > 0) classes[0].num_rows = num_rows;
  }
  for (std::int64_t i = 0; i < num_ids && ids != nullptr; ++i) {
    check_id(ids[i], num_adapters);
    if (Class* c = class_of(ids[i])) c->num_rows += rows_per_id;
  }
  for (Class& c : classes) {
    c.first_row = layout.first_off;
    layout.first_off += c.num_rows;
    if (c.num_rows > 0) layout.most_ranks = std::max(layout.most_ranks, c.num_ranks);
  }
  if (layout.first_off == 0) return false;
  layout.order.resize(static_cast<std::size_t>(num_rows));
  if (ids == nullptr) {
    for (std::int64_t row = 0; row < num_rows; ++row) {
      layout.order[static_cast<std::size_t>(row)] = row;
    }
    return true;
  }
  std::vector<std::int64_t> next;
  for (const Class& c : classes) next.push_back(c.first_row);
  std::int64_t next_off = layout.first_off;
  for (std::int64_t i = 0; i < num_ids; ++i) {
    const bool on = class_of(ids[i]) != nullptr;
    std::int64_t& to = on ? next[static_cast<std::size_t>(ids[i])] : next_off;
    for (std::int64_t j = 0; j < rows_per_id; ++j) {
      layout.order[static_cast<std::size_t>(to++)] = i * rows_per_id + j;
    }
  }
  return true;
}

// One class for every id, or one for all adapters where there are no ids.
inline std::vector<Class> make_classes(
    const std::vector<Adapter>& adapters, std::size_t num_projections, bool has_ids,
    std::int64_t num_adapters) {
  std::int64_t count = has_ids ? num_adapters : 1;
  for (const Adapter& f : adapters) count = has_ids ? std::max(count, f.owner + 1) : count;
  std::vector<Class> classes(static_cast<std::size_t>(count));
  for (Class& c : classes) c.ranks.resize(num_projections, {0, 0});
  for (std::size_t p = 0; p < num_projections; ++p) {
    for (Class& c : classes) c.ranks[p].start = c.num_ranks;
    for (std::size_t j = 0; j < adapters.size(); ++j) {
      const Adapter& adapter = adapters[j];
      if (adapter.projection != static_cast<std::int64_t>(p)) continue;
      Class& c = classes[has_ids ? static_cast<std::size_t>(adapter.owner) : 0];
      c.adapters.push_back(j);
      c.at.push_back(c.ranks[p].start + c.ranks[p].count);
      c.ranks[p].count += adapter.rank;
      c.scale.insert(c.scale.end(), static_cast<std::size_t>(adapter.rank), adapter.scale);
    }
    for (Class& c : classes) {
      c.num_ranks = c.ranks[p].start + c.ranks[p].padded();
      c.scale.resize(static_cast<std::size_t>(c.num_ranks), 0.0f);
    }
  }
  return classes;
}

// ---- packing

inline void make_packed(
    Packed& packed, std::int64_t num_cols, std::int64_t ranks, bool narrow, bool wide,
    Arena& arena) {
  const std::int64_t cols = round_up(num_cols, kCols);
  packed.shape = shrink_shape(ranks);
  packed.num_blocks = static_cast<int>((ranks + packed.shape.block - 1) / packed.shape.block);
  packed.stride = cols * packed.shape.block;
  if (narrow) packed.narrow = arena.take(packed.num_blocks * packed.stride);
  if (wide) packed.wide = arena.take(cols * ranks);
}

// Columns col .. col + width of a factor whose ranks are `at` on of `ranks`.
template <class T>
void pack_columns(
    const T* factor, std::int64_t stride_rank, std::int64_t stride_col, std::int64_t rank,
    std::int64_t at, std::int64_t ranks, std::int64_t col, int width, int wide_block,
    Packed& packed) {
  const int block = packed.shape.block;
  const bool pairs = packed.shape.lanes != block;
  for (std::int64_t r = 0; r < rank; ++r) {
    const T* from = factor + r * stride_rank + col * stride_col;
    if (packed.narrow != nullptr) {
      const std::int64_t j = (at + r) % block;
      float* to = packed.narrow + (at + r) / block * packed.stride + col * block;
      if (pairs) {
        for (int k = 0; k < width; ++k) {
          to[(k & ~1) * block + 2 * j + (k & 1)] = widen(from[k * stride_col]);
        }
      } else {
        for (int k = 0; k < width; ++k) to[k * block + j] = widen(from[k * stride_col]);
      }
    }
    if (packed.wide != nullptr) {
      float* to = packed.wide + col * ranks + (at + r) * wide_block;
      for (int k = 0; k < width; k += wide_block, to += wide_block * ranks) {
        const int here = std::min(wide_block, width - k);
        for (int i = 0; i < here; ++i) to[i] = widen(from[(k + i) * stride_col]);
      }
    }
  }
}

// Zero where there is no rank and no column.
inline void clear_columns(std::int64_t ranks, std::int64_t col, Packed& packed) {
  const int block = packed.shape.block;
  if (packed.narrow != nullptr) {
    for (int b = 0; b < packed.num_blocks; ++b) {
      float* to = packed.narrow + b * packed.stride + col * block;
      std::memset(to, 0, sizeof(float) * static_cast<std::size_t>(kCols * block));
    }
  }
  if (packed.wide != nullptr) {
    float* to = packed.wide + col * ranks;
    std::memset(to, 0, sizeof(float) * static_cast<std::size_t>(kCols * ranks));
  }
}

}  // namespace hydra::cpu::lora
