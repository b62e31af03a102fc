"""Records as tables, and two runs beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.harness import Record

COLUMNS = ("op", "mode", "shape", "dtype", "row", "ms", "p20-p80", "x floor", "GB/s", "TFLOP/s",
           "peak MiB", "host us")  # fmt: skip


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """With colour and rules where rich is installed, else in plain columns."""
    rows = [list(row) for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(plain(title, columns, rows))
        return
    console = Console()
    if not console.is_terminal:  # a log keeps every column, however narrow the terminal was
        print(plain(title, columns, rows))
        return
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 5 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
    console.print(table)


def _style(cell: str) -> str:
    if cell.startswith(("failed", "wrong", "slower")):
        return "red"
    if cell.startswith(("absent", "interrupted", "not reached")):
        return "dim"
    return "green" if cell.startswith("faster") else ""


def plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text: the first column left, numbers right."""
    widths = [max(len(c), *(len(r[i]) for r in rows)) if rows else len(c)
              for i, c in enumerate(columns)]  # fmt: skip
    numeric = [
        all(_is_figure(r[i]) for r in rows) and any(r[i] for r in rows) for i in range(len(columns))
    ]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            c.rjust(w) if right else c.ljust(w)
            for c, w, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([title, line(columns), rule, *(line(r) for r in rows)])


def _is_figure(cell: str) -> bool:
    return not cell.strip("-+0123456789.%x ")


def figure(value: float | None, digits: int = 3) -> str:
    """Three significant digits, and no exponent."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    magnitude = len(f"{abs(value):.0f}") if abs(value) >= 1 else 1
    return f"{value:.{max(0, digits - magnitude)}f}" if abs(value) >= 0.1 else f"{value:.{digits}g}"


def shape(record: Record) -> str:
    return " ".join(f"{name}={size}" for name, size in record.shape.items())


def floors(records: Iterable[Record], floor_of: dict[str, str]) -> dict[tuple, float]:
    """The time of each group's floor row, by op, mode, shape and dtype."""
    return {
        _group(r): r.ms for r in records if r.ms is not None and r.backend == floor_of.get(r.op)
    }


def _group(r: Record) -> tuple:
    return (r.op, r.mode, tuple(r.shape.items()), r.dtype)


def record_rows(records: Sequence[Record], floor_of: dict[str, str]) -> list[list[str]]:
    """One row a record, for ``COLUMNS``; a record without a time says why in place of it."""
    floor = floors(records, floor_of)
    rows = []
    for r in records:
        head = [r.op, r.mode, shape(r), r.dtype, r.backend]
        if r.ms is None:
            extra = ", ".join(f"{k} {figure(v)}" for k, v in r.figures.items())
            said = f"{r.status}: {r.why}" if r.status != "ok" else extra
            rows.append([*head, said, *[""] * (len(COLUMNS) - 6)])
            continue
        base = floor.get(_group(r))
        rows.append(
            [
                *head,
                figure(r.ms),
                f"{figure(r.ms_p20)}-{figure(r.ms_p80)}",
                f"{r.ms / base:.2f}x" if base else "",
                figure(r.gb_per_s),
                figure(r.tflop_per_s),
                figure(r.peak_mib),
                figure(r.host_us),
            ]
        )
    return rows


def compare(old: Sequence[Record], new: Sequence[Record]) -> list[dict[str, Any]]:
    """Every row of either run: new over old, and whether it moved beyond the spread of both.

    A row moved where its 20 to 80% ranges do not overlap. The last record of a key counts.
    """
    before = {r.key: r for r in old}
    after = {r.key: r for r in new}
    rows = []
    for key in [*before, *(k for k in after if k not in before)]:
        a, b = before.get(key), after.get(key)
        some = b or a
        assert some is not None
        row: dict[str, Any] = {"record": some, "old": a and a.ms, "new": b and b.ms}
        row["ratio"] = b.ms / a.ms if a and b and a.ms and b.ms else None
        row["memory"] = (
            b.peak_mib / a.peak_mib if a and b and a.peak_mib and b.peak_mib is not None else None
        )
        row["verdict"] = _verdict(a, b)
        rows.append(row)
    return rows


def _verdict(a: Record | None, b: Record | None) -> str:
    if a is None:
        return "new"
    if b is None:
        return "not run"
    if a.status != b.status:
        return f"{a.status} -> {b.status}"
    if a.ms is None or b.ms is None:
        return a.status
    if None in (a.ms_p20, a.ms_p80, b.ms_p20, b.ms_p80):
        return "no spread"  # written by hand, or by something else
    assert a.ms_p20 is not None and a.ms_p80 is not None
    assert b.ms_p20 is not None and b.ms_p80 is not None
    if b.ms_p20 > a.ms_p80:
        return "slower"
    if b.ms_p80 < a.ms_p20:
        return "faster"
    return "same"


COMPARED = ("op", "mode", "shape", "dtype", "row", "old ms", "new ms", "new/old", "memory", "moved")


def compared_rows(old: Sequence[Record], new: Sequence[Record]) -> list[list[str]]:
    rows = []
    for row in compare(old, new):
        r = row["record"]
        rows.append(
            [
                r.op,
                r.mode,
                shape(r),
                r.dtype,
                r.backend,
                figure(row["old"]),
                figure(row["new"]),
                f"{row['ratio']:.2f}x" if row["ratio"] else "",
                f"{row['memory']:.2f}x" if row["memory"] is not None else "",
                "" if row["verdict"] == "same" else row["verdict"],
            ]
        )
    return rows


def differences(old: Sequence[Record], new: Sequence[Record]) -> list[str]:
    """What the two runs were not alike in, so that a ratio is not taken for the code's."""
    said = []
    for what in ("device", "threads"):
        a, b = ({str(getattr(r, what)) for r in records} for records in (old, new))
        if a and b and a != b:
            said.append(f"{what}: {', '.join(sorted(a))} -> {', '.join(sorted(b))}")
    versions = [
        {f"{k} {v}" for r in records for k, v in r.versions.items()} for records in (old, new)
    ]
    gone, came = sorted(versions[0] - versions[1]), sorted(versions[1] - versions[0])
    if gone or came:
        said.append(f"versions: {', '.join(gone) or 'none'} -> {', '.join(came) or 'none'}")
    return said
