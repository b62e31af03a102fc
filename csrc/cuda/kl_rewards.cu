#include "cuda/check.h"
#include "cuda/entries.h"
#include "cuda/kl_rewards_kernel.cuh"
#include "hydra/pointer.h"

namespace hydra::cuda {

void kl_rewards_fwd(
    std::uintptr_t scores, std::uintptr_t logprobs, std::uintptr_t ref_logprobs,
    std::uintptr_t mask, std::int64_t num_rows, std::int64_t num_cols, float kl_coef, int estimator,
    std::uintptr_t rewards, int device, std::uintptr_t stream) {
  const DeviceGuard guard(device, "kl_rewards");
  KLRewardsParams p;
  p.scores = pointer<const float>(scores);
  p.logprobs = pointer<const float>(logprobs);
  p.ref_logprobs = pointer<const float>(ref_logprobs);
  p.mask = pointer<const std::uint8_t>(mask);
  p.num_rows = num_rows;
  p.num_cols = num_cols;
  p.kl_coef = kl_coef;
  p.estimator = static_cast<KLEstimator>(estimator);
  p.rewards = pointer<float>(rewards);
  check(launch_kl_rewards_fwd(p, pointer<CUstream_st>(stream)), "kl_rewards");
}

}  // namespace hydra::cuda
