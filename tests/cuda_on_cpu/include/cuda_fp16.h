// Stands in for CUDA's header of this name when kernels are compiled for the emulator.
#pragma once

#include "half_bits.h"

struct __half {
  std::uint16_t bits;
  __half() = default;
  explicit __half(float x) : bits(cuda_on_cpu::half_bits(x)) {}
  operator float() const { return cuda_on_cpu::half_value(bits); }
};
inline float __half2float(__half x) {
  return static_cast<float>(x);
}
inline __half __float2half(float x) {
  return __half(x);
}
