"""What a launch on a GPU needs, whoever wrote the kernel: the device, and a ticket counter."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

_tickets: dict[tuple[torch.device, int], Tensor] = {}


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one, on which Triton launches."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def ticket(device: torch.device) -> Tensor:
    """(1,) int32 zero, which the kernel that takes it sets back to zero.

    One a stream, since kernels of one stream follow each other. A graph that is being captured gets
    one of its own: it may be replayed beside anything.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _tickets[key]
