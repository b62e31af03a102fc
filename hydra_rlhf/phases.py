"""Seconds and bytes of each phase of a step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class Phases:
    """Times named phases and measures the memory that each holds and reaches.

    On a GPU bytes are the allocator's. On a CPU they are the process's resident set, which has
    the interpreter and the libraries in it; its peak is read from the kernel where that can be
    reset (Linux), and is the larger of both ends elsewhere.

    Args:
        device: Whose memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.held: dict[str, int] = {}
        self.peak: dict[str, int] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds up over the times that a phase is entered in a step."""
        self._reset_peak()
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            # Once a phase, so that its time is its own and not that of what it has queued.
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        held, peak = self._bytes()
        self.held[name] = held
        self.peak[name] = max(peak, self.peak.get(name, 0))

    def metrics(self) -> dict[str, float]:
        """``time/<phase>`` in seconds, ``memory/<phase>_held`` and ``_peak`` in bytes."""
        out: dict[str, float] = {f"time/{k}": v for k, v in self.seconds.items()}
        for name in self.held:
            out[f"memory/{name}_held"] = float(self.held[name])
            out[f"memory/{name}_peak"] = float(self.peak[name])
        return out

    def clear(self) -> None:
        self.seconds.clear()
        self.held.clear()
        self.peak.clear()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_peak_resident()

    def _bytes(self) -> tuple[int, int]:
        if self.device.type == "cuda":
            held = torch.cuda.memory_allocated(self.device)
            return held, torch.cuda.max_memory_allocated(self.device)
        return resident()


def resident() -> tuple[int, int]:
    """Resident set of this process now, and its peak since the last reset, in bytes; 0 unknown."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    now, peak = (int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, max(now, peak)


def reset_peak_resident() -> bool:
    """Sets the peak resident set to the present one; False where the system does not allow it."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True
