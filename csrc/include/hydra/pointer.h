// Addresses arrive from Python as integers: Tensor.data_ptr(), 0 for an absent tensor.
#pragma once
#include <cstdint>

namespace hydra {

template <typename T>
inline T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace hydra
