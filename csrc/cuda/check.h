// CUDA's status codes as exceptions, and the device of a launch. pybind11 turns the exception into
// Python's RuntimeError.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace hydra::cuda {

// check(launch_ppo_loss_fwd(..., stream), "ppo_loss_fwd");
inline void check(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call, of any library in this thread, reports it again
  throw std::runtime_error(
      std::string(op) + ": CUDA error: " + cudaGetErrorString(status) + " (" +
      cudaGetErrorName(status) + ")");
}

// Makes `device` current and puts the previous one back. A stream belongs to one device, and a
// launch on it while another device is current fails.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check(cudaGetDevice(&previous_), op);
    if (device == previous_) return;
    check(cudaSetDevice(device), op);
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace hydra::cuda
