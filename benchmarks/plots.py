"""Plots of the README, from result files only: ``python -m benchmarks.plots FILE... --out FOLDER``.

``time_<op>.png``   time per token against tokens, a panel a mode and size, a line a backend or peer
``memory.png``      peak memory against vocabulary
``ppo_methods.png`` memory and latency of the PPO methods

A plot that the files have no records for is not made, and a line says so. Bands are the 20 to 80%
range; every figure names the machine, the commit and the date of its records.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  after the backend is chosen
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator  # noqa: E402

from benchmarks.harness import Record, read  # noqa: E402

INK, FAINT = "#22272e", "#d7dce2"
# Ours are saturated, peers are muted; all keep apart in greyscale and for colour-blind readers.
OURS = {
    "cuda": "#0b6e4f",
    "triton": "#1f9e89",
    "cpu": "#0b6e4f",
    "saved": "#52a675",
    "reference": "#7f9cc0",
}
PEERS = ("#c8553d", "#8d6a9f", "#b08d3c", "#6b7280", "#a65e8a", "#4f7cac")
FLOORS = {"copy", "product", "bare product", "F.linear"}  # thin: limits, not alternatives
STYLE = {
    "font.size": 9.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "figure.dpi": 160,
    "savefig.facecolor": "white",
}
PPO = "ppo_methods"
METHODS = ("ppo", "lora-ppo", "d-lora-ppo", "j-hydra-ppo", "hydra-ppo")


def tokens(record: Record) -> int | None:
    """Rows that the op works on: M, or B sequences of T tokens."""
    shape = record.shape
    if "M" in shape:
        return shape["M"]
    return shape["B"] * shape["T"] if {"B", "T"} <= set(shape) else None


def rest(record: Record, *without: str) -> str:
    sizes = (f"{k}={v}" for k, v in record.shape.items() if k not in without)
    return ", ".join([*sizes, record.dtype])


def latest(records: Iterable[Record]) -> list[Record]:
    """One record a measurement: the last of each, so that files can be given oldest first."""
    return list({r.key: r for r in records if r.status == "ok"}.values())


def time_against_tokens(records: Sequence[Record], op: str) -> Figure | None:
    panels: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in records:
        if r.op == op and r.ms is not None and tokens(r):
            panels[(r.mode, rest(r, "M", "B", "T"))].append(r)
    # A curve needs two points; of several sizes the ones with the most points are shown.
    points = {key: len({tokens(r) for r in group}) for key, group in panels.items()}
    shown = sorted((k for k in panels if points[k] > 1), key=lambda k: -points[k])[:4]
    if not shown:
        return None
    shown.sort()
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4.6 * len(shown) + 0.6, 3.7), squeeze=False, layout="constrained"
    )
    for ax, key in zip(axes[0], shown, strict=True):
        mode, sizes = key
        lines(ax, panels[key], lambda r: float(tokens(r) or 1), per_token)
        ax.set_title(f"{mode}   {sizes}")
        ax.set_xlabel("tokens")
    axes[0][0].set_ylabel("microseconds per token")
    return finish(figure, f"{op}: time per token", [r for k in shown for r in panels[k]])


def memory_against_vocabulary(records: Sequence[Record]) -> Figure | None:
    panels: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in records:
        # A product into a given buffer holds nothing, which has no logarithm.
        if r.op == "linear_logprob" and r.peak_mib and r.backend not in FLOORS:
            panels[(r.mode, rest(r, "V"))].append(r)
    points = {key: len({r.shape["V"] for r in group}) for key, group in panels.items()}
    shown = sorted((k for k in panels if points[k] > 1), key=lambda k: -points[k])[:3]
    if not shown:
        return None
    shown.sort()
    figure, axes = plt.subplots(
        1, len(shown), figsize=(4.6 * len(shown) + 0.6, 3.7), squeeze=False, layout="constrained"
    )
    for ax, key in zip(axes[0], shown, strict=True):
        lines(ax, panels[key], lambda r: float(r.shape["V"]), peak)
        ax.set_title(f"{key[0]}   {key[1]}")
        ax.set_xlabel("vocabulary")
    axes[0][0].set_ylabel("peak extra memory, MiB")
    title = "linear_logprob: memory against vocabulary"
    return finish(figure, title, [r for k in shown for r in panels[k]])


def per_token(record: Record) -> tuple[float, float, float]:
    """Median, 20 and 80% in microseconds. Of proportional lines only the quotient can be told."""
    n = 1e-3 * (tokens(record) or 1)
    assert record.ms and record.ms_p20 and record.ms_p80
    return record.ms / n, record.ms_p20 / n, record.ms_p80 / n


def peak(record: Record) -> tuple[float, float, float]:
    assert record.peak_mib
    return record.peak_mib, record.peak_mib, record.peak_mib


def lines(ax: Axes, records: Sequence[Record], x_of: Callable, y_of: Callable) -> None:
    """A line a backend or peer, named at its end, on two logarithmic axes."""
    by_row: dict[str, list[Record]] = defaultdict(list)
    for r in records:
        by_row[r.backend].append(r)
    peers = [row for row in by_row if row not in OURS and row not in FLOORS]
    ends: dict[float, list[tuple[float, str, str]]] = defaultdict(list)
    for row, group in by_row.items():
        group.sort(key=x_of)
        x = [x_of(r) for r in group]
        y, low, high = zip(*(y_of(r) for r in group), strict=True)
        colour = OURS.get(row) or (
            "#6b7280" if row in FLOORS else PEERS[peers.index(row) % len(PEERS)]
        )
        mine = row in OURS and row != "reference"
        width, dash = (2.2, "-") if mine else (1.1, ":") if row in FLOORS else (1.4, "-")
        ax.plot(
            x, y, dash, color=colour, lw=width, marker="o", ms=4 if mine else 3, zorder=2 + mine
        )
        ax.fill_between(x, low, high, color=colour, alpha=0.1, lw=0)
        ends[x[-1]].append((y[-1], row, colour))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(FixedLocator(sorted({x_of(r) for r in records})))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
    bottom, top = ax.get_ylim()
    if top < 12 * bottom:  # what fits on one axis from 0 is easier to compare there
        ax.set_yscale("linear")
        ax.set_ylim(0, top * 1.05)
    ax.grid(axis="x", visible=False)
    last = max(map(x_of, records))
    for x_end, named in ends.items():
        name_ends(ax, named, None if x_end == last else x_end)


def name_ends(ax: Axes, ends: list[tuple[float, str, str]], x: float | None = None) -> None:
    """Each line's name at its right end, pushed apart where they would overlap.

    At ``x``, above the point, for lines that have no row further on; None is the panel's edge.
    """
    step = 0.064
    to_axes = ax.transData + ax.transAxes.inverted()
    right = ax.get_xlim()[1]
    ends = sorted(ends)
    at = [float(to_axes.transform((right, y))[1]) for y, _, _ in ends]
    place_x = 1.02
    if x is not None:
        place_x = float(to_axes.transform((x, 1.0))[0]) + 0.03
        at = [y + 0.05 for y in at]
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + step)
    for i in reversed(range(len(at))):
        at[i] = min(at[i], 0.95 - step * (len(at) - 1 - i))  # the panel's title is above
    for place, (_, row, colour) in zip(at, ends, strict=True):
        ax.annotate(
            row, (place_x, place), xycoords="axes fraction", color=colour, va="center",
            fontweight="bold" if row in OURS and row != "reference" else "normal",
            annotation_clip=False,
        )  # fmt: skip


def ppo_methods(records: Sequence[Record]) -> Figure | None:
    """Bars by method: peak memory with the part that is held, and seconds per sample."""
    groups: dict[str, dict[str, Record]] = defaultdict(dict)
    for r in records:
        # Variants of a method have names of their own and stay in the tables.
        if r.op == PPO and r.mode in METHODS and "s_per_sample" in r.figures:
            groups[rest(r)][r.mode] = r
    if not groups:
        return None
    label, group = max(groups.items(), key=lambda item: (len(item[1]), tokens_of_ppo(item[1])))
    methods = [m for m in METHODS if m in group]
    has_memory = all("peak_gib" in group[m].figures for m in methods)
    figure, axes = plt.subplots(
        1, 1 + has_memory, figsize=(4.9 * (1 + has_memory), 3.5), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    places = range(len(methods))
    colours = [OURS["cuda"] if "hydra" in m else "#9aa5b1" for m in methods]
    if has_memory:
        ax = axes[0][0]
        largest = max(group[m].figures["peak_gib"] for m in methods)
        unit, scale = ("GiB", 1.0) if largest > 4 else ("MiB", 1024.0)

        def of(name: str) -> list[float | None]:
            found = (group[m].figures.get(name) for m in methods)
            return [None if value is None else value * scale for value in found]

        reached = [value or 0.0 for value in of("peak_gib")]
        held = [value or 0.0 for value in of("held_gib")]
        ax.barh(places, reached, color=colours, alpha=0.45, height=0.62)
        ax.barh(places, held, color=colours, height=0.62)
        planned = of("planned_gib")
        for i, value in enumerate(planned):
            if value is not None:
                ax.plot([value, value], [i - 0.36, i + 0.36], color=INK, lw=1.6)
        marks = "solid: held, pale: peak" + (", line: planned" if any(planned) else "")
        ax.set_title(f"memory, {unit}   ({marks})")
        ends = [max(a, b or 0.0) for a, b in zip(reached, planned, strict=True)]
        bar_labels(ax, reached, ends, "{:,.1f}" if scale == 1 else "{:,.0f}")
    ax = axes[0][-1]
    seconds = [group[m].figures["s_per_sample"] for m in methods]
    ax.barh(places, seconds, color=colours, height=0.62)
    ax.set_title("seconds per sample")
    bar_labels(ax, seconds, seconds, "{:.3g}")
    for ax in axes[0]:
        ax.set_yticks(list(places), methods)
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    return finish(figure, f"PPO by method   {label}", list(group.values()))


def tokens_of_ppo(group: dict[str, Record]) -> int:
    shape = next(iter(group.values())).shape
    return shape.get("P", 0) + shape.get("T", 0)


def bar_labels(ax: Axes, values: Sequence[float], ends: Sequence[float], form: str) -> None:
    ax.set_xlim(0, 1.14 * max(ends))
    for i, (value, end) in enumerate(zip(values, ends, strict=True)):
        ax.text(end + 0.012 * max(ends), i, form.format(value), va="center")


def finish(figure: Figure, title: str, records: Sequence[Record]) -> Figure:
    figure.suptitle(title, x=0.008, ha="left", fontweight="bold", fontsize=12)
    made = sorted({f"{r.device}, {r.threads} threads" if "cores" in r.device else r.device
                   for r in records})  # fmt: skip
    commits = sorted({r.commit for r in records})
    dates = sorted({r.date for r in records})
    said = f"{'; '.join(made)}   commit {', '.join(commits)}   {', '.join(dates)}"
    figure.supxlabel(said, x=0.008, ha="left", fontsize=7.5, color="#6b7280")
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="oldest first")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args(argv)
    try:
        records = latest(r for path in args.files for r in read(path))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        ops = sorted({r.op for r in records} - {PPO, "ceilings"})
        made = {f"time_{op}": time_against_tokens(records, op) for op in ops}
        made["memory"] = memory_against_vocabulary(records)
        made["ppo_methods"] = ppo_methods(records)
        for name, figure in made.items():
            if figure is None:
                print(f"no {name}.png: the files have too few records for it", file=sys.stderr)
                continue
            figure.savefig(args.out / f"{name}.png")
            plt.close(figure)
            print(args.out / f"{name}.png")
    return 0 if any(made.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
