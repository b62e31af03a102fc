"""What a run does when a step goes wrong: skip, count, dump, shrink, and say so."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from hydra_rlhf.checkpoint import disk_errors
from hydra_rlhf.processes import Processes

_log = logging.getLogger("hydra_rlhf")
T = TypeVar("T")


class TrainingFault(RuntimeError):
    """Training cannot go on; the message says after what, and where the batch was dumped."""


@dataclass
class BadUpdates:
    """Counts updates whose loss or gradient is not finite.

    Args:
        limit: How many in a row end the run.
        folder: Where the batch of the last one is written; None writes nothing.
    """

    limit: int
    folder: Path | None = None
    in_a_row: int = 0

    def is_bad(
        self, step: int, figures: Mapping[str, Tensor], batch: Callable[[], Mapping[str, Tensor]]
    ) -> bool:
        """Whether an update must be skipped. One transfer from the device.

        Args:
            step: Of the run.
            figures: Losses and norms of gradients, the same in all processes.
            batch: Gives what was trained on, should it have to be written.

        Raises:
            TrainingFault: it is the last of ``limit`` in a row.
        """
        finite = torch.stack([value.detach().float() for value in figures.values()]).isfinite()
        if bool(finite.all()):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        names = [n for n, ok in zip(figures, finite.tolist(), strict=True) if not ok]
        _log.warning(
            "step %d: update skipped, not finite: %s (%d in a row, %d end the run)",
            step,
            ", ".join(names),
            self.in_a_row,
            self.limit,
        )
        if self.in_a_row >= self.limit:
            where = self._dump(step, batch())
            raise TrainingFault(
                f"{self.in_a_row} updates in a row were not finite ({', '.join(names)}) at step "
                f"{step}{where}; lower the learning rate, or look at that batch"
            )
        return True

    def _dump(self, step: int, batch: Mapping[str, Tensor]) -> str:
        if self.folder is None:
            return ""
        file = self.folder / f"step-{step:08d}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with disk_errors():
                save_file({n: t.detach().cpu().contiguous() for n, t in batch.items()}, file)
        except OSError as error:
            return f", the batch could not be written ({error})"
        return f", the batch is in {file}"


def faults_folder(run_dir: str | Path | None, processes: Processes) -> Path | None:
    """Where a process writes the batch of a fault: each its own."""
    if run_dir is None:
        return None
    folder = Path(run_dir) / "faults"
    return folder if processes.is_main else folder / f"process-{processes.index}"


def overflowed(accelerator: Accelerator, norms: Mapping[str, Tensor]) -> bool:
    """Whether fp16's loss scale was too large, which it finds out by trying: no fault of the run.

    At scale 1 a gradient that is not finite is one.
    """
    scaler = accelerator.scaler
    if scaler is None or scaler.get_scale() <= 1.0:
        return False
    return not bool(torch.stack(list(norms.values())).isfinite().all())


@dataclass
class Shrinking:
    """A number of sequences that is halved, for the rest of the run, when memory runs out.

    Args:
        name: The setting that it stands for.
        size: Sequences at a time.
    """

    name: str
    size: int

    def run(
        self,
        attempt: Callable[[int], T],
        clean_up: Callable[[], object],
        *,
        processes: Processes | None = None,
        rest: Callable[[int], object] | None = None,
    ) -> T:
        """``attempt(size)``, again with half of it after each out-of-memory error.

        Args:
            attempt: The passes.
            clean_up: Called after an attempt that is to be repeated.
            processes: Those that have to agree on the size, where passes are common to them.
            rest: As ``attempt`` with next to nothing in each pass: in a process that failed it
                makes those that the others still need.

        Raises:
            torch.OutOfMemoryError: one sequence is too much, or what failed cannot be repeated.
        """
        while True:
            results: list[T] = []
            if processes is not None:
                processes.begin_passes()
            try:
                results.append(attempt(self.size))
            except torch.OutOfMemoryError:
                if self.size == 1 or not (processes is None or processes.can_repeat):
                    raise
            # Outside the except block, whose exception keeps the failed attempt's tensors alive.
            again = not results
            if again:
                _free(clean_up)
            if processes is not None and rest is not None:
                again = processes.end_passes(again, functools.partial(rest, self.size))
            if not again:
                return results[0]
            results.clear()
            _free(clean_up)
            half = math.ceil(self.size / 2)
            _log.warning(
                "out of GPU memory with %s %d: going on with %d", self.name, self.size, half
            )
            self.size = half


def _free(clean_up: Callable[[], object]) -> None:
    clean_up()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
