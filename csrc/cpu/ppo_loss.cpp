// Clipped PPO loss: statistics and gradients of every token in one pass over memory.
#include "hydra/ppo_loss.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/entries.h"
#include "cpu/multiversion.h"
#include "cpu/parallel.h"
#include "hydra/pointer.h"
#include "hydra/where.h"

namespace hydra::cpu {
namespace {

// Float sums run over a block, double sums over the blocks in order: the result depends neither on
// the number of threads nor on their timing. Blocks of 512 were measured twice as far from float64
// as torch's pairwise sum, blocks of 128 as near.
constexpr std::int64_t kBlock = 512;

struct Inputs {
  const float *logprobs, *old_logprobs, *advantages, *values, *old_values, *returns, *entropy, *kl;
  const std::uint8_t* mask;
  float cliprange, cliprange_value;
  float policy_scale, value_scale;  // what a token's derivative is multiplied by
  float *dlogprobs, *dvalues;
};

struct Sums {
  float sum[kNumPPOSums];
};

// What counts of a block's tokens, and 0 in the place of what does not, so that NaN there cannot
// enter. In a step of its own: with a mask in its loop, GCC turns the formula's selections into
// jumps, and then has no vectors. A block that counts as a whole is taken as it is.
inline const float* keep_counted(
    const float* x, const std::uint8_t* mask, std::int64_t length, bool all, float* kept) {
  if (all) return x;
#pragma omp simd
  for (std::int64_t i = 0; i < length; ++i) kept[i] = where(mask[i] != 0, x[i]);
  return kept;
}

inline std::int64_t num_counted(const std::uint8_t* mask, std::int64_t length) {
  return multiversion([=] {
    const std::uint8_t* keep = mask;
    const std::int64_t n = length;
    // Sums of bytes in bytes, which a vector has most of: up to 240 do not overflow.
    constexpr std::int64_t kBytes = 240;
    std::int64_t total = 0, i = 0;
    for (; i + kBytes <= n; i += kBytes) {
      std::uint8_t count = 0;
#pragma omp simd reduction(+ : count)
      for (std::int64_t k = 0; k < kBytes; ++k) count += keep[i + k] != 0;
      total += count;
    }
    for (; i < n; ++i) total += keep[i] != 0;
    return total;
  });
}

inline float sum_counted(const float* x, const std::uint8_t* mask, std::int64_t length) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (std::int64_t i = 0; i < length; ++i) total += where(mask[i] != 0, x[i]);
  return total;
}

inline Sums block_sums(const Inputs in, std::int64_t begin, std::int64_t length) {
  return multiversion([=] {
    // GCC keeps reductions in vectors where they are locals, not where they are array elements.
    float policy_loss = 0, value_loss = 0, entropy = 0, kl = 0, approx_kl = 0, clipped = 0;
    float value_clipped = 0, ratio = 0, count = 0;
    alignas(64) float weight[kBlock], first[kBlock], second[kBlock], third[kBlock];
    const std::int64_t n = length;
    const std::uint8_t* mask = in.mask + begin;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) weight[i] = where(mask[i] != 0, 1.0f);
#pragma omp simd reduction(+ : count)
    for (std::int64_t i = 0; i < n; ++i) count += weight[i];
    Sums out{};
    if (count == 0.0f) {
      if (in.logprobs != nullptr) std::fill_n(in.dlogprobs + begin, n, 0.0f);
      if (in.values != nullptr) std::fill_n(in.dvalues + begin, n, 0.0f);
      return out;
    }
    const bool all = count == static_cast<float>(n);
    if (in.logprobs != nullptr) {
      const float* logprobs = keep_counted(in.logprobs + begin, mask, n, all, first);
      const float* old_logprobs = keep_counted(in.old_logprobs + begin, mask, n, all, second);
      const float* advantages = keep_counted(in.advantages + begin, mask, n, all, third);
      float* dlogprobs = in.dlogprobs + begin;
      const float cliprange = in.cliprange, policy_scale = in.policy_scale;
#pragma omp simd reduction(+ : policy_loss, approx_kl, clipped, ratio)
      for (std::int64_t i = 0; i < n; ++i) {
        const PolicyLoss token =
            ppo_policy_loss(logprobs[i], old_logprobs[i], advantages[i], cliprange);
        dlogprobs[i] = policy_scale * token.dlogprob;  // 0 where masked: the advantage is
        policy_loss += token.loss;
        approx_kl += token.approx_kl;
        clipped += token.clipped;
        ratio += weight[i] * token.ratio;  // 1 where masked
      }
    }
    if (in.values != nullptr) {
      const float* values = keep_counted(in.values + begin, mask, n, all, first);
      const float* old_values = keep_counted(in.old_values + begin, mask, n, all, second);
      const float* returns = keep_counted(in.returns + begin, mask, n, all, third);
      float* dvalues = in.dvalues + begin;
      const float cliprange_value = in.cliprange_value, value_scale = in.value_scale;
#pragma omp simd reduction(+ : value_loss, value_clipped)
      for (std::int64_t i = 0; i < n; ++i) {
        const ValueLoss token =
            ppo_value_loss(values[i], old_values[i], returns[i], cliprange_value);
        dvalues[i] = value_scale * token.dvalue;
        value_loss += token.loss;
        value_clipped += token.clipped;
      }
    }
    if (in.entropy != nullptr) entropy = sum_counted(in.entropy + begin, mask, n);
    if (in.kl != nullptr) kl = sum_counted(in.kl + begin, mask, n);
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

}  // namespace

void ppo_loss_fwd(
    std::uintptr_t logprobs, std::uintptr_t values, std::uintptr_t old_logprobs,
    std::uintptr_t old_values, std::uintptr_t advantages, std::uintptr_t returns,
    std::uintptr_t entropy, std::uintptr_t kl, std::uintptr_t mask, std::int64_t num_tokens,
    float cliprange, float cliprange_value, float vf_coef, float ent_coef, float kl_coef,
    float value_weight, std::uintptr_t stats, std::uintptr_t dlogprobs, std::uintptr_t dvalues) {
  // The count first, one byte a token: the derivatives can then be those of the mean.
  const std::int64_t count = num_counted(pointer<const std::uint8_t>(mask), num_tokens);
  const float share = 1.0f / static_cast<float>(count > 1 ? count : 1);
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
      share,
      share * value_weight,
      pointer<float>(dlogprobs),
      pointer<float>(dvalues)};
  const std::int64_t num_blocks = (num_tokens + kBlock - 1) / kBlock;
  std::vector<Sums> partial(static_cast<std::size_t>(num_blocks));
  Sums* sums = partial.data();
#pragma omp parallel for schedule(static) if (num_tokens >= kParallelTokens)
  for (std::int64_t block = 0; block < num_blocks; ++block) {
    const std::int64_t begin = block * kBlock;
    sums[block] = block_sums(in, begin, std::min(kBlock, num_tokens - begin));
  }
  double total[kNumPPOSums] = {};
  for (const Sums& block : partial) {
    for (int k = 0; k < kNumPPOSums; ++k) total[k] += static_cast<double>(block.sum[k]);
  }
  ppo_stats(total, vf_coef, ent_coef, kl_coef, pointer<float>(stats));
}

}  // namespace hydra::cpu
