// Elementwise operations over up to four dimensions with any strides.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/replay_words.h"
#include "hydra/fast_exp.h"

namespace hydra::cpu::replaying {

template <std::int64_t kOp, class T>
HYDRA_INLINE T map_one(T a, T b) {
  if constexpr (kOp == kCopy) return a;
  if constexpr (kOp == kNeg) return -a;
  if constexpr (kOp == kAdd) return a + b;
  if constexpr (kOp == kSub) return a - b;
  if constexpr (kOp == kMul) return a * b;
  if constexpr (kOp == kSquare) return a * a;
  if constexpr (kOp == kCube) return a * a * a;
  if constexpr (kOp == kDiv) return a / b;
  if constexpr (kOp == kMax) return a > b || a != a ? a : b;  // NaN stays
  if constexpr (kOp == kMin) return a < b || a != a ? a : b;
  if constexpr (kOp == kRelu) return a > 0 ? a : (a == a ? T(0) : a);
  if constexpr (std::is_same_v<T, float>) {
    if constexpr (kOp == kSqrt) return std::sqrt(a);
    if constexpr (kOp == kRsqrt) return 1.0f / std::sqrt(a);
    if constexpr (kOp == kExp) return fast_exp(a);
    if constexpr (kOp == kTanh) return fast_tanh(a);
    if constexpr (kOp == kSigmoid) return 1.0f / (1.0f + fast_exp(-a));
    if constexpr (kOp == kSilu) return a / (1.0f + fast_exp(-a));
    if constexpr (kOp == kGelu) return 0.5f * a * (1.0f + std::erf(a * 0.70710678118654752f));
    if constexpr (kOp == kGeluTanh) {
      return 0.5f * a * (1.0f + fast_tanh(0.79788456080286536f * (a + 0.044715f * a * a * a)));
    }
    if constexpr (kOp == kFloor) return std::floor(a);
    if constexpr (kOp == kLog) return std::log(a);
    if constexpr (kOp == kCos) return std::cos(a);
    if constexpr (kOp == kSin) return std::sin(a);
  }
  return a;
}

template <std::int64_t kOp, class Out, class In>
HYDRA_INLINE Out map_to(In a, In b) {
  if constexpr (std::is_same_v<In, BFloat16>) {
    return widen(a);
  } else {
    return static_cast<Out>(map_one<kOp, In>(a, b));
  }
}

template <std::int64_t kOp, class Out, class In, std::int64_t kA, std::int64_t kB>
HYDRA_INLINE void map_run(Out* out, const In* a, const In* b, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    out[i] = map_to<kOp, Out>(a[i * kA], b[i * kB]);
  }
}

template <std::int64_t kOp, class Out, class In>
HYDRA_INLINE void map_all(
    const std::int64_t (&firsts)[4], const std::int64_t (&lasts)[4], Out* out,
    const std::int64_t (&so)[4], const In* a, const std::int64_t (&sa)[4], const In* b,
    const std::int64_t (&sb)[4]) {
  const std::int64_t n = lasts[3] - firsts[3];
  const bool fast = so[3] == 1 && (sa[3] == 1 || sa[3] == 0) && (sb[3] == 1 || sb[3] == 0);
  for (std::int64_t i = firsts[0]; i < lasts[0]; ++i) {
    for (std::int64_t j = firsts[1]; j < lasts[1]; ++j) {
      for (std::int64_t k = firsts[2]; k < lasts[2]; ++k) {
        Out* to = out + i * so[0] + j * so[1] + k * so[2] + firsts[3] * so[3];
        const In* x = a + i * sa[0] + j * sa[1] + k * sa[2] + firsts[3] * sa[3];
        const In* y = b + i * sb[0] + j * sb[1] + k * sb[2] + firsts[3] * sb[3];
        if (fast && sa[3] == 1 && sb[3] == 1) {
          map_run<kOp, Out, In, 1, 1>(to, x, y, n);
        } else if (fast && sa[3] == 1) {
          map_run<kOp, Out, In, 1, 0>(to, x, y, n);
        } else if (fast && sb[3] == 1) {
          map_run<kOp, Out, In, 0, 1>(to, x, y, n);
        } else {
          for (std::int64_t l = 0; l < n; ++l) {
            to[l * so[3]] = map_to<kOp, Out>(x[l * sa[3]], y[l * sb[3]]);
          }
        }
      }
    }
  }
}

HYDRA_INLINE void run_map(Words words, int thread, int threads) {
  const std::int64_t op = words.next(), type = words.next();
  std::int64_t sizes[4], firsts[4] = {}, lasts[4], so[4], sa[4], sb[4];
  words.read(sizes);
  auto* out = words.address<char>();
  words.read(so);
  const auto* a = words.address<char>();
  words.read(sa);
  const auto* b = words.address<char>();
  words.read(sb);
  const double exact = words.real();  // as a float it would round integers past 2^24
  const auto number = static_cast<float>(exact);
  const auto whole = static_cast<std::int64_t>(exact);
  if (b == nullptr) {
    b = type == kFloat ? reinterpret_cast<const char*>(&number)
                       : reinterpret_cast<const char*>(&whole);
  }
  for (int d = 0; d < 4; ++d) lasts[d] = sizes[d];
  int shared = 0;
  while (shared < 3 && sizes[shared] == 1) ++shared;
  const Part part = part_of(sizes[shared], shared == 3 ? 16 : 1, thread, threads);
  firsts[shared] = part.first;
  lasts[shared] = part.last;
  if (part.first == part.last) return;
#define HYDRA_MAP(OP, OUT, IN)                                                            \
  map_all<OP, OUT, IN>(                                                                   \
      firsts, lasts, reinterpret_cast<OUT*>(out), so, reinterpret_cast<const IN*>(a), sa, \
      reinterpret_cast<const IN*>(b), sb)
  if (type == kIntToFloat) {
    HYDRA_MAP(kCopy, float, std::int64_t);
    return;
  }
  if (type == kBf16ToFloat) {
    HYDRA_MAP(kCopy, float, BFloat16);
    return;
  }
  if (type == kInt) {
    switch (op) {
      case kCopy:
        HYDRA_MAP(kCopy, std::int64_t, std::int64_t);
        break;
      case kAdd:
        HYDRA_MAP(kAdd, std::int64_t, std::int64_t);
        break;
      case kSub:
        HYDRA_MAP(kSub, std::int64_t, std::int64_t);
        break;
      default:
        HYDRA_MAP(kMul, std::int64_t, std::int64_t);
    }
    return;
  }
  switch (op) {
#define HYDRA_CASE(OP)           \
  case OP:                       \
    HYDRA_MAP(OP, float, float); \
    break
    HYDRA_CASE(kCopy);
    HYDRA_CASE(kNeg);
    HYDRA_CASE(kSquare);
    HYDRA_CASE(kCube);
    HYDRA_CASE(kSqrt);
    HYDRA_CASE(kRsqrt);
    HYDRA_CASE(kExp);
    HYDRA_CASE(kTanh);
    HYDRA_CASE(kSigmoid);
    HYDRA_CASE(kSilu);
    HYDRA_CASE(kRelu);
    HYDRA_CASE(kGelu);
    HYDRA_CASE(kGeluTanh);
    HYDRA_CASE(kCos);
    HYDRA_CASE(kSin);
    HYDRA_CASE(kAdd);
    HYDRA_CASE(kSub);
    HYDRA_CASE(kMul);
    HYDRA_CASE(kDiv);
    HYDRA_CASE(kMax);
    HYDRA_CASE(kMin);
    HYDRA_CASE(kFloor);
    HYDRA_CASE(kLog);
#undef HYDRA_CASE
#undef HYDRA_MAP
  }
}

}  // namespace hydra::cpu::replaying
