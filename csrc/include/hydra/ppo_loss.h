// Clipped PPO losses of one token and their derivatives.
//
// Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7 (negated, so that it is minimised), and the
// clipped value loss of the same authors' code: 0.5 max((v - R)^2, (clamp(v, v_old +- eps) - R)^2).
#pragma once
#include <cmath>

#include "hydra/fast_exp.h"
#include "hydra/host_device.h"

namespace hydra {

// |log ratio| is cut here, so that finite inputs give finite losses: exp(60) = 1e26 leaves room for
// advantages and sums in float32. A policy that has moved this far has no gradient worth taking.
constexpr float kLogRatioLimit = 60.0f;

struct PolicyLoss {
  float loss;       // max(-A r, -A clamp(r, 1 - eps, 1 + eps)), r = exp(logprob - old_logprob)
  float dlogprob;   // d loss / d logprob: -A r, or 0 where the clipped branch is the larger
  float clipped;    // 1 where the clipped branch is strictly larger, as counted by clipfrac
  float approx_kl;  // (r - 1) - log r: Schulman's k3
  float ratio;
};

HYDRA_HOST_DEVICE PolicyLoss
ppo_policy_loss(float logprob, float old_logprob, float advantage, float cliprange) {
  // One selection a step: GCC turns chains of them into jumps, and then has no vectors.
  const float log_ratio = logprob - old_logprob;
  const bool cut = fabsf(log_ratio) > kLogRatioLimit;
  const float inside = cut ? copysignf(kLogRatioLimit, log_ratio) : log_ratio;
  const float ratio = fast_exp_in_range(inside);
  // The only end of the clip range that can make the loss larger: of the other, or within the
  // range, the unclipped branch is. So this is the maximum of eq. 7.
  const float end = advantage < 0.0f ? 1.0f - cliprange : 1.0f + cliprange;
  const float unclipped_loss = -advantage * ratio;
  const float clipped_loss = -advantage * end;
  const bool clipped = clipped_loss > unclipped_loss;
  PolicyLoss out;
  out.loss = clipped ? clipped_loss : unclipped_loss;
  out.dlogprob = (clipped | cut) ? 0.0f : unclipped_loss;
  out.clipped = clipped ? 1.0f : 0.0f;
  out.approx_kl = (ratio - 1.0f) - inside;
  out.ratio = ratio;
  return out;
}

struct ValueLoss {
  float loss;     // 0.5 max((v - R)^2, (v_clipped - R)^2)
  float dvalue;   // d loss / d v: v - R, or 0 where the clipped branch is the larger
  float clipped;  // 1 where the clipped branch is strictly larger, as counted by vf_clipfrac
};

HYDRA_HOST_DEVICE ValueLoss
ppo_value_loss(float value, float old_value, float returns, float cliprange_value) {
  // v clamped between old +- eps, not old + clamp(v - old): that one rounds, and a v that is not
  // clipped at all would then lose its gradient to a "larger" clipped branch.
  const float low = old_value - cliprange_value;
  const float high = old_value + cliprange_value;
  const float clamped = value < low ? low : (value > high ? high : value);
  const float unclipped = value - returns;
  const float clipped = clamped - returns;
  const bool larger = clipped * clipped > unclipped * unclipped;
  ValueLoss out;
  out.loss = 0.5f * (larger ? clipped * clipped : unclipped * unclipped);
  out.dvalue = larger ? 0.0f : unclipped;
  out.clipped = larger ? 1.0f : 0.0f;
  return out;
}

// Sums over the tokens that count, in the order in which the kernels keep them.
enum PPOSum {
  kPolicyLoss,
  kValueLoss,
  kEntropy,
  kKL,
  kApproxKL,
  kClipped,
  kValueClipped,
  kRatio,
  kCount,
  kNumPPOSums
};

// What the kernels return: the nine statistics of PPOLoss in its order, then 1 / count.
constexpr int kNumPPOStats = 10;

template <typename T>
HYDRA_HOST_DEVICE void ppo_stats(
    const T* sums, float vf_coef, float ent_coef, float kl_coef, float* stats) {
  const T count = sums[kCount] > T(1) ? sums[kCount] : T(1);
  stats[1] = static_cast<float>(sums[kPolicyLoss] / count);
  stats[2] = static_cast<float>(sums[kValueLoss] / count);
  stats[3] = static_cast<float>(sums[kEntropy] / count);
  stats[4] = static_cast<float>(sums[kKL] / count);
  stats[5] = static_cast<float>(sums[kApproxKL] / count);
  stats[6] = static_cast<float>(sums[kClipped] / count);
  stats[7] = static_cast<float>(sums[kValueClipped] / count);
  stats[8] = static_cast<float>(sums[kRatio] / count);
  stats[9] = static_cast<float>(T(1) / count);
  stats[0] = stats[1] + vf_coef * stats[2] - ent_coef * stats[3] + kl_coef * stats[4];
}

}  // namespace hydra
