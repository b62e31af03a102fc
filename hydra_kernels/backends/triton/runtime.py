"""Where Triton kernels can run: on a GPU, or interpreted on the CPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor

#: Kernels are interpreted, on the CPU. Triton reads the variable when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def missing() -> list[str]:
    """Why Triton kernels cannot run, whatever the tensors; empty when they can."""
    if not INTERPRETED and not torch.cuda.is_available():
        return ["torch sees no GPU (and TRITON_INTERPRET=1 is not set)"]
    return []


def wrong_device(*tensors: Tensor | None) -> list[str]:
    """A reason when a tensor is where no Triton kernel can reach it."""
    found = {t.device.type for t in tensors if t is not None}
    if len(found) > 1:
        return [f"needs tensors on one device, got {', '.join(sorted(found))}"]
    if found <= {"cuda"} or (INTERPRETED and found <= {"cpu"}):
        return []
    return [f"needs tensors on cuda, got {', '.join(sorted(found))}"]
