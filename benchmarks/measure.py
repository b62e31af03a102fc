"""Time and memory of a call, on the host's clock or the device's."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

MIB = 1024**2


@dataclass(frozen=True)
class Effort:
    rounds: int
    # Of one row: fewer rounds where a call is slow, but 3 at least, or 2 where it is past SLOW.
    seconds: float


SLOW = 2.0  # seconds
QUICK = Effort(rounds=10, seconds=1.0)
FULL = Effort(rounds=50, seconds=5.0)


def time_calls(
    calls: dict[str, Callable[[], object]], device: str, effort: Effort
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, str]]:
    """Milliseconds and the host's microseconds of every call, round by round, and failures.

    Before the rounds each call is made four times, or until half of SLOW has gone by.
    """
    sample = _Cuda() if device == "cuda" else _wall
    failures: dict[str, str] = {}
    rounds: dict[str, int] = {}
    busy: dict[str, float] = {}
    for name, call in calls.items():
        try:
            spent = 0.0
            for _ in range(4):
                ms_taken, enqueued = sample(call, busy.get(name, 0.0))
                took, busy[name] = ms_taken / 1e3, enqueued / 1e6
                spent += took
                if spent > SLOW / 2:
                    break
            least = 2 if took > SLOW else 3
            rounds[name] = max(least, int(min(effort.rounds, effort.seconds / max(took, 1e-9))))
        except Exception as error:
            failures[name] = reason(error)
    ms: dict[str, list[float]] = {name: [] for name in rounds}
    host: dict[str, list[float]] = {name: [] for name in rounds}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(max(rounds.values(), default=0)):
            for name in rounds:
                if name in failures or i >= rounds[name]:
                    continue
                try:
                    took, enqueued = sample(calls[name], busy[name])
                except Exception as error:
                    failures[name] = reason(error)
                    continue
                ms[name].append(took)
                host[name].append(enqueued)
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return ms, host, failures


def _wall(call: Callable[[], object], _: float) -> tuple[float, float]:
    start = time.perf_counter()
    call()
    took = time.perf_counter() - start
    return took * 1e3, took * 1e6


class _Cuda:
    """Device time of one call with a cold L2 cache."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        size = 2 * getattr(properties, "L2_cache_size", 64 * MIB)
        self.flush = torch.empty(size // 4, dtype=torch.int32, device="cuda")
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def __call__(self, call: Callable[[], object], host_seconds: float) -> tuple[float, float]:
        torch.cuda.synchronize()
        self.flush.zero_()
        # Long enough that the host has enqueued the call before the device reaches it, at 2 GHz;
        # at most 5 ms, past which launching is what the call really costs.
        torch.cuda._sleep(int(min(5e-3, 1.5 * host_seconds + 2e-5) * 2e9))
        self.start.record()
        start = time.perf_counter()
        call()
        enqueued = time.perf_counter() - start
        self.end.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.end), enqueued * 1e6


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of ``call`` as a captured CUDA graph."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = call()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own stream the current one

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def quantile(samples: Sequence[float], q: float) -> float:
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


_M_MMAP_THRESHOLD = -3  # malloc.h


def peak_mib(call: Callable[[], object], device: str) -> float | None:
    """MiB held at the worst moment of ``call`` above what was held before it.

    On CUDA by torch's allocator. On Linux by the resident set's high-water mark, so that scratch
    which no tensor owns counts too; None where the system keeps no such mark that can be reset.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with _unmapped_when_freed() as marks:
        if not marks:
            return None
        before = _resident_kib("VmRSS")
        call()
        return max(0.0, (_resident_kib("VmHWM") - before) / 1024)


@contextlib.contextmanager
def _unmapped_when_freed() -> Iterator[bool]:
    """glibc gives every block over 64 KiB back at once, and the high-water mark starts anew."""
    reset = Path("/proc/self/clear_refs")
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 64 * 1024)
        libc.malloc_trim(0)
        reset.write_text("5")
    except (OSError, AttributeError):
        yield False
        return
    try:
        yield True
    finally:
        # Where glibc's own adaptive threshold ends up once blocks of that size have been freed.
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * MIB)


def _resident_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def reason(error: BaseException) -> str:
    """Its type and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
