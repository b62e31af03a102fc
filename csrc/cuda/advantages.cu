#include "cuda/check.h"
#include "cuda/entries.h"
#include "cuda/gae_kernel.cuh"
#include "hydra/pointer.h"

namespace hydra::cuda {

void advantages_fwd(
    std::uintptr_t scores, std::uintptr_t logprobs, std::uintptr_t ref_logprobs,
    std::uintptr_t values, std::uintptr_t mask, std::uintptr_t last_values, std::int64_t num_rows,
    std::int64_t num_cols, float kl_coef, int estimator, double gamma, double lam, int tiles,
    std::uintptr_t segment_maps, std::uintptr_t rewards, std::uintptr_t advantages,
    std::uintptr_t returns, std::uintptr_t partial, std::uintptr_t ticket, std::uintptr_t moments,
    int device, std::uintptr_t stream) {
  const DeviceGuard guard(device, "advantages");
  GAEParams p{};
  p.scores = pointer<const float>(scores);
  p.logprobs = pointer<const float>(logprobs);
  p.ref_logprobs = pointer<const float>(ref_logprobs);
  p.kl_coef = kl_coef;
  p.estimator = static_cast<KLEstimator>(estimator);
  p.values = pointer<const float>(values);
  p.mask = pointer<const std::uint8_t>(mask);
  p.last_values = pointer<const float>(last_values);
  p.num_rows = num_rows;
  p.num_cols = num_cols;
  p.coefs = gae_coefs(gamma, lam);
  p.tiles = tiles;
  p.num_segments = gae_segments(num_cols, tiles);
  p.segment_maps = pointer<float>(segment_maps);
  p.rewards_out = pointer<float>(rewards);
  p.advantages = pointer<float>(advantages);
  p.returns = pointer<float>(returns);
  p.moments = {pointer<double>(partial), pointer<unsigned>(ticket), pointer<double>(moments)};
  check(launch_gae_fwd<true>(p, pointer<CUstream_st>(stream)), "advantages");
}

}  // namespace hydra::cuda
