"""The paper's comparison on the bundled task: SFT, LoRA-SFT, Hydra-SFT, three PPOs and DPO.

    python -m benchmarks.alignment_study --seeds 5 --output benchmarks/results/alignment

Every arm of a seed starts from the same language model, trained on the texts of the pairs without
their labels. Each policy then answers the same held-out prompts, judged by the gold reward, which
training never sees. Writes alignment.json with every figure and alignment.md with the table.

Santacroce et al. 2023, arXiv:2309.00754, table 2, judged by GPT-4: average win rates SFT 48.55,
LoRA-PPO 50.68, Hydra-SFT 48.50, J-Hydra-PPO 46.50, Hydra-PPO 55.52.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from hydra_rlhf import demo, evaluate, ppo, sft
from hydra_rlhf.commands.sft import add_lora
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.data import Demonstration, Preference, Prompt, bundled
from hydra_rlhf.demo import Scale
from hydra_rlhf.evaluate import Answers, ScoreJudge
from hydra_rlhf.methods import MethodModels, build_method
from hydra_rlhf.model import HydraModel
from hydra_rlhf.records import Tracker, describe_run
from hydra_rlhf.rollout import sampling_of
from hydra_rlhf.sft import SFTConfig
from hydra_rlhf.statistics import mean_interval, wins

# J-Hydra as the paper has it, and with remedies for its instability.
JOINT: dict[str, dict[str, Any]] = {
    "J-Hydra-PPO": {},
    "J-Hydra-PPO, vf_coef / 10": {"vf_coef": 0.01},
    "J-Hydra-PPO, 5 value steps first": {"critic_warmup_steps": 5},
}
BASELINE = "SFT"


@dataclass
class Arm:
    """One policy of one seed."""

    name: str
    seed: int
    gold: float
    reward: float | None
    kl: float | None
    length: float
    accuracy: float | None  # of the reward head it was trained against or with
    first_value_loss: float | None
    static_bytes: int
    seconds_per_sample: float
    scores: list[float]


@dataclass
class Data:
    """What every arm shares."""

    tokenizer: Any
    pairs: list[Preference]
    held_out: list[Preference]
    prompts: list[Any]  # of Prompt
    test_prompts: list[Prompt]


def quiet() -> Tracker:
    return Tracker(None, console=Console(file=io.StringIO()))


def load_data(scale: Scale) -> Data:
    pairs = bundled.demo_pairs("train")[: scale.num_pairs]
    texts = (pair.prompt + text for pair in pairs for text in (pair.chosen, pair.rejected))
    return Data(
        bundled.build_tokenizer(texts, scale.vocab_size, model_max_length=demo.CONTEXT),
        pairs,
        bundled.demo_pairs("test")[: scale.num_eval_pairs],
        bundled.demo_prompts("train"),
        bundled.demo_prompts("test")[: scale.num_eval_prompts],
    )


def start_model(scale: Scale, data: Data, seed: int, folder: Path) -> Path:
    """A language model of the task's texts, good and bad alike: what the arms start from."""
    model = demo.build_model(scale, data.tokenizer, seed)
    texts = [
        Demonstration(pair.prompt, text)
        for pair in data.pairs
        for text in (pair.chosen, pair.rejected)
    ]
    config = replace(scale.sft, objective="sft", seed=seed, epochs=scale.sft.epochs / 2)
    sft.train(config, model, data.tokenizer, [], quiet(), demonstrations=texts)
    return keep(HydraModel(model.causal_lm), data, folder / "start")


def keep(model: HydraModel, data: Data, path: Path) -> Path:
    model.save_pretrained(path)
    data.tokenizer.save_pretrained(path)
    return path


def bytes_of(models: list[HydraModel]) -> int:
    """Parameters held, and gradients and Adam's two moments of those that are trained."""
    seen = {id(p): p for model in models for p in model.parameters()}.values()
    return sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in seen)


def run_sft(
    config: SFTConfig, start: Path, data: Data, path: Path
) -> tuple[Path, dict[str, float], int, float]:
    """Trains from ``start``; the checkpoint, its held-out figures, bytes, seconds a pair."""
    model = HydraModel.from_pretrained(start)
    if config.lora_r:
        model = add_lora(model, config)
    else:
        model.causal_lm.requires_grad_(True)
    began = time.perf_counter()
    result = sft.train(config, model, data.tokenizer, data.pairs, quiet(), eval_pairs=data.held_out)
    seconds = (time.perf_counter() - began) / (result.steps * config.batch_size)
    held = bytes_of([model])
    if config.lora_r:
        model = sft.merge_adapter(model)
    if config.objective not in sft.REWARD_OBJECTIVES:
        model = HydraModel(model.causal_lm)
    return keep(model, data, path), result.final, held, seconds


def run_ppo(config: PPOConfig, data: Data) -> tuple[MethodModels, float, float, int]:
    """The trained models, the first step's value loss, seconds a sample, bytes held."""
    models = build_method(
        config.method, config.sft_model_path, config.reward_model_path, lora=config
    )
    result = ppo.train(config, models, data.tokenizer, data.prompts)
    samples = len(result.metrics) * config.local_batch_size
    return (
        models,
        result.metrics[0]["loss/value_avg"],
        result.seconds / samples,
        bytes_of(list(models)),
    )


def run_seed(scale: Scale, data: Data, seed: int, folder: Path) -> list[Arm]:
    """All arms of one seed."""
    folder.mkdir(parents=True, exist_ok=True)
    start = start_model(scale, data, seed, folder)
    base = replace(scale.sft, seed=seed, epochs=scale.sft.epochs / 2, learning_rate=1e-3)
    sampling = sampling_of(scale.ppo, data.tokenizer)
    arms: list[Arm] = []
    judge = ScoreJudge("gold", evaluate.gold)
    hydra_path, hydra_figures, hydra_bytes, hydra_seconds = run_sft(
        base, start, data, folder / "hydra-sft"
    )
    reference = HydraModel.from_pretrained(hydra_path)

    def add(name: str, model: HydraModel, role: str, **figures: Any) -> None:
        answers: Answers = evaluate.answer(
            name,
            model,
            data.tokenizer,
            data.test_prompts,
            sampling,
            baseline=reference,
            role=role,
            seed=seed,
        )
        found = evaluate.judge_answers(data.test_prompts, [answers], judge, seed=seed)
        assert found.scores is not None and answers.kl is not None
        report = found.policies[0]
        arms.append(
            Arm(
                name,
                seed,
                gold=sum(found.scores[0]) / len(found.scores[0]),
                reward=None if report.reward is None else report.reward.mean,
                kl=sum(answers.kl) / len(answers.kl),
                length=report.length,
                scores=found.scores[0],
                **{"accuracy": None, "first_value_loss": None, **figures},
            )
        )

    def add_sft(name: str, path: Path, figures: dict, held: int, seconds: float) -> None:
        accuracy = figures.get("accuracy") if "rm_loss" in figures else None
        model = HydraModel.from_pretrained(path)
        add(
            name,
            model,
            "reference",
            accuracy=accuracy,
            static_bytes=held,
            seconds_per_sample=seconds,
        )

    plain = run_sft(replace(base, objective="sft"), start, data, folder / "sft")
    add_sft(BASELINE, *plain)
    lora = replace(base, objective="sft", lora_r=16, learning_rate=3e-3)
    add_sft("LoRA-SFT", *run_sft(lora, start, data, folder / "lora-sft"))
    add_sft("Hydra-SFT", hydra_path, hydra_figures, hydra_bytes, hydra_seconds)
    rm_path, rm_figures, _, _ = run_sft(replace(base, objective="rm"), start, data, folder / "rm")

    def add_ppo(name: str, accuracy: float | None, **settings: Any) -> None:
        config = replace(scale.ppo, seed=seed, **settings)
        models, value_loss, seconds, held = run_ppo(config, data)
        add(
            name,
            models.actor,
            "actor",
            accuracy=accuracy,
            first_value_loss=value_loss,
            static_bytes=held,
            seconds_per_sample=seconds,
        )

    add_ppo(
        "LoRA-PPO",
        rm_figures.get("accuracy"),
        method="lora-ppo",
        sft_model_path=str(plain[0]),
        reward_model_path=str(rm_path),
    )
    accuracy = hydra_figures.get("accuracy")
    for name, settings in JOINT.items():
        add_ppo(name, accuracy, method="j-hydra-ppo", sft_model_path=str(hydra_path), **settings)
    add_ppo("Hydra-PPO", accuracy, method="hydra-ppo", sft_model_path=str(hydra_path))

    config = replace(base, objective="dpo", lora_r=16, learning_rate=1e-3, epochs=base.epochs / 2)
    model = add_lora(HydraModel.from_pretrained(plain[0]), config)
    began = time.perf_counter()
    result = sft.train(config, model, data.tokenizer, data.pairs, quiet())
    seconds = (time.perf_counter() - began) / (result.steps * config.batch_size)
    add("DPO", model, "actor", static_bytes=bytes_of([model]), seconds_per_sample=seconds)
    return arms


def table(arms: list[Arm]) -> str:
    """Markdown, one row an arm over all its seeds; intervals by the bootstrap over answers."""
    baseline = {arm.seed: arm.scores for arm in arms if arm.name == BASELINE}
    lines = [
        "| policy | win rate vs SFT [95%] | by seed | gold reward [95%] | KL to Hydra-SFT "
        "| RM accuracy | first value loss | static MB | ms a sample |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(arm.name for arm in arms):
        mine = [arm for arm in arms if arm.name == name]
        scores = [score for arm in mine for score in arm.scores]
        rate, seeds = "-", "-"
        if name != BASELINE:
            each = [wins(arm.scores, baseline[arm.seed]) for arm in mine]
            rate = evaluate.interval(mean_interval([w for won in each for w in won]), percent=True)
            seeds = " ".join(f"{100 * sum(won) / len(won):.0f}" for won in each)
        lines.append(
            f"| {name} | {rate} | {seeds} | {evaluate.interval(mean_interval(scores))} "
            f"| {_mean([arm.kl for arm in mine], '.2f')} "
            f"| {_mean([arm.accuracy for arm in mine], '.3f')} "
            f"| {_mean([arm.first_value_loss for arm in mine], '.3f')} "
            f"| {mine[0].static_bytes / 1e6:.1f} "
            f"| {1e3 * sum(arm.seconds_per_sample for arm in mine) / len(mine):.0f} |"
        )
    return "\n".join(lines) + "\n"


def _mean(values: list[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), form) if known else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    args = parser.parse_args()
    scale = demo.QUICK if args.quick else demo.FULL
    transformers.utils.logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    data = load_data(scale)
    arms: list[Arm] = []
    for seed in range(args.seeds):
        began = time.perf_counter()
        torch.manual_seed(seed)
        arms += run_seed(scale, data, seed, args.output / f"seed-{seed}")
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
        about = describe_run(f"python -m benchmarks.alignment_study --seeds {args.seeds}")
        record = {"about": about, "arms": [asdict(arm) for arm in arms]}
        (args.output / "alignment.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.output / "alignment.md").write_text(table(arms))
    print(table(arms))


if __name__ == "__main__":
    main()
