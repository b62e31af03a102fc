// The types of numbers that tensors hold, read as float32 and rounded from it.
//
// Without branches and without instructions of one machine, so that loops over them vectorise.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/multiversion.h"

namespace hydra::cpu {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

// As hydra_kernels/backends/cpu/lora_linear.py numbers them.
enum class Dtype : std::int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// f(T{}) with the type that `dtype` names.
template <class F>
void with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
    case Dtype::kFloat16:
      return f(Float16{});
  }
}

HYDRA_INLINE std::uint32_t bits_of(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

HYDRA_INLINE float float_of(std::uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

HYDRA_INLINE float widen(float v) {
  return v;
}

HYDRA_INLINE float widen(BFloat16 v) {
  return float_of(static_cast<std::uint32_t>(v.bits) << 16);
}

HYDRA_INLINE float widen(Float16 v) {
  const std::uint32_t sign = (v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7FFFu;
  // The exponent's bias grows by 112; that of infinities and NaN, all ones, by 112 once more.
  const std::uint32_t extra = magnitude >= 0x7C00u ? 112u << 23 : 0u;
  const std::uint32_t normal = (magnitude << 13) + (112u << 23) + extra;
  // Below 2^-14 it counts steps of 2^-24, which are those of the floats from 1/2 on.
  const std::uint32_t small = bits_of(float_of(0x3F000000u + magnitude) - 0.5f);
  return float_of(sign | (magnitude < 0x0400u ? small : normal));
}

HYDRA_INLINE void narrow(float v, float* to) {
  *to = v;
}

HYDRA_INLINE void narrow(float v, BFloat16* to) {
  const std::uint32_t bits = bits_of(v);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  to->bits = static_cast<std::uint16_t>(nan ? 0x7FC0u : rounded);
}

HYDRA_INLINE void narrow(float v, Float16* to) {
  const std::uint32_t sign = (bits_of(v) >> 16) & 0x8000u, magnitude = bits_of(v) & 0x7FFFFFFFu;
  // Both round half to even, and up into the next exponent where it must be.
  const std::uint32_t normal =
      ((magnitude + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  const std::uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
  std::uint32_t half = magnitude < 0x38800000u ? small : normal;  // 2^-14
  half = magnitude >= 0x477FF000u ? 0x7C00u : half;               // 65520 rounds to infinity
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  to->bits = static_cast<std::uint16_t>(sign | half);
}

}  // namespace hydra::cpu
