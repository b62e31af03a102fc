// What csrc/cuda offers to bindings.cpp. Pointers and the stream arrive as integers
// (Tensor.data_ptr(), torch.cuda.current_stream().cuda_stream); shapes, strides and dtypes have
// been checked in hydra_kernels/ops and hydra_kernels/backends. A failure throws, see check().
#pragma once

#include <cstdint>
#include <string>

namespace hydra::cuda {

std::string device_name(int device);

int ppo_loss_blocks(std::int64_t num_tokens, int device);
void ppo_loss_fwd(
    std::uintptr_t logprobs, std::uintptr_t values, std::uintptr_t old_logprobs,
    std::uintptr_t old_values, std::uintptr_t advantages, std::uintptr_t returns,
    std::uintptr_t entropy, std::uintptr_t kl, std::uintptr_t mask, std::int64_t num_tokens,
    float cliprange, float cliprange_value, float vf_coef, float ent_coef, float kl_coef,
    std::uintptr_t stats, std::uintptr_t dlogprobs, std::uintptr_t dvalues, std::uintptr_t partial,
    std::uintptr_t ticket, int num_blocks, int device, std::uintptr_t stream);

}  // namespace hydra::cuda
