// Four neighbouring tokens, which is what a thread of the token-level kernels takes at once:
// 16-byte loads and stores where rows begin on 16 bytes. No Torch headers: nvcc alone checks this
// file.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

namespace hydra::cuda {

constexpr int kQuad = 4;

struct Quad {
  float at[kQuad];
};

// Which of tokens i..i+3, of those before n, count.
template <bool kAligned>
__device__ __forceinline__ void load_mask(
    const std::uint8_t* mask, std::int64_t i, std::int64_t n, bool (&keep)[kQuad]) {
  if (kAligned && i + kQuad <= n) {
    const uchar4 v = *reinterpret_cast<const uchar4*>(mask + i);
    keep[0] = v.x != 0, keep[1] = v.y != 0, keep[2] = v.z != 0, keep[3] = v.w != 0;
  } else {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) keep[k] = i + k < n && mask[i + k] != 0;
  }
}

// Reads four tokens. What is masked is read but replaced, so that NaN there cannot enter.
template <bool kAligned>
__device__ __forceinline__ Quad
load_quad(const float* x, std::int64_t i, std::int64_t n, const bool (&keep)[kQuad]) {
  Quad out;
  if (kAligned && i + kQuad <= n) {
    const float4 v = __ldcs(reinterpret_cast<const float4*>(x + i));  // streamed: read once
    out.at[0] = v.x, out.at[1] = v.y, out.at[2] = v.z, out.at[3] = v.w;
  } else {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) out.at[k] = i + k < n ? x[i + k] : 0.0f;
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k) out.at[k] = keep[k] ? out.at[k] : 0.0f;
  return out;
}

template <bool kAligned>
__device__ __forceinline__ void store_quad(
    float* x, std::int64_t i, std::int64_t n, const Quad& v) {
  if (kAligned && i + kQuad <= n) {
    *reinterpret_cast<float4*>(x + i) = make_float4(v.at[0], v.at[1], v.at[2], v.at[3]);
  } else {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      if (i + k < n) x[i + k] = v.at[k];
    }
  }
}

// The smallest block whose tile of kQuad tokens a thread holds a row, up to 256 threads.
inline int row_threads(std::int64_t num_cols) {
  return num_cols <= 32 * kQuad ? 32 : num_cols <= 128 * kQuad ? 128 : 256;
}

// Whether load_quad<true> may be used on all of these, and on their rows of num_cols; absent arrays
// are null.
inline bool quads_aligned(
    std::initializer_list<const void*> floats, const void* mask, std::int64_t num_cols) {
  bool aligned = num_cols % kQuad == 0 && reinterpret_cast<std::uintptr_t>(mask) % kQuad == 0;
  for (const void* x : floats) {
    aligned = aligned && reinterpret_cast<std::uintptr_t>(x) % sizeof(float4) == 0;
  }
  return aligned;
}

}  // namespace hydra::cuda
