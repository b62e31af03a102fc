"""C++ kernels for the CPU: SIMD and OpenMP through the compiled extension."""
