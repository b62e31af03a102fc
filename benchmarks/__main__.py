"""``python -m benchmarks``: run the benchmarks, keep their records, compare two runs."""

from __future__ import annotations

import argparse
import functools
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import harness, measure, tables


def _positive(kind: type) -> Callable[[str], float]:
    """A number above 0, as argparse takes it."""

    def parse(text: str) -> float:
        number = kind(text)
        if not number > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return number

    parse.__name__ = kind.__name__  # what argparse says where ``kind`` refuses the text
    return parse


def _sizes(text: str) -> dict[str, int]:
    try:
        return {name: int(size) for name, size in (part.split("=") for part in text.split())}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not as 'M=1024 V=32000'") from None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    p.add_argument("--op", action="append", default=[], help="an op's name, or a file's after "
                   "bench_; may be given again (default: all)")  # fmt: skip
    p.add_argument(
        "--mode", action="append", default=[], help="one mode of an op, as fwd or fwd+bwd"
    )
    p.add_argument("--row", action="append", default=[], help="one backend or peer")
    p.add_argument(
        "--shape", action="append", default=[], type=_sizes, metavar="'M=1024 V=32000'",
        help="shapes with these sizes only; may be given again for others",
    )  # fmt: skip
    p.add_argument("--device", choices=("cpu", "cuda"),
                   default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    p.add_argument("--quick", action="store_true", help="few shapes and few rounds")
    p.add_argument(
        "--rounds", type=_positive(int), help="samples a row (default: 50, quick 10, by time fewer)"
    )
    p.add_argument("--threads", type=_positive(int), help="torch's threads")
    p.add_argument(
        "--limit", type=_positive(float), help="seconds after which the rest is 'not reached'"
    )
    p.add_argument("--json", type=Path, metavar="OUT", help="append the records, one a line")
    p.add_argument("--compare", type=Path, metavar="OLD", help="print ratios to these records")
    p.add_argument("--show", type=Path, metavar="FILE", help="take records from FILE, run nothing")
    p.add_argument("--list", action="store_true", help="print ops, modes and shapes, run nothing")
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    try:
        old = harness.read(args.compare) if args.compare else []
        shown = harness.read(args.show) if args.show else []
    except (OSError, ValueError) as error:
        p.error(str(error))
    if args.device == "cuda" and not (torch.cuda.is_available() or args.show or args.list):
        p.error(f"--device cuda: torch sees no CUDA device: {_why_no_cuda()}")
    known = _known()
    if unknown := [op for op in args.op if op not in known]:
        p.error(f"no benchmark of {', '.join(unknown)} (known: {', '.join(sorted(known))})")
    asked = [b for name in args.op or known for b in known[name] if not hasattr(b, "run")]
    for option, given, found in (
        ("mode", args.mode, {mode for b in asked for mode in b.MODES}),
        ("row", args.row, {row for b in asked for row in harness.rows_of(b, args.device)}),
    ):
        if unknown := [name for name in given if name not in found]:
            p.error(f"no {option} {', '.join(unknown)} (known: {', '.join(sorted(found))})")
    shapes = [s for b in asked for s in harness.shapes_of(b, args.device, args.quick)]
    if unknown := [str(harness.Shape(given, "")) for given in args.shape
                   if not any(shape.has(given) for shape in shapes)]:  # fmt: skip
        p.error(f"no shape with {', '.join(unknown)} (known: {', '.join(map(str, shapes))})")
    if args.list:
        _list(args, known)
        return 0
    if args.json and not (args.show or args.list):
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.open("a").close()
        except OSError as error:
            p.error(f"--json: {error}")
    if args.threads:
        torch.set_num_threads(args.threads)

    records, code = (shown, 0) if args.show else _run(args)
    if args.op:  # a file that is shown or compared may hold more
        records = [r for r in records if r.op in _ops(args.op)]
        old = [r for r in old if r.op in _ops(args.op)]
    where = f"{records[0].device}, commit {records[0].commit}" if records else "no records"
    tables.print_table(where, tables.COLUMNS, tables.record_rows(records, floor_rows()))
    if args.compare:
        for line in tables.differences(old, records):
            print(f"not alike: {line}")
        title = f"against {args.compare}"
        rows = tables.compared_rows(old, records)
        run = [row for row in rows if row[-1] != "not run"]
        tables.print_table(title, tables.COMPARED, run)
        if len(run) < len(rows):
            print(f"{len(rows) - len(run)} rows of {args.compare} were not run this time")
    bad = [r for r in records if r.status in ("wrong", "failed")]
    for r in bad:
        print(
            f"{r.status}: {r.op} {r.mode} {r.backend} {tables.shape(r)}: {r.why}", file=sys.stderr
        )
    if code == 0 and bad:
        code = 1
    return code


def _run(args: argparse.Namespace) -> tuple[list[harness.Record], int]:
    """The records, and 130 where the run was stopped, by the keyboard or by SIGTERM."""
    deadline = time.monotonic() + args.limit if args.limit else float("inf")
    effort = harness.QUICK if args.quick else harness.FULL
    if args.rounds:
        effort = harness.Effort(args.rounds, float("inf"))
    options = harness.Options(
        device=args.device,
        quick=args.quick,
        ops=tuple(args.op),
        modes=tuple(args.mode),
        rows=tuple(args.row),
        shapes=tuple(args.shape),
        deadline=deadline,
        effort=effort,
        say=functools.partial(print, file=sys.stderr, flush=True),
    )
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    records: list[harness.Record] = []
    try:
        for record in harness.run(options):
            records.append(record)
            if args.json:
                harness.write(record, args.json)
            said = f"{tables.figure(record.ms)} ms" if record.ms is not None else record.status
            print(f"  {record.backend}: {said}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        return records, 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return records, 0


def _why_no_cuda() -> str:
    try:
        torch.cuda.init()
    except Exception as error:  # no driver, one that is too old, a torch without CUDA
        return measure.reason(error)
    return "no reason given"


def _known() -> dict[str, list]:
    """The benchmarks by the names they are asked for: a file's after bench_, and its ops'."""
    known: dict[str, list] = {}
    for name in harness.names():
        try:
            benches = harness.load(name)
        except Exception:
            benches = []  # run() reports it as a failed row
        known[name.removeprefix("bench_")] = benches
        for bench in benches:
            known.setdefault(bench.OP, [bench])
    return known


def _ops(asked: list[str]) -> set[str]:
    known = _known()
    return {bench.OP for name in asked for bench in known[name]} | set(asked)


def _list(args: argparse.Namespace, known: dict[str, list]) -> None:
    rows = []
    for bench in {id(b): b for benches in known.values() for b in benches}.values():
        if hasattr(bench, "run"):
            rows.append([bench.OP, "end to end", "", (bench.__doc__ or "").split("\n")[0]])
            continue
        for shape in harness.shapes_of(bench, args.device, args.quick):
            rows.append([bench.OP, ", ".join(bench.MODES), str(shape), shape.why])
    tables.print_table(f"on {args.device}", ("op", "modes", "shape", "why"), rows)


def floor_rows() -> dict[str, str]:
    """By op, the row whose time the others are given in multiples of."""
    floor_of = {}
    for bench in {id(b): b for benches in _known().values() for b in benches}.values():
        peers = getattr(bench, "PEERS", ())
        if floor := getattr(bench, "FLOOR", peers[0] if peers else None):
            floor_of[bench.OP] = floor
    return floor_of


if __name__ == "__main__":
    sys.exit(main())
