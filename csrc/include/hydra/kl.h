// Schulman's estimators of KL(policy || reference) from one token sampled by the policy.
//
// Source: J. Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html.
// With r = exp(ref_logprob - logprob): k1 = -log r, k2 = (log r)^2 / 2, k3 = (r - 1) - log r.
#pragma once
#include "hydra/fast_exp.h"
#include "hydra/host_device.h"

namespace hydra {

// log r is cut here in r, so that finite inputs give finite rewards; as kLogRatioLimit of
// ppo_loss.h.
constexpr float kKLLogRatioLimit = 60.0f;

// exp(d) - 1 - d. Where the terms cancel, its Taylor series: the subtraction would leave 2 digits
// of a d of 1e-3, where a policy that has just left its reference is.
HYDRA_HOST_DEVICE float exp_minus_1_minus(float d) {
  float p = 2.0876757e-9f;    // 1 / 12!
  p = p * d + 2.5052108e-8f;  // 1 / 11!
  p = p * d + 2.7557319e-7f;  // 1 / 10!
  p = p * d + 2.7557319e-6f;  // 1 / 9!
  p = p * d + 2.4801587e-5f;  // 1 / 8!
  p = p * d + 1.9841270e-4f;  // 1 / 7!
  p = p * d + 1.3888889e-3f;  // 1 / 6!
  p = p * d + 8.3333333e-3f;  // 1 / 5!
  p = p * d + 4.1666667e-2f;  // 1 / 4!
  p = p * d + 1.6666667e-1f;  // 1 / 3!
  p = p * d + 0.5f;
  const float series = p * d * d;
  const float cut = d > kKLLogRatioLimit ? kKLLogRatioLimit : d;
  const float direct = (fast_exp(cut) - 1.0f) - d;
  return d > -1.0f && d < 1.0f ? series : direct;
}

enum class KLEstimator : int { kK1 = 0, kK2 = 1, kK3 = 2, kExact = 3 };

// kExact takes the divergence itself in place of logprob.
template <KLEstimator kEstimator>
HYDRA_HOST_DEVICE float kl_estimate(float logprob, float ref_logprob) {
  if constexpr (kEstimator == KLEstimator::kExact) {
    return logprob;
  } else {
    const float log_ratio = ref_logprob - logprob;
    if constexpr (kEstimator == KLEstimator::kK1) {
      return -log_ratio;
    } else if constexpr (kEstimator == KLEstimator::kK2) {
      return 0.5f * log_ratio * log_ratio;
    } else {
      return exp_minus_1_minus(log_ratio);
    }
  }
}

}  // namespace hydra
