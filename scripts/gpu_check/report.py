"""The summary: what passed, and what the ops and the methods reach. Needs the standard library."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SUMMARY = ("gpu_check.json", "gpu_check.csv")
#: What each part writes to OUT, its log first; a part that is run again replaces its own. Eight
#: files in all, few and small, so that they can be carried off as they are: two parts share a log.
#: tune, which is no part of a whole run, has three more.
OF_PART = {
    "build": ("build.log",),
    "tests": ("tests.log",),
    "sanitizer": ("sanitizer.log",),
    "ops": ("bench.log", "ops.jsonl"),
    "ppo": ("bench.log", "ppo.jsonl"),
    "tune": ("tune.log", "tuning.json", "tuned.jsonl"),
}
OURS = ("cuda", "triton", "cpu", "reference")
OP_COLUMNS = ("op", "mode", "shape", "dtype", "ours", "ours ms", "best peer", "peer ms",
              "ceiling ms", "share")  # fmt: skip
PPO_COLUMNS = ("method", "shape", "models GiB", "held GiB", "peak GiB", "planned GiB",
               "s/sample")  # fmt: skip
CEILINGS = "ceilings"
VARIANTS = ("saved",)  # ours by another setting than the default: no peer
LIMITS = ("copy", "product", "bare product", "F.linear")  # what bounds an op, not an alternative


def read_records(path: Path) -> list[dict[str, Any]]:
    """A line that was cut short, by the end of the part's time, is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def ceilings(records: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """The fastest copy (GB/s) and product (TFLOP/s) that this run measured, by dtype."""
    best: dict[tuple[str, str], float] = {}
    for r in records:
        if r["op"] != CEILINGS or r["status"] != "ok":
            continue
        rate = r["gb_per_s"] if r["mode"] == "copy" else r["tflop_per_s"]
        for key in ((r["mode"], r["dtype"]), (r["mode"], "any")):
            best[key] = max(best.get(key, 0.0), rate)
    return best


def ceiling_ms(record: dict[str, Any], best: dict[tuple[str, str], float]) -> float | None:
    """The least time that the op's bytes and operations take at the measured ceilings."""
    times = []
    copy = best.get(("copy", "any"))
    if record["gb_per_s"] and copy:
        times.append(record["ms"] * record["gb_per_s"] / copy)
    product = best.get(("product", record["dtype"]))
    if record["tflop_per_s"] and product:
        times.append(record["ms"] * record["tflop_per_s"] / product)
    return max(times, default=None)


def op_rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each op, mode, shape and dtype: our best backend and the best peer.

    A peer is an alternative a user would take: rows that only copy or multiply are ceilings.
    """
    best = ceilings(records)
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in records:
        if r["op"] != CEILINGS:
            shape = " ".join(f"{k}={v}" for k, v in r["shape"].items())
            groups.setdefault((r["op"], r["mode"], shape, r["dtype"]), []).append(r)
    rows = []
    for (op, mode, shape, dtype), group in groups.items():
        timed = sorted((r for r in group if r["ms"] is not None), key=lambda r: r["ms"])
        # The reference stands for ours only where there is nothing else: not in place of a backend
        # that is wrong here.
        own = {r["backend"] for r in group if r["backend"] in OURS}
        own = own - {"reference"} or own
        mine = [r for r in timed if r["backend"] in own]
        peers = [r for r in timed if r["backend"] not in (*OURS, *VARIANTS, *LIMITS)]
        row: dict[str, Any] = dict.fromkeys(OP_COLUMNS)
        row |= {"op": op, "mode": mode, "shape": shape, "dtype": dtype}
        if mine:
            ceiling = ceiling_ms(mine[0], best)
            row |= {"ours": mine[0]["backend"], "ours ms": mine[0]["ms"], "ceiling ms": ceiling}
            row["share"] = ceiling / mine[0]["ms"] if ceiling else None
        else:
            whys = {r["status"] for r in group if r["backend"] in own}
            row["ours"] = ", ".join(sorted(whys)) or "no row"
        if peers:
            row |= {"best peer": peers[0]["backend"], "peer ms": peers[0]["ms"]}
        rows.append(row)
    return rows


def ppo_rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for r in records:
        f = r["figures"]
        row = {
            "method": r["mode"],
            "shape": " ".join(f"{k}={v}" for k, v in r["shape"].items()),
            "models GiB": f.get("models_gib"),
            "held GiB": f.get("held_gib"),
            "peak GiB": f.get("peak_gib"),
            "planned GiB": f.get("planned_gib"),
            "s/sample": f.get("s_per_sample", r["status"]),
        }
        rows.append(row)
    return rows


def test_counts(path: Path) -> dict[str, Any]:
    """Of the lines of record_tests.py: counts, what failed in the order in which it did, and what
    the end of the run cut short. A test that ran fails if what came before or after it did."""
    outcomes: dict[str, str] = {}
    failures: dict[str, str] = {}
    skips: dict[str, int] = {}
    running: dict[str, None] = {}
    collected = None
    for event in read_records(path):
        if "collected" in event:
            collected = event["collected"]
        elif "started" in event:
            running[event["started"]] = None
        else:
            test, outcome = event["test"], event["outcome"]
            running.pop(test, None)
            if outcome == "failed":
                failures.setdefault(test, event["said"])
            elif outcome == "skipped":
                skips[event["said"]] = skips.get(event["said"], 0) + 1
            if outcomes.get(test) != "failed":
                outcomes[test] = outcome
    if not outcomes and collected is None:
        return {}
    counts = _count(outcomes.values())
    names = ("passed", "failed", "skipped")
    return {
        "collected": collected,
        **{name: counts.get(name, 0) for name in names},
        "not reached": max(0, (collected or 0) - len(set(outcomes) | set(running))),
        "running when stopped": list(running),
        "failures": [{"test": test, "said": said} for test, said in failures.items()],
        "skips": skips,
    }


def collect(
    out: Path, parts: list[dict[str, Any]], tests: Path, commit: str, dry_run: bool
) -> dict[str, Any]:
    """Of the parts that were run: OUT may hold what others have left there before."""
    names = {part["name"] for part in parts}
    ops = read_records(out / "ops.jsonl") if "ops" in names else []
    methods = read_records(out / "ppo.jsonl") if "ppo" in names else []
    some = next(iter(ops + methods), {})
    sanitizer = out / "sanitizer.log"
    not_run = [line for line in sanitizer.read_text(errors="replace").splitlines()
               if line.startswith("not run")] if "sanitizer" in names else []  # fmt: skip
    return {
        "dry_run": dry_run,
        "commit": commit,
        "device": some.get("device"),
        "date": some.get("date"),
        "versions": some.get("versions"),
        "parts": parts,
        "tests": test_counts(tests) if "tests" in names else {},
        "sanitizer": not_run[0] if not_run else None,
        "ceilings": {f"{mode} {dtype}": v for (mode, dtype), v in ceilings(ops).items()},
        "ops": op_rows(ops),
        "ppo": ppo_rows(methods),
        "statuses": _count(r["status"] for r in ops + methods),
        "problems": [problem(r) for r in ops + methods if r["status"] in ("wrong", "failed")],
    }


def problem(record: dict[str, Any]) -> str:
    shape = " ".join(f"{k}={v}" for k, v in record["shape"].items())
    row = (record[name] for name in ("op", "mode", "backend", "dtype"))
    return f"{record['status']}: {' '.join(row)} {shape}: {record['why']}"


def _count(values) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def write(summary: dict[str, Any], out: Path) -> None:
    (out / "gpu_check.json").write_text(json.dumps(summary, indent=1) + "\n")
    with (out / "gpu_check.csv").open("w", newline="") as file:
        columns = ["table", "commit", "device", *OP_COLUMNS,
                   *(c for c in PPO_COLUMNS if c not in OP_COLUMNS)]  # fmt: skip
        rows = csv.DictWriter(file, columns)
        rows.writeheader()
        where = {"commit": summary["commit"], "device": summary["device"]}
        for table in ("ops", "ppo"):
            for row in summary[table]:
                rows.writerow({"table": table, **where, **row})


def text(summary: dict[str, Any]) -> str:
    """The short tables that end the output."""
    where = summary["device"] or "no benchmark records"
    lines = [f"\n{where}, commit {summary['commit']}, {summary['seconds']:.0f} s"]
    for part in summary["parts"]:
        lines.append(f"  {part['name']:<10} {part['status']:<12} {part['seconds']:6.0f} s")
    tests = summary["tests"]
    if tests and summary["dry_run"]:
        lines.append(f"  tests: {tests['collected']} collected")
    elif tests:
        lines.append(
            f"  tests: {tests['passed']} passed, {tests['failed']} failed, "
            f"{tests['skipped']} skipped, {tests['not reached']} not reached"
        )
        # The first ones first: after an error of the device those that follow may be its.
        lines += some(f"    {f['test']}: {f['said'][:100]}" for f in tests["failures"])
        lines += some(f"    running when stopped: {test}" for test in tests["running when stopped"])
    if summary["sanitizer"]:
        lines.append(f"  sanitizer: {summary['sanitizer']}")
    for key, rate in summary["ceilings"].items():
        if not key.endswith("any"):
            lines.append(f"  {key}: {rate:.0f} {'GB/s' if key.startswith('copy') else 'TFLOP/s'}")
    lines += some(f"  {problem}" for problem in summary["problems"])
    if summary["ops"]:
        lines += ["", table(OP_COLUMNS, summary["ops"])]
    if summary["ppo"]:
        lines += ["", table(PPO_COLUMNS, summary["ppo"])]
    return "\n".join(lines)


def some(lines: Iterable[str], most: int = 10) -> list[str]:
    lines = list(lines)
    more = [f"    and {len(lines) - most} more"] if len(lines) > most else []
    return lines[:most] + more


def table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    cells = [list(columns)] + [[cell(name, row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(line.rstrip() for line in lines)


def cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if column == "share":
        return f"{100 * value:.0f}%"
    return f"{value:.4g}"
