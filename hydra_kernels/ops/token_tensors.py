"""What the ops on (B, T) tensors of tokens ask of their arguments, and what kernels get."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_shape(op: str, shape: Sequence[int], **tensors: Tensor) -> None:
    """Each tensor is floating-point and has the shape."""
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{op}: {name} must be {tuple(shape)}, the shape that goes with mask, "
                f"got {tuple(tensor.shape)}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating-point, got {tensor.dtype}")


def check_bool(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bool:
            raise ValueError(f"{op}: {name} must be bool, got {tensor.dtype}")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: tensors must be on one device, got {found}")


def finite(op: str, **numbers: float | Tensor) -> list[float]:
    """The numbers, out of their tensors where a CPU has these."""
    found = []
    for name, number in numbers.items():
        if isinstance(number, Tensor):
            if number.numel() != 1 or not number.is_cpu:
                raise ValueError(
                    f"{op}: {name} must be a number, got {tuple(number.shape)} on {number.device}, "
                    "which to read would be a synchronisation"
                )
            number = number.item()
        if not -float("inf") < number < float("inf"):
            raise ValueError(f"{op}: {name} must be finite, got {number}")
        found.append(number)
    return found


def in_unit_interval(op: str, **numbers: float | Tensor) -> list[float]:
    found = finite(op, **numbers)
    for name, number in zip(numbers, found, strict=True):
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{op}: {name} must be in [0, 1], got {number}")
    return found


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor as kernels take it: a constant, contiguous, half precision widened to float32."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return tensor.contiguous()
