"""The dtype in which the token-level ops keep their state and give their results."""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where a tensor is float64, else float32, whatever half precision came in."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32
