"""What training on a learned reward does to the reward that was meant, along a PPO run.

Every checkpoint of a run answers the same prompts. As the policy moves away from where it started,
the learned reward of its answers goes on rising; what a judge that training never saw says of them
may stop, and fall: Gao, Schulman, Hilton 2022, arXiv:2210.10760, whose abscissa, the square root of
the KL, is used here. The two rewards have different units, so gains are drawn in standard
deviations of each over the answers of the start.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table

from hydra_rlhf import evaluate
from hydra_rlhf.checkpoint import CheckpointStore
from hydra_rlhf.data import Prompt
from hydra_rlhf.errors import UserError
from hydra_rlhf.evaluate import Answers, ScoreFn, ScoreJudge
from hydra_rlhf.methods import is_classifier
from hydra_rlhf.model import HydraModel
from hydra_rlhf.pretrained import base_of
from hydra_rlhf.records import read_metrics, table
from hydra_rlhf.rewards import ClassifierReward, call_reward_fn, load_reward_fn
from hydra_rlhf.rollout import Sampling
from hydra_rlhf.statistics import Estimate, mean_interval, wins


@dataclass
class Point:
    """One checkpoint's answers. Step 0 is the policy that the run started from."""

    step: int
    kl: float  # nats a response, against the start
    learned: Estimate  # the reward that was trained on
    judged: Estimate
    win_rate: Estimate | None  # by the judge, against the start
    tokens: float


@dataclass
class Curve:
    """A run. ``*_scale``: standard deviation of a reward over the start's answers."""

    run: str
    judge: str
    learned_scale: float
    judged_scale: float
    points: list[Point]

    @property
    def best(self) -> Point:
        """The checkpoint that the judge likes best."""
        return max(self.points, key=lambda point: point.judged.mean)

    def gains(self, reward: str) -> list[Estimate]:
        """``learned`` or ``judged`` above the start's mean, in the start's standard deviations."""
        scale = getattr(self, f"{reward}_scale") or 1.0
        start = getattr(self.points[0], reward).mean
        return [
            Estimate(*((x - start) / scale for x in getattr(point, reward)))
            for point in self.points
        ]

    def verdict(self) -> str:
        """The run in one line: where the judge's reward was highest, and what came after."""
        best, last = self.best, self.points[-1]
        after = (
            "the last step"
            if best is last
            else f"step {best.step}; after it the learned reward went from "
            f"{best.learned.mean:.2f} to {last.learned.mean:.2f}, {self.judge} from "
            f"{best.judged.mean:.3f} to {last.judged.mean:.3f}"
        )
        return f"{self.run}: {self.judge} is highest at KL {best.kl:.1f}, {after}"


@dataclass
class PPORun:
    """What a run folder of ``hydra-rlhf ppo`` leaves to follow.

    Attributes:
        start: The policy that it started from.
        start_path: Where that is; the adapters are for it.
        tokenizer: Of both.
        adapters: The policy after some steps, by step: of each whole checkpoint, and of the end.
        reward_model: What it trained on: a model with a reward head, ...
        reward_fn: ... or a function.
    """

    start: HydraModel
    start_path: str
    tokenizer: Any
    adapters: list[tuple[int, Path]]
    reward_model: HydraModel | None
    reward_fn: ScoreFn | None


def open_run(run_dir: str | Path, *, base: str | None = None, device: Any = None) -> PPORun:
    """Loads what :func:`follow` needs.

    Args:
        run_dir: The run folder.
        base: The model the run started from; None takes the one that the run names.
        device: Where to.

    Raises:
        UserError: it is no PPO run, has no checkpoints or no models to load, or what it started
            from or was rewarded by is not where it was.
    """
    run_dir = Path(run_dir)
    settings = _settings(run_dir)
    adapters = _adapters(run_dir, settings["method"])
    start_path = str(base or base_of(run_dir, settings["sft_model_path"]))
    start, tokenizer = evaluate.load_policy(start_path, device=device)
    reward_model, reward_fn = _learned(settings, start, device)
    return PPORun(start, start_path, tokenizer, adapters, reward_model, reward_fn)


def follow(
    name: str,
    run: PPORun,
    prompts: Sequence[Prompt],
    judge: ScoreJudge,
    sampling: Sampling,
    *,
    seed: int = 0,
    batch_size: int = 64,
    apply_chat_template: bool = False,
    on_policy: Callable[[int], None] | None = None,
) -> Curve:
    """Answers, learned reward and judge's reward of every checkpoint of a PPO run.

    Args:
        name: The run's, in tables.
        run: From :func:`open_run`.
        prompts: What to answer.
        judge: A reward that training did not see.
        sampling: How to answer.
        seed: Of sampling and of the intervals.
        batch_size: Prompts at a time.
        apply_chat_template: Wrap each prompt in the chat template, as one user turn.
        on_policy: Called with the number of policies done; the start is one.

    Raises:
        UserError: a policy does not load, or the judge fails.
    """
    texts = [prompt.prompt for prompt in prompts]
    given: list[tuple[int, Answers]] = []
    for step, path in [(0, None), *run.adapters]:
        model = run.start
        if path is not None:
            model, _ = evaluate.load_policy(path, base=run.start_path, device=run.start.device)
        answers = evaluate.answer(
            f"step {step}",
            model,
            run.tokenizer,
            prompts,
            sampling,
            baseline=run.start,
            reward_model=run.reward_model,
            seed=seed,
            batch_size=batch_size,
            apply_chat_template=apply_chat_template,
        )
        if run.reward_fn is not None:
            rewards = call_reward_fn(
                run.reward_fn,
                texts,
                answers.responses,
                evaluate.columns_of(prompts),
                torch.device("cpu"),
            )
            answers.rewards = rewards.tolist()
        given.append((step, answers))
        if on_policy is not None:
            on_policy(len(given))
    judged = evaluate.judge_answers(prompts, [answers for _, answers in given], judge, seed=seed)
    assert judged.scores is not None
    points, spreads = [], []
    for (step, answers), scores in zip(given, judged.scores, strict=True):
        assert answers.kl is not None and answers.rewards is not None
        spreads.append((_spread(answers.rewards), _spread(scores)))
        points.append(
            Point(
                step,
                kl=sum(answers.kl) / len(answers.kl),
                learned=mean_interval(answers.rewards, seed=seed),
                judged=mean_interval(scores, seed=seed),
                win_rate=mean_interval(wins(scores, judged.scores[0]), seed=seed) if step else None,
                tokens=sum(answers.tokens) / len(answers.tokens),
            )
        )
    return Curve(name, judge.name, *spreads[0], points)


def points_table(curve: Curve) -> Table:
    rows = [
        [
            str(point.step),
            f"{point.kl:.2f}",
            evaluate.interval(point.learned),
            evaluate.interval(point.judged),
            evaluate.interval(point.win_rate, percent=True),
            f"{point.tokens:.1f}",
        ]
        for point in curve.points
    ]
    columns = ["step", "KL", "learned reward [95%]", f"{curve.judge} [95%]",
               "win rate vs start [95%]", "length"]  # fmt: skip
    return table(f"Along {curve.run}", columns, rows, numeric=len(columns))


def to_json(curves: Sequence[Curve]) -> str:
    return json.dumps([asdict(curve) for curve in curves], indent=1) + "\n"


def _adapters(run_dir: Path, method: str) -> list[tuple[int, Path]]:
    if method == "ppo":
        raise UserError(f"{run_dir}: the checkpoints of method ppo are no models to load")
    adapter = "joint" if method == "j-hydra-ppo" else "actor"
    found = {
        one.step: one.path / adapter
        for one in CheckpointStore(run_dir / "checkpoints").whole()
        if (one.path / adapter).is_dir()
    }
    steps = [line["step"] for line in read_metrics(run_dir) if line.get("stage") == "ppo"]
    if steps and (run_dir / adapter).is_dir():
        found.setdefault(max(steps), run_dir / adapter)
    if not found:
        raise UserError(f"{run_dir} has no checkpoints to follow: train with --save-steps")
    return sorted(found.items())


def _settings(run_dir: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["ppo"]
        return {name: settings[name] for name in _NEEDED}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir} is no run folder of hydra-rlhf ppo") from error


_NEEDED = ("method", "sft_model_path", "reward_model_path", "reward_fn")


def _learned(
    settings: dict[str, Any], start: HydraModel, device: torch.device | None
) -> tuple[HydraModel | None, ScoreFn | None]:
    """The reward of the run: a model with a reward head, or a function."""
    path = settings["reward_model_path"]
    if settings["reward_fn"] is not None:
        return None, load_reward_fn(settings["reward_fn"])
    if path is not None and is_classifier(path):
        return None, ClassifierReward(path, device=device or "cpu")
    if path is not None:
        return HydraModel.from_pretrained(path, device=device).eval(), None
    if not bool(start.reward_head.weight.any()):
        raise UserError("the model that the run started from has no reward head beside it")
    return start, None


def _spread(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).std(correction=0))
