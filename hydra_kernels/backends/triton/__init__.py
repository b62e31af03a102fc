"""Triton kernels, for a GPU, or interpreted where TRITON_INTERPRET=1."""
