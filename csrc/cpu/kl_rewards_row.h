// Rewards of one row, for kl_rewards.cpp and advantages.cpp.
#pragma once
#include <cstdint>

#include "cpu/multiversion.h"
#include "hydra/kl.h"
#include "hydra/where.h"

namespace hydra::cpu {

struct KLRewards {
  const float* scores;        // (B,)
  const float* logprobs;      // (B, T); the divergence itself for KLEstimator::kExact
  const float* ref_logprobs;  // (B, T); not read for kExact
  const std::uint8_t* mask;   // (B, T)
  std::int64_t num_cols;      // T
  float kl_coef;
  KLEstimator estimator;
  float* rewards;  // (B, T)
};

template <KLEstimator kEstimator>
inline void kl_penalties(
    const float* logprobs, const float* ref_logprobs, const std::uint8_t* mask,
    std::int64_t num_cols, float kl_coef, float* rewards) {
  multiversion([=] {
    // Locals: a captured float could alias what is stored, and would be read again each time.
    const float *p = logprobs, *q = ref_logprobs;
    const std::uint8_t* keep = mask;
    const float weight = -kl_coef;
    float* out = rewards;
    const std::int64_t length = num_cols;
#pragma omp simd
    for (std::int64_t t = 0; t < length; ++t) {
      const float kl =
          kl_estimate<kEstimator>(p[t], kEstimator == KLEstimator::kExact ? 0.0f : q[t]);
      out[t] = where(keep[t] != 0, weight * kl);
    }
    return 0;
  });
}

inline void kl_rewards_row(const KLRewards& in, std::int64_t row) {
  const std::int64_t begin = row * in.num_cols;
  const std::uint8_t* mask = in.mask + begin;
  const float* logprobs = in.logprobs + begin;
  const float* ref_logprobs = in.ref_logprobs == nullptr ? nullptr : in.ref_logprobs + begin;
  float* rewards = in.rewards + begin;
  switch (in.estimator) {
    case KLEstimator::kK1:
      kl_penalties<KLEstimator::kK1>(
          logprobs, ref_logprobs, mask, in.num_cols, in.kl_coef, rewards);
      break;
    case KLEstimator::kK2:
      kl_penalties<KLEstimator::kK2>(
          logprobs, ref_logprobs, mask, in.num_cols, in.kl_coef, rewards);
      break;
    case KLEstimator::kK3:
      kl_penalties<KLEstimator::kK3>(
          logprobs, ref_logprobs, mask, in.num_cols, in.kl_coef, rewards);
      break;
    case KLEstimator::kExact:
      kl_penalties<KLEstimator::kExact>(
          logprobs, ref_logprobs, mask, in.num_cols, in.kl_coef, rewards);
      break;
  }
  std::int64_t last = in.num_cols - 1;
  while (last >= 0 && mask[last] == 0) --last;
  if (last >= 0) rewards[last] += in.scores[row];
}

}  // namespace hydra::cpu
