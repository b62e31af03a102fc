// What csrc/cuda offers to bindings.cpp. Pointers and the stream arrive as integers
// (Tensor.data_ptr(), torch.cuda.current_stream().cuda_stream); shapes, strides and dtypes have
// been checked in hydra_kernels/ops and hydra_kernels/backends. A failure throws, see check().
#pragma once

#include <cstdint>
#include <string>

namespace hydra::cuda {

std::string device_name(int device);

}  // namespace hydra::cuda
