"""Launch choices by GPU architecture: a table in the package, a generic default, tuning on request.

A kernel with choices asks for them at each launch:

    config = tuning.choose("gae_fwd", rewards, {"B": B, "T": T}, CANDIDATES, launch)

``CANDIDATES[0]`` is the generic default and runs wherever nothing better is known. ``tuning.json``
holds what was measured to be better, a row a kernel, architecture and range of sizes:

    {"kernel": "gae_fwd", "arch": "90", "when": {"T": [1, 512]}, "config": {"BLOCK_T": 128}}

The first row that fits wins. Nothing is ever timed at a user's call unless ``HYDRA_AUTOTUNE=1``:
then the first call of each size (to the next power of two) on a GPU compiles every candidate, side
by side, runs each, leaves out those whose outputs are not the default's, and the process keeps the
fastest of the rest. With ``HYDRA_TUNING_FILE`` set, rows found are added to that file, and a file
that is there is read before the package's: it has the same form, so that rows worth keeping are
copied over as they are.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hydra_kernels.backends.triton.side_by_side import compile_launches

Config = Mapping[str, int]
#: What a launch has written: a tensor, or several, None for one that this call has not.
Outputs = Tensor | Sequence[Tensor | None]

_TABLE = Path(__file__).with_suffix(".json")
_log = logging.getLogger("hydra_kernels")
_found: dict[tuple[str, str, tuple[tuple[str, int], ...]], Config] = {}


def choose(
    kernel: str,
    tensor: Tensor,
    sizes: Mapping[str, int],
    candidates: Sequence[Config],
    launch: Callable[[Config], Outputs] | None = None,
) -> Config:
    """The launch choice of ``kernel`` for these sizes on the tensor's device.

    Args:
        kernel: The name the table has it by.
        tensor: Any tensor of the call, for its device.
        sizes: What the choice depends on.
        candidates: Every choice that is right, the generic default first.
        launch: Launches the kernel with a choice, as often as it is called, and returns what that
            has written, all of it the same for every choice but for rounding; None where that
            cannot be, and then it is never tuned.
    """
    if tensor.device.type != "cuda":
        return candidates[0]
    arch = _arch(tensor.device)
    if launch is not None and len(candidates) > 1 and os.environ.get("HYDRA_AUTOTUNE") == "1":
        key = (kernel, arch, tuple((name, _bucket(n)) for name, n in sizes.items()))
        if _listing.on:  # what this call would tune is compiled together with its caller's
            for config in candidates[1:]:
                with contextlib.suppress(Exception):
                    launch(config)
            return candidates[0]
        if key not in _found and not torch.cuda.is_current_stream_capturing():
            _compile(candidates, launch)
            _found[key] = fastest(kernel, candidates, launch, _cuda_ms)
            _keep(key)
        if key in _found:
            return _found[key]
    # Rows are few, but a launch takes microseconds: the search is remembered.
    row = _lookup(kernel, arch, tuple(sizes.items()), os.environ.get("HYDRA_TUNING_FILE"))
    return candidates[0] if row is None else row


class _Listing(threading.local):
    """Whether this thread runs launches only to see which kernels they need."""

    on = False


_listing = _Listing()


def _compile(candidates: Sequence[Config], launch: Callable[[Config], Outputs]) -> None:
    """Has the kernels of every candidate compiled, side by side, before any of them is timed."""
    _listing.on = True
    try:
        compile_launches(functools.partial(launch, config) for config in candidates)
    finally:
        _listing.on = False


def fastest(
    kernel: str,
    candidates: Sequence[Config],
    launch: Callable[[Config], Outputs],
    time_ms: Callable[[Callable[[], object]], float],
) -> Config:
    """The fastest candidate of those that run and write what the default, the first, writes.

    The others are logged, each with what is wrong with it. Outputs are left as the default's. The
    time of each is logged too, for whoever lists INFO.

    Raises:
        RuntimeError: the default does not run, or a candidate has lost the device.
    """
    try:
        written = _tensors(launch(candidates[0]))
        result = [t.clone() for t in written]
        # Once more over NaN: what is NaN then is no output, but room that the kernel leaves alone.
        _poison(written)
        mine = written = _tensors(launch(candidates[0]))
        expected = [t.clone() for t in written]
        times = [(time_ms(functools.partial(launch, candidates[0])), 0)]
    except Exception as error:
        raise RuntimeError(
            f"{kernel}: the default {dict(candidates[0])} does not run, and without it no other "
            f"candidate can be checked: {error}"
        ) from error
    for i, config in enumerate(candidates[1:], 1):
        try:
            _poison(written)
            written = _tensors(launch(config))
            wrong = _differs(written, expected)
            if not wrong:
                times.append((time_ms(functools.partial(launch, config)), i))
        except Exception as error:  # too much shared memory, too many registers: Triton's own types
            wrong = f"does not run: {error}"
            _raise_if_lost(kernel, config)
        if wrong:
            _log.warning("%s: tuning left out %s: %s", kernel, dict(config), wrong)
    for t, kept in zip(mine, result, strict=True):
        t.copy_(kept)
    for ms, i in times:
        _log.info("%s: %.4f ms with %s", kernel, ms, dict(candidates[i]))
    best, winner = min(times)
    _log.info("%s: %s, %.4f ms (default %.4f)", kernel, candidates[winner], best, times[0][0])
    return candidates[winner]


def _tensors(outputs: Outputs) -> list[Tensor]:
    given = [outputs] if isinstance(outputs, Tensor) else outputs
    return [t for t in given if t is not None]


def _poison(tensors: Sequence[Tensor]) -> None:
    """What is not written is not right by chance: from the last launch, or from its memory."""
    for t in tensors:
        t.fill_(float("nan"))


def _differs(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """What sets the outputs of a candidate apart from the default's; "" where nothing does.

    Sums in another order differ by their rounding: by a few units in the last place of an element,
    or of what is usual among its neighbours where terms have cancelled.
    """
    for i, (got, due) in enumerate(zip(tensors, expected, strict=True)):
        if got.shape != due.shape or got.dtype != due.dtype:
            return (
                f"output {i} is {got.dtype} {tuple(got.shape)}, {due.dtype} {tuple(due.shape)} due"
            )
        is_output = ~due.isnan()
        allowed = max(4 * torch.finfo(due.dtype).eps, _TOLERANCE)
        due, got = due[is_output].float(), got[is_output].float()
        if due.numel() == 0:
            continue
        usual = due[due.isfinite()].square().mean().sqrt().nan_to_num()
        error = torch.where(got == due, 0.0, (got - due).abs())  # infinities too
        right = error <= allowed * (due.abs().nan_to_num(posinf=0.0) + usual)  # NaN is not
        if not right.all():
            count = int((~right).sum())
            worst = float(torch.where(right, 0.0, error.nan_to_num(torch.inf, torch.inf)).max())
            what = f"off by up to {worst:.2e}" if worst < float("inf") else "not finite"
            return f"output {i} differs from the default's in {count} of {due.numel()}: {what}"
    return ""


#: Of float32 sums of some thousand terms, and of KL, where logits cancel.
_TOLERANCE = 5e-5


def _raise_if_lost(kernel: str, config: Config) -> None:
    try:
        _synchronize()
    except Exception as error:
        raise RuntimeError(f"{kernel}: the candidate {dict(config)} lost the device") from error


def _synchronize() -> None:
    torch.cuda.synchronize()


def _cuda_ms(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    samples = []
    for _ in range(11):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return statistics.median(samples)


def _bucket(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else n  # 0 and 1 are answers to a question


@functools.cache
def _arch(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}"


@functools.cache
def _rows(path: str | None) -> list[dict[str, Any]]:
    """Of the user's file, then of the package's table.

    Raises:
        ValueError: a file is not a list of rows, each with its four keys.
    """
    rows: list[dict[str, Any]] = []
    for file in [Path(path)] if path and Path(path).exists() else []:
        rows += read(file)
    return rows + read(_TABLE)


def read(file: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    keys = {"kernel", "arch", "when", "config"}
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, dict) or set(row) != keys:
            raise ValueError(f"{file}: not a row of kernel, arch, when and config: {row}")
    return rows


@functools.lru_cache(maxsize=4096)
def _lookup(
    kernel: str, arch: str, sizes: tuple[tuple[str, int], ...], path: str | None
) -> Config | None:
    given = dict(sizes)
    for row in _rows(path):
        if row["kernel"] == kernel and row["arch"] == arch:
            ranges = row["when"].items()
            if unknown := [name for name in row["when"] if name not in given]:
                raise ValueError(
                    f"{kernel}: a tuning row asks for {', '.join(unknown)}, "
                    f"the kernel has {', '.join(given)}"
                )
            if all(low <= given[name] <= high for name, (low, high) in ranges):
                return row["config"]
    return None


def _keep(key: tuple[str, str, tuple[tuple[str, int], ...]]) -> None:
    path = os.environ.get("HYDRA_TUNING_FILE")
    if not path:
        return
    kernel, arch, buckets = key
    when = {name: [bucket // 2 + 1 if bucket > 1 else bucket, bucket] for name, bucket in buckets}
    row = {"kernel": kernel, "arch": arch, "when": when, "config": dict(_found[key])}
    file = Path(path)
    rows = read(file) if file.exists() else []
    rows = [
        old for old in rows if (old["kernel"], old["arch"], old["when"]) != (kernel, arch, when)
    ]
    # Replaced as a whole: a process that is killed leaves the old file or the new one.
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps([*rows, row], indent=1) + "\n")
    partial.replace(file)
