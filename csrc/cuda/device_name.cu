// The smallest CUDA entry: tells whether this build reaches a GPU at all.
#include "cuda/check.h"
#include "cuda/entries.h"

namespace hydra::cuda {

std::string device_name(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "device_name");
  return properties.name;
}

}  // namespace hydra::cuda
