// Philox4x32-10, the counter-based generator that every backend draws dropout masks from.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The
// key is the 64-bit seed. The counter of columns 8 j .. 8 j + 7 of row m of an (M, K) matrix is
// (group, offset), each 64 bits, low word first, group = m * ceil(K / 8) + j. Its four words, low
// halves first, are the eight columns' draws; one is kept where its draw is at least
// round(p * 2^16).
#pragma once
#include <cstdint>

#include "hydra/host_device.h"

namespace hydra {

struct PhiloxWords {
  std::uint32_t at[4];
};

// The counter's four words, then the key's two.
HYDRA_HOST_DEVICE PhiloxWords philox_words(
    std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uint32_t k0,
    std::uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = static_cast<std::uint64_t>(0xD2511F53u) * c0;
    const std::uint64_t product1 = static_cast<std::uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(product1);
    c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace hydra
