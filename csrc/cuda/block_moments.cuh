// Moments over all threads of all blocks of a launch.
//
// Each block writes the moments of its elements. The one that finishes last, found by an atomic
// ticket, merges them: the ticket decides who merges, not in which order, so the result is the same
// every time. No Torch headers: nvcc alone checks this file.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "hydra/whiten.h"

namespace hydra::cuda {

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_down_sync(0xffffffffu, x, lane);
  return x;
}

// The sum over the block, in a fixed order, in every thread.
template <int kThreads>
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double of_warp[kThreads / 32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) total += of_warp[w];
  __syncthreads();  // of_warp is used again
  return total;
}

// Chan's merge of the moments of all threads at once, in every thread.
template <int kThreads>
__device__ __forceinline__ Moments block_moments(Moments mine) {
  const double count = block_sum<kThreads>(mine.count);
  const double mean = block_sum<kThreads>(mine.count * mine.mean) / (count > 0.0 ? count : 1.0);
  const double apart = mine.mean - mean;
  return {count, mean, block_sum<kThreads>(mine.m2 + mine.count * apart * apart)};
}

struct MomentsOut {
  double* partial;   // (num_blocks, 3)
  unsigned* ticket;  // 0 before and after
  double* moments;   // (3,) count, mean, sum of squared deviations
};

// Every block calls this once with its threads' moments; the last one writes those of all blocks.
template <int kThreads>
__device__ __forceinline__ void finish_moments(
    Moments mine, MomentsOut out, std::int64_t block, std::int64_t num_blocks) {
  const Moments of_block = block_moments<kThreads>(mine);
  __shared__ bool last;
  if (threadIdx.x == 0) {
    out.partial[block * 3] = of_block.count;
    out.partial[block * 3 + 1] = of_block.mean;
    out.partial[block * 3 + 2] = of_block.m2;
    __threadfence();  // the moments are visible to every block before the ticket is
    last = atomicAdd(out.ticket, 1u) == static_cast<unsigned>(num_blocks - 1);
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  double count = 0.0, weighted = 0.0;
  for (std::int64_t b = threadIdx.x; b < num_blocks; b += kThreads) {
    const double n = __ldcg(out.partial + b * 3);
    count += n;
    weighted += n * __ldcg(out.partial + b * 3 + 1);
  }
  count = block_sum<kThreads>(count);
  const double mean = block_sum<kThreads>(weighted) / (count > 0.0 ? count : 1.0);
  double m2 = 0.0;
  for (std::int64_t b = threadIdx.x; b < num_blocks; b += kThreads) {
    const double apart = __ldcg(out.partial + b * 3 + 1) - mean;
    m2 += __ldcg(out.partial + b * 3 + 2) + __ldcg(out.partial + b * 3) * apart * apart;
  }
  m2 = block_sum<kThreads>(m2);
  if (threadIdx.x == 0) {
    out.moments[0] = count;
    out.moments[1] = mean;
    out.moments[2] = m2;
    *out.ticket = 0;
  }
}

}  // namespace hydra::cuda
