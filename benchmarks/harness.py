"""Times the ops: correctness first, every row of a table in the same rounds, one record a line.

A benchmark is a module ``benchmarks/bench_<op>.py`` (or, where one file holds several ops, each
object listed in its ``BENCHES``) that provides

``OP``       the op's name in ``hydra_kernels``
``MODES``    names of what is timed, for instance ``("fwd", "fwd+bwd")``
``SHAPES``   ``{"cpu": [Shape(...), ...], "cuda": [...]}``, each with the reason it is there
``DTYPES``   ``{"cpu": (torch.float32,), "cuda": (torch.bfloat16,)}``; a shape may have its own
``PEERS``    names of the rows that are not ours, whether they can be imported or not
``inputs(shape, dtype, device)``
             the tensors, made by ``shape.sizes`` from torch's global seed
``calls(inputs, mode)``
             ``{row: callable or Absent(why)}``. A row is a backend's name or one of ``PEERS``; a
             callable returns what ``check`` looks at
``check(inputs, mode, row, output)``
             "" when the output is right, else what is wrong with it. It may look at a sample of
             rows, never at nothing; ``differs`` below is the usual answer
``work(shape, dtype, mode)``
             ``Work(bytes, flops)``: what must move and be computed at the least, each tensor read
             or written once; its docstring counts

and, where they apply, ``FLOOR`` (the row that ratios are taken to, default the first peer),
``MEMORY = True`` (peak memory is part of the claim) and ``GRAPH = ("fwd", ...)`` (modes that are
timed on CUDA as the replay of a captured graph, because launching them takes longer than running).

The sizes of a shape cut to 16 must work too: tests and dry runs take them.

An end-to-end benchmark provides ``OP`` and ``run(options) -> Iterator[Record]`` instead, makes its
records with ``Record.of``, and runs only when ``--op`` names it. What does not fit a column goes
into ``Record.figures``.

How a row is timed. Its output is checked; a wrong one gets no time. All rows of a shape and mode
are called once per round, so that drift and other load fall on all of them alike. On CUDA the L2
cache is overwritten before each call and the time is that between two events behind a queue kept
busy, so that it is the device's; ``host_us`` is how long the host took to enqueue the same call.
Peak memory is what one more call holds above what was held before it.
"""

from __future__ import annotations

import gc
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.measure import FULL, QUICK, Effort, graphed, peak_mib, quantile, reason, time_calls


@dataclass(frozen=True)
class Shape:
    sizes: dict[str, int]
    why: str
    quick: bool = False  # also part of --quick, of `pytest benchmarks/` and of the tests
    dtypes: tuple[torch.dtype, ...] = ()  # none: those of the benchmark on this device

    def has(self, sizes: dict[str, int]) -> bool:
        return sizes.items() <= self.sizes.items()

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.sizes.items())


@dataclass(frozen=True)
class Work:
    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Absent:
    """A row that cannot be measured here, and why: it is reported, not dropped."""

    why: str


@dataclass(frozen=True)
class Options:
    device: str = "cpu"
    quick: bool = False
    ops: tuple[str, ...] = ()  # none: all of them
    modes: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    shapes: tuple[dict[str, int], ...] = ()  # only those with all of the sizes of one of these
    deadline: float = float("inf")  # on time.monotonic's clock; what is left then is "not reached"
    effort: Effort | None = None
    say: Callable[[str], object] = str  # told what is measured next; str says it to nobody

    @property
    def rounds(self) -> Effort:
        return self.effort or (QUICK if self.quick else FULL)


@dataclass(frozen=True)
class Record:
    op: str
    mode: str
    backend: str  # ours, or the name of a peer
    shape: dict[str, int]
    dtype: str
    status: str = "ok"  # or "wrong", "failed", "absent", "interrupted", "not reached"
    why: str = ""
    ms: float | None = None  # median
    ms_p20: float | None = None
    ms_p80: float | None = None
    gb_per_s: float | None = None  # Work.bytes over ms
    tflop_per_s: float | None = None  # Work.flops over ms
    peak_mib: float | None = None
    host_us: float | None = None
    repeats: int = 0
    timing: str = ""  # "wall", "events" or "graph"
    figures: dict[str, float] = field(default_factory=dict)
    device: str = ""
    threads: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    date: str = ""

    @classmethod
    def of(
        cls, op: str, mode: str, backend: str, shape: Shape, dtype: torch.dtype, device: str, **rest
    ) -> Record:
        """A record that says where it was made; ``rest`` is any of the other fields."""
        return cls(
            op=op,
            mode=mode,
            backend=backend,
            shape=dict(shape.sizes),
            dtype=str(dtype).removeprefix("torch."),
            device=machine.device_name(device),
            threads=torch.get_num_threads(),
            versions=machine.versions(device),
            commit=machine.commit(),
            date=machine.today(),
            **rest,
        )

    @property
    def key(self) -> tuple:
        """What makes two records measurements of the same thing."""
        return (self.op, self.mode, self.backend, tuple(sorted(self.shape.items())), self.dtype)


def write(record: Record, path: Path) -> None:
    """Appends one line and flushes it: a run that is killed keeps what it has measured."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def read(path: Path) -> list[Record]:
    """Raises ValueError, with the line's number, where a line is no record."""
    known = {f.name for f in fields(Record)}
    records = []
    try:
        lines = path.read_text().splitlines()
    except ValueError as error:
        raise ValueError(f"{path}: not a file of benchmark records ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            record = Record(**{k: v for k, v in row.items() if k in known})
            if not isinstance(record.shape, dict):
                raise ValueError(f"shape is {record.shape!r}")
            records.append(record)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: not a benchmark record ({error})") from None
    return records


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """``|actual - exact| / |exact|`` in float64, infinite where anything is not finite."""
    actual, exact = actual.detach().double(), exact.detach().double().to(actual.device)
    if actual.shape != exact.shape or not torch.isfinite(actual).all():
        return float("inf")
    error, size = (actual - exact).norm().item(), exact.norm().item()
    return error / size if size else error


#: Rounding of sums of some thousand terms with float32 accumulators and one downcast.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def differs(
    actual: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float | None = None
) -> str:
    """Which tensor is not within ``tolerance`` (by its dtype) of ``exact``; "" when all are."""
    if len(actual) != len(exact):
        return f"{len(actual)} outputs where {len(exact)} are due"
    for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
        allowed = TOLERANCE[a.dtype] if tolerance is None else tolerance
        if not (error := relative_error(a, e)) <= allowed:
            return f"output {i}: relative error {error:.2e}, allowed {allowed:.0e}"
    return ""


def names() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))


def load(name: str) -> list[Any]:
    """The benchmarks in the module ``benchmarks.<name>``."""
    module = importlib.import_module(f"benchmarks.{name}")
    return list(getattr(module, "BENCHES", (module,)))


def shapes_of(bench: Any, device: str, quick: bool) -> list[Shape]:
    shapes = bench.SHAPES.get(device, [])
    return [s for s in shapes if s.quick] if quick else list(shapes)


def tiny(bench: Any, device: str) -> Shape:
    """A shape to see a benchmark work at, not to time it: the first one, each size at most 16."""
    shape = bench.SHAPES[device][0]
    return Shape({name: min(size, 16) for name, size in shape.sizes.items()}, "a dry run")


def rows_of(bench: Any, device: str) -> list[str]:
    """The rows that ``bench`` may report on ``device``, ours first."""
    return [*ours(bench.OP, device), *bench.PEERS]


def ours(op: str, device: str) -> list[str]:
    """The backends of ``op`` that run on ``device``: compiled ones on their own only."""
    from hydra_kernels.backends import registry

    if op not in registry.available_backends():
        return []
    elsewhere = {"cpu": ("cuda", "triton"), "cuda": ("cpu",)}[device]
    return [name for name in registry.available_backends(op) if name not in elsewhere]


def run(options: Options) -> Iterator[Record]:
    """Every record of the benchmarks asked for: measured, wrong, failed, absent or not reached.

    After a KeyboardInterrupt the rows in hand are reported as interrupted and the rest as not
    reached; then it is raised again.
    """
    stopped: KeyboardInterrupt | None = None
    for name in names():
        op = name.removeprefix("bench_")
        try:
            benches = load(name)
        except Exception as error:
            if not options.ops or op in options.ops:
                yield _whole(op, options, "failed", reason(error))
            continue
        for bench in benches:
            if options.ops and bench.OP not in options.ops and op not in options.ops:
                continue
            if hasattr(bench, "run"):
                if not options.ops:
                    continue  # takes minutes: only when it is named
                groups: Iterator[Iterator[Record]] = iter([_end_to_end(bench, options)])
            else:
                groups = (
                    run_rows(bench, shape, dtype, mode, options)
                    for shape in shapes_of(bench, options.device, options.quick)
                    if not options.shapes or any(map(shape.has, options.shapes))
                    for dtype in shape.dtypes or bench.DTYPES[options.device]
                    for mode in bench.MODES
                    if not options.modes or mode in options.modes
                )
            for group in groups:
                try:
                    yield from group
                except KeyboardInterrupt as interrupt:
                    stopped = interrupt
                    options = replace(options, deadline=float("-inf"))
    if stopped is not None:
        raise stopped


def _whole(op: str, options: Options, status: str, why: str) -> Record:
    """One record that stands for all rows of ``op``."""
    every = Shape({}, "the whole benchmark")
    return Record.of(op, "", "", every, torch.float32, options.device, status=status, why=why)


_LATE = "the run's time was over"


def _end_to_end(bench: Any, options: Options) -> Iterator[Record]:
    if time.monotonic() > options.deadline:
        yield _whole(bench.OP, options, "not reached", _LATE)
        return
    try:
        yield from bench.run(options)
    except KeyboardInterrupt:
        yield _whole(bench.OP, options, "interrupted", "stopped before its end")
        raise
    except Exception as error:
        yield _whole(bench.OP, options, "failed", reason(error))


def run_rows(
    bench: Any, shape: Shape, dtype: torch.dtype, mode: str, options: Options
) -> Iterator[Record]:
    """The rows of one shape, dtype and mode, timed against each other."""
    device = options.device
    due = [r for r in rows_of(bench, device) if not options.rows or r in options.rows]

    def record(row: str, status: str = "ok", why: str = "", **measured) -> Record:
        due.remove(row)
        return Record.of(
            bench.OP, mode, row, shape, dtype, device, status=status, why=why, **measured
        )

    if time.monotonic() > options.deadline:
        for row in list(due):
            yield record(row, "not reached", _LATE)
        return
    try:
        yield from _measure(bench, shape, dtype, mode, options, due, record)
    except KeyboardInterrupt:
        for row in list(due):
            yield record(row, "interrupted", "stopped before its end")
        raise
    except Exception as error:  # the inputs, or the benchmark's own code
        for row in list(due):
            yield record(row, "failed", reason(error))
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _measure(
    bench: Any,
    shape: Shape,
    dtype: torch.dtype,
    mode: str,
    options: Options,
    due: list[str],
    record: Callable[..., Record],
) -> Iterator[Record]:
    device = options.device
    options.say(f"{bench.OP} {mode} {shape} {str(dtype)[6:]}: {', '.join(due)}")
    torch.manual_seed(0)
    # Each group's graphs are new: past eight of one function torch.compile would run it eagerly.
    torch.compiler.reset()
    inputs = bench.inputs(shape, dtype, device)
    rows = bench.calls(inputs, mode)
    as_graph = device == "cuda" and mode in getattr(bench, "GRAPH", ())
    calls: dict[str, Callable[[], object]] = {}
    for row in list(due):
        call = rows.get(row, Absent(f"has no {mode}"))
        if isinstance(call, Absent):
            yield record(row, "absent", call.why)
            continue
        try:
            calls[row] = graphed(call) if as_graph else call
            wrong = bench.check(inputs, mode, row, calls[row]())
        except Exception as error:
            wrong = ""
            calls.pop(row, None)
            yield record(row, "failed", reason(error))
        if wrong:
            del calls[row]
            yield record(row, "wrong", wrong)
    ms, host, failures = time_calls(calls, device, options.rounds)
    work = bench.work(shape, dtype, mode)
    for row in calls:
        if row in failures:
            yield record(row, "failed", failures[row])
            continue
        median = statistics.median(ms[row])
        yield record(
            row,
            ms=median,
            ms_p20=quantile(ms[row], 0.2),
            ms_p80=quantile(ms[row], 0.8),
            gb_per_s=work.bytes / median / 1e6 if work.bytes else None,
            tflop_per_s=work.flops / median / 1e9 if work.flops else None,
            # Of the call itself: a graph has its memory from its capture on.
            peak_mib=peak_mib(rows[row], device) if getattr(bench, "MEMORY", False) else None,
            host_us=statistics.median(host[row]) if device == "cuda" else None,
            repeats=len(ms[row]),
            timing="graph" if as_graph else "events" if device == "cuda" else "wall",
        )
