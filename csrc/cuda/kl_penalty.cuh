// KL penalty of four neighbouring tokens, for kl_rewards and the fused advantages. No Torch
// headers: nvcc alone checks this file.
#pragma once
#include <cstdint>

#include "cuda/quad.cuh"
#include "hydra/kl.h"
#include "hydra/where.h"

namespace hydra::cuda {

__device__ __forceinline__ float kl_of(KLEstimator estimator, float logprob, float ref_logprob) {
  switch (estimator) {
    case KLEstimator::kK1:
      return kl_estimate<KLEstimator::kK1>(logprob, ref_logprob);
    case KLEstimator::kK2:
      return kl_estimate<KLEstimator::kK2>(logprob, ref_logprob);
    case KLEstimator::kK3:
      return kl_estimate<KLEstimator::kK3>(logprob, ref_logprob);
    default:
      return logprob;
  }
}

template <bool kAligned>
__device__ __forceinline__ Quad kl_penalty(
    const float* logprobs, const float* ref_logprobs, KLEstimator estimator, float kl_coef,
    std::int64_t i, std::int64_t n, const bool (&keep)[kQuad]) {
  const Quad logprob = load_quad<kAligned>(logprobs, i, n, keep);
  Quad ref_logprob = logprob;
  if (estimator != KLEstimator::kExact) ref_logprob = load_quad<kAligned>(ref_logprobs, i, n, keep);
  Quad out;
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    out.at[k] = where(keep[k], -kl_coef * kl_of(estimator, logprob.at[k], ref_logprob.at[k]));
  }
  return out;
}

}  // namespace hydra::cuda
