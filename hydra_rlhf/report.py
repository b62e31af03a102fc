"""report.html: a run on one page that needs nothing else, not even a network.

Made from the records of a run folder (run.json, config.yaml, metrics.jsonl, samples.jsonl), so it
can be made again at any time and for a run that was cut short. Curves are SVG in the page. Whatever
comes from data, models or settings is escaped; the page's own policy forbids scripts and requests.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from hydra_rlhf import curves
from hydra_rlhf.progress import format_figure
from hydra_rlhf.records import MARKER, SAMPLES, read_lines, read_metrics

REPORT = "report.html"
MAX_POINTS = 400  # of a line; more is thinned out, because a page is no database
MAX_SAMPLE_STEPS = 12
HEADLINES = (
    ("objective/scores", "score of the policy's responses"),
    ("objective/rlhf_reward", "score less KL penalty"),
    ("objective/kl", "KL to the reference, nats a response"),
    ("objective/response_length", "tokens a response"),
    ("policy/entropy_avg", "entropy, nats a token"),
    ("policy/clipfrac_avg", "share of tokens clipped"),
    ("val/explained_variance", "explained variance of the values"),
    ("perf/tokens_per_second", "response tokens a second"),
    ("sft_loss", "SFT loss, nats a token"),
    ("accuracy", "pairs ranked right"),
)
_EXTRA_PANELS = (
    curves.Panel("ppo", "Losses", "", (curves.Line("loss/policy_avg", "policy", smooth=True),)),
    curves.Panel(
        "ppo", "Value loss", "squared score", (curves.Line("loss/value_avg", "value", smooth=True),)
    ),
    curves.Panel(
        "ppo", "Learning rate", "", (curves.Line("lr", "actor"), curves.Line("lr/critic", "critic"))
    ),
)

_STYLE = """
:root { color-scheme: light dark; --ink: #22303c; --soft: #5b6b78; --rule: #d9dfe4; --bg: #fff;
  --card: #f6f8f9; --c0: #1b6ca8; --c1: #d1495b; --c2: #3a9d6e; --c3: #c98a1b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ed; --soft: #9aa7b1; --rule: #38444e;
  --bg: #14191d; --card: #1c2328; --c0: #62aee5; --c1: #ee7c8b; --c2: #6bcb9c; --c3: #e6b254; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--bg);
  margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
p.sub { color: var(--soft); margin: .2rem 0 0 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem }
figure { margin: 0; padding: .8rem; background: var(--card); border-radius: 8px }
figcaption { font-weight: 600 } figcaption span { font-weight: 400; color: var(--soft) }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft); font-size: 10px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .92rem }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top }
th { color: var(--soft); font-weight: 600 } td.n, th.n { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums }
td.t { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 12rem }
pre { background: var(--card); padding: .8rem; border-radius: 8px; overflow-x: auto;
  font-size: .85rem } .key { margin-right: .9rem } summary { cursor: pointer; color: var(--soft) }
.bar { background: var(--c0); height: .6rem; border-radius: 3px; min-width: 1px }
"""


def write(run_dir: str | Path, notes: Sequence[str] = ()) -> Path:
    """Makes report.html in a run folder from what is there, and says where it is.

    Args:
        run_dir: A run folder.
        notes: What the run had to say, each shown in a line.
    """
    run_dir = Path(run_dir)
    path = run_dir / REPORT
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(page(run_dir, notes), encoding="utf-8")
    temporary.replace(path)
    return path


def page(run_dir: Path, notes: Sequence[str] = ()) -> str:
    """The HTML of :func:`write`."""
    records = read_metrics(run_dir)
    described = _read_json(run_dir / MARKER)
    settings = _read_text(run_dir / "config.yaml")
    sections = [
        _notes(notes),
        _figures(records),
        _charts(records),
        _memory(records),
        _samples(read_lines(run_dir / SAMPLES)),
        _section("Configuration", f"<pre>{_escape(settings)}</pre>") if settings else "",
        _section("The run", _described(described)) if described else "",
    ]
    title = _title(run_dir, settings)
    started = str(described.get("started", ""))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{_escape(title)}</h1>",
            f'<p class="sub">{_escape(started)} &middot; {_steps(records)}</p>',
            *(section for section in sections if section),
            "</body></html>",
            "",
        ]
    )


def _title(run_dir: Path, settings: str) -> str:
    try:
        sections = yaml.safe_load(settings) or {}
        method = sections.get("ppo", {}).get("method")
    except (yaml.YAMLError, AttributeError):
        method = None
    return f"{method}: {run_dir.resolve().name}" if method else run_dir.resolve().name


def _steps(records: Sequence[dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for record in records:
        stage = str(record.get("stage", ""))
        counts[stage] = counts.get(stage, 0) + 1
    return _escape(", ".join(f"{n} {stage} steps" for stage, n in counts.items()) or "no steps")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_escape(title)}</h2>{body}</section>"


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{_escape(note)}</li>" for note in dict.fromkeys(notes))
    return _section("What looked wrong", f"<ul>{items}</ul>")


def _figures(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    for name, meaning in HEADLINES:
        values = _numbers(records, name)
        if values:
            first, last = (format_figure(v) for v in (values[0], values[-1]))
            rows.append([name, meaning, first, last, format_figure(max(values))])
    if not rows:
        return ""
    return _section(
        "Figures", _table(["name", "what it is", "first step", "last step", "largest"], rows, 3)
    )


def _numbers(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [r[name] for r in records if isinstance(r.get(name), (int, float))]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: int) -> str:
    left = len(columns) - numeric
    head = "".join(
        f"<th{' class=n' if i >= left else ''}>{_escape(c)}</th>" for i, c in enumerate(columns)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{"n" if i >= left else "t"}">{_escape(cell)}</td>'
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


# Curves


def _charts(records: Sequence[dict[str, Any]]) -> str:
    drawn = [
        chart
        for panel in (*curves.PANELS, *_EXTRA_PANELS)
        if (chart := _chart(panel, curves.series(panel, records)))
    ]
    return _section("Curves", f'<div class="grid">{"".join(drawn)}</div>') if drawn else ""


def _chart(panel: curves.Panel, found: Sequence[tuple[curves.Line, list[int], list[float]]]) -> str:
    """One panel as SVG: at most four lines, faint where a moving average is drawn over them."""
    if not found:
        return ""
    width, height, left, top, bottom = 320, 170, 56, 8, 22
    values = [v for _, _, line in found for v in line]
    steps = [s for _, line, _ in found for s in line]
    low, high = _limits(values)
    first, last = min(steps), max(steps)

    def x(step: float) -> float:
        return left + (width - left - 6) * (step - first) / max(last - first, 1)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / (high - low)

    parts = []
    for i in range(4):
        value = low + (high - low) * i / 3
        parts.append(
            f'<line x1="{left}" x2="{width - 6}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            'stroke="var(--rule)"/>'
            f'<text x="{left - 5}" y="{y(value) + 3:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    parts.append(
        f'<text x="{left}" y="{height - 6}">{first}</text>'
        f'<text x="{width - 6}" y="{height - 6}" text-anchor="end">{last}</text>'
        f'<text x="{(left + width) / 2}" y="{height - 6}" text-anchor="middle">step</text>'
    )
    for i, (line, at, line_values) in enumerate(found[:4]):
        colour = f"var(--c{i})"
        noisy = line.smooth and len(line_values) > 10
        if noisy:
            parts.append(_path(at, line_values, x, y, colour, 'stroke-opacity=".25"'))
            line_values = curves.moving_average(line_values)
        parts.append(_path(at, line_values, x, y, colour, 'stroke-width="1.8"'))
    keys = "".join(
        f'<span class="key" style="color:var(--c{i})">{_escape(line.label)} '
        f"{format_figure(line_values[-1])}</span>"
        for i, (line, _, line_values) in enumerate(found[:4])
    )
    unit = f" <span>{_escape(panel.unit)}</span>" if panel.unit else ""
    return (
        f"<figure><figcaption>{_escape(panel.title)}{unit}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_escape(panel.title)}">'
        f"{''.join(parts)}</svg>{keys}</figure>"
    )


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    return low - room, high + room


def _path(steps, values, x, y, colour: str, more: str) -> str:
    points = list(zip(steps, values, strict=True))
    points = points[:: math.ceil(len(points) / MAX_POINTS)]
    if len(points) == 1:
        return (
            f'<circle cx="{x(points[0][0]):.1f}" cy="{y(points[0][1]):.1f}" r="3" fill="{colour}"/>'
        )
    drawn = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    return f'<polyline points="{drawn}" fill="none" stroke="{colour}" {more}/>'


# Memory, samples, the rest


def _memory(records: Sequence[dict[str, Any]]) -> str:
    """What each phase held at its end and reached, the largest of all steps, and its seconds."""
    phases = dict.fromkeys(
        key.removeprefix("memory/").removesuffix("_peak")
        for record in records
        for key in record
        if key.startswith("memory/") and key.endswith("_peak")
    )
    rows = []
    for phase in phases:
        held = max(_numbers(records, f"memory/{phase}_held"), default=0.0)
        peak = max(_numbers(records, f"memory/{phase}_peak"), default=0.0)
        seconds = _numbers(records, f"time/{phase}")
        rows.append((phase, held, peak, sum(seconds) / max(len(seconds), 1)))
    if not rows:
        return ""
    most = max(row[2] for row in rows) or 1.0
    cache = max(_numbers(records, "memory/kv_cache"), default=0.0)
    keys = (
        f" Keys and values of the rollout were {cache / 2**20:,.1f} MiB of its peak, and are freed "
        "at its end."
        if cache
        else ""
    )
    body = "".join(
        f'<tr><td>{_escape(phase)}</td><td style="width:40%">'
        f'<div class="bar" style="width:{100 * peak / most:.1f}%"></div></td>'
        f'<td class="n">{peak / 2**20:,.1f}</td><td class="n">{held / 2**20:,.1f}</td>'
        f'<td class="n">{seconds:.3f}</td></tr>'
        for phase, held, peak, seconds in rows
    )
    return _section(
        "Memory by phase",
        '<div class="scroll"><table><tr><th>phase</th><th></th><th class="n">peak MiB</th>'
        '<th class="n">held after MiB</th><th class="n">seconds a step</th></tr>'
        f"{body}</table></div>"
        "<p class=sub>Largest of all steps: the allocator's on a GPU, the process's resident set "
        f"on a CPU.{keys}</p>",
    )


def _samples(lines: Sequence[dict[str, Any]]) -> str:
    by_step: dict[Any, list[dict[str, Any]]] = {}
    for line in lines:
        by_step.setdefault(line.get("step"), []).append(line)
    steps = list(by_step)
    if not steps:
        return ""
    if len(steps) > MAX_SAMPLE_STEPS:  # the first, the last, and some between
        last = len(steps) - 1
        steps = [steps[i * last // (MAX_SAMPLE_STEPS - 1)] for i in range(MAX_SAMPLE_STEPS)]
    parts = []
    for step in steps:
        rows = [
            [
                str(line.get("prompt", "")),
                str(line.get("response", "")),
                format_figure(line.get("score")),
                format_figure(line.get("kl")),
            ]
            for line in by_step[step]
        ]
        shown = " open" if step in (steps[0], steps[-1]) else ""
        parts.append(
            f"<details{shown}><summary>Step {_escape(str(step))}</summary>"
            + _table(["prompt", "response", "score", "KL"], rows, 2)
            + "</details>"
        )
    return _section("Samples", "".join(parts))


def _described(described: dict[str, Any]) -> str:
    rows = []
    for key, value in described.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        rows.append([key, str(value)])
    return _table(["", ""], rows, 0)


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read_text(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
