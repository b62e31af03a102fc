// float32 matrix products by the BLAS that torch brought along.
//
// hydra_kernels/backends/extension.py finds its Fortran entry, sgemm_, and gives the address here.
// A product by it is, bit for bit, torch.mm's: they end in the same function. What it saves is the
// way there, hundreds of microseconds after a product that has pushed torch's code out of the
// cache.
#pragma once
#include <cstdint>

namespace hydra::cpu {

// Sizes are 64 bits wide: read as 32 on a little-endian machine they have the same value, so both
// kinds of BLAS can be called.
using Sgemm = void (*)(
    const char* transpose_a, const char* transpose_b, const std::int64_t* m, const std::int64_t* n,
    const std::int64_t* k, const float* alpha, const float* a, const std::int64_t* lda,
    const float* b, const std::int64_t* ldb, const float* beta, float* c, const std::int64_t* ldc);

inline Sgemm& sgemm_entry() {
  static Sgemm entry = nullptr;
  return entry;
}

inline void set_sgemm(std::uintptr_t address) {
  sgemm_entry() = reinterpret_cast<Sgemm>(address);
}

struct Matrix {
  const float* at;
  std::int64_t stride;  // of its rows
  bool transposed;      // op(M) = M^T
};

// out (m, n) = beta out + alpha op(a) op(b), with k inside; rows of contiguous columns.
inline void product(
    std::int64_t m, std::int64_t n, std::int64_t k, float alpha, const Matrix& a, const Matrix& b,
    float beta, float* out, std::int64_t out_stride) {
  // Columns first, as Fortran has it: out^T = op(b)^T op(a)^T.
  sgemm_entry()(
      b.transposed ? "T" : "N", a.transposed ? "T" : "N", &n, &m, &k, &alpha, b.at, &b.stride, a.at,
      &a.stride, &beta, out, &out_stride);
}

}  // namespace hydra::cpu
