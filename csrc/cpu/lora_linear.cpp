// The adapters of LoRA layers, in one pass over the wide matrices each way; the wide products are
// torch's, added to what is written here.
//
//   forward:  s = gate * (drop(x) A^T), y = s B^T + bias
//   backward: ds = gate * (dy B), dB = dy^T s, dA = ds^T drop(x), dx = drop(ds A)
//
// 64 rows at a time, all of one class (lora_layout.h), go through every product while they are in
// the cache: x and dy are read from memory once, and a dropout mask is drawn once. The factor
// 1 / (1 - p) of dropout is in the gate.
//
// Everything is multiplied and summed in float32, whatever comes in, in an order that the number of
// threads does not change: gradients are sums over chunks of rows, added up in the chunks' order.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/arena.h"
#include "cpu/entries.h"
#include "cpu/floats.h"
#include "cpu/lora_dropout.h"
#include "cpu/lora_layout.h"
#include "cpu/lora_panels.h"
#include "cpu/lora_worker.h"
#include "cpu/parallel.h"

namespace hydra::cpu {
namespace {

using namespace lora;

constexpr std::int64_t kChunkRows = 256;  // rows whose gradients are summed up on their own

Arena& scratch() {
  static thread_local Arena arena;
  arena.start();
  return arena;
}

struct Block {
  const Class* of;  // null: rows that are off
  std::int64_t first, count;
};

// ---- forward

template <class T>
std::vector<float*> wide_biases(const Call& call, Arena& arena) {
  std::vector<float*> biases;
  for (const Projection& p : call.projections) {
    const std::int64_t padded = round_up(p.num_outputs, kCols);
    biases.push_back(arena.take(padded));
    std::fill_n(biases.back(), padded, 0.0f);
    const auto* from = reinterpret_cast<const T*>(p.bias);
    for (std::int64_t n = 0; n < p.num_outputs && from != nullptr; ++n) {
      biases.back()[n] = widen(from[n]);
    }
  }
  return biases;
}

template <class T>
void fwd_block(
    const Call& call, std::uintptr_t x, const std::vector<float*>& biases, const Block& block,
    Worker<T>& w) {
  w.take(block.first, block.count);
  if (block.of != nullptr) {
    w.draw();
    w.make_s(*block.of, x);
  }
  for (std::size_t p = 0; p < call.projections.size(); ++p) {
    const Projection& to = call.projections[p];
    w.point(to.wide, to.stride);
    if (block.of == nullptr) {
      w.expand(nullptr, 0, 0, nullptr, biases[p], to.num_outputs, nullptr);
      continue;
    }
    const Class& c = *block.of;
    w.expand(
        w.s.get() + c.ranks[p].start, c.num_ranks, c.ranks[p].count, &c.b[p], biases[p],
        to.num_outputs, nullptr);
  }
}

template <class T>
void fwd(Call& call, std::uintptr_t x) {
  Arena& arena = scratch();
  std::vector<Block> blocks;
  const auto add = [&](const Class* c, std::int64_t first, std::int64_t count) {
    for (std::int64_t row = 0; row < count; row += kRows) {
      blocks.push_back({c, first + row, std::min<std::int64_t>(kRows, count - row)});
    }
  };
  for (const Class& c : call.layout.classes) add(&c, c.first_row, c.num_rows);
  add(nullptr, call.layout.first_off, call.num_rows - call.layout.first_off);
  const auto packs = plan_packs(call, true, false, false, true, arena);
  const auto biases = wide_biases<T>(call, arena);
#pragma omp parallel if (call.parallel())
  {
    Worker<T> worker(call);
#pragma omp for schedule(static)
    for (std::size_t i = 0; i < packs.size(); ++i) pack_one(call, packs[i], worker.fn.block);
#pragma omp for schedule(dynamic, 1)
    for (std::size_t i = 0; i < blocks.size(); ++i) fwd_block(call, x, biases, blocks[i], worker);
  }
  arena.finish();
}

// ---- backward

// Sums of a class: dA (num_ranks, K) and then dB^T (ranks, N) of each projection, rows padded.
struct Sums {
  std::int64_t cols_a;
  std::vector<std::int64_t> at_b, cols_b;
  std::int64_t size;

  Sums(const Call& call, const Class& c) : cols_a(round_up(call.num_inputs, kCols)) {
    size = c.num_ranks * cols_a;
    for (std::size_t p = 0; p < call.projections.size(); ++p) {
      at_b.push_back(size);
      cols_b.push_back(round_up(call.projections[p].num_outputs, kCols));
      size += c.ranks[p].padded() * cols_b.back();
    }
  }
};

struct Wanted {
  bool x, a, b;
};

template <class T>
void bwd_rows(
    const Call& call, std::uintptr_t x, std::uintptr_t dx, const Wanted& want, const Class& c,
    const Sums& sums, const float* zeros, float* g, Worker<T>& w) {
  w.draw();
  if (want.b) w.make_s(c, x);
  const bool want_ds = want.a || want.x;
  if (want_ds) {
    std::memset(w.ds.get(), 0, sizeof(float) * static_cast<std::size_t>(kRows * c.num_ranks));
  }
  for (std::size_t p = 0; p < call.projections.size(); ++p) {
    const Projection& from = call.projections[p];
    if (from.wide == 0 || c.ranks[p].count == 0) continue;
    w.point(from.wide, from.stride);
    if (want_ds) w.start(c.b[p]);
    for (std::int64_t col = 0; col < from.num_outputs; col += kCols) {
      w.load(col, from.num_outputs, nullptr);
      if (want_ds) w.shrink(c.b[p], col);
      if (want.b) {
        w.fn.outer(
            {w.panel.get(), w.num_rows, w.s.get() + c.ranks[p].start, c.num_ranks,
             c.ranks[p].padded(), g + sums.at_b[p] + col, sums.cols_b[p]});
      }
    }
    if (want_ds) w.finish(c.b[p], c, c.ranks[p].start, c.ranks[p].count, w.ds.get());
  }
  if (want.a) {
    w.point(x, call.x_stride);
    for (std::int64_t col = 0; col < call.num_inputs; col += kCols) {
      w.load(col, call.num_inputs, w.drawn());
      w.fn.outer(
          {w.panel.get(), w.num_rows, w.ds.get(), c.num_ranks, c.num_ranks, g + col, sums.cols_a});
    }
  }
  if (want.x) {
    w.point(dx, call.num_inputs);
    w.expand(w.ds.get(), c.num_ranks, c.num_ranks, &c.a, zeros, call.num_inputs, w.drawn());
  }
}

constexpr std::int64_t kWriteCols = 512;

// A gradient's columns col .. col + kWriteCols.
struct Write {
  std::size_t of, adapter;  // the class, and which of its adapters
  bool of_b;
  std::int64_t col;
};

std::vector<Write> plan_writes(const Call& call) {
  std::vector<Write> writes;
  for (std::size_t i = 0; i < call.layout.classes.size(); ++i) {
    const Class& c = call.layout.classes[i];
    for (std::size_t j = 0; j < c.adapters.size(); ++j) {
      const Adapter& f = call.adapters[c.adapters[j]];
      const std::int64_t n = call.projections[static_cast<std::size_t>(f.projection)].num_outputs;
      for (std::int64_t col = 0; col < call.num_inputs && f.da != 0; col += kWriteCols) {
        writes.push_back({i, j, false, col});
      }
      for (std::int64_t col = 0; col < n && f.db != 0; col += kWriteCols) {
        writes.push_back({i, j, true, col});
      }
    }
  }
  return writes;
}

// dA (rank, K), or dB (N, rank), from its class's sums; zeros where there are none.
template <class T>
void write_grad(const Call& call, const Write& task, const Sums& sums, const float* total) {
  const Class& c = call.layout.classes[task.of];
  const Adapter& f = call.adapters[c.adapters[task.adapter]];
  const auto p = static_cast<std::size_t>(f.projection);
  const std::int64_t cols = task.of_b ? call.projections[p].num_outputs : call.num_inputs;
  const std::int64_t stride = task.of_b ? sums.cols_b[p] : sums.cols_a;
  const std::int64_t at = c.at[task.adapter];
  const std::int64_t first =
      task.of_b ? sums.at_b[p] + (at - c.ranks[p].start) * stride : at * stride;
  auto* to = reinterpret_cast<T*>(task.of_b ? f.db : f.da);
  const std::int64_t to_rank = task.of_b ? 1 : cols, to_col = task.of_b ? f.rank : 1;
  const std::int64_t end = std::min(task.col + kWriteCols, cols);
  for (std::int64_t r = 0; r < f.rank; ++r) {
    for (std::int64_t col = task.col; col < end; ++col) {
      const float value = total == nullptr ? 0.0f : total[first + r * stride + col];
      narrow(value, to + r * to_rank + col * to_col);
    }
  }
}

template <class T>
void bwd(Call& call, std::uintptr_t x, std::uintptr_t dx, const Wanted& want) {
  struct Chunk {
    std::size_t of;  // its class
    std::int64_t first, count;
    bool starts;  // its class's sums
  };
  auto& classes = call.layout.classes;
  std::vector<Chunk> chunks;
  std::vector<Sums> sums;
  std::vector<float*> totals(classes.size());
  Arena& arena = scratch();
  std::int64_t most = 0;
  for (std::size_t i = 0; i < classes.size(); ++i) {
    const Class& c = classes[i];
    sums.emplace_back(call, c);
    if (c.num_rows == 0) continue;
    totals[i] = arena.take(sums[i].size);
    most = std::max(most, sums[i].size);
    // Equal parts, in whole blocks of rows, whatever the number of threads.
    const std::int64_t parts = (c.num_rows + kChunkRows - 1) / kChunkRows;
    const std::int64_t size = round_up((c.num_rows + parts - 1) / parts, 16);
    for (std::int64_t row = 0; row < c.num_rows; row += size) {
      chunks.push_back({i, c.first_row + row, std::min(size, c.num_rows - row), row == 0});
    }
  }
  const auto packs = plan_packs(call, want.b, want.x, want.a || want.x, false, arena);
  const auto writes = plan_writes(call);
  const std::size_t threads = call.parallel() ? static_cast<std::size_t>(max_threads()) : 1;
  std::vector<float*> partial;
  for (std::size_t i = 0; i < std::min(threads, chunks.size()); ++i) {
    partial.push_back(arena.take(most));
  }
  float* zeros = arena.take(round_up(call.num_inputs, kCols));
  std::fill_n(zeros, round_up(call.num_inputs, kCols), 0.0f);
  const std::size_t wave = partial.size();
#pragma omp parallel if (call.parallel())
  {
    Worker<T> w(call);
#pragma omp for schedule(static)
    for (std::size_t i = 0; i < packs.size(); ++i) pack_one(call, packs[i], w.fn.block);
    for (std::size_t first = 0; first < chunks.size(); first += wave) {
      const std::size_t here = std::min(wave, chunks.size() - first);
#pragma omp for schedule(static, 1)
      for (std::size_t i = 0; i < here; ++i) {
        const Chunk& chunk = chunks[first + i];
        const Class& c = classes[chunk.of];
        float* g = partial[i];
        std::memset(g, 0, sizeof(float) * static_cast<std::size_t>(sums[chunk.of].size));
        for (std::int64_t row = 0; row < chunk.count; row += kRows) {
          w.take(chunk.first + row, std::min<std::int64_t>(kRows, chunk.count - row));
          bwd_rows(call, x, dx, want, c, sums[chunk.of], zeros, g, w);
        }
      }
      constexpr std::int64_t kPiece = 4096;
      const std::int64_t pieces = want.a || want.b ? (most + kPiece - 1) / kPiece : 0;
#pragma omp for schedule(static)
      for (std::int64_t piece = 0; piece < pieces; ++piece) {
        for (std::size_t i = 0; i < here; ++i) {
          const Chunk& chunk = chunks[first + i];
          const std::int64_t end = std::min((piece + 1) * kPiece, sums[chunk.of].size);
          float* to = totals[chunk.of];
          const float* from = partial[i];
          if (chunk.starts) {
            for (std::int64_t j = piece * kPiece; j < end; ++j) to[j] = from[j];
          } else {
            for (std::int64_t j = piece * kPiece; j < end; ++j) to[j] += from[j];
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (std::size_t i = 0; i < writes.size(); ++i) {
      const std::size_t of = writes[i].of;
      const Adapter& f = call.adapters[classes[of].adapters[writes[i].adapter]];
      with_type(f.dtype, [&](auto zero) {
        write_grad<decltype(zero)>(call, writes[i], sums[of], totals[of]);
      });
    }
    const std::int64_t off = call.num_rows - call.layout.first_off;
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < (want.x ? off : 0); row += kRows) {
      w.take(call.layout.first_off + row, std::min<std::int64_t>(kRows, off - row));
      w.point(dx, call.num_inputs);
      w.expand(nullptr, 0, 0, nullptr, zeros, call.num_inputs, nullptr);
    }
  }
  arena.finish();
}

// ---- merging

// Rows first .. of W + sum of scale B A, 64 at most.
void merge_rows(
    const Call& call, std::uintptr_t weight, std::int64_t weight_stride, std::int64_t first,
    std::int64_t num_outputs, float* out, Worker<float>& w) {
  const Class& c = call.layout.classes[0];
  w.num_rows = static_cast<int>(std::min<std::int64_t>(kRows, num_outputs - first));
  std::memset(w.s.get(), 0, sizeof(float) * static_cast<std::size_t>(kRows * c.num_ranks));
  for (std::size_t i = 0; i < c.adapters.size(); ++i) {
    const Adapter& f = call.adapters[c.adapters[i]];
    const auto* b = reinterpret_cast<const float*>(f.b);
    for (int row = 0; row < w.num_rows; ++row) {
      float* to = w.s.get() + row * c.num_ranks + c.at[i];
      const float* from = b + (first + row) * f.b_stride_col;
      for (std::int64_t r = 0; r < f.rank; ++r) to[r] = f.scale * from[r * f.b_stride_rank];
    }
  }
  for (int i = 0; i < w.num_rows; ++i) w.rows[i] = out + (first + i) * call.num_inputs;
  const auto* base = reinterpret_cast<const float*>(weight) + first * weight_stride;
  w.fn.expand(
      {w.s.get(), c.num_ranks, static_cast<int>(c.num_ranks), w.num_rows, c.a.wide, base,
       weight_stride, call.num_inputs, nullptr, 0, w.rows, w.packed.get()});
}

// The arguments of both entries; false where no row has an adapter.
bool read_call(
    std::int64_t num_rows, std::int64_t num_inputs, std::int64_t x_stride,
    const std::vector<std::int64_t>& adapters, const std::vector<double>& scales,
    const std::vector<std::int64_t>& projections, std::uintptr_t ids, std::int64_t num_ids,
    std::int64_t num_adapters, double dropout, std::uintptr_t seed, Call& call) {
  call.num_rows = num_rows;
  call.num_inputs = num_inputs;
  call.x_stride = x_stride;
  call.adapters = read_adapters(adapters, scales);
  call.projections = read_projections(projections);
  call.dropout = make_dropout(dropout, reinterpret_cast<const std::int64_t*>(seed));
  const auto* id = reinterpret_cast<const std::int64_t*>(ids);
  call.layout.classes =
      make_classes(call.adapters, call.projections.size(), id != nullptr, num_adapters);
  return sort_rows(id, num_ids, num_adapters, num_rows, call.layout);
}

}  // namespace

bool lora_linear_fwd(
    std::uintptr_t x, std::int64_t x_dtype, std::int64_t num_rows, std::int64_t num_inputs,
    std::int64_t x_stride, const std::vector<std::int64_t>& adapters,
    const std::vector<double>& scales, const std::vector<std::int64_t>& projections,
    std::uintptr_t ids, std::int64_t num_ids, std::int64_t num_adapters, double dropout,
    std::uintptr_t seed) {
  Call call;
  const bool any = read_call(
      num_rows, num_inputs, x_stride, adapters, scales, projections, ids, num_ids, num_adapters,
      dropout, seed, call);
  if (!any) return false;
  with_type(static_cast<Dtype>(x_dtype), [&](auto zero) { fwd<decltype(zero)>(call, x); });
  return true;
}

bool lora_linear_bwd(
    std::uintptr_t x, std::int64_t x_dtype, std::int64_t num_rows, std::int64_t num_inputs,
    std::int64_t x_stride, const std::vector<std::int64_t>& adapters,
    const std::vector<double>& scales, const std::vector<std::int64_t>& projections,
    std::uintptr_t ids, std::int64_t num_ids, std::int64_t num_adapters, double dropout,
    std::uintptr_t seed, std::uintptr_t dx) {
  Call call;
  const bool any = read_call(
      num_rows, num_inputs, x_stride, adapters, scales, projections, ids, num_ids, num_adapters,
      dropout, seed, call);
  if (!any) return false;
  Wanted want{dx != 0, false, false};
  for (const Adapter& f : call.adapters) {
    want.a |= f.da != 0;
    want.b |= f.db != 0;
  }
  with_type(
      static_cast<Dtype>(x_dtype), [&](auto zero) { bwd<decltype(zero)>(call, x, dx, want); });
  return true;
}

void lora_linear_merged(
    std::uintptr_t weight, std::int64_t weight_stride, std::int64_t num_outputs,
    std::int64_t num_inputs, const std::vector<std::int64_t>& adapters,
    const std::vector<double>& scales, std::uintptr_t merged) {
  Call call;
  read_call(
      num_outputs, num_inputs, 0, adapters, scales, {num_outputs, 0, 0, 0}, 0, 0, 1, 0.0, 0, call);
  Arena& arena = scratch();
  call.layout.classes[0].num_rows = num_outputs;
  const auto packs = plan_packs(call, false, true, false, false, arena);
#pragma omp parallel if (call.parallel())
  {
    Worker<float> worker(call);
#pragma omp for schedule(static)
    for (std::size_t i = 0; i < packs.size(); ++i) pack_one(call, packs[i], worker.fn.block);
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < num_outputs; row += kRows) {
      merge_rows(
          call, weight, weight_stride, row, num_outputs, reinterpret_cast<float*>(merged), worker);
    }
  }
  arena.finish();
}

std::int64_t lora_linear_only_id(
    std::uintptr_t ids, std::int64_t num_ids, std::int64_t num_adapters) {
  const auto* id = reinterpret_cast<const std::int64_t*>(ids);
  bool alike = true;
  for (std::int64_t i = 0; i < num_ids; ++i) {
    check_id(id[i], num_adapters);
    alike &= id[i] == id[0];
  }
  if (num_ids == 0) return -1;
  return alike ? id[0] : -2;
}

}  // namespace hydra::cpu
