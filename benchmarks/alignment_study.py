"""The paper's comparison on the bundled task: SFT, LoRA-SFT, Hydra-SFT, three PPOs and DPO.

    python -m benchmarks.alignment_study --seeds 0-4 --records FILE
    python -m benchmarks.alignment_study --timing --records FILE
    python -m benchmarks.alignment_report FILE --page docs/alignment_study.md

Every arm of every seed starts from the same language model, trained on the texts of the pairs
without their labels; a seed is of all that follows. Each policy then answers the same held-out
prompts, judged by the gold reward, which training never sees. A seed and arm is one line of the
records; what is in them already is not done again, so that a study may be stopped, continued, and
split over processes by its seeds, once ``--arms Start`` is done. Seconds are taken apart, on a
quiet machine, by ``--timing``: each arm in turn, a few steps at a time.

Santacroce et al. 2023, arXiv:2309.00754, table 2, judged by GPT-4: average win rates SFT 48.55,
LoRA-PPO 50.68, Hydra-SFT 48.50, J-Hydra-PPO 46.50, Hydra-PPO 55.52.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from benchmarks import machine
from benchmarks.gradient_surgery import surgery
from hydra_rlhf import demo, evaluate, ppo, sft
from hydra_rlhf.commands.sft import add_lora
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.data import Demonstration, Preference, Prompt, bundled
from hydra_rlhf.demo import Scale
from hydra_rlhf.evaluate import ScoreJudge
from hydra_rlhf.methods import MethodModels, build_method
from hydra_rlhf.model import HydraModel
from hydra_rlhf.records import Tracker
from hydra_rlhf.rollout import sampling_of
from hydra_rlhf.sft_config import REWARD_OBJECTIVES, SFTConfig

START, REWARD_MODEL = "Start", "Reward model"
SURGERY = "value gradient projected"
SFT, HYDRA_SFT = "SFT", "Hydra-SFT"


@dataclass(frozen=True)
class Arm:
    """One policy, or, for the reward model, what judges one.

    Args:
        name: In the table.
        base: The arm whose checkpoint it starts from and its KL is to; "" for random weights.
        reward: The arm whose reward head scores its answers, and is what PPO trains against.
        settings: Of PPOConfig where there is a method, else of SFTConfig.
        group: paper, remedy (for J-Hydra-PPO) or critic (how it is initialised).
        value_head: What it starts as: the reward head (as the method has it), zero or noise.
    """

    name: str
    base: str
    reward: str = REWARD_MODEL
    settings: dict[str, Any] = field(default_factory=dict)
    group: str = "paper"
    value_head: str = "the reward head"

    @property
    def is_ppo(self) -> bool:
        return "method" in self.settings


def _joint(name: str, **settings: Any) -> Arm:
    settings = {"method": "j-hydra-ppo", **settings}
    return Arm(f"J-Hydra-PPO, {name}", HYDRA_SFT, HYDRA_SFT, settings, group="remedy")


def _critic(value_head: str) -> Arm:
    settings = {"method": "hydra-ppo", "max_steps": 10}
    name = f"Hydra-PPO, critic from {value_head}"
    return Arm(name, HYDRA_SFT, HYDRA_SFT, settings, "critic", value_head)


ARMS = (
    Arm(START, "", "", {"objective": "sft", "epochs": 2.0, "learning_rate": 3e-3}),
    Arm(REWARD_MODEL, START, settings={"objective": "rm"}),
    Arm(SFT, START, settings={"objective": "sft"}),
    Arm(HYDRA_SFT, START, HYDRA_SFT, {"objective": "hydra"}),
    Arm("J-Hydra-PPO", HYDRA_SFT, HYDRA_SFT, {"method": "j-hydra-ppo"}),
    Arm("Hydra-PPO", HYDRA_SFT, HYDRA_SFT, {"method": "hydra-ppo"}),
    Arm("LoRA-PPO", SFT, REWARD_MODEL, {"method": "lora-ppo"}),
    Arm("LoRA-SFT", START, "", settings={"objective": "sft", "lora_r": 16, "learning_rate": 3e-3}),
    Arm(
        "DPO",
        SFT,
        settings={"objective": "dpo", "lora_r": 16, "learning_rate": 1e-3, "epochs": 0.5},
    ),
    _joint("vf_coef / 10", vf_coef=0.01),
    _joint("vf_coef x 10", vf_coef=1.0),  # no remedy: how much it can hurt
    _joint("value head's rate x 10", critic_learning_rate=1e-2),
    _joint("5 critic steps first", critic_warmup_steps=5),
    _joint("value loss to the head alone", detach_values=True),
    _joint(SURGERY, vf_coef=0.1),
    _critic("the reward head"),
    _critic("zero"),
    _critic("noise"),
)
START_SEED = 0
# The demo's sizes. The start has seen the texts, so that one pass is enough for what follows.
SCALE = replace(
    demo.FULL,
    sft=replace(demo.FULL.sft, epochs=1.0, learning_rate=2e-3, eval_every=0),
    ppo=replace(demo.FULL.ppo, max_steps=40),
)
BY_NAME = {arm.name: arm for arm in ARMS}
# Of each PPO step, kept in the records.
CURVES = {
    "score": "objective/scores",
    "kl": "objective/kl",
    "entropy": "policy/entropy_avg",
    "length": "objective/response_length",
    "value_loss": "loss/value_avg",
    "explained_variance": "val/explained_variance",
    "grad_norm": "policy/grad_norm",
    "clipfrac": "policy/clipfrac_avg",
}
TIMED_STEPS = {"ppo": 3, "sft": 12}  # a round; the first is left out


class Study:
    """The arms of some seeds, at one scale.

    Args:
        scale: Sizes, as the demo's.
        records: File of finished arms.
        work: Folder of checkpoints; each scale has its own inside.
    """

    def __init__(self, scale: Scale, records: Path, work: Path):
        self.scale, self.records = scale, records
        machine.commit()  # of the code that runs, not of what the checkout becomes meanwhile
        self.sizes = {
            f.name: getattr(scale, f.name)
            for f in dataclasses.fields(scale)
            if isinstance(getattr(scale, f.name), int)
        }
        described = json.dumps([self.sizes, _changed(scale.sft), _changed(scale.ppo)])
        self.work = work / hashlib.sha256(described.encode()).hexdigest()[:12]
        self.pairs = bundled.demo_pairs("train")[: scale.num_pairs]
        texts = (pair.prompt + text for pair in self.pairs for text in (pair.chosen, pair.rejected))
        self.tokenizer = bundled.build_tokenizer(
            texts, scale.vocab_size, model_max_length=demo.CONTEXT
        )
        self.held_out: list[Preference] = bundled.demo_pairs("test")[: scale.num_eval_pairs]
        self.prompts = bundled.demo_prompts("train")
        self.test_prompts: list[Prompt] = bundled.demo_prompts("test")[: scale.num_eval_prompts]

    def done(self) -> set[tuple[int, str]]:
        """Seeds and arms in the records.

        Raises:
            SystemExit: one of them was run with other settings, or on other prompts. Settings that
                did not exist then do not count.
        """
        found = [one for one in read(self.records) if one["kind"] == "arm"]
        for one in found:
            now, then = self.settings(BY_NAME[one["arm"]]), one["settings"]
            other = [name for name in now.keys() & then.keys() if now[name] != then[name]]
            if len(one.get("scores", self.test_prompts)) != len(self.test_prompts):
                other.append("num_eval_prompts")
            if other:
                raise SystemExit(
                    f"{self.records}: {one['arm']} was run with another {', '.join(sorted(other))}"
                )
        return {(one["seed"], one["arm"]) for one in found}

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Trains and evaluates an arm, and adds its record."""
        began = time.perf_counter()
        if arm.name == START:
            model, role = HydraModel.from_pretrained(self.checkpoint(START, seed)), "reference"
            figures: dict[str, Any] = {"seconds": [], "static_bytes": static_bytes([model])}
        else:
            model, role, figures = self.train(arm, seed)
        record = {"kind": "arm", "arm": arm.name, "group": arm.group, "seed": seed}
        figures["train_s"] = sum(figures.pop("seconds"))
        if arm.name != REWARD_MODEL:
            figures |= self.evaluate(arm, seed, model, role)
        record |= {**figures, "wall_s": round(time.perf_counter() - began, 1)}
        return self.append(record)

    def append(self, record: dict[str, Any]) -> dict[str, Any]:
        record |= {
            "sizes": self.sizes,
            "settings": self.settings(BY_NAME[record["arm"]]),
            "device": machine.device_name("cpu"),
            "threads": torch.get_num_threads(),
            "versions": machine.versions("cpu"),
            "commit": machine.commit(),
            "date": machine.today(),
        }
        self.records.parent.mkdir(parents=True, exist_ok=True)
        torn = self.records.exists() and not self.records.read_bytes().endswith(b"\n")
        line = json.dumps(_rounded(record))
        with self.records.open("a") as file:
            file.write(("\n" if torn else "") + line + "\n")
            file.flush()
            os.fsync(file.fileno())
        return record

    def settings(self, arm: Arm) -> dict[str, Any]:
        config = self.ppo_config(arm, 0) if arm.is_ppo else self.sft_config(arm, 0)
        kept = dataclasses.asdict(config)
        for name in ("seed", "sft_model_path", "reward_model_path"):
            kept.pop(name, None)
        return _rounded(kept)

    # Training

    def sft_config(self, arm: Arm, seed: int) -> SFTConfig:
        return replace(self.scale.sft, seed=seed, **arm.settings)

    def ppo_config(self, arm: Arm, seed: int) -> PPOConfig:
        paths = {"sft_model_path": str(self.path(arm.base, seed))}
        if arm.reward != arm.base:
            paths["reward_model_path"] = str(self.path(arm.reward, seed))
        return replace(self.scale.ppo, seed=seed, **paths, **arm.settings)

    def path(self, name: str, seed: int) -> Path:
        folder = "every-seed" if name == START else f"seed-{seed}"
        return self.work / folder / name.lower().replace(" ", "-")

    def checkpoint(self, name: str, seed: int) -> Path:
        """The checkpoint of an SFT arm, trained if it is not there."""
        if not self.path(name, seed).exists():
            self.train(BY_NAME[name], seed)
        return self.path(name, seed)

    def train(
        self, arm: Arm, seed: int, max_steps: int | None = None
    ) -> tuple[HydraModel, str, dict[str, Any]]:
        """The trained model, the role that is its policy, and figures of the training."""
        for needed in {arm.base, arm.reward if arm.is_ppo else ""} - {""}:
            self.checkpoint(needed, seed)
        seed = START_SEED if arm.name == START else seed
        torch.manual_seed(seed)
        if arm.is_ppo:
            models, figures = self._train_ppo(arm, seed, max_steps)
            return models.actor, "actor", figures
        return self._train_sft(arm, seed, max_steps)

    def _train_sft(
        self, arm: Arm, seed: int, max_steps: int | None
    ) -> tuple[HydraModel, str, dict[str, Any]]:
        config = replace(self.sft_config(arm, seed), max_steps=max_steps)
        pairs: Sequence[Preference] = self.pairs
        texts: list[Demonstration] = []
        if arm.name == START:  # good and bad alike, without a label
            model = demo.build_model(self.scale, self.tokenizer, seed)
            pairs, texts = (
                [],
                [
                    Demonstration(pair.prompt, text)
                    for pair in self.pairs
                    for text in (pair.chosen, pair.rejected)
                ],
            )
        else:
            model = HydraModel.from_pretrained(self.path(arm.base, seed))
        if config.lora_r:
            model = add_lora(model, config)
        stamps = [time.perf_counter()]
        result = sft.train(
            config,
            model,
            self.tokenizer,
            pairs,
            Tracker(None, console=Console(file=io.StringIO())),
            demonstrations=texts,
            eval_pairs=[] if max_steps else self.held_out,
            on_step=lambda step: stamps.append(time.perf_counter()),
        )
        figures = {"seconds": _steps(stamps), "samples_a_step": config.batch_size}
        figures["static_bytes"] = static_bytes([model])
        figures |= {name: result.final[name] for name in ("sft_loss",) if name in result.final}
        if config.objective in REWARD_OBJECTIVES:
            figures |= {k: result.final[k] for k in ("accuracy", "calibration") if result.final}
        if config.objective == "dpo":
            return model, "actor", figures
        if config.lora_r:
            model = sft.merge_adapter(model)
        if config.objective not in REWARD_OBJECTIVES:
            model = HydraModel(model.causal_lm)
        if not max_steps:
            self._keep(model, self.path(arm.name, seed))
        return model, "reference", figures

    def _train_ppo(
        self, arm: Arm, seed: int, max_steps: int | None
    ) -> tuple[MethodModels, dict[str, Any]]:
        config = self.ppo_config(arm, seed)
        if max_steps:
            config = replace(config, max_steps=max_steps)
        models = build_method(
            config.method, config.sft_model_path, config.reward_model_path, lora=config
        )
        head = models.critic.value_head.weight
        with torch.no_grad():
            if arm.value_head == "zero":
                head.zero_()
            elif arm.value_head == "noise":
                head.normal_(std=head.shape[1] ** -0.5)
        stamps = [time.perf_counter()]
        with surgery() if SURGERY in arm.name else contextlib.nullcontext():
            result = ppo.train(
                config,
                models,
                self.tokenizer,
                self.prompts,
                on_step=lambda step, metrics: stamps.append(time.perf_counter()),
            )
        figures: dict[str, Any] = {
            "seconds": _steps(stamps),
            "samples_a_step": config.local_batch_size,
            "static_bytes": static_bytes(list(models)),
            "warnings": result.diagnostics,
        }
        figures["curves"] = {
            name: [one.get(key) for one in result.metrics] for name, key in CURVES.items()
        }
        return models, figures

    def _keep(self, model: HydraModel, path: Path) -> None:
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        self.tokenizer.save_pretrained(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)

    # Evaluation

    def evaluate(self, arm: Arm, seed: int, model: HydraModel, role: str) -> dict[str, Any]:
        """Answers to the held-out prompts: gold reward, KL to ``arm.base``, learned reward."""
        names = {name for name in (arm.base, arm.reward) if name}
        others = {n: HydraModel.from_pretrained(self.checkpoint(n, seed)) for n in names}
        answers = evaluate.answer(
            arm.name,
            model,
            self.tokenizer,
            self.test_prompts,
            sampling_of(self.scale.ppo, self.tokenizer),
            baseline=others.get(arm.base),
            reward_model=others.get(arm.reward),
            role=role,
            seed=seed,
            batch_size=200,
        )
        found: dict[str, Any] = {}
        if answers.kl is not None:
            found["kl"] = sum(answers.kl) / len(answers.kl)
        if answers.rewards is not None:
            found["reward"] = sum(answers.rewards) / len(answers.rewards)
        judged = evaluate.judge_answers(
            self.test_prompts, [answers], ScoreJudge("gold", evaluate.gold), seed=seed
        )
        assert judged.scores is not None
        report = judged.policies[0]
        found["gold"] = sum(judged.scores[0]) / len(judged.scores[0])
        found |= {"tokens": report.length, "ended": report.ended, "distinct_2": report.distinct_2}
        return {**found, "scores": judged.scores[0], "examples": answers.responses[:3]}

    # Seconds

    def time(self, arms: Sequence[Arm], seed: int, rounds: int) -> None:
        """Adds a record of seconds a sample for each arm, a few steps of each in turn."""
        for arm in arms:
            for name in {arm.base, arm.reward} - {""}:
                self.checkpoint(name, seed)
        seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
        samples: dict[str, int] = {}
        for _ in range(rounds):
            for arm in arms:
                steps = TIMED_STEPS["ppo" if arm.is_ppo else "sft"]
                _, _, figures = self.train(arm, seed, max_steps=steps)
                seconds[arm.name] += figures["seconds"][1:]
                samples[arm.name] = figures["samples_a_step"]
        for name, each in seconds.items():
            per_sample = sorted(s / samples[name] for s in each)
            low, middle, high = (per_sample[int(q * (len(each) - 1))] for q in (0.2, 0.5, 0.8))
            figures = {"s_per_sample": middle, "p20": low, "p80": high, "steps": len(each)}
            self.append({"kind": "timing", "arm": name, "seed": seed, **figures})


def static_bytes(models: list[HydraModel]) -> int:
    """Parameters held, and gradients and Adam's two moments of those that are trained."""
    seen = {id(p): p for model in models for p in model.parameters()}.values()
    return sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in seen)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file; the latest of each seed and arm. A torn line is left out."""
    found: dict[tuple, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            one = json.loads(line)
        except ValueError:
            continue
        found[one["kind"], one["arm"], one["seed"]] = one
    return list(found.values())


def _changed(config: Any) -> dict[str, Any]:
    """The settings that are not at their defaults: a new one does not make a new study."""
    default = type(config)()
    every = dataclasses.asdict(config)
    return {name: value for name, value in every.items() if value != getattr(default, name)}


def _steps(stamps: list[float]) -> list[float]:
    return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]


def _rounded(value: Any) -> Any:
    """Five significant digits: enough for every table, and a third of the file."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def _seeds(text: str) -> list[int]:
    """ "0,2-4" is 0, 2, 3, 4."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=_seeds, default=_seeds("0-4"), help="as 0,2-4")
    parser.add_argument("--arms", nargs="+", choices=list(BY_NAME), metavar="NAME")
    parser.add_argument("--groups", nargs="+", default=["paper", "remedy", "critic"])
    parser.add_argument("--records", type=Path, default=Path("runs/alignment.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--timing", action="store_true", help="seconds a sample, nothing else")
    parser.add_argument("--rounds", type=int, default=3, help="of --timing")
    args = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    study = Study(demo.QUICK if args.quick else SCALE, args.records, args.work)
    done = study.done()
    arms = [BY_NAME[n] for n in args.arms] if args.arms else ARMS
    if args.timing:
        timed = [arm for arm in arms if arm.group == "paper" and arm.name != START]
        study.time(timed, args.seeds[0], args.rounds)
        return
    for group in args.groups:
        for seed in args.seeds:
            for arm in arms:
                if arm.group == group and (seed, arm.name) not in done:
                    one = study.run(arm, seed)
                    gold = f"gold {one['gold']:.3f}, " if "gold" in one else ""
                    print(f"seed {seed}, {arm.name}: {gold}{one['wall_s']} s", flush=True)


if __name__ == "__main__":
    main()
