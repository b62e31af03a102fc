// Selection that a compiler turns into a blend, with no branch and no masked load.
#pragma once
#include "hydra/host_device.h"

namespace hydra {

// Both sides exist already: x is loaded whether it counts or not, and dropped if not, NaN included.
template <typename T>
HYDRA_HOST_DEVICE T where(bool keep, T x) {
  return keep ? x : T(0);
}

}  // namespace hydra
