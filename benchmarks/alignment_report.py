"""Tables and picture of the alignment study, from its records only.

    python -m benchmarks.alignment_report FILE --page docs/alignment_study.md

Writes each table between ``<!-- name -->`` and ``<!-- end -->`` of the page, and the picture beside
it as alignment_study.png. Intervals: 95%, over seeds and prompts (``statistics.crossed_interval``).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.alignment_study import ARMS, BY_NAME, REWARD_MODEL, SFT, START, read
from hydra_rlhf.evaluate import interval
from hydra_rlhf.statistics import Estimate, crossed_interval, wins

Record = dict[str, Any]
Table = list[list[str]]  # the head first
JOINT, HYDRA = "J-Hydra-PPO", "Hydra-PPO"
PAPER = {  # Santacroce et al. 2023, arXiv:2309.00754, table 2: average win rates by GPT-4
    "SFT": 48.55,
    "LoRA-PPO": 50.68,
    "Hydra-SFT": 48.50,
    "J-Hydra-PPO": 46.50,
    "Hydra-PPO": 55.52,
}
ORDER = (START, SFT, "LoRA-SFT", "Hydra-SFT", "LoRA-PPO", JOINT, HYDRA, "DPO")
FIRST_STEPS = 5


class Results:
    """The records of a study, by arm and seed; only seeds that have every arm of ORDER."""

    def __init__(self, records: Sequence[Record]):
        arms = {(one["arm"], one["seed"]): one for one in records if one["kind"] == "arm"}
        self.timing = {one["arm"]: one for one in records if one["kind"] == "timing"}
        seeds = {seed for _, seed in arms}
        self.seeds = sorted(s for s in seeds if all((name, s) in arms for name in ORDER))
        self.arms = {
            arm.name: [arms[arm.name, s] for s in self.seeds]
            for arm in ARMS
            if self.seeds and all((arm.name, s) in arms for s in self.seeds)
        }

    def scores(self, name: str) -> list[list[float]]:
        """(seeds, prompts) of gold reward."""
        return [one["scores"] for one in self.arms[name]]

    def won(self, ours: str, theirs: str) -> list[list[float]]:
        """(seeds, prompts): 1, 0 or, for a tie, half."""
        pairs = zip(self.scores(ours), self.scores(theirs), strict=True)
        return [wins(a, b) for a, b in pairs]

    def mean(self, name: str, key: str) -> float | None:
        found = [one[key] for one in self.arms[name] if one.get(key) is not None]
        return sum(found) / len(found) if found else None

    def first_losses(self, name: str) -> list[float]:
        """The value loss of the first steps, a mean a seed."""
        losses = (one["curves"]["value_loss"][:FIRST_STEPS] for one in self.arms[name])
        return [sum(each) / len(each) for each in losses]


def comparison(results: Results) -> Table:
    """The paper's arms: the table of the study."""
    head = [
        "policy",
        "win rate vs SFT [95%]",
        "by seed",
        "mean win rate vs the others",
        "paper, GPT-4",
        "gold reward [95%]",
        "KL to its start",
        "RM accuracy",
        "static MB",
        "ms a sample",
    ]
    rows = []
    for name in ORDER:
        others = [other for other in PAPER if other != name]
        against = [_overall(results.won(name, other)) for other in others]
        won = results.won(name, SFT)
        timed = results.timing.get(name)
        rows.append(
            [
                name,
                "-" if name == SFT else interval(crossed_interval(won), percent=True),
                "-" if name == SFT else " ".join(f"{100 * sum(w) / len(w):.0f}" for w in won),
                f"{100 * sum(against) / len(against):.1f}" if name in PAPER else "-",
                f"{PAPER[name]:.2f}" if name in PAPER else "-",
                interval(crossed_interval(results.scores(name))),
                _figure(results.mean(name, "kl"), ".2f"),
                _figure(_accuracy(results, name), ".3f"),
                _figure(_mega(results.mean(name, "static_bytes")), ".1f"),
                "-" if timed is None else f"{1e3 * timed['s_per_sample']:.1f}",
            ]
        )
    return [head, *rows]


def matrix(results: Results) -> Table:
    """Win rates of row against column, over seeds and prompts, in percent."""
    rows = [
        [
            ours,
            *(
                "" if ours == theirs else f"{100 * _overall(results.won(ours, theirs)):.1f}"
                for theirs in ORDER
            ),
        ]
        for ours in ORDER
    ]
    return [["", *ORDER], *rows]


def learned(results: Results) -> Table:
    """What PPO's learned reward says it gained, beside what the gold reward says."""
    head = ["policy", "learned reward, start to end", "gold reward, start to end", "KL", "tokens",
            "distinct-2"]  # fmt: skip
    rows = []
    for name in (*(n for n in ORDER if BY_NAME[n].is_ppo), "DPO"):
        base = BY_NAME[name].base
        rows.append(
            [
                name,
                *(
                    f"{results.mean(base, key):.{digits}f} to {results.mean(name, key):.{digits}f}"
                    for key, digits in (("reward", 2), ("gold", 3))
                ),
                _figure(results.mean(name, "kl"), ".2f"),
                _figure(results.mean(name, "tokens"), ".1f"),
                _figure(results.mean(name, "distinct_2"), ".3f"),
            ]
        )
    return [head, *rows]


def remedies(results: Results) -> Table:
    """J-Hydra-PPO as it is, changed, and Hydra-PPO: gold reward against the first, paired."""
    names = [JOINT, *(n for n in results.arms if BY_NAME[n].group == "remedy"), HYDRA]
    head = [
        "policy",
        "gold reward",
        f"less {JOINT}'s [95%]",
        "by seed",
        f"win rate vs {JOINT} [95%]",
        "KL",
        f"value loss, steps 1-{FIRST_STEPS}",
        "explained variance, last 10",
    ]
    rows = []
    for name in names:
        ours, theirs = results.scores(name), results.scores(JOINT)
        gains = [
            [x - y for x, y in zip(a, b, strict=True)] for a, b in zip(ours, theirs, strict=True)
        ]
        explained = [one["curves"]["explained_variance"][-10:] for one in results.arms[name]]
        same = name == JOINT
        rows.append(
            [
                name,
                _figure(results.mean(name, "gold"), ".3f"),
                "-" if same else _signed(crossed_interval(gains)),
                "-" if same else " ".join(f"{sum(g) / len(g):+.3f}" for g in gains),
                "-" if same else interval(crossed_interval(results.won(name, JOINT)), percent=True),
                _figure(results.mean(name, "kl"), ".2f"),
                _range(results.first_losses(name)),
                _figure(sum(map(sum, explained)) / sum(map(len, explained)), ".2f"),
            ]
        )
    return [head, *rows]


def critics(results: Results) -> Table:
    """The value head from the reward head, from zero and from noise."""
    names = [n for n in results.arms if BY_NAME[n].group == "critic"]
    head = [
        "value head starts from",
        "value loss of step 1",
        f"of steps 1-{FIRST_STEPS}",
        "of step 10",
        "explained variance of step 1",
        "learned reward of step 10",
    ]
    rows = []
    for name in names:
        curves = [one["curves"] for one in results.arms[name]]
        rows.append(
            [
                BY_NAME[name].value_head,
                _range([c["value_loss"][0] for c in curves]),
                _range(results.first_losses(name)),
                _range([c["value_loss"][-1] for c in curves]),
                _range([c["explained_variance"][0] for c in curves], ".2f"),
                _range([c["score"][-1] for c in curves], ".2f"),
            ]
        )
    return [head, *rows]


def about(results: Results) -> Table:
    """What the records say of themselves."""
    every = [one for arm in results.arms.values() for one in arm]

    def of(key: str) -> str:
        return ", ".join(sorted({str(one[key]) for one in every}))

    versions = every[0]["versions"]
    rows = [
        ["seeds", ", ".join(map(str, results.seeds))],
        ["held-out prompts", str(len(every[0]["scores"]))],
        ["machine", f"{of('device')}; {of('threads')} thread a process"],
        ["versions", ", ".join(f"{name} {version}" for name, version in versions.items())],
        ["commit", of("commit")],
        ["date", of("date")],
    ]
    if results.timing:
        timed = next(iter(results.timing.values()))
        rows.append(
            [
                "seconds",
                f"{timed['device']}; {timed['threads']} threads, nothing else running; "
                f"commit {timed['commit']}, {timed['date']}",
            ]
        )
    return [["", ""], *rows]


TABLES = {
    "comparison": comparison,
    "matrix": matrix,
    "learned": learned,
    "remedies": remedies,
    "critics": critics,
    "about": about,
}


def markdown(table: Table) -> str:
    head, *rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def fill(page: str, results: Results) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: it has no place for a table.
    """
    for name, make in TABLES.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(page):
            raise ValueError(f"the page has no place for the table {name}")
        made = markdown(make(results))
        page = place.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", page)
    return page


def draw(results: Results, path: Path) -> None:
    """Win rates with every seed, then score, KL and value loss along PPO."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    from hydra_rlhf.curves import COLOURS, INK, dress

    figure = Figure(figsize=(11.5, 6.6), layout="constrained", dpi=130)
    wide, *small = (
        figure.add_subplot(place)
        for place in (lambda g: (g[:, 0], g[0, 1], g[0, 2], g[1, 1], g[1, 2]))(
            figure.add_gridspec(2, 3, width_ratios=(1.25, 1, 1))
        )
    )
    names = [name for name in ORDER if name != SFT]
    for row, name in enumerate(names):
        won = results.won(name, SFT)
        mean, low, high = (100.0 * x for x in crossed_interval(won))
        wide.errorbar(mean, row, xerr=[[mean - low], [high - mean]], fmt="o", color=COLOURS[0],
                      capsize=4, markersize=7)  # fmt: skip
        each = [100.0 * sum(w) / len(w) for w in won]
        wide.plot(each, [row + 0.22] * len(each), ".", color="#9aa7b1", markersize=6)
    wide.axvline(50.0, color="#9aa7b1", linestyle="--", linewidth=1)
    wide.set_yticks(range(len(names)), names)
    wide.set_ylim(len(names) - 0.4, -0.6)
    _title(wide, "Win rate against SFT, % (small: each seed)")
    panels = (
        ("score", "Learned reward of the samples", False),
        ("kl", "KL to the start, nats a response", False),
        ("value_loss", "Value loss", True),
        ("entropy", "Entropy, nats a token", False),
    )
    lines = {"LoRA-PPO": COLOURS[3], JOINT: COLOURS[1], HYDRA: COLOURS[0]}
    for axis, (key, title, log) in zip(small, panels, strict=True):
        for name, colour in lines.items():
            every = [one["curves"][key] for one in results.arms[name]]
            for each in every:
                axis.plot(range(1, len(each) + 1), each, color=colour, alpha=0.18, linewidth=0.8)
            means = [sum(at) / len(at) for at in zip(*every, strict=True)]
            axis.plot(range(1, len(means) + 1), means, color=colour, linewidth=1.9, label=name)
        if log:
            axis.set_yscale("log")
        axis.set_xlabel("PPO step", fontsize=9, color=INK)
        axis.legend(frameon=False, fontsize=7.5, labelcolor=INK)
        _title(axis, title)
    for axis in (wide, *small):
        dress(axis)
    figure.savefig(path, format="png", metadata={"Software": None})


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=10.5, fontweight="bold", color="#22303c")


def _overall(won: list[list[float]]) -> float:
    return sum(map(sum, won)) / sum(map(len, won))


def _accuracy(results: Results, name: str) -> float | None:
    """Of the reward head that the arm was trained with or against."""
    arm = BY_NAME[name]
    if not arm.is_ppo:
        return results.mean(name, "accuracy")
    return results.mean(arm.reward, "accuracy") if arm.reward in results.arms else None


def _mega(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _range(values: Sequence[float], form: str = ".3f") -> str:
    """The mean over seeds, and the least and greatest."""
    mean = sum(values) / len(values)
    return f"{mean:{form}} ({min(values):{form}} to {max(values):{form}})"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--page", type=Path, help="to write the tables into, and the picture by")
    args = parser.parse_args(arguments)
    results = Results([one for path in args.records for one in read(path)])
    if not results.seeds:
        raise SystemExit(f"no seed has every arm yet: {', '.join(ORDER)}, {REWARD_MODEL}")
    for name, make in TABLES.items():
        print(f"\n{name}\n\n{markdown(make(results))}")
    if args.page is not None:
        args.page.write_text(fill(args.page.read_text(), results))
        draw(results, args.page.with_suffix(".png"))


if __name__ == "__main__":
    main()
