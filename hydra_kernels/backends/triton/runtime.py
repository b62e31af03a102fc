"""Where Triton kernels can run: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import contextvars
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hydra_kernels.backends.recording import constant_to_compilers

if TYPE_CHECKING:  # what is here is asked where there is no Triton too
    from triton.tools.tensor_descriptor import TensorDescriptor

#: Kernels are interpreted, on the CPU. Triton reads the variable when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def missing() -> list[str]:
    """Why Triton kernels cannot run, whatever the tensors; empty when they can."""
    if not INTERPRETED and not torch.cuda.is_available():
        return ["torch sees no GPU (and TRITON_INTERPRET=1 is not set)"]
    return []


@constant_to_compilers
def too_old(device: torch.device) -> bool:
    """Whether Triton does not support a GPU: one of NVIDIA's before Ampere."""
    return _too_old(device)


@functools.cache
def _too_old(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 8


def wrong_device(*tensors: Tensor | None) -> list[str]:
    """A reason when a tensor is where no Triton kernel can reach it."""
    found = {t.device.type for t in tensors if t is not None}
    if len(found) > 1:
        return [f"needs tensors on one device, got {', '.join(sorted(found))}"]
    if found <= {"cuda"}:
        for t in tensors:
            if t is not None:
                return ["needs compute capability 8.0 or newer"] if too_old(t.device) else []
        return []
    if INTERPRETED and found <= {"cpu"}:
        return []
    return [f"needs tensors on cuda, got {', '.join(sorted(found))}"]


@functools.cache
def major(device: torch.device) -> int:
    """The GPU's compute capability, before the point; Hopper's for the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The GPU's; some, for the interpreter, which runs the programs of a grid in turn."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def has_tma(*matrices: Tensor) -> bool:
    """Whether Hopper's copy engine (TMA) can read these: aligned rows of adjacent elements."""
    return major(matrices[0].device) >= 9 and all(map(_describable, matrices))


def _describable(matrix: Tensor) -> bool:
    row = matrix.stride(0) * matrix.element_size()
    aligned = row > 0 and row % 16 == 0 and matrix.data_ptr() % 16 == 0
    return aligned and matrix.stride(1) == 1 and matrix.numel() > 0


def descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """What a kernel reads blocks of the matrix by; made on the host, a graph keeps it."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)


def launch_with_scratch(kernel: Callable[..., object], *args: object, **options: object) -> None:
    """Launches a kernel that makes descriptors itself, for which Triton asks for device memory.

    The allocator that is told to Triton is gone afterwards: another may be the user's.
    """
    import triton

    def run() -> None:
        triton.set_allocator(lambda size, _, __: torch.empty(size, dtype=torch.int8, device="cuda"))
        kernel(*args, **options)

    contextvars.copy_context().run(run)
