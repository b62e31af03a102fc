"""CUDA C++ kernels through the compiled extension."""
