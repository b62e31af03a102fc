// A LoRA linear layer for few rows (decoding), in one launch that streams W once.
//
//   y = x W^T + bias + s B^T,  s = gate * (x A^T)
//
// Rows of W and rows of A alike are the A operand of mma.m16n8k16, x the B operand, so that one
// warp reads 16-byte pieces of 16 rows and multiplies them with all rows of x. A block takes a tile
// of 16 rows, its warps a part of K each. Which tile is found by an atomic ticket: the tiles of A
// come first, so that whoever waits for s waits for blocks that run already. The last block to
// finish sets the counters back. No Torch headers: nvcc alone checks this file.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace hydra::cuda {

constexpr int kLoraThreads = 256;
constexpr int kLoraWarps = kLoraThreads / 32;
constexpr int kLoraTile = 16;      // rows of W or A of a block: M of the mma
constexpr int kLoraMaxRows = 32;   // rows of x
constexpr int kLoraMaxRanks = 64;  // sum of the adapters' ranks
constexpr int kLoraDepth = 32;     // columns that the 4 threads of a row take at once, 8 each

template <typename T>
struct LoraDecodeParams {
  const T* x;     // (M, K), rows 16-byte aligned, K a multiple of 8, as are those below
  const T* w;     // (N, K)
  const T* bias;  // (N,) or null
  const T* a;     // (R, K)
  const T* b;     // (N, R), any strides
  std::int64_t stride_bn, stride_br;
  const std::int64_t* ids;    // null: every adapter on everywhere
  const std::int64_t* owner;  // (R,)
  const float* scale;         // (R,)
  float* s;                   // (kLoraMaxRows, R) scratch
  int* counters;              // (3,): tickets, tiles of A done, blocks done; 0 before and after
  T* y;                       // (M, N)
  int num_rows, num_outputs, num_inputs, num_ranks, rows_per_id;
};

// A build for older GPUs has no such instruction, and refuses the kernel (backends/cuda/device.py).
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define HYDRA_HAS_MMA 1
#else
#define HYDRA_HAS_MMA 0
#endif

template <typename T>
struct LoraMma;

template <>
struct LoraMma<__nv_bfloat16> {
  static __device__ __forceinline__ void run(
      float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
#if HYDRA_HAS_MMA
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    __trap();
#endif
  }
  static __device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float v) { return __float2bfloat16(v); }
};

template <>
struct LoraMma<__half> {
  static __device__ __forceinline__ void run(
      float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
#if HYDRA_HAS_MMA
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    __trap();
#endif
  }
  static __device__ __forceinline__ float widen(__half v) { return __half2float(v); }
  static __device__ __forceinline__ __half narrow(float v) { return __float2half(v); }
};

template <bool kStream, typename T>
__device__ __forceinline__ uint4 load_eight(const T* row, int col, int num_cols, bool inside) {
  if (!inside || col >= num_cols) return make_uint4(0, 0, 0, 0);
  const auto* at = reinterpret_cast<const uint4*>(row + col);
  return kStream ? __ldcs(at) : __ldg(at);  // W is read once; x and A by every block
}

// total[t][..] += rows (16, K) x^T, the part of K that is this warp's; 8 rows of x each t.
//
// The mma wants columns 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of 16 from thread t of a row. A sum does
// not mind its order, so thread t gives its own eight neighbours to two products instead.
template <typename T, int kTiles, bool kStream>
__device__ __forceinline__ void lora_tile_product(
    const T* rows, int first, int num_tile_rows, const T* x, int num_rows, int num_cols,
    float (&total)[kTiles][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = lane / 4, part = lane % 4;
  const bool low = first + group < num_tile_rows, high = first + group + 8 < num_tile_rows;
  const T* row_low = rows + static_cast<std::int64_t>(low ? first + group : 0) * num_cols;
  const T* row_high = rows + static_cast<std::int64_t>(high ? first + group + 8 : 0) * num_cols;
#pragma unroll 4
  for (int k = warp * kLoraDepth; k < num_cols; k += kLoraWarps * kLoraDepth) {
    const int col = k + part * 8;
    const uint4 a_low = load_eight<kStream>(row_low, col, num_cols, low);
    const uint4 a_high = load_eight<kStream>(row_high, col, num_cols, high);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int m = t * 8 + group;
      const T* x_row = x + static_cast<std::int64_t>(m < num_rows ? m : 0) * num_cols;
      const uint4 b = load_eight<false>(x_row, col, num_cols, m < num_rows);
      LoraMma<T>::run(total[t], a_low.x, a_high.x, a_low.y, a_high.y, b.x, b.y);
      LoraMma<T>::run(total[t], a_low.z, a_high.z, a_low.w, a_high.w, b.z, b.w);
    }
  }
}

// SASS expects: lora_decode_kernel: wide_loads, tensor_cores
template <typename T, int kTiles>
__global__ void __launch_bounds__(kLoraThreads) lora_decode_kernel(const LoraDecodeParams<T> p) {
  __shared__ float sums[kLoraWarps][kTiles * 8][kLoraTile + 1];  // + 1: no bank conflicts
  __shared__ int ticket, any_on;
  if (threadIdx.x == 0) {
    ticket = atomicAdd(p.counters, 1);
    any_on = p.ids == nullptr ? 1 : 0;
  }
  __syncthreads();
  if (p.ids != nullptr && threadIdx.x < p.num_rows && p.ids[threadIdx.x / p.rows_per_id] >= 0) {
    any_on = 1;  // whoever writes, writes this
  }
  __syncthreads();
  const int rank_tiles = (p.num_ranks + kLoraTile - 1) / kLoraTile;
  const bool of_adapter = ticket < rank_tiles;
  const int first = (of_adapter ? ticket : ticket - rank_tiles) * kLoraTile;

  float total[kTiles][4] = {};
  if (!of_adapter) {
    lora_tile_product<T, kTiles, true>(
        p.w, first, p.num_outputs, p.x, p.num_rows, p.num_inputs, total);
  } else if (any_on) {
    lora_tile_product<T, kTiles, false>(
        p.a, first, p.num_ranks, p.x, p.num_rows, p.num_inputs, total);
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[warp][t * 8 + lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8] = total[t][i];
    }
  }
  if (!of_adapter && any_on && threadIdx.x == 0) {
    while (atomicAdd(p.counters + 1, 0) < rank_tiles) __nanosleep(64);
    __threadfence();
  }
  __syncthreads();

  for (int i = threadIdx.x; i < kTiles * 8 * kLoraTile; i += kLoraThreads) {
    const int m = i / kLoraTile, n = i % kLoraTile;
    if (m >= p.num_rows) continue;
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < kLoraWarps; ++w) value += sums[w][m][n];
    const int at = first + n;
    if (of_adapter) {
      if (at >= p.num_ranks) continue;
      const bool on = p.ids == nullptr || p.ids[m / p.rows_per_id] == p.owner[at];
      p.s[m * p.num_ranks + at] = on ? p.scale[at] * value : 0.0f;
    } else {
      if (at >= p.num_outputs) continue;
      if (p.bias != nullptr) value += LoraMma<T>::widen(p.bias[at]);
      if (any_on) {
        const T* b = p.b + at * p.stride_bn;
        for (int r = 0; r < p.num_ranks; ++r) {
          value += __ldcg(p.s + m * p.num_ranks + r) * LoraMma<T>::widen(b[r * p.stride_br]);
        }
      }
      p.y[static_cast<std::int64_t>(m) * p.num_outputs + at] = LoraMma<T>::narrow(value);
    }
  }
  __threadfence();  // s is visible before its tile counts as done
  __syncthreads();
  if (threadIdx.x == 0) {
    // With nothing on nobody waits for this, and it might come after the counters are set back.
    if (of_adapter && any_on) atomicAdd(p.counters + 1, 1);
    if (atomicAdd(p.counters + 2, 1) == static_cast<int>(gridDim.x) - 1) {
      p.counters[0] = p.counters[1] = p.counters[2] = 0;
    }
  }
}

template <typename T>
inline cudaError_t launch_lora_decode(const LoraDecodeParams<T>& p, cudaStream_t stream) {
  if (p.num_rows == 0 || p.num_outputs == 0) return cudaSuccess;
  const int blocks =
      (p.num_ranks + kLoraTile - 1) / kLoraTile + (p.num_outputs + kLoraTile - 1) / kLoraTile;
  if (p.num_rows <= 8) {
    lora_decode_kernel<T, 1><<<blocks, kLoraThreads, 0, stream>>>(p);
  } else if (p.num_rows <= 16) {
    lora_decode_kernel<T, 2><<<blocks, kLoraThreads, 0, stream>>>(p);
  } else {
    lora_decode_kernel<T, 4><<<blocks, kLoraThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace hydra::cuda
