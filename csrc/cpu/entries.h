// What csrc/cpu offers to bindings.cpp. Pointers arrive as integers (Tensor.data_ptr()); shapes,
// strides and dtypes have been checked in hydra_kernels/ops and hydra_kernels/backends.
#pragma once

#include <cstdint>

namespace hydra::cpu {

void ppo_loss_fwd(
    std::uintptr_t logprobs, std::uintptr_t values, std::uintptr_t old_logprobs,
    std::uintptr_t old_values, std::uintptr_t advantages, std::uintptr_t returns,
    std::uintptr_t entropy, std::uintptr_t kl, std::uintptr_t mask, std::int64_t num_tokens,
    float cliprange, float cliprange_value, float vf_coef, float ent_coef, float kl_coef,
    std::uintptr_t stats, std::uintptr_t dlogprobs, std::uintptr_t dvalues);

}  // namespace hydra::cpu
