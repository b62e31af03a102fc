// Whitening over a mask: moments in one launch, whitening in another.
//
// No Torch headers: nvcc alone checks this file.
// SASS expects: masked_whiten_moments_kernel<true>: wide_loads
// SASS expects: masked_whiten_fwd_kernel<true>: wide_loads
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/block_moments.cuh"
#include "cuda/quad.cuh"
#include "hydra/where.h"
#include "hydra/whiten.h"

namespace hydra::cuda {

constexpr int kWhitenThreads = 256;
constexpr int kWhitenTile = kWhitenThreads * kQuad;

template <bool kAligned>
__global__ void __launch_bounds__(kWhitenThreads) masked_whiten_moments_kernel(
    const float* __restrict__ x, const std::uint8_t* __restrict__ mask, std::int64_t length,
    MomentsOut out) {
  ShiftedSums sums{0.0f, 0.0, 0.0, 0.0};
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kWhitenTile;
  std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kWhitenTile + threadIdx.x * kQuad;
  for (; i < length; i += stride) {
    bool keep[kQuad];
    load_mask<kAligned>(mask, i, length, keep);
    const Quad elements = load_quad<kAligned>(x, i, length, keep);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      if (keep[k]) add(sums, elements.at[k]);
    }
  }
  finish_moments<kWhitenThreads>(moments_of(sums), out, blockIdx.x, gridDim.x);
}

template <bool kAligned>
__global__ void __launch_bounds__(kWhitenThreads) masked_whiten_fwd_kernel(
    const float* __restrict__ x, const std::uint8_t* __restrict__ mask, std::int64_t length,
    const double* __restrict__ moments, bool shift_mean, float* __restrict__ out) {
  __shared__ Whitening shared;  // one thread pays for the double division and square root
  if (threadIdx.x == 0) shared = whitening({moments[0], moments[1], moments[2]}, shift_mean);
  __syncthreads();
  const Whitening by = shared;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kWhitenTile;
  std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kWhitenTile + threadIdx.x * kQuad;
  for (; i < length; i += stride) {
    bool keep[kQuad];
    load_mask<kAligned>(mask, i, length, keep);
    Quad elements = load_quad<kAligned>(x, i, length, keep);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) elements.at[k] = where(keep[k], whiten(elements.at[k], by));
    store_quad<kAligned>(out, i, length, elements);
  }
}

// Blocks of either launch, and rows of MomentsOut::partial.
inline int masked_whiten_num_blocks(std::int64_t length, int num_multiprocessors) {
  const std::int64_t tiles = (length + kWhitenTile - 1) / kWhitenTile;
  const std::int64_t most = 8LL * num_multiprocessors;  // 2048 threads of a multiprocessor
  const std::int64_t blocks = tiles < most ? tiles : most;
  return static_cast<int>(blocks > 0 ? blocks : 1);  // one block writes the zeros of no elements
}

inline cudaError_t launch_masked_whiten_moments(
    const float* x, const std::uint8_t* mask, std::int64_t length, MomentsOut out, int num_blocks,
    cudaStream_t stream) {
  if (quads_aligned({x}, mask, kQuad)) {
    masked_whiten_moments_kernel<true>
        <<<num_blocks, kWhitenThreads, 0, stream>>>(x, mask, length, out);
  } else {
    masked_whiten_moments_kernel<false>
        <<<num_blocks, kWhitenThreads, 0, stream>>>(x, mask, length, out);
  }
  return cudaGetLastError();
}

inline cudaError_t launch_masked_whiten_fwd(
    const float* x, const std::uint8_t* mask, std::int64_t length, const double* moments,
    bool shift_mean, float* out, int num_blocks, cudaStream_t stream) {
  if (quads_aligned({x, out}, mask, kQuad)) {
    masked_whiten_fwd_kernel<true>
        <<<num_blocks, kWhitenThreads, 0, stream>>>(x, mask, length, moments, shift_mean, out);
  } else {
    masked_whiten_fwd_kernel<false>
        <<<num_blocks, kWhitenThreads, 0, stream>>>(x, mask, length, moments, shift_mean, out);
  }
  return cudaGetLastError();
}

}  // namespace hydra::cuda
