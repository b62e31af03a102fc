// Clipped PPO loss: statistics and gradients of every token in one pass over memory.
#include "hydra/ppo_loss.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/entries.h"
#include "cpu/multiversion.h"

namespace hydra::cpu {
namespace {

// Float sums run over a block, double sums over the blocks in order: the result depends neither on
// the number of threads nor on their timing. Blocks of 512 were measured twice as far from float64
// as torch's pairwise sum, blocks of 128 as near.
constexpr std::int64_t kBlock = 128;
// Below this many tokens a parallel region costs more than it saves.
constexpr std::int64_t kParallelTokens = 16384;

struct Inputs {
  const float *logprobs, *old_logprobs, *advantages, *values, *old_values, *returns, *entropy, *kl;
  const std::uint8_t* mask;
  float cliprange, cliprange_value;
  float *dlogprobs, *dvalues;
};

struct Sums {
  float sum[kNumPPOSums];
};

inline float where(bool keep, float x) {
  return keep ? x : 0.0f;
}

inline Sums block_sums(const Inputs in, std::int64_t begin, std::int64_t end) {
  return multiversion([=] {
    float policy_loss = 0, value_loss = 0, entropy = 0, kl = 0, approx_kl = 0, clipped = 0;
    float value_clipped = 0, ratio = 0, count = 0;
    const std::uint8_t* mask = in.mask;
#pragma omp simd reduction(+ : count)
    for (std::int64_t i = begin; i < end; ++i) count += static_cast<float>(mask[i]);
    if (in.logprobs != nullptr) {
      const float *logprobs = in.logprobs, *old_logprobs = in.old_logprobs;
      const float* advantages = in.advantages;
      float* dlogprobs = in.dlogprobs;
      const float cliprange = in.cliprange;
#pragma omp simd reduction(+ : policy_loss, approx_kl, clipped, ratio)
      for (std::int64_t i = begin; i < end; ++i) {
        const bool keep = mask[i] != 0;
        const PolicyLoss token = ppo_policy_loss(
            where(keep, logprobs[i]), where(keep, old_logprobs[i]), where(keep, advantages[i]),
            cliprange);
        dlogprobs[i] = where(keep, token.dlogprob);
        policy_loss += where(keep, token.loss);
        approx_kl += where(keep, token.approx_kl);
        clipped += where(keep, token.clipped);
        ratio += where(keep, token.ratio);
      }
    }
    if (in.values != nullptr) {
      const float *values = in.values, *old_values = in.old_values, *returns = in.returns;
      float* dvalues = in.dvalues;
      const float cliprange_value = in.cliprange_value;
#pragma omp simd reduction(+ : value_loss, value_clipped)
      for (std::int64_t i = begin; i < end; ++i) {
        const bool keep = mask[i] != 0;
        const ValueLoss token = ppo_value_loss(
            where(keep, values[i]), where(keep, old_values[i]), where(keep, returns[i]),
            cliprange_value);
        dvalues[i] = where(keep, token.dvalue);
        value_loss += where(keep, token.loss);
        value_clipped += where(keep, token.clipped);
      }
    }
    if (in.entropy != nullptr) {
      const float* entropies = in.entropy;
#pragma omp simd reduction(+ : entropy)
      for (std::int64_t i = begin; i < end; ++i) entropy += where(mask[i] != 0, entropies[i]);
    }
    if (in.kl != nullptr) {
      const float* kls = in.kl;
#pragma omp simd reduction(+ : kl)
      for (std::int64_t i = begin; i < end; ++i) kl += where(mask[i] != 0, kls[i]);
    }
    Sums out;
    out.sum[kPolicyLoss] = policy_loss;
    out.sum[kValueLoss] = value_loss;
    out.sum[kEntropy] = entropy;
    out.sum[kKL] = kl;
    out.sum[kApproxKL] = approx_kl;
    out.sum[kClipped] = clipped;
    out.sum[kValueClipped] = value_clipped;
    out.sum[kRatio] = ratio;
    out.sum[kCount] = count;
    return out;
  });
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void ppo_loss_fwd(
    std::uintptr_t logprobs, std::uintptr_t values, std::uintptr_t old_logprobs,
    std::uintptr_t old_values, std::uintptr_t advantages, std::uintptr_t returns,
    std::uintptr_t entropy, std::uintptr_t kl, std::uintptr_t mask, std::int64_t num_tokens,
    float cliprange, float cliprange_value, float vf_coef, float ent_coef, float kl_coef,
    std::uintptr_t stats, std::uintptr_t dlogprobs, std::uintptr_t dvalues) {
  const Inputs in{
      pointer<const float>(logprobs),
      pointer<const float>(old_logprobs),
      pointer<const float>(advantages),
      pointer<const float>(values),
      pointer<const float>(old_values),
      pointer<const float>(returns),
      pointer<const float>(entropy),
      pointer<const float>(kl),
      pointer<const std::uint8_t>(mask),
      cliprange,
      cliprange_value,
      pointer<float>(dlogprobs),
      pointer<float>(dvalues)};
  const std::int64_t num_blocks = (num_tokens + kBlock - 1) / kBlock;
  std::vector<Sums> partial(static_cast<std::size_t>(num_blocks));
  Sums* sums = partial.data();
#pragma omp parallel for schedule(static) if (num_tokens >= kParallelTokens)
  for (std::int64_t block = 0; block < num_blocks; ++block) {
    const std::int64_t begin = block * kBlock;
    sums[block] = block_sums(in, begin, std::min(begin + kBlock, num_tokens));
  }
  double total[kNumPPOSums] = {};
  for (const Sums& block : partial) {
    for (int k = 0; k < kNumPPOSums; ++k) total[k] += static_cast<double>(block.sum[k]);
  }
  ppo_stats(total, vf_coef, ent_coef, kl_coef, pointer<float>(stats));
}

}  // namespace hydra::cpu
