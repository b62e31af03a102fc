// What linear_logprob does with a block of logits on a GPU: add it to the statistics of its rows,
// or turn it into the gradient. One thread block takes one row of the block of logits, which the
// product before has left in the L2 cache. No Torch headers: nvcc alone checks this file.
//
// SASS expects: linear_logprob_sums_kernel: wide_loads
// SASS expects: linear_logprob_grads_kernel: wide_loads
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "hydra/linear_logprob.h"

namespace hydra::cuda {

constexpr int kLogprobThreads = 256;
constexpr int kLogprobWarps = kLogprobThreads / 32;
constexpr int kLogprobVector = 8;  // columns a thread takes at once: 16 bytes of half precision

template <typename T>
struct alignas(sizeof(T) * kLogprobVector > 16 ? 16 : sizeof(T) * kLogprobVector) Octet {
  T at[kLogprobVector];
};

struct LogprobParams {
  const void *products, *ref_products;  // (num_rows, row_stride) of TIn; the reference's or null
  std::int64_t row_stride;
  std::int64_t num_rows;
  std::int64_t first_column, num_columns;
  const float* bias;  // (V,) or null
  const float* temperature;
  float softcap;
  const std::int64_t* targets;  // (num_rows,)
  std::int64_t ignore_index;
  float* sums;  // (kNumLogprobSums, stride)
  std::int64_t stride;
  // For the gradient alone:
  const float *norms, *entropy, *kl, *upstream;  // (kNumLogprobNorms, stride), ..., (4, stride)
  void* dlogits;                                 // (num_rows, dlogits_stride) of TOut
  std::int64_t dlogits_stride;
};

template <typename T>
__device__ __forceinline__ float widen(T x) {
  return static_cast<float>(x);
}

// Eight products as logits; those past the end become -inf, whose exponential is 0.
template <typename T, bool kCapped>
__device__ __forceinline__ void load_logits(
    const T* row, const float* bias, std::int64_t begin, std::int64_t count, LogitScale scale,
    float (&z)[kLogprobVector], float (&slope)[kLogprobVector]) {
  T x[kLogprobVector];
  if (begin + kLogprobVector <= count &&
      reinterpret_cast<std::uintptr_t>(row + begin) % alignof(Octet<T>) == 0) {
    const Octet<T> v = *reinterpret_cast<const Octet<T>*>(row + begin);
#pragma unroll
    for (int k = 0; k < kLogprobVector; ++k) x[k] = v.at[k];
  } else {
#pragma unroll
    for (int k = 0; k < kLogprobVector; ++k) {
      x[k] = begin + k < count ? row[begin + k] : static_cast<T>(0.0f);
    }
  }
#pragma unroll
  for (int k = 0; k < kLogprobVector; ++k) {
    const bool inside = begin + k < count;
    float product = widen(x[k]);
    if (bias != nullptr && inside) product += bias[begin + k];
    const Logit logit = make_logit<kCapped>(product, scale);
    z[k] = inside ? logit.z : -INFINITY;
    slope[k] = logit.slope;
  }
}

// The softmax sums of eight logits; `below` of a -inf is replaced so that 0 times it is 0.
template <bool kRef>
__device__ __forceinline__ OnlineSoftmax
octet_sums(const float (&z)[kLogprobVector], const float (&z_ref)[kLogprobVector]) {
  OnlineSoftmax s = empty_softmax();
#pragma unroll
  for (int k = 0; k < kLogprobVector; ++k) s.max = fmaxf(s.max, z[k]);
#pragma unroll
  for (int k = 0; k < kLogprobVector; ++k) {
    const bool inside = z[k] != -INFINITY;
    const float below = inside ? z[k] - s.max : 0.0f;
    const float e = inside ? fast_exp(below) : 0.0f;
    s.sum += e;
    s.weighted += e * below;
    if (kRef) s.difference += inside ? e * (z[k] - z_ref[k]) : 0.0f;
  }
  return s;
}

// Merges over the thread block in a fixed order; the result is thread 0's.
__device__ __forceinline__ OnlineSoftmax block_merge(OnlineSoftmax s) {
  __shared__ OnlineSoftmax of_warp[kLogprobWarps];
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    OnlineSoftmax other;
    other.max = __shfl_down_sync(0xffffffffu, s.max, lane);
    other.sum = __shfl_down_sync(0xffffffffu, s.sum, lane);
    other.weighted = __shfl_down_sync(0xffffffffu, s.weighted, lane);
    other.difference = __shfl_down_sync(0xffffffffu, s.difference, lane);
    s = merge(s, other);
  }
  __syncthreads();  // of_warp may still be read, from the call before
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kLogprobWarps; ++warp) s = merge(s, of_warp[warp]);
  }
  return s;
}

template <typename T, bool kRef, bool kCapped>
__global__ void __launch_bounds__(kLogprobThreads)
    linear_logprob_sums_kernel(const LogprobParams p) {
  const std::int64_t row = blockIdx.x;
  const std::int64_t token = p.targets[row];
  if (token == p.ignore_index) return;  // finish gives 0, whatever the sums hold
  const T* products = static_cast<const T*>(p.products) + row * p.row_stride;
  const T* ref_products =
      kRef ? static_cast<const T*>(p.ref_products) + row * p.row_stride : nullptr;
  const float* bias = p.bias == nullptr ? nullptr : p.bias + p.first_column;
  const LogitScale scale = make_logit_scale(*p.temperature, p.softcap);
  const std::int64_t target = token - p.first_column;
  float* state = p.sums + row;

  OnlineSoftmax actor = empty_softmax(), ref = empty_softmax();
  for (std::int64_t begin = threadIdx.x * kLogprobVector; begin < p.num_columns;
       begin += kLogprobThreads * kLogprobVector) {
    float z[kLogprobVector], z_ref[kLogprobVector], slope[kLogprobVector];
    load_logits<T, kCapped>(products, bias, begin, p.num_columns, scale, z, slope);
    if (kRef)
      load_logits<T, kCapped>(ref_products, bias, begin, p.num_columns, scale, z_ref, slope);
    actor = merge(actor, octet_sums<kRef>(z, z_ref));
    if (kRef) ref = merge(ref, octet_sums<false>(z_ref, z_ref));
#pragma unroll
    for (int k = 0; k < kLogprobVector; ++k) {
      if (begin + k != target) continue;
      state[kTarget * p.stride] = z[k];
      if (kRef) state[kRefTarget * p.stride] = z_ref[k];
    }
  }
  actor = block_merge(actor);
  if (kRef) ref = block_merge(ref);
  if (threadIdx.x != 0) return;
  if (p.first_column > 0) {
    actor = merge(
        {state[kMax * p.stride], state[kSum * p.stride], state[kWeighted * p.stride],
         state[kDifference * p.stride]},
        actor);
    if (kRef) {
      ref = merge({state[kRefMax * p.stride], state[kRefSum * p.stride], 0.0f, 0.0f}, ref);
    }
  }
  state[kMax * p.stride] = actor.max;
  state[kSum * p.stride] = actor.sum;
  state[kWeighted * p.stride] = actor.weighted;
  state[kDifference * p.stride] = actor.difference;
  if (kRef) {
    state[kRefMax * p.stride] = ref.max;
    state[kRefSum * p.stride] = ref.sum;
  }
}

// results (5, num_rows) and norms (kNumLogprobNorms, num_rows); 0 in the rows that are ignored.
__global__ void __launch_bounds__(kLogprobThreads) linear_logprob_finish_kernel(
    const float* sums, const std::int64_t* targets, std::int64_t ignore_index,
    std::int64_t vocabulary, std::int64_t num_rows, bool has_ref, float* results, float* norms) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kLogprobThreads + threadIdx.x;
  if (row >= num_rows) return;
  RowResult out{0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  RowNorm norm{0.0f, 0.0f}, ref_norm{0.0f, 0.0f};
  const std::int64_t target = targets[row];
  if (target != ignore_index) {
    const auto at = [=](LogprobSum which) { return sums[which * num_rows + row]; };
    const bool known = target >= 0 && target < vocabulary;  // else nobody wrote the target's logit
    const OnlineSoftmax actor{at(kMax), at(kSum), at(kWeighted), at(kDifference)};
    norm = norm_of(actor);
    if (has_ref) ref_norm = norm_of({at(kRefMax), at(kRefSum), 0.0f, 0.0f});
    const float ref_target = has_ref && known ? at(kRefTarget) : NAN;
    out = finish_row(actor, norm, known ? at(kTarget) : NAN, ref_norm, ref_target, has_ref);
  }
  results[0 * num_rows + row] = out.logprob;
  results[1 * num_rows + row] = out.entropy;
  results[2 * num_rows + row] = out.logsumexp;
  results[3 * num_rows + row] = out.ref_logprob;
  results[4 * num_rows + row] = out.kl;
  norms[kNormMax * num_rows + row] = norm.max;
  norms[kNormLogSum * num_rows + row] = norm.log_sum;
  norms[kRefNormMax * num_rows + row] = ref_norm.max;
  norms[kRefNormLogSum * num_rows + row] = ref_norm.log_sum;
}

template <typename TIn, typename TOut, bool kRef, bool kCapped>
__global__ void __launch_bounds__(kLogprobThreads)
    linear_logprob_grads_kernel(const LogprobParams p) {
  const std::int64_t row = blockIdx.x, stride = p.stride;
  TOut* dlogits = static_cast<TOut*>(p.dlogits) + row * p.dlogits_stride;
  const std::int64_t token = p.targets[row];
  const bool keep = token != p.ignore_index;
  const TIn* products = static_cast<const TIn*>(p.products) + row * p.row_stride;
  const TIn* ref_products =
      kRef ? static_cast<const TIn*>(p.ref_products) + row * p.row_stride : nullptr;
  const float* bias = p.bias == nullptr ? nullptr : p.bias + p.first_column;
  const LogitScale scale = make_logit_scale(*p.temperature, p.softcap);
  const std::int64_t target = token - p.first_column;
  const RowNorm norm{p.norms[kNormMax * stride + row], p.norms[kNormLogSum * stride + row]};
  RowNorm ref_norm = norm;
  if (kRef) {
    ref_norm = {p.norms[kRefNormMax * stride + row], p.norms[kRefNormLogSum * stride + row]};
  }
  const RowGrad g = make_row_grad(
      norm, ref_norm, p.entropy[row], kRef ? p.kl[row] : 0.0f, p.upstream[row],
      p.upstream[stride + row], p.upstream[2 * stride + row], p.upstream[3 * stride + row]);
  for (std::int64_t begin = threadIdx.x * kLogprobVector; begin < p.num_columns;
       begin += kLogprobThreads * kLogprobVector) {
    float z[kLogprobVector], z_ref[kLogprobVector], slope[kLogprobVector], unused[kLogprobVector];
    if (keep) {
      load_logits<TIn, kCapped>(products, bias, begin, p.num_columns, scale, z, slope);
      if (kRef) {
        load_logits<TIn, kCapped>(ref_products, bias, begin, p.num_columns, scale, z_ref, unused);
      }
    }
    Octet<TOut> out;
#pragma unroll
    for (int k = 0; k < kLogprobVector; ++k) {
      float dz = 0.0f;
      if (keep) {
        dz = logit_grad<kRef>(g, z[k], kRef ? z_ref[k] : 0.0f);
        if (begin + k == target) dz += g.target;
        dz *= slope[k];
      }
      out.at[k] = static_cast<TOut>(dz);
    }
    if (begin + kLogprobVector <= p.num_columns &&
        reinterpret_cast<std::uintptr_t>(dlogits + begin) % alignof(Octet<TOut>) == 0) {
      *reinterpret_cast<Octet<TOut>*>(dlogits + begin) = out;
    } else {
#pragma unroll
      for (int k = 0; k < kLogprobVector; ++k) {
        if (begin + k < p.num_columns) dlogits[begin + k] = out.at[k];
      }
    }
  }
}

template <typename T>
inline cudaError_t launch_linear_logprob_sums(const LogprobParams& p, cudaStream_t stream) {
  if (p.num_rows == 0) return cudaSuccess;  // a grid of zero blocks is an error
  const auto blocks = static_cast<unsigned>(p.num_rows);
  const bool ref = p.ref_products != nullptr, capped = p.softcap > 0.0f;
  auto* kernel = ref ? (capped ? linear_logprob_sums_kernel<T, true, true>
                               : linear_logprob_sums_kernel<T, true, false>)
                     : (capped ? linear_logprob_sums_kernel<T, false, true>
                               : linear_logprob_sums_kernel<T, false, false>);
  kernel<<<blocks, kLogprobThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

inline cudaError_t launch_linear_logprob_finish(
    const float* sums, const std::int64_t* targets, std::int64_t ignore_index,
    std::int64_t vocabulary, std::int64_t num_rows, bool has_ref, float* results, float* norms,
    cudaStream_t stream) {
  if (num_rows == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((num_rows + kLogprobThreads - 1) / kLogprobThreads);
  linear_logprob_finish_kernel<<<blocks, kLogprobThreads, 0, stream>>>(
      sums, targets, ignore_index, vocabulary, num_rows, has_ref, results, norms);
  return cudaGetLastError();
}

template <typename TIn, typename TOut>
inline cudaError_t launch_linear_logprob_grads(const LogprobParams& p, cudaStream_t stream) {
  if (p.num_rows == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(p.num_rows);
  const bool ref = p.ref_products != nullptr, capped = p.softcap > 0.0f;
  auto* kernel = ref ? (capped ? linear_logprob_grads_kernel<TIn, TOut, true, true>
                               : linear_logprob_grads_kernel<TIn, TOut, true, false>)
                     : (capped ? linear_logprob_grads_kernel<TIn, TOut, false, true>
                               : linear_logprob_grads_kernel<TIn, TOut, false, false>);
  kernel<<<blocks, kLogprobThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace hydra::cuda
