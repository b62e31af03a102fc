// How this extension was built and what it found on this machine.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/multiversion.h"

#ifdef HYDRA_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace hydra {

inline pybind11::dict build_info() {
  pybind11::dict info;
#ifdef HYDRA_WITH_CUDA
  info["cuda"] = true;
  info["cuda_version"] =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["cuda_archs"] = HYDRA_CUDA_ARCHS;
#else
  info["cuda"] = false;
  info["cuda_version"] = pybind11::none();
  info["cuda_archs"] = "";
#endif
#ifdef _OPENMP
  info["openmp"] = _OPENMP;  // the specification's date, 201511 is OpenMP 4.5
#else
  info["openmp"] = pybind11::none();
#endif
  info["cpu_isa"] = cpu::isa_name(cpu::isa_level());
  info["machine_isa"] = cpu::isa_name(cpu::machine_isa());
  info["compiler"] = HYDRA_COMPILER;
  info["interface"] = HYDRA_INTERFACE;
  return info;
}

}  // namespace hydra
