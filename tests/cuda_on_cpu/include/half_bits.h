// float16 and bfloat16 as bits, rounded to the nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace cuda_on_cpu {

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline std::uint32_t round_off(std::uint32_t bits, int dropped) {
  const std::uint32_t half = 1u << (dropped - 1), odd = bits >> dropped & 1;
  return (bits + half - 1 + odd) >> dropped;
}

inline std::uint16_t bfloat_bits(float x) {
  const std::uint32_t bits = bits_of(x);
  if (x != x) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>(round_off(bits, 16));
}

inline float bfloat_value(std::uint16_t bits) {
  return float_of(static_cast<std::uint32_t>(bits) << 16);
}

inline std::uint16_t half_bits(float x) {
  const std::uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u,
                      magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u)
    return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520: infinity
  if (magnitude < 0x38800000u) {                        // below 2^-14: a multiple of 2^-24
    const float steps = float_of(magnitude) * 16777216.0f;
    const float rounded = (steps + 8388608.0f) - 8388608.0f;  // to the nearest integer
    return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(rounded));
  }
  return static_cast<std::uint16_t>(sign | (round_off(magnitude, 13) - (112u << 10)));
}

inline float half_value(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31,
                      rest = bits & 1023u;
  if (exponent == 31) return float_of(sign | 0x7f800000u | rest << 13);
  if (exponent == 0) {
    const float x = static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -x : x;
  }
  return float_of(sign | (exponent + 112u) << 23 | rest << 13);
}

}  // namespace cuda_on_cpu
