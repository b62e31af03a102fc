#include "cuda/check.h"
#include "cuda/entries.h"
#include "cuda/masked_whiten_kernel.cuh"
#include "cuda/multiprocessors.h"
#include "hydra/pointer.h"

namespace hydra::cuda {

int masked_whiten_blocks(std::int64_t length, int device) {
  return masked_whiten_num_blocks(length, multiprocessors(device, "masked_whiten"));
}

void masked_whiten_moments(
    std::uintptr_t x, std::uintptr_t mask, std::int64_t length, std::uintptr_t partial,
    std::uintptr_t ticket, std::uintptr_t moments, int num_blocks, int device,
    std::uintptr_t stream) {
  const DeviceGuard guard(device, "masked_whiten");
  const MomentsOut out{
      pointer<double>(partial), pointer<unsigned>(ticket), pointer<double>(moments)};
  check(
      launch_masked_whiten_moments(
          pointer<const float>(x), pointer<const std::uint8_t>(mask), length, out, num_blocks,
          pointer<CUstream_st>(stream)),
      "masked_whiten");
}

void masked_whiten_fwd(
    std::uintptr_t x, std::uintptr_t mask, std::int64_t length, std::uintptr_t moments,
    bool shift_mean, std::uintptr_t out, int num_blocks, int device, std::uintptr_t stream) {
  const DeviceGuard guard(device, "masked_whiten");
  check(
      launch_masked_whiten_fwd(
          pointer<const float>(x), pointer<const std::uint8_t>(mask), length,
          pointer<const double>(moments), shift_mean, pointer<float>(out), num_blocks,
          pointer<CUstream_st>(stream)),
      "masked_whiten");
}

}  // namespace hydra::cuda
