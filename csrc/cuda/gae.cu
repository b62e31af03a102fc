#include "cuda/check.h"
#include "cuda/entries.h"
#include "cuda/gae_kernel.cuh"
#include "cuda/multiprocessors.h"
#include "hydra/pointer.h"

namespace hydra::cuda {

int gae_segment_tiles(std::int64_t num_rows, std::int64_t num_cols, int device) {
  return gae_segment_tiles_for(num_rows, num_cols, multiprocessors(device, "gae"));
}

int gae_segments(std::int64_t num_cols, int tiles) {
  const std::int64_t of_row = gae_row_tiles(num_cols);
  return static_cast<int>((of_row + tiles - 1) / tiles);
}

void gae_fwd(
    std::uintptr_t rewards, std::uintptr_t values, std::uintptr_t mask, std::uintptr_t last_values,
    std::int64_t num_rows, std::int64_t num_cols, double gamma, double lam, int tiles,
    std::uintptr_t segment_maps, std::uintptr_t advantages, std::uintptr_t returns, int device,
    std::uintptr_t stream) {
  const DeviceGuard guard(device, "gae");
  GAEParams p{};
  p.rewards = pointer<const float>(rewards);
  p.values = pointer<const float>(values);
  p.mask = pointer<const std::uint8_t>(mask);
  p.last_values = pointer<const float>(last_values);
  p.num_rows = num_rows;
  p.num_cols = num_cols;
  p.coefs = gae_coefs(gamma, lam);
  p.tiles = tiles;
  p.num_segments = gae_segments(num_cols, tiles);
  p.segment_maps = pointer<float>(segment_maps);
  p.advantages = pointer<float>(advantages);
  p.returns = pointer<float>(returns);
  check(launch_gae_fwd<false>(p, pointer<CUstream_st>(stream)), "gae");
}

}  // namespace hydra::cuda
