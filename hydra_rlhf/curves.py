"""Curves of a run from its metrics: curves.png."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

INK = "#22303c"
COLOURS = ("#1b6ca8", "#d1495b", "#3a9d6e", "#c98a1b")


@dataclass(frozen=True)
class Line:
    name: str  # in metrics.jsonl
    label: str
    smooth: bool = False  # noisy: drawn faint, with its moving average on top
    percent: bool = False


@dataclass(frozen=True)
class Panel:
    stage: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    limits: tuple[float, float] | None = None
    chance: float | None = None  # a level to compare with, drawn dashed
    log: bool = False


PANELS = (
    Panel(
        "sft",
        "SFT loss",
        "nats per token, log scale",
        (Line("sft_loss", "training", smooth=True), Line("eval_sft_loss", "held out")),
        log=True,
    ),
    Panel(
        "sft",
        "Reward model: pairs ranked right",
        "%",
        (
            Line("accuracy", "training", smooth=True, percent=True),
            Line("eval_accuracy", "held out", percent=True),
        ),
        limits=(30.0, 102.0),
        chance=50.0,
    ),
    Panel(
        "ppo",
        "Reward of the policy",
        "reward head",
        (
            Line("objective/scores", "score", smooth=True),
            Line("objective/rlhf_reward", "score less KL penalty", smooth=True),
        ),
    ),
    Panel(
        "ppo",
        "KL to the SFT policy",
        "nats per response",
        (Line("objective/kl", "KL", smooth=True),),
    ),
    Panel(
        "ppo",
        "Entropy of the policy",
        "nats per token",
        (Line("policy/entropy_avg", "entropy", smooth=True),),
    ),
    Panel(
        "ppo",
        "Response length",
        "tokens",
        (Line("objective/response_length", "length", smooth=True),),
    ),
)


def draw(records: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Write the panels that the records have figures for; None without matplotlib or figures."""
    panels = [(panel, found) for panel in PANELS if (found := series(panel, records))]
    if not panels:
        return None
    try:
        import matplotlib
    except ImportError:
        _log.warning("no curves: pip install 'hydra-rlhf[plot]' brings matplotlib")
        return None
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained", dpi=130)
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.1, h_pad=0.1)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (panel, found) in zip(axes.flat, panels, strict=False):
        _draw_panel(axis, panel, found)
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    return path


def moving_average(values: Sequence[float]) -> list[float]:
    """Exponential over a fifteenth of the values, at most 20, without the bias of its start.

    The correction is that of Kingma and Ba 2015, arXiv:1412.6980, section 3.
    """
    smoothing = 1.0 - 1.0 / min(max(len(values) / 15, 2.0), 20.0)
    averaged, total, weight = [], 0.0, 0.0
    for value in values:
        total = smoothing * total + (1.0 - smoothing) * value
        weight = smoothing * weight + (1.0 - smoothing)
        averaged.append(total / weight)
    return averaged


def series(
    panel: Panel, records: Sequence[dict[str, Any]]
) -> list[tuple[Line, list[int], list[float]]]:
    found = []
    for line in panel.lines:
        points = [
            (record["step"], record[line.name] * (100.0 if line.percent else 1.0))
            for record in records
            if record.get("stage") == panel.stage and record.get(line.name) is not None
        ]
        if points:
            steps, values = zip(*points, strict=True)
            found.append((line, list(steps), list(values)))
    return found


def _draw_panel(axis: Any, panel: Panel, found: list[tuple[Line, list[int], list[float]]]) -> None:
    for colour, (line, steps, values) in zip(COLOURS, found, strict=False):
        if line.smooth and len(values) > 10:
            axis.plot(steps, values, color=colour, alpha=0.22, linewidth=0.9)
            axis.plot(steps, moving_average(values), color=colour, linewidth=1.9, label=line.label)
        else:
            axis.plot(
                steps,
                values,
                color=colour,
                linewidth=1.6,
                marker="o" if len(values) <= 40 else None,
                markersize=4,
                label=line.label,
            )
    if panel.log:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    if panel.chance is not None:
        axis.axhline(panel.chance, color="#9aa7b1", linestyle="--", linewidth=1, label="chance")
    axis.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
    axis.set_ylabel(panel.unit, fontsize=9, color=INK)
    names = {"sft": "SFT step", "ppo": "PPO step"}
    axis.set_xlabel(names.get(panel.stage, "step"), fontsize=9, color=INK)
    axis.margins(x=0.02)
    if panel.limits is not None:
        axis.set_ylim(*panel.limits)
    dress(axis)
    if len(found) > 1:
        axis.legend(frameon=False, fontsize=8, labelcolor=INK)


def draw_evaluation(evaluation: Any, path: Path) -> Path | None:
    """Mean scores and the win rates against the baseline, with 95% intervals."""
    try:
        import matplotlib
    except ImportError:
        _log.warning("no picture: pip install 'hydra-rlhf[plot]' brings matplotlib")
        return None
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    names = [report.policy for report in evaluation.policies]
    panels = [
        (
            f"Mean score by {evaluation.judge}",
            [(report.policy, report.score) for report in evaluation.policies if report.score],
            None,
        ),
        (
            f"Win rate against {names[0]}, %",
            [
                (report.policy, [100.0 * x for x in report.win_rate])
                for report in evaluation.policies
                if report.win_rate
            ],
            50.0,
        ),
    ]
    panels = [panel for panel in panels if panel[1]]
    height = 1.2 + 0.45 * len(names)
    figure = Figure(figsize=(4.8 * max(1, len(panels)), height), layout="constrained", dpi=130)
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)
    for axis, (title, points, line) in zip(axes.flat, panels, strict=False):
        for row, (_, (mean, low, high)) in enumerate(points):
            colour = COLOURS[names.index(points[row][0]) % len(COLOURS)]
            axis.errorbar(
                mean,
                row,
                xerr=[[mean - low], [high - mean]],
                fmt="o",
                color=colour,
                capsize=4,
                markersize=7,
            )
        if line is not None:
            axis.axvline(line, color="#9aa7b1", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(points)), [name for name, _ in points])
        axis.set_ylim(len(points) - 0.5, -0.5)
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
        dress(axis)
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    return path


def draw_overoptimisation(curves: Sequence[Any], path: Path) -> Path | None:
    """Gains of the learned and the judge's reward over the root of the KL; the KL over the steps.

    Args:
        curves: Of ``overoptimisation``, a colour each.
        path: The PNG.

    Returns:
        ``path``; None without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        _log.warning("no picture: pip install 'hydra-rlhf[plot]' brings matplotlib")
        return None
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained", dpi=130)
    gains, kls = figure.subplots(1, 2, width_ratios=(1.5, 1.0))
    for i, curve in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        prefix = f"{curve.run}: " if len(curves) > 1 else ""
        roots = [max(point.kl, 0.0) ** 0.5 for point in curve.points]
        for reward, style, label in (
            ("learned", "--", "learned reward"),
            ("judged", "-", curve.judge),
        ):
            mean, low, high = zip(*curve.gains(reward), strict=True)
            gains.plot(roots, mean, style, color=colour, linewidth=1.8, marker="o", markersize=4,
                       label=prefix + label)  # fmt: skip
            gains.fill_between(roots, low, high, color=colour, alpha=0.13, linewidth=0)
        best = curve.points.index(curve.best)
        gains.plot(
            roots[best],
            curve.gains("judged")[best].mean,
            "*",
            color=colour,
            markersize=14,
            zorder=5,
        )
        steps = [point.step for point in curve.points]
        kls.plot(steps, [point.kl for point in curve.points], color=colour, linewidth=1.8,
                 marker="o", markersize=4, label=curve.run)  # fmt: skip
    gains.axhline(0.0, color="#9aa7b1", linestyle="--", linewidth=1)
    titles = (
        (gains, "Gain over the start (star: the judge's best)", "root of the KL to the start"),
        (kls, "KL to the start, nats a response", "PPO step"),
    )
    for axis, title, label in titles:
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
        axis.set_xlabel(label, fontsize=9, color=INK)
        dress(axis)
    gains.set_ylabel("standard deviations of the start", fontsize=9, color=INK)
    gains.legend(frameon=False, fontsize=8, labelcolor=INK)
    if len(curves) > 1:
        kls.legend(frameon=False, fontsize=8, labelcolor=INK)
    temporary = path.with_name(f".{path.name}.partial")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
    return path


def dress(axis: Any) -> None:
    axis.grid(True, color="#d9dfe4", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, colors=INK, length=0)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#9aa7b1")
