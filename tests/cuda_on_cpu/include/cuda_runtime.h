// Stands in for CUDA's header of this name when kernels are compiled for the emulator. Only what
// csrc/cuda uses, or a change there is likely to use next.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __align__(n) alignas(n)

#define threadIdx (::cuda_on_cpu::thread_index())
#define blockIdx (::cuda_on_cpu::block_index())
#define blockDim (::cuda_on_cpu::block_size())
#define gridDim (::cuda_on_cpu::grid_size())
constexpr int warpSize = 32;

#define CUDA_ON_CPU_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- vectors

struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline int4 make_int4(int x, int y, int z, int w) {
  return {x, y, z, w};
}
inline double2 make_double2(double x, double y) {
  return {x, y};
}

// ---- barriers and fences

inline void __syncthreads(CUDA_ON_CPU_PLACE) {
  cuda_on_cpu::sync_threads(cuda_on_cpu::Barrier::kPlain, 0, {file, line});
}
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::sync_threads(cuda_on_cpu::Barrier::kOr, predicate, {file, line});
}
inline int __syncthreads_and(int predicate, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::sync_threads(cuda_on_cpu::Barrier::kAnd, predicate, {file, line});
}
inline int __syncthreads_count(int predicate, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::sync_threads(cuda_on_cpu::Barrier::kCount, predicate, {file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_PLACE) {
  cuda_on_cpu::sync_warp(mask, {file, line});
}
inline void __threadfence() {
  cuda_on_cpu::fence();
}
inline void __nanosleep(unsigned) {
  cuda_on_cpu::nap();
}

// ---- what the lanes of a warp do together

namespace cuda_on_cpu {

enum class Shuffle { kIndex, kUp, kDown, kXor };

template <typename T>
struct ShuffleIn {
  T value;
  unsigned amount;
  int width;
};

template <typename T, Shuffle kind>
__attribute__((no_sanitize("thread"))) void shuffled(Lanes& lanes) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(lanes.mask >> lane & 1)) continue;
    ShuffleIn<T> mine, theirs;
    std::memcpy(&mine, lanes.in[lane], sizeof(mine));
    const unsigned width = static_cast<unsigned>(mine.width);
    const unsigned begin = lane / width * width, at = lane % width;
    unsigned from = lane;
    if (kind == Shuffle::kIndex) from = begin + mine.amount % width;
    if (kind == Shuffle::kUp && at >= mine.amount) from = lane - mine.amount;
    if (kind == Shuffle::kDown && at + mine.amount < width) from = lane + mine.amount;
    // Across a segment's end only from the right to the left.
    if (kind == Shuffle::kXor && (lane ^ mine.amount) < begin + width) from = lane ^ mine.amount;
    if (!(lanes.mask >> from & 1)) fail("a shuffle reads a lane that its mask leaves out");
    std::memcpy(&theirs, lanes.in[from], sizeof(theirs));
    std::memcpy(lanes.out[lane], &theirs.value, sizeof(T));
  }
}

template <typename T, Shuffle kind>
T shuffle(const char* what, unsigned mask, T value, unsigned amount, int width, Place at) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 and 8 bytes");
  ShuffleIn<T> in;
  std::memset(static_cast<void*>(&in), 0, sizeof(in));
  in.value = value, in.amount = amount, in.width = width;
  T out;
  collective(what, &shuffled<T, kind>, mask, &in, sizeof(in), &out, sizeof(out), at);
  return out;
}

enum class Vote { kAny, kAll, kBallot };
unsigned vote(Vote kind, const char* what, unsigned mask, int predicate, Place at);

}  // namespace cuda_on_cpu

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::shuffle<T, cuda_on_cpu::Shuffle::kIndex>(
      "__shfl_sync", mask, value, static_cast<unsigned>(lane), width, {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::shuffle<T, cuda_on_cpu::Shuffle::kUp>(
      "__shfl_up_sync", mask, value, delta, width, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::shuffle<T, cuda_on_cpu::Shuffle::kDown>(
      "__shfl_down_sync", mask, value, delta, width, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_ON_CPU_PLACE) {
  return cuda_on_cpu::shuffle<T, cuda_on_cpu::Shuffle::kXor>(
      "__shfl_xor_sync", mask, value, static_cast<unsigned>(bits), width, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_PLACE) {
  return vote(cuda_on_cpu::Vote::kAny, "__any_sync", mask, predicate, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_PLACE) {
  return vote(cuda_on_cpu::Vote::kAll, "__all_sync", mask, predicate, {file, line}) != 0;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_PLACE) {
  return vote(cuda_on_cpu::Vote::kBallot, "__ballot_sync", mask, predicate, {file, line});
}

// ---- memory

#define CUDA_ON_CPU_ATOMIC(name, T, result)                          \
  __attribute__((no_sanitize("thread"))) inline T name(T* at, T x) { \
    ::cuda_on_cpu::atomic_access(at, sizeof(T));                     \
    const T old = *at;                                               \
    *at = result;                                                    \
    return old;                                                      \
  }
#define CUDA_ON_CPU_ATOMICS(name, result)    \
  CUDA_ON_CPU_ATOMIC(name, int, result)      \
  CUDA_ON_CPU_ATOMIC(name, unsigned, result) \
  CUDA_ON_CPU_ATOMIC(name, unsigned long long, result)
CUDA_ON_CPU_ATOMICS(atomicAdd, old + x)
CUDA_ON_CPU_ATOMIC(atomicAdd, float, old + x)
CUDA_ON_CPU_ATOMIC(atomicAdd, double, old + x)
CUDA_ON_CPU_ATOMICS(atomicMax, old > x ? old : x)
CUDA_ON_CPU_ATOMICS(atomicMin, old < x ? old : x)
CUDA_ON_CPU_ATOMICS(atomicExch, x)
CUDA_ON_CPU_ATOMICS(atomicOr, old | x)
CUDA_ON_CPU_ATOMICS(atomicAnd, old& x)
__attribute__((no_sanitize("thread"))) inline int atomicCAS(int* at, int compare, int x) {
  ::cuda_on_cpu::atomic_access(at, sizeof(int));
  const int old = *at;
  if (old == compare) *at = x;
  return old;
}

template <typename T>
T __ldg(const T* at) {
  cuda_on_cpu::read_only_access(at, sizeof(T));
  return *at;
}
template <typename T>
T __ldcs(const T* at) {
  return *at;
}
template <typename T>
T __ldcg(const T* at) {
  return *at;
}
template <typename T>
void __stcs(T* at, const T& x) {
  *at = x;
}
template <typename T>
void __stcg(T* at, const T& x) {
  *at = x;
}

// ---- arithmetic

inline float __expf(float x) {
  return expf(x);
}
inline float __logf(float x) {
  return logf(x);
}
inline float __fdividef(float x, float y) {
  return x / y;
}
inline float __fmaf_rn(float x, float y, float z) {
  return fmaf(x, y, z);
}
inline float rsqrtf(float x) {
  return 1.0f / sqrtf(x);
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline float __int_as_float(int x) {
  float out;
  std::memcpy(&out, &x, sizeof(out));
  return out;
}
inline int __float_as_int(float x) {
  int out;
  std::memcpy(&out, &x, sizeof(out));
  return out;
}
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(x) * y >> 32);
}

// ---- the host's side

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = CUstream_st*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
struct cudaDeviceProp {
  char name[256];
  int multiProcessorCount;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t status);
const char* cudaGetErrorName(cudaError_t status);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
