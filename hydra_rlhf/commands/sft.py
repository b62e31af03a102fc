"""``hydra-rlhf sft``."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

from hydra_rlhf import data, evaluate, sft
from hydra_rlhf.commands.inputs import OutputConfig, command_line, open_shared_run_dir
from hydra_rlhf.data import Preference
from hydra_rlhf.errors import UserError
from hydra_rlhf.model import HydraModel, default_lora_config
from hydra_rlhf.records import Tracker
from hydra_rlhf.settings import required, setting
from hydra_rlhf.sft import SFTConfig, SFTResult


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


ARGUMENTS = (SFTInput, SFTConfig, OutputConfig)


def run(given: SFTInput, config: SFTConfig, output: OutputConfig) -> SFTResult:
    """Trains, and writes the checkpoint into ``output_dir/model``."""
    output.check()
    tokenizer = evaluate.load_tokenizer(given.model)
    pairs, held_out = _pairs(given, config, tokenizer)
    demonstrations = data.load_sft(given.sft_data, tokenizer=tokenizer) if given.sft_data else []
    accelerator = sft.make_accelerator(output.device, given.mixed_precision)
    model = HydraModel.from_pretrained(
        given.model,
        dtype=None if given.dtype == "auto" else given.dtype,
        trust_remote_code=given.trust_remote_code,
    )
    sft.check_data(config, model, tokenizer, pairs, held_out, demonstrations)
    if config.lora_r:
        model = add_lora(model, config)
    run_dir = open_shared_run_dir(accelerator, output)
    settings = {"input": given, "training": config, "output": output}
    with Tracker(
        run_dir,
        settings,
        command=command_line(),
        log_with=output.trackers,
        is_main=accelerator.is_main_process,
    ) as tracker:
        result = sft.train(
            config,
            model,
            tokenizer,
            pairs,
            tracker,
            eval_pairs=held_out,
            demonstrations=demonstrations,
            accelerator=accelerator,
        )
        if accelerator.is_main_process:
            if config.lora_r:
                model = sft.merge_adapter(model)
            model.save_pretrained(run_dir / "model")
            tokenizer.save_pretrained(run_dir / "model")
            tracker.plot()
            tracker.write_text("README.md", readme(given, config, result, str(run_dir)))
        for name, value in result.final.items():
            tracker.say(f"held-out {name.replace('_', ' ')}: {value:.3f}")
        tracker.say(f"Checkpoint: {run_dir / 'model'}")
    return result


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
    given: SFTInput, config: SFTConfig, tokenizer: Any
) -> tuple[list[Preference], list[Preference]]:
    if given.pair_data is None:
        if config.objective != "sft":
            raise UserError(f"objective {config.objective} needs --pair-data")
        return [], data.load_preferences(given.eval_data) if given.eval_data else []
    pairs = data.load_preferences(given.pair_data, split=given.pair_split, tokenizer=tokenizer)
    if not pairs:
        raise UserError(f"{given.pair_data} holds no pairs")
    if given.eval_data is not None:
        return pairs, data.load_preferences(given.eval_data, tokenizer=tokenizer)
    held = round(given.eval_share * len(pairs))
    if held == 0:
        return pairs, []
    order = list(range(len(pairs)))
    random.Random(config.seed).shuffle(order)
    return [pairs[i] for i in sorted(order[held:])], [pairs[i] for i in sorted(order[:held])]


def readme(given: SFTInput, config: SFTConfig, result: SFTResult, run_dir: str) -> str:
    rows = [f"| {name.replace('_', ' ')} | {value:.4f} |" for name, value in result.final.items()]
    sources = " and ".join(f"`{name}`" for name in (given.pair_data, given.sft_data) if name)
    results = ["| held-out figure | value |", "|---|---|", *rows] if rows else ["Not measured."]
    return "\n".join(
        [
            f"# SFT with objective {config.objective}",
            "",
            f"`{given.model}` trained on {sources}: {result.steps} steps, "
            f"{result.tokens} tokens, {result.seconds:.0f} s.",
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
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{run_dir}/model")',
            f'model = AutoModelForCausalLM.from_pretrained("{run_dir}/model")',
            "```",
            "",
            "Next: `hydra-rlhf ppo` takes the same folder as its SFT model, and "
            "`model/reward_head.safetensors`",
            "beside it as the reward model.",
            "",
        ]
    )
