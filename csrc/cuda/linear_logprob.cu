#include <stdexcept>

#include "cuda/check.h"
#include "cuda/entries.h"
#include "cuda/linear_logprob_kernel.cuh"
#include "hydra/pointer.h"

namespace hydra::cuda {
namespace {

// What hydra_kernels/backends/cuda/linear_logprob.py calls the dtypes.
enum Dtype { kFloat, kHalf, kBFloat };

template <typename TIn>
cudaError_t launch_grads(const LogprobParams& p, int out_dtype, cudaStream_t stream) {
  switch (out_dtype) {
    case kFloat:
      return launch_linear_logprob_grads<TIn, float>(p, stream);
    case kHalf:
      return launch_linear_logprob_grads<TIn, __half>(p, stream);
    case kBFloat:
      return launch_linear_logprob_grads<TIn, __nv_bfloat16>(p, stream);
  }
  throw std::invalid_argument("linear_logprob: no such dtype");
}

LogprobParams block_params(
    std::uintptr_t products, std::uintptr_t ref_products, std::int64_t row_stride,
    std::int64_t num_rows, std::int64_t first_column, std::int64_t num_columns, std::uintptr_t bias,
    std::uintptr_t temperature, float softcap, std::uintptr_t targets, std::int64_t ignore_index,
    std::int64_t stride) {
  LogprobParams p{};
  p.products = pointer<const void>(products);
  p.ref_products = pointer<const void>(ref_products);
  p.row_stride = row_stride;
  p.num_rows = num_rows;
  p.first_column = first_column;
  p.num_columns = num_columns;
  p.bias = pointer<const float>(bias);
  p.temperature = pointer<const float>(temperature);
  p.softcap = softcap;
  p.targets = pointer<const std::int64_t>(targets);
  p.ignore_index = ignore_index;
  p.stride = stride;
  return p;
}

}  // namespace

void linear_logprob_sums(
    std::uintptr_t products, std::uintptr_t ref_products, int dtype, std::int64_t row_stride,
    std::int64_t num_rows, std::int64_t first_column, std::int64_t num_columns, std::uintptr_t bias,
    std::uintptr_t temperature, float softcap, std::uintptr_t targets, std::int64_t ignore_index,
    std::uintptr_t sums, std::int64_t stride, int device, std::uintptr_t stream_) {
  const DeviceGuard guard(device, "linear_logprob");
  LogprobParams p = block_params(
      products, ref_products, row_stride, num_rows, first_column, num_columns, bias, temperature,
      softcap, targets, ignore_index, stride);
  p.sums = pointer<float>(sums);
  auto* stream = pointer<CUstream_st>(stream_);
  check(
      dtype == kFloat  ? launch_linear_logprob_sums<float>(p, stream)
      : dtype == kHalf ? launch_linear_logprob_sums<__half>(p, stream)
                       : launch_linear_logprob_sums<__nv_bfloat16>(p, stream),
      "linear_logprob");
}

void linear_logprob_finish(
    std::uintptr_t sums, std::uintptr_t targets, std::int64_t ignore_index, std::int64_t vocabulary,
    std::int64_t num_rows, bool has_ref, std::uintptr_t results, std::uintptr_t norms, int device,
    std::uintptr_t stream) {
  const DeviceGuard guard(device, "linear_logprob");
  check(
      launch_linear_logprob_finish(
          pointer<const float>(sums), pointer<const std::int64_t>(targets), ignore_index,
          vocabulary, num_rows, has_ref, pointer<float>(results), pointer<float>(norms),
          pointer<CUstream_st>(stream)),
      "linear_logprob");
}

void linear_logprob_grads(
    std::uintptr_t products, std::uintptr_t ref_products, int dtype, std::int64_t row_stride,
    std::int64_t num_rows, std::int64_t first_column, std::int64_t num_columns, std::uintptr_t bias,
    std::uintptr_t temperature, float softcap, std::uintptr_t targets, std::int64_t ignore_index,
    std::uintptr_t norms, std::uintptr_t entropy, std::uintptr_t kl, std::uintptr_t upstream,
    std::int64_t stride, std::uintptr_t dlogits, int out_dtype, std::int64_t dlogits_stride,
    int device, std::uintptr_t stream_) {
  const DeviceGuard guard(device, "linear_logprob");
  LogprobParams p = block_params(
      products, ref_products, row_stride, num_rows, first_column, num_columns, bias, temperature,
      softcap, targets, ignore_index, stride);
  p.norms = pointer<const float>(norms);
  p.entropy = pointer<const float>(entropy);
  p.kl = pointer<const float>(kl);
  p.upstream = pointer<const float>(upstream);
  p.dlogits = pointer<void>(dlogits);
  p.dlogits_stride = dlogits_stride;
  auto* stream = pointer<CUstream_st>(stream_);
  // Recomputed logits are float32 and their gradient may be narrower; saved ones have its dtype.
  check(
      dtype == kFloat  ? launch_grads<float>(p, out_dtype, stream)
      : dtype == kHalf ? launch_linear_logprob_grads<__half, __half>(p, stream)
                       : launch_linear_logprob_grads<__nv_bfloat16, __nv_bfloat16>(p, stream),
      "linear_logprob");
}

}  // namespace hydra::cuda
