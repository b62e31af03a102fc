"""Checkpoints that a crash cannot spoil: written beside, synced, renamed, and verified when read.

    checkpoints/
      step-00000100/
        manifest.json     step, and size and SHA-256 of every other file
        ...               whatever the trainer writes
      .writing-...        a save that was interrupted; removed by the next one

A folder with the final name is complete: it got that name, in one rename, after all its files and
the folder itself had reached the disk. The manifest is for what happens later: a truncated copy, a
full disk, a flipped bit. Such a checkpoint is named and passed over for the one before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from hydra_rlhf.errors import UserError

MANIFEST = "manifest.json"
STATE = "state.pt"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")
_WRITING = ".writing-"

_log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint cannot be trusted; the message says which file of it and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: the step after which it was taken, and its folder."""

    step: int
    path: Path


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: Where they live; made by the first save.
        save_total_limit: How many are kept, the newest ones; None keeps all.
    """

    def __init__(self, folder: str | Path, *, save_total_limit: int | None = None):
        if save_total_limit is not None and save_total_limit < 1:
            raise UserError(f"--save-total-limit must be at least 1, got {save_total_limit}")
        self.folder = Path(folder)
        self.save_total_limit = save_total_limit

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Takes the checkpoint of ``step``: ``write`` fills a folder, which then appears whole.

        When ``write`` raises, or the disk is full, nothing changes: the checkpoints before it stay,
        and what was half-written is removed. A checkpoint of the same step is replaced.

        Raises:
            OSError: the disk refused.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_interrupted()
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f"{_WRITING}{final.name}-{os.getpid()}"
        temporary.mkdir()
        try:
            with disk_errors():
                write(temporary)
            _write_manifest(temporary, step)
            _sync_tree(temporary)
            if final.exists():
                # Renaming onto a folder that is not empty is an error; the one before this one is
                # still there if the process dies between these two lines.
                shutil.rmtree(final)
            os.rename(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(self.folder)
        self._forget_old(step)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that passes :func:`verify`; None where there is none at all.

        Logs a warning for each one passed over, with its name and what is wrong with it.

        Raises:
            UserError: there are checkpoints and none of them can be used.
        """
        found = self._steps()
        for checkpoint in self._whole(reversed(found)):
            return checkpoint
        if found:
            raise UserError(f"cannot resume: all {len(found)} checkpoints in {self.folder} are bad")
        return None

    def refuse_others(self) -> None:
        """Raises UserError where there are checkpoints already, which a new run would mix with."""
        if self._steps():
            raise UserError(
                f"{self.folder} holds checkpoints of a run: resume it, or choose another folder"
            )

    def whole(self) -> list[Checkpoint]:
        """Every checkpoint that passes :func:`verify`, oldest first.

        Logs a warning for each one passed over, as :meth:`latest` does.
        """
        return list(self._whole(self._steps()))

    def _whole(self, found: Iterable[tuple[int, Path]]) -> Iterator[Checkpoint]:
        for step, path in found:
            try:
                if verify(path) != step:
                    raise CheckpointError(f"{MANIFEST} is of another step")
            except CheckpointError as error:
                _log.warning("checkpoint %s is damaged and passed over: %s", path.name, error)
                continue
            yield Checkpoint(step, path)

    def _steps(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        named = ((_NAME.fullmatch(p.name), p) for p in self.folder.iterdir() if p.is_dir())
        return sorted((int(match[1]), path) for match, path in named if match)

    def _forget_old(self, saved: int) -> None:
        if self.save_total_limit is None:
            return
        # One of a later step is what this run passed over when it went on from an earlier one.
        oldest_first = sorted(self._steps(), key=lambda found: (found[0] <= saved, found[0]))
        for _, path in oldest_first[: -self.save_total_limit]:
            # Renamed first, so that a half-removed folder is never taken for a checkpoint.
            doomed = path.with_name(f"{_WRITING}{path.name}-old")
            with contextlib.suppress(OSError):
                os.rename(path, doomed)
                shutil.rmtree(doomed)

    def _remove_interrupted(self) -> None:
        for path in self.folder.glob(f"{_WRITING}*"):
            shutil.rmtree(path, ignore_errors=True)


def verify(path: Path) -> int:
    """The step of the checkpoint in ``path``, once every file has the size and hash it was given.

    Raises:
        CheckpointError: the manifest is missing or not one, or a file is missing, truncated,
            changed, or not in the manifest.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{MANIFEST} does not read: {error}") from None
    step, files = _parse_manifest(manifest)
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir()}
    present.discard(MANIFEST)
    for name in sorted(set(files) - present):
        raise CheckpointError(f"{name} is missing")
    for name in sorted(present - set(files)):
        raise CheckpointError(f"{name} is not in {MANIFEST}")
    for name, (size, sha256) in sorted(files.items()):
        file = path / name
        if file.is_symlink():
            raise CheckpointError(f"{name} is a link")
        if file.stat().st_size != size:
            raise CheckpointError(f"{name} has {file.stat().st_size} bytes and should have {size}")
        if _sha256(file) != sha256:
            raise CheckpointError(f"{name} has changed: its SHA-256 is not that of {MANIFEST}")
    return step


def _parse_manifest(manifest: Any) -> tuple[int, dict[str, tuple[int, str]]]:
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{MANIFEST} is not of format {_FORMAT}")
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or step < 0 or not isinstance(files, dict):
        raise CheckpointError(f"{MANIFEST} has no step or no files")
    out = {}
    for name, entry in files.items():
        # A name is only ever compared with those that are there, so it cannot lead elsewhere.
        if (
            not isinstance(entry, dict)
            or type(entry.get("size")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            raise CheckpointError(f"{MANIFEST} has no size or no hash for {name!r}")
        out[name] = (entry["size"], entry["sha256"])
    return step, out


def _write_manifest(folder: Path, step: int) -> None:
    files = {
        p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": _sha256(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    manifest = {"format": _FORMAT, "step": step, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    """Files before the folders that name them."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Raises what a disk refuses within it as OSError, which safetensors and torch do not.

    Of torch's errors those of a Python file: it wraps the file's own.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    except RuntimeError as error:
        if not isinstance(error.__context__, OSError):
            raise
        raise error.__context__ from error


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes a nested dict of tensors, numbers, strings, lists and tuples to ``folder``."""
    with open(folder / STATE, "wb") as file:  # not by its name: see disk_errors
        torch.save(state, file)


def load_state(folder: Path) -> dict[str, Any]:
    """What :func:`save_state` wrote, on the CPU. Never unpickles: ``weights_only``.

    Raises:
        CheckpointError: the file does not read, or holds something else than data.
    """
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, and each of them means: not usable
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{STATE} does not load: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{STATE} holds no state")
    return state


def rng_state() -> dict[str, Any]:
    """The state of every random generator a run may draw from, as data for :func:`save_state`."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`rng_state` took.

    A state taken with another number of GPUs sets the generators of those that are here.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, of_device in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(of_device, device)


class StopRequest:
    """Set by the first SIGTERM or SIGINT, so that a run can save and end between two steps."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


# Seconds in which a signal that comes again is taken for the same one. A scheduler signals every
# process of a job, and the launcher among them sends its own on to the processes that it started.
_SENT_ON = 3.0


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns SIGTERM and SIGINT into a request that the loop asks for; the second one stops at once.

    The same one again within three seconds is not a second one. Outside the main thread, where
    Python cannot handle signals, the request is never set.
    """
    request = StopRequest()
    asked = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if request.signal is None:
            request.signal, asked = signal.Signals(number), time.monotonic()
        elif number != request.signal or time.monotonic() - asked > _SENT_ON:
            for each, handler in before.items():
                signal.signal(each, handler)
            signal.raise_signal(number)

    before = {each: signal.signal(each, handle) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
