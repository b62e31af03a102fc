// Marks a formula as compiled for host and device alike.
#pragma once

#ifdef __CUDACC__
#define HYDRA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HYDRA_HOST_DEVICE inline __attribute__((always_inline))
#endif
