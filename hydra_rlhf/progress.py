"""What a run shows while it goes on: a bar for each stage on a terminal, elsewhere plain lines."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_WIDTH = 110  # columns where stdout is not a terminal
PLAIN_LINES = 10  # lines a stage prints there


class ProgressBar:
    """What ``Tracker.progress`` yields."""

    def update(self, step: int, **figures: Any) -> None:
        """``step`` steps are done; ``figures`` are the ones to show, in this order."""
        raise NotImplementedError

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def progress_bar(console: Console, stage: str, total: int) -> ProgressBar:
    """Of ``total`` steps, as ``console`` can show it."""
    if console.is_terminal:
        return _RichBar(console, stage, total)
    return _PlainBar(console, stage, total)


class _RichBar(ProgressBar):
    def __init__(self, console: Console, stage: str, total: int):
        self._bar = Progress(
            TextColumn("[bold]{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )
        self._task = self._bar.add_task(stage, total=total, figures="")

    def update(self, step: int, **figures: Any) -> None:
        shown = "  ".join(f"[dim]{_label(k)}[/dim] {format_figure(v)}" for k, v in figures.items())
        if figures:
            self._bar.update(self._task, completed=step, figures=shown)
        else:
            self._bar.update(self._task, completed=step)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()


class _PlainBar(ProgressBar):
    """A line at the first step, at every tenth of the way and at the last."""

    def __init__(self, console: Console, stage: str, total: int):
        self._console, self._stage, self._total = console, stage, total
        self._started = time.perf_counter()
        self._printed = -1
        self._skipped: int | None = None  # steps of the run that this one goes on with
        self._figures: dict[str, Any] = {}

    def update(self, step: int, **figures: Any) -> None:
        self._skipped = max(step - 1, 0) if self._skipped is None else self._skipped
        self._figures.update(figures)
        part = step * PLAIN_LINES // max(self._total, 1)
        if part == self._printed:
            return
        self._printed = part
        shown = "".join(f"  {_label(k)} {format_figure(v)}" for k, v in self._figures.items())
        seconds = time.perf_counter() - self._started
        left = ""
        if 0 < step < self._total:
            each = seconds / max(step - self._skipped, 1)
            left = f", {each * (self._total - step):.0f} s left"
        self._console.print(
            f"{self._stage:<12} {step:>5}/{self._total}  {seconds:6.1f} s{left}{shown}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def make_console(quiet: bool = False) -> Console:
    """The standard output; where it is no terminal, wide and without control characters."""
    if sys.stdout.isatty():
        return Console(quiet=quiet)
    return Console(
        file=sys.stdout, width=PLAIN_WIDTH, force_terminal=False, color_system=None, quiet=quiet
    )


def format_figure(value: Any) -> str:
    found = number(value)
    if found is None:
        return "-"
    if isinstance(found, int):
        return str(found)
    if found != 0 and abs(found) < 1e-3:
        return f"{found:.1e}"
    return f"{found:.3f}" if abs(found) < 10 else f"{found:.1f}"


def number(value: Any) -> float | int | None:
    """None for what JSON cannot hold, so that every line of metrics.jsonl is strict JSON."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None:
        return None
    if isinstance(value, (bool, int)):
        return int(value)
    value = float(value)
    return value if math.isfinite(value) else None


def _label(name: str) -> str:
    return name.replace("_", " ")
