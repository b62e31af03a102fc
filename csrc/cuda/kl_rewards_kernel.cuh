// Per-token rewards in one launch: a KL penalty on every token and the score on the last. No Torch
// headers: nvcc alone checks this file.
// SASS expects: kl_rewards_fwd_kernel<*, true>: wide_loads
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/kl_penalty.cuh"
#include "cuda/quad.cuh"

namespace hydra::cuda {

struct KLRewardsParams {
  const float* scores;        // (B,)
  const float* logprobs;      // (B, T); the divergence itself for KLEstimator::kExact
  const float* ref_logprobs;  // (B, T); not read for kExact
  const std::uint8_t* mask;   // (B, T)
  std::int64_t num_rows, num_cols;
  float kl_coef;
  KLEstimator estimator;
  float* rewards;  // (B, T)
};

template <int kThreads, bool kAligned>
__global__ void __launch_bounds__(kThreads) kl_rewards_fwd_kernel(const KLRewardsParams p) {
  constexpr int kTile = kThreads * kQuad;
  const std::int64_t row = blockIdx.x;
  const std::int64_t row_begin = row * p.num_cols, row_end = row_begin + p.num_cols;
  const std::int64_t tile_begin = row_begin + static_cast<std::int64_t>(blockIdx.y) * kTile;
  const std::int64_t i = tile_begin + threadIdx.x * kQuad;
  bool keep[kQuad];
  load_mask<kAligned>(p.mask, i, row_end, keep);
  Quad reward =
      kl_penalty<kAligned>(p.logprobs, p.ref_logprobs, p.estimator, p.kl_coef, i, row_end, keep);

  __shared__ int last;  // quad of the tile's last token that counts
  if (threadIdx.x == 0) last = -1;
  __syncthreads();
  const bool mine = keep[0] || keep[1] || keep[2] || keep[3];
  if (mine) atomicMax(&last, static_cast<int>(threadIdx.x));  // integers: no order to depend on
  __syncthreads();
  if (last >= 0) {
    // Whether a token right of this tile counts; the first tile looked at mostly tells.
    int right = 0;
    for (std::int64_t ahead = tile_begin + kTile; ahead < row_end && right == 0; ahead += kTile) {
      bool counts[kQuad];
      load_mask<kAligned>(p.mask, ahead + threadIdx.x * kQuad, row_end, counts);
      right = __syncthreads_or(counts[0] || counts[1] || counts[2] || counts[3]);
    }
    if (right == 0 && static_cast<int>(threadIdx.x) == last) {
      const float score = p.scores[row];
      bool placed = false;
#pragma unroll
      for (int k = kQuad - 1; k >= 0; --k) {
        if (keep[k] && !placed) {
          reward.at[k] += score;
          placed = true;
        }
      }
    }
  }
  store_quad<kAligned>(p.rewards, i, row_end, reward);
}

template <int kThreads>
cudaError_t launch_kl_rewards(const KLRewardsParams& p, cudaStream_t stream) {
  constexpr int kTile = kThreads * kQuad;
  const dim3 grid(
      static_cast<unsigned>(p.num_rows), static_cast<unsigned>((p.num_cols + kTile - 1) / kTile));
  if (quads_aligned({p.logprobs, p.ref_logprobs, p.rewards}, p.mask, p.num_cols)) {
    kl_rewards_fwd_kernel<kThreads, true><<<grid, kThreads, 0, stream>>>(p);
  } else {
    kl_rewards_fwd_kernel<kThreads, false><<<grid, kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

inline cudaError_t launch_kl_rewards_fwd(const KLRewardsParams& p, cudaStream_t stream) {
  if (p.num_rows * p.num_cols == 0) return cudaSuccess;  // a grid of zero blocks is an error
  switch (row_threads(p.num_cols)) {
    case 32:
      return launch_kl_rewards<32>(p, stream);
    case 128:
      return launch_kl_rewards<128>(p, stream);
    default:
      return launch_kl_rewards<256>(p, stream);
  }
}

}  // namespace hydra::cuda
