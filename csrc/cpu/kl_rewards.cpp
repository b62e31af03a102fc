// Per-token rewards: a KL penalty on every token and the score on the last.
#include <cstdint>

#include "cpu/entries.h"
#include "cpu/kl_rewards_row.h"
#include "cpu/parallel.h"
#include "hydra/pointer.h"

namespace hydra::cpu {

void kl_rewards_fwd(
    std::uintptr_t scores, std::uintptr_t logprobs, std::uintptr_t ref_logprobs,
    std::uintptr_t mask, std::int64_t num_rows, std::int64_t num_cols, float kl_coef, int estimator,
    std::uintptr_t rewards) {
  const KLRewards in{
      pointer<const float>(scores),
      pointer<const float>(logprobs),
      pointer<const float>(ref_logprobs),
      pointer<const std::uint8_t>(mask),
      num_cols,
      kl_coef,
      static_cast<KLEstimator>(estimator),
      pointer<float>(rewards)};
#pragma omp parallel for schedule(static) if (num_rows * num_cols >= kParallelTokens)
  for (std::int64_t row = 0; row < num_rows; ++row) kl_rewards_row(in, row);
}

}  // namespace hydra::cpu
