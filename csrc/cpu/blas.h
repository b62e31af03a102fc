// Products of bfloat16 matrices with float32 results, by the BLAS that torch brought along: torch
// itself gives them rounded to bfloat16 only.
//
// hydra_kernels/backends/extension.py finds the Fortran entry, gemm_bf16bf16f32_, and gives the
// address here.
#pragma once
#include <cstdint>

#include "cpu/multiversion.h"

#ifdef HYDRA_X86_LEVELS
#include <cpuid.h>
#endif

namespace hydra::cpu {

// Sizes are 64 bits wide: read as 32 on a little-endian machine they have the same value, so both
// kinds of BLAS can be called.
using GemmBf16 = void (*)(
    const char* transpose_a, const char* transpose_b, const std::int64_t* m, const std::int64_t* n,
    const std::int64_t* k, const float* alpha, const std::uint16_t* a, const std::int64_t* lda,
    const std::uint16_t* b, const std::int64_t* ldb, const float* beta, float* c,
    const std::int64_t* ldc);

inline GemmBf16& gemm_bf16_entry() {
  static GemmBf16 entry = nullptr;
  return entry;
}

inline void set_gemm_bf16(std::uintptr_t address) {
  gemm_bf16_entry() = reinterpret_cast<GemmBf16>(address);
}

// Whether the processor multiplies bfloat16 matrices itself (AMX), and the system lets it.
// Elsewhere such products are slower than those of float32 with the conversion.
inline bool has_bf16_tiles() {
#ifdef HYDRA_X86_LEVELS
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kOsXsave = 1u << 27, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (isa_level() != Isa::kV4 || !__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsXsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
  unsigned low = 0, high = 0;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  return (low & kTileState) == kTileState;
#else
  return false;
#endif
}

}  // namespace hydra::cpu
