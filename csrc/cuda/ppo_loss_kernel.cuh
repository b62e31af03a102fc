// Clipped PPO loss: statistics and gradients of every token in one launch and one pass over memory.
//
// Each block writes the sums of its tokens. The one that finishes last, found by an atomic ticket,
// adds them in their order: the ticket decides who adds, not in which order, so the result is the
// same every time. No Torch headers: nvcc alone checks this file.
// SASS expects: ppo_loss_fwd_kernel<true>: wide_loads
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/quad.cuh"
#include "hydra/ppo_loss.h"

namespace hydra::cuda {

constexpr int kPPOThreads = 256;
constexpr int kPPOTile = kPPOThreads * kQuad;

struct PPOLossParams {
  const float *logprobs, *values, *old_logprobs, *old_values, *advantages, *returns, *entropy, *kl;
  const std::uint8_t* mask;
  std::int64_t num_tokens;
  float cliprange, cliprange_value, vf_coef, ent_coef, kl_coef;
  float* partial;    // (num_blocks, kNumPPOSums)
  unsigned* ticket;  // 0 before and after
  float* stats;      // (kNumPPOStats,)
  float *dlogprobs, *dvalues;
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_down_sync(0xffffffffu, x, lane);
  return x;
}

// Adds each of sums over the block, in a fixed order; the result is in thread 0's.
__device__ __forceinline__ void block_sum(float (&sums)[kNumPPOSums]) {
  __shared__ float of_warp[kPPOThreads / 32][kNumPPOSums];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int s = 0; s < kNumPPOSums; ++s) {
    const float total = warp_sum(sums[s]);
    if (lane == 0) of_warp[warp][s] = total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll
    for (int s = 0; s < kNumPPOSums; ++s) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kPPOThreads / 32; ++w) total += of_warp[w][s];
      sums[s] = total;
    }
  }
  __syncthreads();  // of_warp is used again
}

template <bool kAligned>
__global__ void __launch_bounds__(kPPOThreads) ppo_loss_fwd_kernel(const PPOLossParams p) {
  float sums[kNumPPOSums] = {};
  const std::int64_t n = p.num_tokens;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kPPOTile;
  std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPPOTile + threadIdx.x * kQuad;
  for (; i < n; i += stride) {
    bool keep[kQuad];
    load_mask<kAligned>(p.mask, i, n, keep);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) sums[kCount] += keep[k] ? 1.0f : 0.0f;
    if (p.logprobs != nullptr) {
      const Quad logprob = load_quad<kAligned>(p.logprobs, i, n, keep);
      const Quad old_logprob = load_quad<kAligned>(p.old_logprobs, i, n, keep);
      const Quad advantage = load_quad<kAligned>(p.advantages, i, n, keep);
      Quad dlogprob;
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const PolicyLoss token =
            ppo_policy_loss(logprob.at[k], old_logprob.at[k], advantage.at[k], p.cliprange);
        dlogprob.at[k] = token.dlogprob;  // 0 where masked: the advantage is
        sums[kPolicyLoss] += token.loss;
        sums[kApproxKL] += token.approx_kl;
        sums[kClipped] += token.clipped;
        sums[kRatio] += keep[k] ? token.ratio : 0.0f;
      }
      store_quad<kAligned>(p.dlogprobs, i, n, dlogprob);
    }
    if (p.values != nullptr) {
      const Quad value = load_quad<kAligned>(p.values, i, n, keep);
      const Quad old_value = load_quad<kAligned>(p.old_values, i, n, keep);
      const Quad target = load_quad<kAligned>(p.returns, i, n, keep);
      Quad dvalue;
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        const ValueLoss token =
            ppo_value_loss(value.at[k], old_value.at[k], target.at[k], p.cliprange_value);
        dvalue.at[k] = token.dvalue;
        sums[kValueLoss] += token.loss;
        sums[kValueClipped] += token.clipped;
      }
      store_quad<kAligned>(p.dvalues, i, n, dvalue);
    }
    if (p.entropy != nullptr) {
      const Quad entropy = load_quad<kAligned>(p.entropy, i, n, keep);
#pragma unroll
      for (int k = 0; k < kQuad; ++k) sums[kEntropy] += entropy.at[k];
    }
    if (p.kl != nullptr) {
      const Quad kl = load_quad<kAligned>(p.kl, i, n, keep);
#pragma unroll
      for (int k = 0; k < kQuad; ++k) sums[kKL] += kl.at[k];
    }
  }
  block_sum(sums);

  __shared__ bool last;
  if (threadIdx.x == 0) {
    float* mine = p.partial + static_cast<std::int64_t>(blockIdx.x) * kNumPPOSums;
#pragma unroll
    for (int s = 0; s < kNumPPOSums; ++s) mine[s] = sums[s];
    __threadfence();  // the sums are visible to every block before the ticket is
    last = atomicAdd(p.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
#pragma unroll
  for (int s = 0; s < kNumPPOSums; ++s) sums[s] = 0.0f;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kPPOThreads) {
#pragma unroll
    for (int s = 0; s < kNumPPOSums; ++s) {
      sums[s] += __ldcg(p.partial + static_cast<std::int64_t>(block) * kNumPPOSums + s);
    }
  }
  block_sum(sums);
  if (threadIdx.x == 0) {
    ppo_stats(sums, p.vf_coef, p.ent_coef, p.kl_coef, p.stats);
    *p.ticket = 0;
  }
}

// Blocks of a launch, which is also the number of rows of PPOLossParams::partial.
inline int ppo_loss_num_blocks(std::int64_t num_tokens, int num_multiprocessors) {
  const std::int64_t tiles = (num_tokens + kPPOTile - 1) / kPPOTile;
  const std::int64_t most = 8LL * num_multiprocessors;  // 2048 threads of a multiprocessor
  const std::int64_t blocks = tiles < most ? tiles : most;
  return static_cast<int>(blocks > 0 ? blocks : 1);  // one block writes the zeros of no tokens
}

inline cudaError_t launch_ppo_loss_fwd(
    const PPOLossParams& p, int num_blocks, cudaStream_t stream) {
  const bool aligned = quads_aligned(
      {p.logprobs, p.values, p.old_logprobs, p.old_values, p.advantages, p.returns, p.entropy, p.kl,
       p.dlogprobs, p.dvalues},
      p.mask, kQuad);
  if (aligned) {
    ppo_loss_fwd_kernel<true><<<num_blocks, kPPOThreads, 0, stream>>>(p);
  } else {
    ppo_loss_fwd_kernel<false><<<num_blocks, kPPOThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace hydra::cuda
