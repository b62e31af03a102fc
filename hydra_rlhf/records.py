"""The run folder: what a run writes, and what it shows while it runs.

    config.yaml       every setting of the run
    run.json          command, versions, machine, commit; also what marks a folder as a run
    metrics.jsonl     one line a step: stage, step, seconds since the start, figures
    tensorboard/      the same as TensorBoard events
    curves.png        the figures that matter, drawn
    README.md         what the run is, its results, and how to load what it left

``metrics.jsonl`` is the record; the events, the curves and the report are made from the same
figures. On a terminal progress is a bar for each stage; elsewhere it is a plain line now and then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hydra_rlhf.errors import UserError
from hydra_rlhf.progress import ProgressBar, make_console, number, progress_bar

MARKER = "run.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
SETTINGS = "config.yaml"
EVENTS = "tensorboard"
UNUSED = "unused"  # in run.json: what was in the folder when an error came before the first step
VERSIONS = ("torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "triton")

_log = logging.getLogger(__name__)


def open_run_dir(path: str | Path, *, overwrite: bool = False, resume: bool = False) -> Path:
    """Check that a run may be written to ``path``, and make or empty the folder.

    Call it once every other input has been checked: with ``overwrite`` it deletes the run that
    was there. One that an error ended before its first step is replaced without.

    Raises:
        UserError: the folder holds a run and neither ``overwrite`` nor ``resume`` is set; it holds
            something that is not a run, which is never deleted; it cannot be made.
    """
    path = Path(path)
    check_run_dir(path, overwrite=overwrite, resume=resume)
    try:
        if path.exists() and not resume:
            for entry in path.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to output folder {path}: {error.strerror}") from error
    return path


def check_run_dir(path: str | Path, *, overwrite: bool = False, resume: bool = False) -> None:
    """What ``open_run_dir`` refuses, without touching the disk."""
    path = Path(path)
    if overwrite and resume:
        raise UserError("--overwrite and --resume contradict each other")
    if path.exists() and not path.is_dir():
        raise UserError(f"output folder {path} is a file")
    existing = next((p for p in (path, *path.parents) if p.exists()), Path("."))
    if not os.access(existing, os.W_OK):
        raise UserError(f"cannot write to output folder {path}: {existing} is not writable")
    holds_run = (path / MARKER).is_file()
    if resume:
        if not holds_run:
            raise UserError(f"cannot resume: {path} holds no run")
        if _is_finished(path) and not any((path / "checkpoints").glob("step-*")):
            raise UserError(
                f"cannot resume: {path} holds a finished run and no checkpoint to go on from "
                "(--save-steps takes them); --overwrite starts anew"
            )
        return
    if not path.exists() or not any(path.iterdir()):
        return
    if not holds_run:
        raise UserError(f"output folder {path} is not empty and holds no run: choose another")
    if not overwrite and not _is_unused(path):
        raise UserError(
            f"output folder {path} already holds a run (started {_started(path)}): "
            "choose another, or pass --overwrite to replace it"
        )


def _is_finished(path: Path) -> bool:
    """Whether there is what a run writes at its end, which starting anew would replace."""
    return any((path / made).is_dir() for made in ("actor", "joint", "model"))


def _is_unused(path: Path) -> bool:
    """Whether an error ended the run there before its first step, and nothing came since."""
    left = _marker(path).get(UNUSED)
    if not isinstance(left, list) or not {p.name for p in path.iterdir()} <= set(left):
        return False
    return not (path / METRICS).is_file() or (path / METRICS).stat().st_size == 0


def _marker(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _started(path: Path) -> str:
    return str(_marker(path).get("started", "at an unknown time"))


class Tracker:
    """Writes a run's records and shows its progress.

    Args:
        run_dir: An open run folder, or None to show progress and write nothing.
        config: The run's settings, a dataclass or a mapping of sections; written as config.yaml.
        command: The command line that was run, for run.json.
        log_with: Trackers of ``accelerate`` besides TensorBoard, such as "wandb".
        resume: Add to the records that are there instead of starting new ones.
        console: Where progress and tables go; the standard output by default.
        is_main: False on every process but the first: such a tracker is silent and writes nothing.
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        config: Any = None,
        *,
        command: str | None = None,
        log_with: tuple[str, ...] = (),
        resume: bool = False,
        console: Console | None = None,
        is_main: bool = True,
    ):
        self.run_dir = Path(run_dir) if run_dir is not None else None
        self.console = console or make_console(quiet=not is_main)
        self.started = time.perf_counter()
        self._before = 0.0  # seconds of the run that this one goes on with
        self._metrics = None
        self._events: Any = None
        self._others: list[Any] = []
        self._own = {MARKER, SETTINGS, METRICS, SAMPLES, EVENTS, *log_with}
        self._global_step = 0
        self._rewind: set[str] | None = set() if resume else None
        if self.run_dir is None or not is_main:
            self.run_dir = None
            return
        settings = plain(config)
        if not resume:
            _write_text(self.run_dir / MARKER, json.dumps(describe_run(command), indent=2) + "\n")
            (self.run_dir / SETTINGS).write_text(
                yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
            )
        else:
            self._goes_on_after(read_metrics(self.run_dir))
        self._metrics = open(self.run_dir / METRICS, "a", buffering=1, encoding="utf-8")
        if not resume:
            self._events = _tensorboard_writer(self.run_dir / EVENTS)
        if log_with:
            from hydra_rlhf import trackers

            try:
                self._others = trackers.start(log_with, self.run_dir, settings or {})
            except BaseException:
                self._leave_unused()
                raise

    def log(self, step: int, values: Mapping[str, Any], stage: str) -> None:
        """Record the figures of one step of ``stage``; tensors of one element are read here."""
        figures = {name: number(value) for name, value in values.items()}
        if self._rewind is not None and stage not in self._rewind and self.run_dir is not None:
            self._rewind.add(stage)
            self._forget(stage, step)
        self._global_step += 1
        if self._metrics is not None:
            seconds = round(self._before + time.perf_counter() - self.started, 3)
            line = {"stage": stage, "step": step, "time": seconds, **figures}
            self._metrics.write(json.dumps(line) + "\n")
        if self._events is not None:
            for name, value in figures.items():
                if value is not None:
                    self._events.add_scalar(f"{stage}/{name}", value, step)
        for tracker in self._others:
            said = {f"{stage}/{k}": v for k, v in figures.items() if v is not None}
            tracker.log(said, step=self._global_step)

    def log_samples(self, step: int, rows: Iterable[Mapping[str, Any]], stage: str) -> None:
        """Adds what a step sampled to samples.jsonl: a line a response, with prompt and score."""
        if self.run_dir is None:
            return
        file = self.run_dir / SAMPLES
        if self._rewind is not None and SAMPLES not in self._rewind:
            self._rewind.add(SAMPLES)
            before = [row for row in read_lines(file) if row.get("step", step) < step]
            _write_text(file, "".join(json.dumps(row) + "\n" for row in before))
        with open(file, "a", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps({"stage": stage, "step": step, **row}) + "\n")

    def report(self, notes: Sequence[str] = ()) -> Path | None:
        """Makes report.html from the records."""
        if self.run_dir is None:
            return None
        from hydra_rlhf import report

        return report.write(self.run_dir, notes)

    def _forget(self, stage: str, step: int) -> None:
        """Drops what a run that goes on will say again: the stage's steps from ``step`` on."""
        assert self.run_dir is not None and self._metrics is not None
        self._metrics.close()
        file = self.run_dir / METRICS
        lines = file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if not _is_from(line, stage, step)]
        _write_text(file, "".join(f"{line}\n" for line in kept))
        self._goes_on_after(read_metrics(self.run_dir))
        self._metrics = open(file, "a", buffering=1, encoding="utf-8")
        if self._events is None:
            self._events = _tensorboard_writer(self.run_dir / EVENTS, purge_step=step)

    def _goes_on_after(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self._global_step = len(lines)
        self._before = max((line.get("time") or 0.0 for line in lines), default=0.0)

    @contextlib.contextmanager
    def progress(self, stage: str, total: int) -> Iterator[ProgressBar]:
        """A bar of ``total`` steps; ``bar.update(step, loss=..., kl=...)`` moves it."""
        with progress_bar(self.console, stage, total) as bar:
            yield bar

    def say(self, text: str = "") -> None:
        """One line of plain text to the screen; brackets in it are not markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, renderable: Any) -> None:
        """A rich table or other renderable to the screen."""
        self.console.print(renderable)

    def plot(self) -> Path | None:
        """Draw curves.png from metrics.jsonl; None where matplotlib is not installed."""
        if self.run_dir is None:
            return None
        from hydra_rlhf import curves  # type: ignore[attr-defined]

        return curves.draw(read_metrics(self.run_dir), self.run_dir / "curves.png")

    def write_text(self, name: str, text: str) -> None:
        """A text file of the run folder, written whole or not at all."""
        if self.run_dir is not None:
            _write_text(self.run_dir / name, text)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._events is not None:
            self._events.close()
            self._events = None
        for tracker in self._others:
            tracker.finish()
        self._others = []

    def _leave_unused(self) -> None:
        """Says in run.json that the folder may be taken again: nothing in it took a step."""
        if self.run_dir is None or self._rewind is not None or self._global_step:
            return
        names = sorted(p.name for p in self.run_dir.iterdir())
        if set(names) <= self._own:
            marker = _marker(self.run_dir) | {UNUSED: names}
            _write_text(self.run_dir / MARKER, json.dumps(marker, indent=2) + "\n")

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        self.close()
        if kind is not None:
            self._leave_unused()


def table(title: str, columns: list[str], rows: list[list[str]], *, numeric: int = 0) -> Table:
    """A rich table whose last ``numeric`` columns hold figures, set to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", show_lines=False)
    for index, name in enumerate(columns):
        right = index >= len(columns) - numeric
        made.add_column(name, justify="right" if right else "left", no_wrap=right)
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def printable(text: str) -> str:
    """``text`` on one line, with what a terminal might obey or cannot show replaced."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut short by a crash is left out."""
    return read_lines(Path(run_dir) / METRICS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, up to the first line that is not one; none without it."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                break
            if not isinstance(found, dict):
                break
            lines.append(found)
    return lines


def plain(config: Any) -> Any:
    """``config`` as dicts, lists, strings and numbers, for YAML and JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(value) for value in config]
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    return str(config)


def describe_run(command: str | None) -> dict[str, Any]:
    """When, with what and on what a run was started."""
    import torch

    versions = {"python": platform.python_version()}
    for name in ("hydra-rlhf", *VERSIONS):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command or "",
        "commit": _commit(),
        "versions": versions,
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": device,
        },
    }


def _commit() -> str | None:
    """The commit of the checkout this package runs from; None where it is installed."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() or None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _is_from(line: str, stage: str, step: int) -> bool:
    """Whether a line of metrics.jsonl is of ``stage`` at ``step`` or later, or was cut short."""
    try:
        record = json.loads(line)
        return record["stage"] == stage and record["step"] >= step
    except (ValueError, KeyError, TypeError):
        return True


def _tensorboard_writer(path: Path, purge_step: int | None = None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _log.warning("no TensorBoard events: pip install 'hydra-rlhf[plot]' brings tensorboard")
        return None
    return SummaryWriter(str(path), purge_step=purge_step)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
