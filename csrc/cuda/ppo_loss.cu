#include "cuda/ppo_loss_kernel.cuh"

#include "cuda/check.h"
#include "cuda/entries.h"

namespace hydra::cuda {
namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

int ppo_loss_blocks(std::int64_t num_tokens, int device) {
  int multiprocessors = 0;
  check(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "ppo_loss");
  return ppo_loss_num_blocks(num_tokens, multiprocessors);
}

void ppo_loss_fwd(
    std::uintptr_t logprobs, std::uintptr_t values, std::uintptr_t old_logprobs,
    std::uintptr_t old_values, std::uintptr_t advantages, std::uintptr_t returns,
    std::uintptr_t entropy, std::uintptr_t kl, std::uintptr_t mask, std::int64_t num_tokens,
    float cliprange, float cliprange_value, float vf_coef, float ent_coef, float kl_coef,
    std::uintptr_t stats, std::uintptr_t dlogprobs, std::uintptr_t dvalues, std::uintptr_t partial,
    std::uintptr_t ticket, int num_blocks, int device, std::uintptr_t stream) {
  const DeviceGuard guard(device, "ppo_loss");
  PPOLossParams p;
  p.logprobs = pointer<const float>(logprobs);
  p.values = pointer<const float>(values);
  p.old_logprobs = pointer<const float>(old_logprobs);
  p.old_values = pointer<const float>(old_values);
  p.advantages = pointer<const float>(advantages);
  p.returns = pointer<const float>(returns);
  p.entropy = pointer<const float>(entropy);
  p.kl = pointer<const float>(kl);
  p.mask = pointer<const std::uint8_t>(mask);
  p.num_tokens = num_tokens;
  p.cliprange = cliprange;
  p.cliprange_value = cliprange_value;
  p.vf_coef = vf_coef;
  p.ent_coef = ent_coef;
  p.kl_coef = kl_coef;
  p.partial = pointer<float>(partial);
  p.ticket = pointer<unsigned>(ticket);
  p.stats = pointer<float>(stats);
  p.dlogprobs = pointer<float>(dlogprobs);
  p.dvalues = pointer<float>(dvalues);
  check(launch_ppo_loss_fwd(p, num_blocks, pointer<CUstream_st>(stream)), "ppo_loss");
}

}  // namespace hydra::cuda
