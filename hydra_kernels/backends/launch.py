"""What a launch on a GPU needs, whoever wrote the kernel: the device, tickets, constants."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
_tickets: dict[tuple[torch.device, int], Tensor] = {}
_constants: dict[Hashable, Any] = {}
_captured: dict[int, Any] = {}


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
    return counters(_tickets, 1, device)


def counters(
    kept: dict[tuple[torch.device, int], Tensor], size: int, device: torch.device
) -> Tensor:
    """(size,) int32 zeros, as ``ticket``; ``kept`` holds those of each stream."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in kept:
        kept[key] = lasting(device, lambda: torch.zeros(size, dtype=torch.int32, device=device))
    return kept[key]


def lasting(device: torch.device, make: Callable[[], Made]) -> Made:
    """What ``make`` makes on a GPU, in memory that may be kept from one call to the next.

    Made by another thread, on this one's stream. A thread may take its memory from a pool that is
    counted or given back as a whole: torch.compile's CUDA graphs refuse a warm-up that leaves
    anything behind in theirs. A pool is its thread's, as are modes such as inference_mode.
    """
    stream = torch.cuda.current_stream(device)
    made: list[Made] = []
    failed: list[BaseException] = []

    def outside() -> None:
        try:
            with torch.cuda.stream(stream):
                made.append(make())
        except BaseException as error:  # raised where it was asked for
            failed.append(error)

    thread = threading.Thread(target=outside)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def constant(key: Hashable, device: torch.device, make: Callable[[], Made]) -> Made:
    """What ``make`` makes on a GPU, the same tensors at every call with ``key``; it may not copy
    from the host."""
    capturing = torch.cuda.is_current_stream_capturing()
    found = _constants.get(key)
    if found is None and capturing:
        return make()  # of the graph's memory, and made again at each replay

    def made_and_done() -> Made:
        made = make()
        torch.cuda.current_stream(device).synchronize()  # the next call may be on another stream
        return made

    if found is None:
        if len(_constants) >= 4096:
            _constants.clear()
        found = _constants[key] = lasting(device, made_and_done)
    if capturing:
        # A graph reads them at each replay, and knows no more of them than where they are.
        _captured[id(found)] = found
    return found


def table(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(len(values),) constants.

    On a GPU a fill for each run of equal ones: a copy from the host would wait for the device, and
    is refused in a capture.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    out = torch.empty(len(values), dtype=dtype, device=device)
    start = 0
    for stop in range(1, len(values) + 1):
        if stop == len(values) or values[stop] != values[start]:
            out[start:stop].fill_(values[start])
            start = stop
    return out
