// Kernels with one mistake each, and the same without it: what the emulator must say about them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

template <bool kBarrier>
__global__ void neighbour_kernel(float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 33) % 64];
}

// What is read is not yet read when the next round writes it.
template <bool kSecondBarrier>
__global__ void rounds_kernel(float* out) {
  __shared__ float value;
  float sum = 0.0f;
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x == 0) value = static_cast<float>(round);
    __syncthreads();
    sum += value;
    if (kSecondBarrier) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool kSync>
__global__ void lanes_kernel(float* out) {
  __shared__ float values[32];
  values[threadIdx.x] = 1.0f;
  if (kSync) __syncwarp();
  out[threadIdx.x] = values[31 - threadIdx.x];
}

__global__ void same_value_kernel(float* out) {
  __shared__ int any;
  if (threadIdx.x == 0) any = 0;
  __syncthreads();
  if (threadIdx.x % 3 == 0) any = 1;
  __syncthreads();
  out[threadIdx.x] = static_cast<float>(any);
}

__global__ void other_value_kernel(float* out) {
  __shared__ int which;
  if (threadIdx.x % 3 == 0) which = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = static_cast<float>(which);
}

__global__ void barrier_in_a_branch_kernel(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 0.0f;
  if (threadIdx.x >= 32) __syncthreads();
}

__global__ void early_exit_kernel(float* out) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  out[threadIdx.x] = 0.0f;
}

__global__ void shuffle_in_a_branch_kernel(float* out) {
  float x = static_cast<float>(threadIdx.x);
  if (threadIdx.x % 2 == 0) x = __shfl_down_sync(0xffffffffu, x, 2);
  out[threadIdx.x] = x;
}

__global__ void shuffle_from_outside_kernel(float* out) {
  const float x = static_cast<float>(threadIdx.x);
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_down_sync(0x0000ffffu, x, 4);
}

__global__ void never_written_kernel(float* out) {
  __shared__ float values[64];
  if (threadIdx.x != 7) values[threadIdx.x] = 0.0f;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void past_an_array_kernel(float* out) {
  __shared__ float values[2][64];
  values[0][threadIdx.x + 1] = 0.0f;
  __syncthreads();
  out[threadIdx.x] = 0.0f;
}

template <int kOffset>
__global__ void outside_kernel(float* out) {
  out[static_cast<int>(threadIdx.x) + kOffset] = 0.0f;
}

template <int kOffset>
__global__ void outside_read_kernel(float* out) {
  const float x = out[static_cast<int>(threadIdx.x) + kOffset];
  if (x > 1e30f) out[threadIdx.x] = 0.0f;
}

template <int kOffset>
__global__ void vector_kernel(float* out) {
  if (threadIdx.x < 15) {
    *reinterpret_cast<float4*>(out + 4 * threadIdx.x + kOffset) = make_float4(1, 2, 3, 4);
  }
}

__global__ void two_blocks_one_place_kernel(float* out) {
  if (threadIdx.x == 0) out[0] = static_cast<float>(blockIdx.x);
}

// The last block adds what the others wrote.
template <bool kRelease, bool kAcquire>
__global__ void last_block_kernel(float* out) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    out[blockIdx.x] = 1.0f;
    if (kRelease) __threadfence();
    last = atomicAdd(reinterpret_cast<int*>(out + 63), 1) == static_cast<int>(gridDim.x) - 1;
  }
  __syncthreads();
  if (!last) return;
  if (kAcquire) __threadfence();
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += out[b];
  __syncthreads();
  if (threadIdx.x == 0) out[62] = sum;
}

// Every block waits for the one after it, or for the one that took a ticket before it.
template <bool kForLater>
__global__ void wait_kernel(float* out) {
  int* counters = reinterpret_cast<int*>(out);
  if (threadIdx.x == 0) {
    const int ticket = atomicAdd(counters, 1);
    const int wanted = kForLater ? static_cast<int>(gridDim.x) - 1 - ticket : ticket;
    while (atomicAdd(counters + 1, 0) < wanted) __nanosleep(32);
    atomicAdd(counters + 1, 1);
  }
}

__global__ void read_only_kernel(float* out) {
  out[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x > 0) return;
  out[0] = __ldg(out + 5);
}

__global__ void __launch_bounds__(64) bound_kernel(float* out) {
  out[threadIdx.x % 64] = 0.0f;
}

// out = A B + C of one warp, its fragments as the PTX manual writes them (m16n8k16).
template <typename T>
__global__ void mma_kernel(const T* a, const T* b, const float* c, float* d) {
  const int lane = threadIdx.x, group = lane >> 2, in_group = lane % 4;
  T a_of[8], b_of[4];
  for (int i = 0; i < 8; ++i) {
    const int row = (i < 2) || (i >= 4 && i < 6) ? group : group + 8;
    const int col = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    a_of[i] = a[row * 16 + col];
  }
  for (int i = 0; i < 4; ++i) {
    const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
    b_of[i] = b[row * 8 + group];
  }
  unsigned a_regs[4], b_regs[2];
  std::memcpy(a_regs, a_of, sizeof(a_regs));
  std::memcpy(b_regs, b_of, sizeof(b_regs));
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  if (sizeof(a_of[0]) == 2 && std::is_same<T, __half>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a_regs[0]), "r"(a_regs[1]), "r"(a_regs[2]), "r"(a_regs[3]), "r"(b_regs[0]),
          "r"(b_regs[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a_regs[0]), "r"(a_regs[1]), "r"(a_regs[2]), "r"(a_regs[3]), "r"(b_regs[0]),
          "r"(b_regs[1]));
  }
  for (int i = 0; i < 4; ++i) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = sum[i];
}

__global__ void shuffles_kernel(float* out) {
  const int x = static_cast<int>(threadIdx.x);
  int sum = __shfl_sync(0xffffffffu, x, 5);
  sum = sum * 64 + __shfl_up_sync(0xffffffffu, x, 3);
  sum = sum * 64 + __shfl_xor_sync(0xffffffffu, x, 9);
  sum = sum * 64 + __shfl_down_sync(0xffffffffu, x, 2, 8);
  out[threadIdx.x] = static_cast<float>(sum % 8388608);
  const bool odd = __any_sync(0xffffffffu, x == 33) && !__all_sync(0xffffffffu, x < 40);
  out[threadIdx.x] += static_cast<float>(__popc(__ballot_sync(0xffffffffu, x % 3 == 0))) + odd;
}

}  // namespace

// Runs a kernel on 64 floats and returns CUDA's message, or nothing.
EXPORT const char* probe(const char* name, float* out, int blocks, int threads) {
  const auto is = [=](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("neighbour")) neighbour_kernel<true><<<blocks, threads, 0, nullptr>>>(out);
  if (is("neighbour, no barrier")) neighbour_kernel<false><<<blocks, threads, 0, nullptr>>>(out);
  if (is("rounds")) rounds_kernel<true><<<blocks, threads, 0, nullptr>>>(out);
  if (is("rounds, one barrier")) rounds_kernel<false><<<blocks, threads, 0, nullptr>>>(out);
  if (is("lanes")) lanes_kernel<true><<<blocks, 32, 0, nullptr>>>(out);
  if (is("lanes, in lockstep")) lanes_kernel<false><<<blocks, 32, 0, nullptr>>>(out);
  if (is("same value")) same_value_kernel<<<blocks, threads, 0, nullptr>>>(out);
  if (is("other value")) other_value_kernel<<<blocks, threads, 0, nullptr>>>(out);
  if (is("barrier in a branch")) barrier_in_a_branch_kernel<<<blocks, threads, 0, nullptr>>>(out);
  if (is("early exit")) early_exit_kernel<<<blocks, threads, 0, nullptr>>>(out);
  if (is("shuffle in a branch")) shuffle_in_a_branch_kernel<<<blocks, threads, 0, nullptr>>>(out);
  if (is("shuffle from outside")) shuffle_from_outside_kernel<<<blocks, 32, 0, nullptr>>>(out);
  if (is("never written")) never_written_kernel<<<blocks, threads, 0, nullptr>>>(out);
  if (is("past an array")) past_an_array_kernel<<<blocks, threads, 0, nullptr>>>(out);
  if (is("past the end")) outside_kernel<1><<<blocks, threads, 0, nullptr>>>(out);
  if (is("ahead of the start")) outside_kernel<-1><<<blocks, threads, 0, nullptr>>>(out);
  if (is("read past the end")) outside_read_kernel<1><<<blocks, threads, 0, nullptr>>>(out);
  if (is("vector")) vector_kernel<0><<<blocks, threads, 0, nullptr>>>(out);
  if (is("misaligned vector")) vector_kernel<1><<<blocks, threads, 0, nullptr>>>(out);
  if (is("two blocks")) two_blocks_one_place_kernel<<<blocks, threads, 0, nullptr>>>(out);
  if (is("last block")) last_block_kernel<true, true><<<blocks, threads, 0, nullptr>>>(out);
  if (is("no release")) last_block_kernel<false, true><<<blocks, threads, 0, nullptr>>>(out);
  if (is("no acquire")) last_block_kernel<true, false><<<blocks, threads, 0, nullptr>>>(out);
  if (is("wait")) wait_kernel<false><<<blocks, threads, 0, nullptr>>>(out);
  if (is("wait for later")) wait_kernel<true><<<blocks, threads, 0, nullptr>>>(out);
  if (is("read-only")) read_only_kernel<<<blocks, threads, 0, nullptr>>>(out);
  if (is("bound")) bound_kernel<<<blocks, threads, 0, nullptr>>>(out);
  if (is("shuffles")) shuffles_kernel<<<blocks, threads, 0, nullptr>>>(out);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

EXPORT const char* probe_mma(int is_half, const void* a, const void* b, const float* c, float* d) {
  if (is_half) {
    mma_kernel<__half>
        <<<1, 32, 0, nullptr>>>(static_cast<const __half*>(a), static_cast<const __half*>(b), c, d);
  } else {
    mma_kernel<__nv_bfloat16><<<1, 32, 0, nullptr>>>(
        static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b), c, d);
  }
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

EXPORT void probe_round(
    int is_half, const float* x, std::uint16_t* bits, float* back, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    if (is_half) {
      const __half rounded = __float2half(x[i]);
      bits[i] = rounded.bits, back[i] = __half2float(rounded);
    } else {
      const __nv_bfloat16 rounded = __float2bfloat16(x[i]);
      bits[i] = rounded.bits, back[i] = __bfloat162float(rounded);
    }
  }
}
