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

// Rows x columns are B x T. An absent tensor is the address 0; estimator is a KLEstimator. `tiles`
// is what gae_segment_tiles says; segment_maps is (num_rows, gae_segments, 3) float32, absent for
// one segment; partial is (blocks, 3) float64, with num_rows * gae_segments blocks for
// advantages_fwd.
void kl_rewards_fwd(
    std::uintptr_t scores, std::uintptr_t logprobs, std::uintptr_t ref_logprobs,
    std::uintptr_t mask, std::int64_t num_rows, std::int64_t num_cols, float kl_coef, int estimator,
    std::uintptr_t rewards, int device, std::uintptr_t stream);
int gae_segment_tiles(std::int64_t num_rows, std::int64_t num_cols, int device);
int gae_segments(std::int64_t num_cols, int tiles);
void gae_fwd(
    std::uintptr_t rewards, std::uintptr_t values, std::uintptr_t mask, std::uintptr_t last_values,
    std::int64_t num_rows, std::int64_t num_cols, double gamma, double lam, int tiles,
    std::uintptr_t segment_maps, std::uintptr_t advantages, std::uintptr_t returns, int device,
    std::uintptr_t stream);
int masked_whiten_blocks(std::int64_t length, int device);
void masked_whiten_moments(
    std::uintptr_t x, std::uintptr_t mask, std::int64_t length, std::uintptr_t partial,
    std::uintptr_t ticket, std::uintptr_t moments, int num_blocks, int device,
    std::uintptr_t stream);
void masked_whiten_fwd(
    std::uintptr_t x, std::uintptr_t mask, std::int64_t length, std::uintptr_t moments,
    bool shift_mean, std::uintptr_t out, int num_blocks, int device, std::uintptr_t stream);
void advantages_fwd(
    std::uintptr_t scores, std::uintptr_t logprobs, std::uintptr_t ref_logprobs,
    std::uintptr_t values, std::uintptr_t mask, std::uintptr_t last_values, std::int64_t num_rows,
    std::int64_t num_cols, float kl_coef, int estimator, double gamma, double lam, int tiles,
    std::uintptr_t segment_maps, std::uintptr_t rewards, std::uintptr_t advantages,
    std::uintptr_t returns, std::uintptr_t partial, std::uintptr_t ticket, std::uintptr_t moments,
    int device, std::uintptr_t stream);

// Adds a block of logits, hidden W^T, to the sums (LogprobSum, stride) of its rows. dtype: 0
// float32, 1 float16, 2 bfloat16.
void linear_logprob_sums(
    std::uintptr_t products, std::uintptr_t ref_products, int dtype, std::int64_t row_stride,
    std::int64_t num_rows, std::int64_t first_column, std::int64_t num_columns, std::uintptr_t bias,
    std::uintptr_t temperature, float softcap, std::uintptr_t targets, std::int64_t ignore_index,
    std::uintptr_t sums, std::int64_t stride, int device, std::uintptr_t stream);
void linear_logprob_finish(
    std::uintptr_t sums, std::uintptr_t targets, std::int64_t ignore_index, std::int64_t vocabulary,
    std::int64_t num_rows, bool has_ref, std::uintptr_t results, std::uintptr_t norms, int device,
    std::uintptr_t stream);
// The gradient of a block of logits, in out_dtype; upstream (4, stride): of logprobs, entropy,
// logsumexp, kl.
void linear_logprob_grads(
    std::uintptr_t products, std::uintptr_t ref_products, int dtype, std::int64_t row_stride,
    std::int64_t num_rows, std::int64_t first_column, std::int64_t num_columns, std::uintptr_t bias,
    std::uintptr_t temperature, float softcap, std::uintptr_t targets, std::int64_t ignore_index,
    std::uintptr_t norms, std::uintptr_t entropy, std::uintptr_t kl, std::uintptr_t upstream,
    std::int64_t stride, std::uintptr_t dlogits, int out_dtype, std::int64_t dlogits_stride,
    int device, std::uintptr_t stream);

// At most 32 rows and 64 ranks. Zero counters (3,) int32 come back zero; s is (32, ranks) scratch.
void lora_linear_decode(
    bool is_bf16, std::uintptr_t x, std::uintptr_t w, std::uintptr_t bias, std::uintptr_t a,
    std::uintptr_t b, std::int64_t stride_bn, std::int64_t stride_br, std::uintptr_t ids,
    std::uintptr_t owner, std::uintptr_t scale, std::uintptr_t s, std::uintptr_t counters,
    std::uintptr_t y, int num_rows, int num_outputs, int num_inputs, int num_ranks, int rows_per_id,
    int device, std::uintptr_t stream);

}  // namespace hydra::cuda
