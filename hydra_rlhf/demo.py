"""The whole pipeline on a small model and the bundled task, in minutes on a CPU.

Hydra-SFT from random weights, PPO on that checkpoint, evaluation on held-out prompts. Training sees
the pairs and the reward head learned from them; the gold reward is computed only in the last
stage, on prompts that are in no pair.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from hydra_rlhf import evaluate, sft
from hydra_rlhf.cards import write_cards
from hydra_rlhf.commands import ppo
from hydra_rlhf.commands.ppo import METHOD_TITLES
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.data import bundled
from hydra_rlhf.evaluate import Evaluation, ScoreJudge
from hydra_rlhf.methods import build_method
from hydra_rlhf.model import HydraModel
from hydra_rlhf.records import Tracker, check_run_dir, open_run_dir
from hydra_rlhf.rollout import Sampling, sampling_of
from hydra_rlhf.settings import setting
from hydra_rlhf.sft_config import SFTConfig

SHOWN_PROMPTS = 5


@dataclass
class DemoConfig:
    """What can be set; sizes are fixed so that the demo takes minutes."""

    seed: int = setting(0, "seed of everything random")
    output_dir: str = setting("runs/demo", "run folder to write")
    overwrite: bool = setting(False, "replace the run that is in it")
    method: Literal["ppo", "lora-ppo", "d-lora-ppo", "j-hydra-ppo", "hydra-ppo"] = setting(
        "hydra-ppo", "how many models PPO holds and what it trains"
    )
    quick: bool = setting(
        False, "a smaller model and few steps: shows that it runs, not that it learns"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto takes a GPU where there is one")


ARGUMENTS = (DemoConfig,)


@dataclass(frozen=True)
class Scale:
    """Sizes of the demo's parts."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_pairs: int
    num_eval_pairs: int
    num_eval_prompts: int
    sft: SFTConfig
    ppo: PPOConfig


CONTEXT = 128

FULL = Scale(
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=1024,
    num_pairs=4000,
    num_eval_pairs=400,
    num_eval_prompts=400,
    sft=SFTConfig(
        epochs=4,
        batch_size=16,
        gamma=1.0,
        center_rewards=0.01,
        learning_rate=3e-3,
        weight_decay=0.05,
        eval_every=125,
        max_length=CONTEXT,
    ),
    ppo=PPOConfig(
        max_steps=50,
        per_device_train_batch_size=64,
        num_mini_batches=1,
        local_rollout_forward_batch_size=192,
        num_ppo_epochs=2,
        response_length=40,
        temperature=1.0,
        lora_r=16,
        lora_alpha=32,
        learning_rate=1e-3,
        kl_coef=0.1,
        missing_eos_penalty=1.0,
        warmup_steps=4,
    ),
)

QUICK = replace(
    FULL,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=400,
    num_pairs=256,
    num_eval_pairs=32,
    num_eval_prompts=16,
    sft=replace(FULL.sft, epochs=2, eval_every=8),
    ppo=replace(FULL.ppo, max_steps=3, per_device_train_batch_size=8, response_length=16, lora_r=4),
)


def run(config: DemoConfig) -> Evaluation:
    """Runs the three stages and leaves a run folder.

    Raises:
        UserError: the run folder cannot be used, or there is no such device.
    """
    started = time.perf_counter()
    check_run_dir(config.output_dir, overwrite=config.overwrite)
    accelerator = sft.make_accelerator(config.device)
    scale = QUICK if config.quick else FULL
    sft_config = replace(scale.sft, seed=config.seed)
    title = METHOD_TITLES[config.method]
    run_dir = open_run_dir(config.output_dir, overwrite=config.overwrite)
    ppo_config = replace(
        scale.ppo, seed=config.seed, method=config.method, sft_model_path=str(run_dir / "sft")
    )
    settings = {"demo": config, "sft": sft_config, "ppo": ppo_config}
    with Tracker(run_dir, settings, command=_command(config)) as tracker:
        # 1. Hydra-SFT from random weights.
        pairs = bundled.demo_pairs("train")[: scale.num_pairs]
        tokenizer = bundled.build_tokenizer(
            (pair.prompt + text for pair in pairs for text in (pair.chosen, pair.rejected)),
            scale.vocab_size,
            model_max_length=CONTEXT,
        )
        model = build_model(scale, tokenizer, config.seed)
        tracker.say(
            f"{model.causal_lm.num_parameters() / 1e6:.2f} M parameters from random weights, "
            f"{len(tokenizer)} tokens, {len(pairs)} preference pairs, seed {config.seed}, "
            f"{accelerator.device.type} with {torch.get_num_threads()} threads"
        )
        trained = sft.train(
            sft_config,
            model,
            tokenizer,
            pairs,
            tracker,
            eval_pairs=bundled.demo_pairs("test")[: scale.num_eval_pairs],
            accelerator=accelerator,
        )
        model.save_pretrained(run_dir / "sft")
        tokenizer.save_pretrained(run_dir / "sft")
        del model
        gc.collect()

        # 2. PPO on that checkpoint, loaded as any user's.
        models = build_method(
            config.method, run_dir / "sft", lora=ppo_config, device=accelerator.device
        )
        tokenizer = evaluate.load_tokenizer(run_dir / "sft")
        prompts = bundled.demo_prompts("train")
        result = ppo.train(ppo_config, models, tokenizer, prompts, tracker)
        ppo.save(models, tokenizer, run_dir / "ppo", ppo_config)
        last = result.metrics[-1] if result.metrics else {}
        write_cards(run_dir / "ppo", ppo_config, last, "the bundled demo prompts")
        del models
        gc.collect()

        # 3. Both policies, as saved, on prompts that no pair has.
        evaluation = compare(scale, config, run_dir, tokenizer, ppo_config, tracker)
        tracker.write_text("evaluation.json", evaluation.to_json())
        tracker.plot()
        seconds = time.perf_counter() - started
        show(tracker, evaluation, run_dir, title, trained.final, seconds)
        tracker.write_text("README.md", readme(evaluation, run_dir, title, config, trained.final))
        tracker.report(result.diagnostics)
    return evaluation


def build_model(scale: Scale, tokenizer: Any, seed: int) -> HydraModel:
    """A small Llama with random weights."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=scale.hidden_size,
        intermediate_size=8 * scale.hidden_size // 3 // 16 * 16,
        num_hidden_layers=scale.num_hidden_layers,
        num_attention_heads=scale.num_attention_heads,
        num_key_value_heads=scale.num_attention_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        # Three times the default, which is for wide models: at this width it learns slower.
        initializer_range=0.06,
    )
    return HydraModel(transformers.LlamaForCausalLM(config))


def compare(
    scale: Scale,
    config: DemoConfig,
    run_dir: Path,
    tokenizer: Any,
    ppo_config: PPOConfig,
    tracker: Tracker,
) -> Evaluation:
    """SFT and PPO on held-out prompts, judged by the gold reward."""
    device = torch.device(sft.make_accelerator(config.device).device)
    prompts = bundled.demo_prompts("test")[: scale.num_eval_prompts]
    sampling: Sampling = sampling_of(ppo_config, tokenizer)
    baseline, _ = evaluate.load_policy(run_dir / "sft", device=device)
    adapter = ppo.adapter_of(config.method)
    policy, _ = evaluate.load_policy(run_dir / "ppo" / adapter, device=device)
    answers = []
    with tracker.progress("Evaluation", 2 * len(prompts)) as bar:
        for index, (name, model) in enumerate(
            (("SFT", baseline), (METHOD_TITLES[config.method], policy))
        ):

            def on_batch(done: int, before: int = index * len(prompts)) -> None:
                bar.update(before + done)

            answers.append(
                evaluate.answer(
                    name,
                    model,
                    tokenizer,
                    prompts,
                    sampling,
                    baseline=baseline,
                    seed=config.seed,
                    batch_size=100,
                    on_batch=on_batch,
                )
            )
    return evaluate.judge_answers(
        prompts, answers, ScoreJudge("gold", evaluate.gold), seed=config.seed
    )


def show(
    tracker: Tracker,
    evaluation: Evaluation,
    run_dir: Path,
    title: str,
    reward_model: dict[str, float],
    seconds: float,
) -> None:
    """The end of the demo on screen."""
    tracker.say()
    tracker.show(evaluate.answer_table(evaluation, SHOWN_PROMPTS))
    tracker.say()
    tracker.show(
        evaluate.summary_table(
            evaluation, f"{evaluation.num_prompts} held-out prompts, judged by the gold reward"
        )
    )
    won = evaluation.policies[1].win_rate
    tracker.say()
    tracker.say(f"{title} against SFT by gold reward: {evaluate.interval(won, percent=True)}")
    if reward_model:
        tracker.say(
            f"Reward head on held-out pairs: {100 * reward_model['accuracy']:.1f}% ranked right, "
            f"calibration error {reward_model['calibration']:.3f}"
        )
    tracker.say(f"Run folder {run_dir}: README.md says what is in it. {seconds:.0f} s in all.")


def readme(
    evaluation: Evaluation,
    run_dir: Path,
    title: str,
    config: DemoConfig,
    reward_model: dict[str, float],
) -> str:
    """README.md of the run folder."""
    adapter = ppo.adapter_of(config.method)
    head = "| policy | gold reward [95%] | win rate vs SFT [95%] | RM reward | KL | length |"
    lines = [head, "|---|---|---|---|---|---|"]
    for report in evaluation.policies:
        lines.append(
            f"| {report.policy} | {evaluate.interval(report.score)} "
            f"| {evaluate.interval(report.win_rate, percent=True)} "
            f"| {'-' if report.reward is None else f'{report.reward.mean:.2f}'} "
            f"| {'-' if report.kl is None else f'{report.kl.mean:.1f}'} "
            f"| {report.length:.1f} |"
        )
    samples = ["| prompt | SFT | " + title + " |", "|---|---|---|"]
    for i in range(min(SHOWN_PROMPTS, evaluation.num_prompts)):
        first, second = (evaluation.answers[k].responses[i].strip() for k in (0, 1))
        samples.append(f"| {evaluation.prompts[i]} | {first} | {second} |")
    if config.method == "ppo":
        trained = "ppo/actor, ppo/critic     the trained policy and critic, whole models"
    else:
        names = "ppo/joint" if adapter == "joint" else "ppo/actor, ppo/critic"
        trained = f"{names:<24}  adapters for sft/, as PEFT folders"
    loading = ppo.loading_code(config.method, run_dir / "sft", run_dir / "ppo")
    accuracy = (
        f"The reward head ranks {100 * reward_model['accuracy']:.1f}% of the held-out pairs right."
        if reward_model
        else ""
    )
    return "\n".join(
        [
            f"# {title} on the bundled task, seed {config.seed}",
            "",
            f"Made by `{_command(config)}`. The policy was trained on a reward head learned from",
            "preference pairs; the gold reward below was computed only here, on "
            f"{evaluation.num_prompts} prompts that",
            "are in no pair, one sampled answer each. Intervals: 95%, bootstrapped over prompts.",
            "",
            "## Results",
            "",
            *lines,
            "",
            accuracy,
            "",
            "The first held-out prompts:",
            "",
            *samples,
            "",
            "![curves](curves.png)",
            "",
            "## Use",
            "",
            "```python",
            loading,
            "```",
            "",
            "## Files",
            "",
            "```",
            "config.yaml               every setting",
            "run.json                  command, versions, machine, commit",
            "metrics.jsonl             a line for each step; tensorboard/ has the same",
            "evaluation.json           every answer and score of the evaluation",
            "sft/                      the Hydra-SFT model, tokenizer; reward head in heads/",
            trained,
            "ppo/heads/                value head (trained) and reward head (as in sft/)",
            "```",
            "",
        ]
    )


def _command(config: DemoConfig) -> str:
    command = f"hydra-rlhf demo --seed {config.seed}"
    if config.method != "hydra-ppo":
        command += f" --method {config.method}"
    return command + (" --quick" if config.quick else "")
