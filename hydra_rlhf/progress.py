"""What a run shows while it goes on: a bar for each stage on a terminal, elsewhere plain lines."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

PLAIN_WIDTH = 110  # columns where stdout is not a terminal
PLAIN_LINES = 10  # lines a stage prints there
PLAIN_SECONDS = 600.0  # or this long after the last: a tenth of a long run is hours


class ProgressBar:
    """What ``Tracker.progress`` yields."""

    def __init__(self, total: int):
        self._total = total
        self._started = time.perf_counter()
        self._skipped: int | None = None  # steps of the run that this one goes on with

    def update(self, step: int, **figures: Any) -> None:
        """``step`` steps are done; ``figures`` are the ones to show, in this order."""
        self._skipped = max(step - 1, 0) if self._skipped is None else self._skipped
        self._show(step, figures)

    def _show(self, step: int, figures: dict[str, Any]) -> None:
        raise NotImplementedError

    def _seconds(self) -> float:
        """Since the bar was made."""
        return time.perf_counter() - self._started

    def _left(self, step: int) -> float:
        """Seconds that the steps after ``step`` will take, by the mean of those made here."""
        return self._seconds() / max(step - (self._skipped or 0), 1) * (self._total - step)

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
        super().__init__(total)
        self._bar = Progress(
            TextColumn("[bold]{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            # Not rich's own, which knows no time left where a step takes over half a minute.
            TextColumn("[cyan]{task.fields[clock]}"),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )
        self._task = self._bar.add_task(stage, total=total, figures="", clock="--:--")

    def _show(self, step: int, figures: dict[str, Any]) -> None:
        clock = _clock(self._left(step) if 0 < step < self._total else self._seconds())
        fields: dict[str, Any] = {"clock": clock if step > 0 else "--:--"}
        if figures:
            shown = (f"[dim]{_label(k)}[/dim] {format_figure(v)}" for k, v in figures.items())
            fields["figures"] = "  ".join(shown)
        self._bar.update(self._task, completed=step, **fields)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()


class _PlainBar(ProgressBar):
    """A line at the first step, at every tenth of the way or ten minutes, and at the last."""

    def __init__(self, console: Console, stage: str, total: int):
        super().__init__(total)
        self._console, self._stage = console, stage
        self._printed, self._printed_at = -1, 0.0
        self._figures: dict[str, Any] = {}

    def _show(self, step: int, figures: dict[str, Any]) -> None:
        self._figures.update(figures)
        part = step * PLAIN_LINES // max(self._total, 1)
        seconds = self._seconds()
        if part == self._printed and seconds - self._printed_at < PLAIN_SECONDS:
            return
        self._printed, self._printed_at = part, seconds
        shown = "".join(f"  {_label(k)} {format_figure(v)}" for k, v in self._figures.items())
        left = f", {self._left(step):.0f} s left" if 0 < step < self._total else ""
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


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"
