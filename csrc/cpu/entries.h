// What csrc/cpu offers to bindings.cpp. Pointers arrive as integers (Tensor.data_ptr()); shapes,
// strides and dtypes have been checked in hydra_kernels/ops and hydra_kernels/backends.
#pragma once

#include <cstdint>

namespace hydra::cpu {}  // namespace hydra::cpu
