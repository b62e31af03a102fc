// Whitening over a mask: moments in one pass over memory, whitening in another.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/entries.h"
#include "cpu/masked_whiten_block.h"
#include "cpu/parallel.h"
#include "hydra/pointer.h"
#include "hydra/where.h"

namespace hydra::cpu {
namespace {

// Merged in order: the result depends neither on the number of threads nor on their timing.
constexpr std::int64_t kBlock = 4 * kWhitenChunk;

std::int64_t num_blocks(std::int64_t length) {
  return (length + kBlock - 1) / kBlock;
}

}  // namespace

void masked_whiten_moments(
    std::uintptr_t x, std::uintptr_t mask, std::int64_t length, std::uintptr_t moments) {
  const float* elements = pointer<const float>(x);
  const std::uint8_t* counts = pointer<const std::uint8_t>(mask);
  std::vector<Moments> of_block(static_cast<std::size_t>(num_blocks(length)));
#pragma omp parallel for schedule(static) if (length >= kParallelTokens)
  for (std::int64_t block = 0; block < num_blocks(length); ++block) {
    const std::int64_t begin = block * kBlock;
    of_block[static_cast<std::size_t>(block)] =
        masked_moments(elements + begin, counts + begin, std::min(kBlock, length - begin));
  }
  Moments total{0.0, 0.0, 0.0};
  for (const Moments& block : of_block) total = merge(total, block);
  store(total, pointer<double>(moments));
}

void masked_whiten_fwd(
    std::uintptr_t x, std::uintptr_t mask, std::int64_t length, std::uintptr_t moments,
    bool shift_mean, std::uintptr_t out) {
  const float* elements = pointer<const float>(x);
  const std::uint8_t* counts = pointer<const std::uint8_t>(mask);
  const double* m = pointer<const double>(moments);
  float* whitened = pointer<float>(out);
  const Whitening by = whitening({m[0], m[1], m[2]}, shift_mean);
#pragma omp parallel for schedule(static) if (length >= kParallelTokens)
  for (std::int64_t block = 0; block < num_blocks(length); ++block) {
    const std::int64_t begin = block * kBlock;
    const std::int64_t end = std::min(begin + kBlock, length);
    multiversion([=] {
      const float* in = elements;
      const std::uint8_t* keep = counts;
      float* result = whitened;
      const Whitening w = by;
      const std::int64_t first = begin, last = end;
#pragma omp simd
      for (std::int64_t i = first; i < last; ++i) {
        result[i] = where(keep[i] != 0, whiten(in[i], w));
      }
      return 0;
    });
  }
}

}  // namespace hydra::cpu
