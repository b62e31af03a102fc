// When the token-level kernels take more than one thread, and how many rows a thread takes at once.
#pragma once
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace hydra::cpu {

// Below this many tokens a parallel region costs more than it saves.
constexpr std::int64_t kParallelTokens = 16384;

inline int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Within a parallel region: which of its threads this one is, and how many there are.
inline int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline int threads() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

}  // namespace hydra::cpu
