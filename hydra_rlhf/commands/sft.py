"""``hydra-rlhf sft``."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator

from hydra_rlhf import data, evaluate, raft, sft, sharding
from hydra_rlhf.commands.inputs import (
    TrainingOutput,
    command_line,
    limits,
    open_shared_run_dir,
    stopped,
)
from hydra_rlhf.commands.ppo import loading_code
from hydra_rlhf.data import Preference
from hydra_rlhf.errors import UserError
from hydra_rlhf.model import HydraModel, default_lora_config
from hydra_rlhf.records import Tracker
from hydra_rlhf.schedule import seed_everything
from hydra_rlhf.settings import required, setting
from hydra_rlhf.sft import SFTResult
from hydra_rlhf.sft_config import LIKELIHOOD_OBJECTIVES, REWARD_OBJECTIVES, TITLES, SFTConfig
from hydra_rlhf.sft_resume import refuse_split_weights


@dataclass
class SFTInput:
    """What is trained, and on what."""

    _argument_group_name = "model and data"

    model: str = required("folder or hub name of the causal language model to start from")
    pair_data: str | None = setting(None, "preference pairs: a file, a folder or a hub name")
    sft_data: str | None = setting(
        None, "answers to imitate (prompt and completion), besides the pairs or instead; see --mix"
    )
    pair_split: str | None = setting(None, "split of the pairs; train when not set")
    format: str | None = setting(
        None, "name of the pairs' format, where their columns tell another; see data check"
    )
    sft_format: str | None = setting(None, "name of the format of --sft-data")
    overlong: Literal["cut", "error", "drop", "truncate"] = setting(
        "cut",
        "what does not fit the context. cut: an answer loses its end, a prompt that leaves no room "
        "is an error; error; drop; truncate: such a prompt loses its beginning",
    )
    eval_data: str | None = setting(None, "held-out pairs to measure on")
    eval_share: float = setting(
        0.02, "share of the pairs to hold out where eval_data is not given; 0 for none"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "float32", "dtype of the weights; auto takes the checkpoint's"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "accelerate's autocast")
    trust_remote_code: bool = setting(False, "run code that comes with the model")

    def __post_init__(self) -> None:
        if self.pair_data is None and self.sft_data is None:
            raise UserError("--pair-data or --sft-data is required")
        if not 0 <= self.eval_share < 1:
            raise UserError(f"eval_share must be in [0, 1), got {self.eval_share}")


ALIGNING = (*LIKELIHOOD_OBJECTIVES, "raft")
ARGUMENTS = (SFTInput, SFTConfig, TrainingOutput)


def run(given: SFTInput, config: SFTConfig, output: TrainingOutput) -> SFTResult:
    """Trains, and writes the checkpoint into ``output_dir/model``.

    Raises:
        SystemExit: with 128 + its number, when a signal ended the run after it was saved.
    """
    sets = (given.pair_data, given.sft_data, given.eval_data)
    output.check(resume=output.resume, reads=[given.model, *sets])
    given.model = evaluate.resolve_checkpoint(given.model)
    tokenizer = evaluate.load_tokenizer(given.model)
    limit: dict[str, Any] = {}
    if given.overlong != "cut":  # which is how examples are encoded
        limit = limits(given.overlong, given.model, tokenizer, max_length=config.max_length)
    pairs, held_out = _pairs(given, config, tokenizer=tokenizer, **limit)
    demonstrations = []
    if given.sft_data:
        demonstrations = data.load_sft(
            given.sft_data, tokenizer=tokenizer, format=given.sft_format, **limit
        )
    accelerator = sft.make_accelerator(output.device, given.mixed_precision)
    refuse_split_weights(config, accelerator, output.resume)
    seed_everything(config.seed)  # new adapters are drawn before training
    model = _load(given)
    sft.check_data(config, model, tokenizer, pairs, held_out, demonstrations)
    if config.objective == "raft" and not bool(model.reward_head.weight.any()):
        raise UserError(f"objective raft needs a reward head beside {given.model}")
    if config.lora_r:
        model = add_lora(model, config)
    run_dir = open_shared_run_dir(accelerator, output)
    settings = {"input": given, "training": config, "output": output}
    with Tracker(
        run_dir,
        settings,
        command=command_line(),
        log_with=output.trackers,
        resume=output.resume,
        is_main=accelerator.is_main_process,
    ) as tracker:
        into: dict[str, Any] = {"run_dir": run_dir, "resume": output.resume}
        if config.objective == "raft":
            rows: list[Any] = [*pairs, *demonstrations]
            prompts = list(dict.fromkeys(one.prompt for one in rows))
            result = raft.train(
                config, model, tokenizer, prompts, tracker, accelerator=accelerator, **into
            )
        else:
            result = sft.train(
                config,
                model,
                tokenizer,
                pairs,
                tracker,
                eval_pairs=held_out,
                demonstrations=demonstrations,
                accelerator=accelerator,
                **into,
            )
        if result.stopped_by is not None:
            tracker.report()
            tracker.say(stopped(result.stopped_by, result.saved))
            raise SystemExit(128 + result.stopped_by)
        saved = save(config, model, tokenizer, run_dir, given, accelerator)
        if accelerator.is_main_process:
            tracker.plot()
            tracker.report()
            tracker.write_text("README.md", readme(given, config, result, saved))
            tracker.say(f"Written: {saved}")
        for name, value in result.final.items():
            tracker.say(f"held-out {name.replace('_', ' ')}: {value:.3f}")
    return result


def save(
    config: SFTConfig,
    model: HydraModel,
    tokenizer: Any,
    run_dir: Path,
    given: SFTInput,
    accelerator: Accelerator,
) -> Path:
    """Writes what was trained: a checkpoint, or, of an aligned policy, the adapter alone.

    dpo, rrhf, pro and raft align a policy as PPO does: with LoRA the result is an adapter for the
    model it started from. The other objectives make a model to start from, so LoRA is merged. A
    reward head that was not trained with the weights says nothing about them and is left out.

    Called by every process, because each may hold a part of the weights; the first one writes.
    """
    is_main, split = accelerator.is_main_process, sharding.is_asked_for(accelerator)
    if config.lora_r and config.objective in ALIGNING:
        if is_main:
            model.save_adapters(run_dir, base_model=given.model)
        return run_dir / "actor"
    folder = run_dir / "model"
    if config.lora_r and is_main:
        model = sft.merge_adapter(_whole(config, model, given) if split else model)
    if is_main or (split and not config.lora_r):
        if config.objective not in REWARD_OBJECTIVES:
            model = HydraModel(model.causal_lm)
        model.save_pretrained(folder)
    if is_main:
        tokenizer.save_pretrained(folder)
    return folder


def _whole(config: SFTConfig, model: HydraModel, given: SFTInput) -> HydraModel:
    """The trained adapter and reward head on the model that training started from, read again.

    LoRA left its weights as they were, and here each process has but a part of them.
    """
    other = add_lora(_load(given), config)
    trained = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name or name.startswith("reward_head."):
                parameter.copy_(trained[name])
    return other


def _load(given: SFTInput) -> HydraModel:
    return HydraModel.from_pretrained(
        given.model,
        dtype=None if given.dtype == "auto" else given.dtype,
        trust_remote_code=given.trust_remote_code,
    )


def add_lora(model: HydraModel, config: SFTConfig) -> HydraModel:
    """The model with one trainable adapter; ``sft.merge_adapter`` folds it in."""
    lora = default_lora_config(
        model.causal_lm,
        r=config.lora_r,
        lora_alpha=2 * config.lora_r if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
    )
    return HydraModel(
        model.causal_lm, adapters=("actor",), lora_config=lora, reward_head=model.reward_head
    )


def _pairs(
    given: SFTInput, config: SFTConfig, **options: Any
) -> tuple[list[Preference], list[Preference]]:
    if given.pair_data is None:
        if config.objective != "sft":
            raise UserError(
                f"objective {config.objective} needs --pair-data; of --sft-data alone learns "
                "--objective sft"
            )
        held_out = data.load_preferences(given.eval_data, **options) if given.eval_data else []
        return [], held_out
    options["format"] = given.format
    pairs = data.load_preferences(given.pair_data, split=given.pair_split, **options)
    if not pairs:
        raise UserError(f"{given.pair_data} holds no pairs")
    if given.eval_data is not None:
        return pairs, data.load_preferences(given.eval_data, **options)
    held = round(given.eval_share * len(pairs))
    if held == 0:
        return pairs, []
    order = list(range(len(pairs)))
    random.Random(config.seed).shuffle(order)
    return [pairs[i] for i in sorted(order[held:])], [pairs[i] for i in sorted(order[:held])]


def readme(given: SFTInput, config: SFTConfig, result: SFTResult, saved: Path) -> str:
    """README.md of the run folder."""
    rows = [f"| {name.replace('_', ' ')} | {value:.4f} |" for name, value in result.final.items()]
    sources = " and ".join(f"`{name}`" for name in (given.pair_data, given.sft_data) if name)
    results = ["| held-out figure | value |", "|---|---|", *rows] if rows else ["Not measured."]
    if saved.name == "actor":
        code = loading_code("hydra-ppo", given.model, saved.parent)
        after = "The adapter is for the model that training started from."
    else:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{saved}")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{saved}")'
        )
        after = f"Next: `hydra-rlhf ppo --sft-model-path {saved.parent}`."
        if config.objective not in REWARD_OBJECTIVES:
            after += " There is no reward head: give it --reward-model-path or --reward-fn."
    return "\n".join(
        [
            f"# {TITLES[config.objective]} on {sources}",
            "",
            f"From `{given.model}`: {result.steps} steps, {result.tokens} tokens, "
            f"{result.seconds:.0f} s.",
            "",
            "## Results",
            "",
            *results,
            "",
            "![curves](curves.png)",
            "",
            "## Use",
            "",
            "```python",
            code,
            "```",
            "",
            after,
            "",
        ]
    )
