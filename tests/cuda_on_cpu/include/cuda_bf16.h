// Stands in for CUDA's header of this name when kernels are compiled for the emulator.
#pragma once

#include "half_bits.h"

struct __nv_bfloat16 {
  std::uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) : bits(cuda_on_cpu::bfloat_bits(x)) {}
  operator float() const { return cuda_on_cpu::bfloat_value(bits); }
};
inline float __bfloat162float(__nv_bfloat16 x) {
  return static_cast<float>(x);
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  return __nv_bfloat16(x);
}
