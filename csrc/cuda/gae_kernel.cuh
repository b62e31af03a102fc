// Generalised advantage estimation as a block-wide scan of affine maps (hydra/gae.h has the
// algebra), with or without the KL penalty in front of it and the moments of the result behind it.
//
// A block scans its part of a row from the right, a tile of kThreads * 4 tokens at a time: each
// thread composes the maps of its 4 tokens, a warp scans those by shuffles, and the carry goes
// through the warps in order. Where there are too few rows to fill the GPU, a row is cut into
// segments: a first launch reduces each to its map, and every block of the second applies the maps
// right of its own segment, in their order, before it scans. No Torch headers: nvcc alone checks
// this file.
// SASS expects: gae_fwd_kernel<*, true>: wide_loads
// SASS expects: gae_segment_kernel<*, true>: wide_loads
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/block_moments.cuh"
#include "cuda/kl_penalty.cuh"
#include "cuda/quad.cuh"
#include "hydra/gae.h"
#include "hydra/where.h"

namespace hydra::cuda {

struct GAEParams {
  const float* rewards;   // (B, T); null for the fused kernel, which makes them of the next four
  const float* scores;    // (B,)
  const float* logprobs;  // (B, T); the divergence itself for KLEstimator::kExact
  const float* ref_logprobs;  // (B, T); not read for kExact
  float kl_coef;
  KLEstimator estimator;

  const float* values;       // (B, T)
  const std::uint8_t* mask;  // (B, T)
  const float* last_values;  // (B,) or null
  std::int64_t num_rows, num_cols;
  GAECoefs coefs;
  int num_segments;     // of a row
  int tiles;            // of a segment
  float* segment_maps;  // (B, num_segments, 3): scale, shift, 1 if a token counts; null for one

  float* rewards_out;  // (B, T), fused only
  float* advantages;   // (B, T)
  float* returns;      // (B, T)
  MomentsOut moments;  // of the advantages, fused only
};

struct Tokens {
  bool keep[kQuad];
  Quad reward, value;  // 0 where masked
};

// Tokens i..i+3 of the arrays, whose row ends before `end`. Without the score of the sequence.
template <bool kFused, bool kAligned>
__device__ __forceinline__ Tokens
load_tokens(const GAEParams& p, std::int64_t i, std::int64_t end) {
  Tokens tokens;
  load_mask<kAligned>(p.mask, i, end, tokens.keep);
  if (kFused) {
    tokens.reward = kl_penalty<kAligned>(
        p.logprobs, p.ref_logprobs, p.estimator, p.kl_coef, i, end, tokens.keep);
  } else {
    tokens.reward = load_quad<kAligned>(p.rewards, i, end, tokens.keep);
  }
  tokens.value = load_quad<kAligned>(p.values, i, end, tokens.keep);
  return tokens;
}

// The map of a thread's four tokens.
__device__ __forceinline__ AffineMap quad_map(const Tokens& tokens, GAECoefs coefs) {
  AffineMap map{1.0f, 0.0f};
#pragma unroll
  for (int k = kQuad - 1; k >= 0; --k) {
    map = compose(gae_map(tokens.keep[k], tokens.reward.at[k], tokens.value.at[k], coefs), map);
  }
  return map;
}

// After the call a lane has the map of its own and all higher lanes.
__device__ __forceinline__ AffineMap warp_suffix(AffineMap map) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const AffineMap right{
        __shfl_down_sync(0xffffffffu, map.scale, step),
        __shfl_down_sync(0xffffffffu, map.shift, step)};
    if (lane + step < 32) map = compose(map, right);
  }
  return map;
}

// What the threads of a block exchange about one tile.
template <int kThreads>
struct TileShared {
  AffineMap map[kThreads / 32];
  bool counts[kThreads / 32];
};

template <int kThreads, bool kFused, bool kAligned>
__global__ void __launch_bounds__(kThreads) gae_segment_kernel(const GAEParams p) {
  constexpr int kTile = kThreads * kQuad;
  __shared__ TileShared<kThreads> shared[2];
  const std::int64_t row = blockIdx.x;
  const std::int64_t row_begin = row * p.num_cols, row_end = row_begin + p.num_cols;
  const std::int64_t segment_begin = static_cast<std::int64_t>(blockIdx.y) * p.tiles * kTile;
  AffineMap total{1.0f, 0.0f};
  bool any = false;
  for (int tile = p.tiles - 1; tile >= 0; --tile) {
    const std::int64_t begin = segment_begin + static_cast<std::int64_t>(tile) * kTile;
    if (begin >= p.num_cols) continue;  // the same for the whole block
    TileShared<kThreads>& of_tile = shared[tile % 2];
    const Tokens tokens =
        load_tokens<kFused, kAligned>(p, row_begin + begin + threadIdx.x * kQuad, row_end);
    const AffineMap map = warp_suffix(quad_map(tokens, p.coefs));
    const bool mine = tokens.keep[0] || tokens.keep[1] || tokens.keep[2] || tokens.keep[3];
    const bool of_warp = __any_sync(0xffffffffu, mine);
    if (threadIdx.x % 32 == 0) {
      of_tile.map[threadIdx.x / 32] = map;
      of_tile.counts[threadIdx.x / 32] = of_warp;
    }
    __syncthreads();  // one a tile: the tiles take turns with the two halves of shared
#pragma unroll
    for (int w = kThreads / 32 - 1; w >= 0; --w) {
      total = compose(of_tile.map[w], total);
      any = any || of_tile.counts[w];
    }
  }
  if (threadIdx.x == 0) {
    float* out = p.segment_maps + (row * p.num_segments + blockIdx.y) * 3;
    out[0] = total.scale;
    out[1] = total.shift;
    out[2] = any ? 1.0f : 0.0f;
  }
}

template <int kThreads, bool kFused, bool kAligned>
__global__ void __launch_bounds__(kThreads) gae_fwd_kernel(const GAEParams p) {
  constexpr int kTile = kThreads * kQuad;
  constexpr int kWarps = kThreads / 32;
  __shared__ TileShared<kThreads> shared[2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::int64_t row = blockIdx.x;
  const std::int64_t row_begin = row * p.num_cols, row_end = row_begin + p.num_cols;

  float carry = gae_first_carry(p.last_values == nullptr ? 0.0f : p.last_values[row], p.coefs);
  // The score is a reward of the last token that counts, and there a reward and the carry add up.
  const float score = kFused ? p.scores[row] : 0.0f;
  if (kFused) carry += score;
  bool seen = false;  // a token right of the tile counts
  for (int s = p.num_segments - 1; s > static_cast<int>(blockIdx.y); --s) {
    const float* right = p.segment_maps + (row * p.num_segments + s) * 3;
    carry = apply({right[0], right[1]}, carry);
    seen = seen || right[2] != 0.0f;
  }

  ShiftedSums sums{0.0f, 0.0, 0.0, 0.0};
  const std::int64_t segment_begin = static_cast<std::int64_t>(blockIdx.y) * p.tiles * kTile;
  for (int tile = p.tiles - 1; tile >= 0; --tile) {
    const std::int64_t begin = segment_begin + static_cast<std::int64_t>(tile) * kTile;
    if (begin >= p.num_cols) continue;  // the same for the whole block
    TileShared<kThreads>& of_tile = shared[tile % 2];
    const std::int64_t i = row_begin + begin + threadIdx.x * kQuad;
    Tokens tokens = load_tokens<kFused, kAligned>(p, i, row_end);
    const AffineMap suffix = warp_suffix(quad_map(tokens, p.coefs));
    const bool mine = tokens.keep[0] || tokens.keep[1] || tokens.keep[2] || tokens.keep[3];
    const unsigned lanes = __ballot_sync(0xffffffffu, mine);
    if (lane == 0) {
      of_tile.map[warp] = suffix;
      of_tile.counts[warp] = lanes != 0;
    }
    AffineMap right{
        __shfl_down_sync(0xffffffffu, suffix.scale, 1),
        __shfl_down_sync(0xffffffffu, suffix.shift, 1)};
    if (lane == 31) right = {1.0f, 0.0f};
    __syncthreads();  // one a tile: the tiles take turns with the two halves of shared

    float of_warp = carry;     // the carry right of this warp, then of the tile's left neighbour
    float from_right = carry;  // the carry right of this thread's tokens
    bool counts_right = seen;
#pragma unroll
    for (int w = kWarps - 1; w >= 0; --w) {
      if (w == warp) from_right = apply(right, of_warp);
      if (w > warp) counts_right = counts_right || of_tile.counts[w];
      of_warp = apply(of_tile.map[w], of_warp);
      seen = seen || of_tile.counts[w];
    }
    carry = of_warp;
    // lanes >> 32 would be undefined for the last lane
    counts_right = counts_right || (lanes & ~(0xffffffffu >> (31 - lane))) != 0;

    Quad advantage, result;
#pragma unroll
    for (int k = kQuad - 1; k >= 0; --k) {
      const float reward = tokens.reward.at[k], value = tokens.value.at[k];
      const float exact = gae_advantage(reward, value, from_right);
      advantage.at[k] = where(tokens.keep[k], exact);
      result.at[k] = where(tokens.keep[k], exact + value);
      from_right = apply(gae_map(tokens.keep[k], reward, value, p.coefs), from_right);
      if (kFused && tokens.keep[k]) {
        if (!counts_right) tokens.reward.at[k] += score;
        counts_right = true;
        add(sums, advantage.at[k]);
      }
    }
    store_quad<kAligned>(p.advantages, i, row_end, advantage);
    store_quad<kAligned>(p.returns, i, row_end, result);
    if (kFused) store_quad<kAligned>(p.rewards_out, i, row_end, tokens.reward);
  }
  if (kFused) {
    const std::int64_t block = row * gridDim.y + blockIdx.y;
    finish_moments<kThreads>(
        moments_of(sums), p.moments, block, static_cast<std::int64_t>(gridDim.x) * gridDim.y);
  }
}

inline std::int64_t gae_row_tiles(std::int64_t num_cols) {
  const std::int64_t tile = row_threads(num_cols) * kQuad;
  return (num_cols + tile - 1) / tile;
}

// Tiles of a segment: all of a row, or fewer if rows are few. At least 4, so that the segments
// right of a block stay few against its own work.
inline int gae_segment_tiles_for(
    std::int64_t num_rows, std::int64_t num_cols, int num_multiprocessors) {
  const std::int64_t tiles = gae_row_tiles(num_cols);
  const std::int64_t many = 4LL * num_multiprocessors;
  if (num_rows >= many || tiles <= 4) return static_cast<int>(tiles);
  const std::int64_t wanted = (tiles * num_rows + many - 1) / many;
  return static_cast<int>(wanted > 4 ? wanted : 4);
}

template <int kThreads, bool kFused, bool kAligned>
cudaError_t launch_gae(const GAEParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.num_rows), static_cast<unsigned>(p.num_segments));
  if (p.num_segments > 1) {
    gae_segment_kernel<kThreads, kFused, kAligned><<<grid, kThreads, 0, stream>>>(p);
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) return status;
  }
  gae_fwd_kernel<kThreads, kFused, kAligned><<<grid, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <bool kFused>
cudaError_t launch_gae_fwd(const GAEParams& p, cudaStream_t stream) {
  if (p.num_rows * p.num_cols == 0) return cudaSuccess;  // a grid of zero blocks is an error
  const bool aligned = quads_aligned(
      {p.rewards, p.logprobs, p.ref_logprobs, p.values, p.rewards_out, p.advantages, p.returns},
      p.mask, p.num_cols);
  switch (row_threads(p.num_cols)) {
    case 32:
      return aligned ? launch_gae<32, kFused, true>(p, stream)
                     : launch_gae<32, kFused, false>(p, stream);
    case 128:
      return aligned ? launch_gae<128, kFused, true>(p, stream)
                     : launch_gae<128, kFused, false>(p, stream);
    default:
      return aligned ? launch_gae<256, kFused, true>(p, stream)
                     : launch_gae<256, kFused, false>(p, stream);
  }
}

}  // namespace hydra::cuda
