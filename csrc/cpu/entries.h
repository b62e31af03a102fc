// What csrc/cpu offers to bindings.cpp. Pointers arrive as integers (Tensor.data_ptr()); shapes,
// strides and dtypes have been checked in hydra_kernels/ops and hydra_kernels/backends.
#pragma once

#include <cstdint>
#include <vector>

namespace hydra::cpu {

// dlogprobs and dvalues: derivatives of the mean policy loss and of value_weight * the mean value
// loss.
void ppo_loss_fwd(
    std::uintptr_t logprobs, std::uintptr_t values, std::uintptr_t old_logprobs,
    std::uintptr_t old_values, std::uintptr_t advantages, std::uintptr_t returns,
    std::uintptr_t entropy, std::uintptr_t kl, std::uintptr_t mask, std::int64_t num_tokens,
    float cliprange, float cliprange_value, float vf_coef, float ent_coef, float kl_coef,
    float value_weight, std::uintptr_t stats, std::uintptr_t dlogprobs, std::uintptr_t dvalues);

// Rows x columns are B x T. An absent tensor is the address 0; estimator is a KLEstimator.
void kl_rewards_fwd(
    std::uintptr_t scores, std::uintptr_t logprobs, std::uintptr_t ref_logprobs,
    std::uintptr_t mask, std::int64_t num_rows, std::int64_t num_cols, float kl_coef, int estimator,
    std::uintptr_t rewards);
void gae_fwd(
    std::uintptr_t rewards, std::uintptr_t values, std::uintptr_t mask, std::uintptr_t last_values,
    std::int64_t num_rows, std::int64_t num_cols, double gamma, double lam,
    std::uintptr_t advantages, std::uintptr_t returns);
void masked_whiten_moments(
    std::uintptr_t x, std::uintptr_t mask, std::int64_t length, std::uintptr_t moments);
void masked_whiten_fwd(
    std::uintptr_t x, std::uintptr_t mask, std::int64_t length, std::uintptr_t moments,
    bool shift_mean, std::uintptr_t out);
void advantages_fwd(
    std::uintptr_t scores, std::uintptr_t logprobs, std::uintptr_t ref_logprobs,
    std::uintptr_t values, std::uintptr_t mask, std::uintptr_t last_values, std::int64_t num_rows,
    std::int64_t num_cols, float kl_coef, int estimator, double gamma, double lam,
    std::uintptr_t rewards, std::uintptr_t advantages, std::uintptr_t returns,
    std::uintptr_t moments);

// out (m, n) float32 = op(a) (m, k) op(b) (k, n) of bfloat16 matrices, added to out if it adds, by
// BLAS with at most `piece` of k at once.
void linear_logprob_product(
    std::uintptr_t a, std::int64_t a_stride, bool a_transposed, std::uintptr_t b,
    std::int64_t b_stride, bool b_transposed, std::int64_t m, std::int64_t n, std::int64_t k,
    std::int64_t piece, bool adds, std::uintptr_t out, std::int64_t out_stride);
// Adds a block of logits, hidden W^T, to the sums (LogprobSum, sums_stride) of its rows.
void linear_logprob_sums(
    std::uintptr_t products, std::uintptr_t ref_products, std::int64_t row_stride,
    std::int64_t num_rows, std::int64_t first_column, std::int64_t num_columns, std::uintptr_t bias,
    std::uintptr_t temperature, float softcap, std::uintptr_t targets, std::uintptr_t sums,
    std::int64_t sums_stride);
// results (5, num_rows) in the order of LinearLogprob; norms (LogprobNorm, num_rows).
void linear_logprob_finish(
    std::uintptr_t sums, std::int64_t num_rows, bool has_ref, std::uintptr_t results,
    std::uintptr_t norms);
// The gradient of a block of logits; upstream (4, stride): of logprobs, entropy, logsumexp, kl.
// Each row of dlogits, float32 or bfloat16, may begin where that of the products does.
void linear_logprob_grads(
    std::uintptr_t products, std::uintptr_t ref_products, std::int64_t row_stride,
    std::int64_t num_rows, std::int64_t first_column, std::int64_t num_columns, std::uintptr_t bias,
    std::uintptr_t temperature, float softcap, std::uintptr_t targets, std::uintptr_t norms,
    std::uintptr_t entropy, std::uintptr_t kl, std::uintptr_t upstream, std::int64_t stride,
    std::uintptr_t dlogits, bool is_bf16, std::int64_t dlogits_stride);

// The adapters' part of y, or bias, into every y; false, and nothing written, where every row is
// off. Adapters and projections are flattened as csrc/cpu/lora_layout.h says.
bool lora_linear_fwd(
    std::uintptr_t x, std::int64_t x_dtype, std::int64_t num_rows, std::int64_t num_inputs,
    std::int64_t x_stride, const std::vector<std::int64_t>& adapters,
    const std::vector<double>& scales, const std::vector<std::int64_t>& projections,
    std::uintptr_t ids, std::int64_t num_ids, std::int64_t num_adapters, double dropout,
    std::uintptr_t seed);
// The adapters' part of dx and their gradients; false, and nothing written, where every row is off.
bool lora_linear_bwd(
    std::uintptr_t x, std::int64_t x_dtype, std::int64_t num_rows, std::int64_t num_inputs,
    std::int64_t x_stride, const std::vector<std::int64_t>& adapters,
    const std::vector<double>& scales, const std::vector<std::int64_t>& projections,
    std::uintptr_t ids, std::int64_t num_ids, std::int64_t num_adapters, double dropout,
    std::uintptr_t seed, std::uintptr_t dx);
// The same of few rows: added to every y, and to dx where it is wanted, which hold the wide
// products. Backward takes float32 alone.
void lora_linear_few_fwd(
    std::uintptr_t x, std::int64_t x_dtype, std::int64_t num_rows, std::int64_t num_inputs,
    std::int64_t x_stride, const std::vector<std::int64_t>& adapters,
    const std::vector<double>& scales, const std::vector<std::int64_t>& projections,
    std::uintptr_t ids, std::int64_t num_ids, std::int64_t num_adapters);
void lora_linear_few_bwd(
    std::uintptr_t x, std::int64_t num_rows, std::int64_t num_inputs, std::int64_t x_stride,
    const std::vector<std::int64_t>& adapters, const std::vector<double>& scales,
    const std::vector<std::int64_t>& projections, std::uintptr_t ids, std::int64_t num_ids,
    std::int64_t num_adapters, std::uintptr_t dx);
// merged (N, K) = W + the sum of scale B A, all float32.
void lora_linear_merged(
    std::uintptr_t weight, std::int64_t weight_stride, std::int64_t num_outputs,
    std::int64_t num_inputs, const std::vector<std::int64_t>& adapters,
    const std::vector<double>& scales, std::uintptr_t merged);
// The id that all have, -1 where there are none, -2 where they differ.
std::int64_t lora_linear_only_id(
    std::uintptr_t ids, std::int64_t num_ids, std::int64_t num_adapters);

// Runs the instructions of hydra_kernels/replay; table holds the storages' addresses.
void replay(std::uintptr_t program, std::int64_t num_words, std::uintptr_t table, int threads);

}  // namespace hydra::cpu
