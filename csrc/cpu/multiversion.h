// One loop, compiled for several x86-64 vector levels, the best one taken when it runs.
//
// The extension is built for any x86-64, so plain code gets 128-bit vectors. A loop that should get
// more goes into multiversion(), inside the parallel region and around at least a few hundred
// elements (the call is a load, a compare and a jump):
//
//   #pragma omp parallel for
//   for (int64_t row = 0; row < num_rows; ++row) {
//     const float* x_row = x + row * num_cols;
//     sum[row] = multiversion([=] {
//       float total = 0.0f;
//   #pragma omp simd reduction(+ : total)
//       for (int64_t i = 0; i < num_cols; ++i) total += x_row[i];
//       return total;
//     });
//   }
//
// Three rules:
//  - capture by value: through a reference the compiler must reload after every store;
//  - what the loop calls is inlined (`flatten`), so it must be visible: a header's inline function,
//    or a template. Calls into libm stay scalar; csrc/include/hydra has an exp that vectorises;
//  - intrinsics above SSE2 do not compile in the lambda itself. Put them in a function of their own
//    with HYDRA_TARGET_V3 or HYDRA_TARGET_V4 and call that after asking isa_level().
//
// Why not `target_clones`: it needs ifunc (no macOS, no musl), cannot be put on a template, and is
// dropped from the function that OpenMP outlines. Why not one object file per level: inline
// functions of the standard library are merged by the linker, which may keep the AVX-512 copy for
// everyone.
//
// HYDRA_CPU_ISA=baseline|v3|v4 in the environment lowers the level (never raises it above the
// machine's), read once. Levels round differently, because v3 and v4 fuse multiply and add.
#pragma once

#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HYDRA_X86_LEVELS 1
#define HYDRA_TARGET_V3 __attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt")))
#if defined(__clang__)
#define HYDRA_TARGET_V4 \
  __attribute__((       \
      target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt")))
#else
#define HYDRA_TARGET_V4                                                \
  __attribute__((target(                                               \
      "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi," \
      "bmi2,lzcnt,prefer-vector-width=512")))
#endif
#endif

// For what has no level of its own: inlined, it takes that of the function around it.
#define HYDRA_INLINE inline __attribute__((always_inline))

namespace hydra::cpu {

enum class Isa { kBaseline = 0, kV3 = 1, kV4 = 2 };  // as in the x86-64 psABI levels

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kV4:
      return "v4";
    case Isa::kV3:
      return "v3";
    default:
      return "baseline";
  }
}

inline Isa machine_isa() {
#ifdef HYDRA_X86_LEVELS
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? Isa::kV4 : v3 ? Isa::kV3 : Isa::kBaseline;
#else
  return Isa::kBaseline;
#endif
}

// The level that multiversion() runs.
inline Isa isa_level() {
  static const Isa level = [] {
    const Isa machine = machine_isa();
    const char* asked = std::getenv("HYDRA_CPU_ISA");
    if (asked != nullptr && std::strcmp(asked, "baseline") == 0) return Isa::kBaseline;
    if (asked != nullptr && std::strcmp(asked, "v3") == 0 && machine == Isa::kV4) return Isa::kV3;
    return machine;
  }();
  return level;
}

#ifdef HYDRA_X86_LEVELS

template <class Body>
HYDRA_TARGET_V4 __attribute__((noinline, flatten)) auto run_v4(const Body& body) {
  return body();
}

template <class Body>
HYDRA_TARGET_V3 __attribute__((noinline, flatten)) auto run_v3(const Body& body) {
  return body();
}

template <class Body>
__attribute__((noinline, flatten)) auto run_baseline(const Body& body) {
  return body();
}

template <class Body>
inline auto multiversion(const Body& body) {
  switch (isa_level()) {
    case Isa::kV4:
      return run_v4(body);
    case Isa::kV3:
      return run_v3(body);
    default:
      return run_baseline(body);
  }
}

#else

template <class Body>
inline auto multiversion(const Body& body) {
  return body();
}

#endif

}  // namespace hydra::cpu
