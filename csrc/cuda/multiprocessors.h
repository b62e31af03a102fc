// How wide a device is, for the size of a launch.
#pragma once

#include "cuda/check.h"

namespace hydra::cuda {

inline int multiprocessors(int device, const char* op) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), op);
  return count;
}

}  // namespace hydra::cuda
