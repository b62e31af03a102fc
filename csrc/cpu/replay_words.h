// An instruction of replay.cpp: a few integers, and the part of its work that a thread takes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/floats.h"

namespace hydra::cpu::replaying {

// The numbers of hydra_kernels/replay/lowering.py.
enum Opcode : std::int64_t {
  kLinear = 0,     // y = alpha (x W^T + s B^T) + bias, W (N, K)
  kLinearT = 1,    // y = alpha x W + bias, W (K, N)
  kMap = 2,        // elementwise
  kMean = 3,       // over rows
  kLayerNorm = 4,  // over rows
  kSoftmax = 5,    // over rows
  kGather = 6,     // rows of a table
  kPut = 7,        // values at indices
  kAttention = 8,
  kDraw = 9,      // a token from each row of logits
  kSum = 10,      // over rows
  kTopK = 11,     // of rows, largest first
  kPick = 12,     // elements at the indices of one dimension
  kExperts = 13,  // products with a matrix of its own for each row
};

enum MapOp : std::int64_t {
  kCopy = 0,
  kNeg,
  kSquare,
  kCube,
  kSqrt,
  kRsqrt,
  kExp,
  kTanh,
  kSigmoid,
  kSilu,
  kRelu,
  kGelu,
  kGeluTanh,
  kCos,
  kSin,
  kAdd,
  kSub,
  kMul,
  kDiv,
  kMax,
  kMin,
  kFloor,
  kLog,
};

enum MapType : std::int64_t { kFloat = 0, kInt = 1, kIntToFloat = 2, kBf16ToFloat = 3 };

// The words of one instruction, read in order.
struct Words {
  const std::int64_t* at;
  const std::int64_t* table;  // addresses of the storages

  HYDRA_INLINE std::int64_t next() { return *at++; }

  HYDRA_INLINE double real() {
    double value;
    std::memcpy(&value, at++, sizeof value);
    return value;
  }

  HYDRA_INLINE float number() { return static_cast<float>(real()); }

  template <class T = float>
  HYDRA_INLINE T* address() {
    const std::int64_t slot = *at++, offset = *at++;
    return slot < 0 ? nullptr : reinterpret_cast<T*>(table[slot] + offset);
  }

  template <int N>
  HYDRA_INLINE void read(std::int64_t (&to)[N]) {
    for (int i = 0; i < N; ++i) to[i] = *at++;
  }
};

// Which part of n things, in units of `unit`, a thread takes.
struct Part {
  std::int64_t first, last;
};

HYDRA_INLINE Part part_of(std::int64_t n, std::int64_t unit, int thread, int threads) {
  const std::int64_t units = (n + unit - 1) / unit;
  return {
      std::min(n, units * thread / threads * unit),
      std::min(n, units * (thread + 1) / threads * unit)};
}

}  // namespace hydra::cpu::replaying
