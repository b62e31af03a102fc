"""``hydra-rlhf ppo``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from hydra_rlhf import data, evaluate, ppo, run_sampling, sft, sharding
from hydra_rlhf.cards import write_cards
from hydra_rlhf.commands.inputs import (
    TrainingOutput,
    command_line,
    limits,
    open_shared_run_dir,
    stopped,
)
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.errors import UserError
from hydra_rlhf.methods import MethodModels, models_of
from hydra_rlhf.records import Tracker, read_metrics
from hydra_rlhf.rollout import PromptTooLong, encode_prompts
from hydra_rlhf.schedule import seed_everything
from hydra_rlhf.settings import required, setting

METHOD_TITLES = {
    "ppo": "PPO",
    "lora-ppo": "LoRA-PPO",
    "d-lora-ppo": "D-LoRA-PPO",
    "j-hydra-ppo": "J-Hydra-PPO",
    "hydra-ppo": "Hydra-PPO",
}


@dataclass
class PPOInput:
    """What the policy is trained on."""

    _argument_group_name = "data"

    prompts: str = required("prompts: a file, a folder or a hub name; other columns are kept")
    prompt_split: str | None = setting(None, "split of the prompts; train when not set")
    eval_prompts: str | None = setting(None, "held-out prompts, for --eval-steps")
    format: str | None = setting(
        None, "name of the prompts' format, where their columns tell another; see data check"
    )
    overlong: Literal["error", "drop", "truncate"] = setting(
        "error",
        "prompts that leave the response no room, or are above max_prompt_length: an error, "
        "dropped, or truncated at their beginning",
    )


ARGUMENTS = (PPOInput, PPOConfig, TrainingOutput)


def run(given: PPOInput, config: PPOConfig, output: TrainingOutput) -> ppo.PPOResult:
    """Trains, and writes adapters and heads into ``output_dir``.

    Raises:
        SystemExit: with 128 + its number, when a signal ended the run after it was saved.
    """
    folders = (config.sft_model_path, config.reward_model_path, config.reference_adapter)
    output.check(resume=output.resume, reads=[*folders, given.prompts, given.eval_prompts])
    config.validate()
    if not config.sft_model_path:
        raise UserError("ppo: --sft-model-path is required")
    config.sft_model_path = evaluate.resolve_checkpoint(config.sft_model_path)
    if config.reward_model_path is not None:
        config.reward_model_path = evaluate.resolve_checkpoint(config.reward_model_path)
    tokenizer = evaluate.load_tokenizer(config.sft_model_path)
    options: dict[str, Any] = {"tokenizer": tokenizer, "format": given.format}
    if given.overlong != "error":  # check_prompts has the error
        options |= limits(
            given.overlong,
            config.sft_model_path,
            tokenizer,
            max_length=config.max_prompt_length,
            response_length=config.response_length,
            apply_chat_template=config.apply_chat_template,
        )
    prompts = data.load_prompts(given.prompts, split=given.prompt_split, **options)
    held_out = data.load_prompts(given.eval_prompts, **options) if given.eval_prompts else None
    accelerator = sft.make_accelerator(output.device, config.mixed_precision)
    seed_everything(config.seed)  # new adapters are drawn before training
    models, reward_fn = models_of(
        config, device=accelerator.device, sharded=sharding.is_asked_for(accelerator)
    )
    if config.apply_chat_template and any("prompt_messages" in p.extra for p in prompts):
        raise UserError(
            f"apply_chat_template is for text prompts; {given.prompts} has messages, which the "
            "chat template has made into text already"
        )
    check_prompts(config, models, tokenizer, [prompt.prompt for prompt in prompts])
    run_dir = open_shared_run_dir(accelerator, output)
    settings = {"input": given, "ppo": config, "output": output}
    with Tracker(
        run_dir,
        settings,
        command=command_line(),
        log_with=output.trackers,
        resume=output.resume,
        is_main=accelerator.is_main_process,
    ) as tracker:
        if config.reward_fn is not None:
            tracker.say(f"Reward: {config.reward_fn}. This runs your code, in this process.")
        result = train(
            config,
            models,
            tokenizer,
            prompts,
            tracker,
            reward_fn=reward_fn,
            eval_prompts=held_out,
            run_dir=run_dir,
            resume=output.resume,
        )
        if result.stopped_by is not None:
            tracker.report(result.diagnostics)
            tracker.say(stopped(result.stopped_by, result.saved))
            raise SystemExit(128 + result.stopped_by)
        if accelerator.is_main_process:
            save(models, tokenizer, run_dir, config)
            figures = [line for line in read_metrics(run_dir) if line.get("stage") == "ppo"]
            write_cards(run_dir, config, figures[-1] if figures else {}, given.prompts)
            tracker.plot()
            tracker.write_text("README.md", readme(given, config, figures, result, run_dir))
            tracker.report(result.diagnostics)
        for message in result.diagnostics:
            tracker.say(f"note: {message}")
        if not result.metrics:
            tracker.say("All steps were done before: a larger --max-steps goes on")
        tracker.say(f"Adapters and heads: {run_dir}")
    return result


def save(models: MethodModels, tokenizer: Any, folder: Path, config: PPOConfig) -> None:
    """``models.save``; a policy that is a whole model, as of method ppo, gets what it lacks.

    Its tokenizer, and a generation_config.json that samples it as it was trained.
    """
    models.save(folder, base_model=config.sft_model_path)
    if not models.actor.adapters:
        tokenizer.save_pretrained(folder / "actor")
        settings = {name: getattr(config, name) for name in run_sampling.DEFAULTS}
        run_sampling.generation_config(settings, tokenizer).save_pretrained(folder / "actor")


def train(
    config: PPOConfig,
    models: MethodModels,
    tokenizer: Any,
    prompts: list[Any],
    tracker: Tracker,
    **kwargs: Any,
) -> ppo.PPOResult:
    """``ppo.train`` with its figures on a bar and in the records."""
    steps = config.num_steps(len(prompts), PartialState().num_processes)
    with tracker.progress(METHOD_TITLES[config.method], steps) as bar:

        def on_step(step: int, metrics: dict[str, float]) -> None:
            tracker.log(step, metrics, "ppo")
            bar.update(
                step,
                reward=metrics["objective/scores"],
                kl=metrics["objective/kl"],
                entropy=metrics.get("policy/entropy_avg"),
                length=metrics["objective/response_length"],
                clipped=metrics.get("policy/clipfrac_avg"),
                **{"tokens/s": metrics["perf/tokens_per_second"]},
            )

        return ppo.train(
            config,
            models,
            tokenizer,
            prompts,
            on_step=on_step,
            on_samples=lambda step, rows: tracker.log_samples(step, rows, "ppo"),
            **kwargs,
        )


def check_prompts(
    config: PPOConfig, models: MethodModels, tokenizer: Any, prompts: list[str]
) -> None:
    """Raises UserError for the first prompt that leaves a response no room, before any training."""
    limit = ppo.context_limit(models.actor)
    most = config.max_prompt_length
    if limit is not None:
        most = min(most or limit, limit - config.response_length)
        if most < 1:
            raise UserError(
                f"response_length {config.response_length} leaves no room for a prompt in a "
                f"context of {limit} tokens"
            )
    try:
        encode_prompts(
            tokenizer, prompts, max_length=most, apply_chat_template=config.apply_chat_template
        )
    except PromptTooLong as error:
        raise UserError(f"{error} (--overlong drop, or truncate)") from error


def readme(
    given: PPOInput,
    config: PPOConfig,
    figures: list[dict[str, Any]],
    result: ppo.PPOResult,
    run_dir: Path,
) -> str:
    """README.md of the run folder.

    Args:
        figures: Of every step of the run, those before it went on too.
    """
    rows = []
    responses = config.local_batch_size * PartialState().num_processes
    seconds = f", {result.seconds:.0f} s" if result.first_step == 1 else ""
    if figures:
        first, last = figures[0], figures[-1]
        for name in (
            "objective/scores",
            "objective/kl",
            "objective/rlhf_reward",
            "objective/response_length",
            "policy/entropy_avg",
        ):
            if name in last:
                rows.append(f"| {name} | {first.get(name, 0.0):.4f} | {last[name]:.4f} |")
    return "\n".join(
        [
            f"# {METHOD_TITLES[config.method]} on `{given.prompts}`",
            "",
            f"From `{config.sft_model_path}`, {len(figures)} steps of "
            f"{responses} responses{seconds}.",
            "",
            "| figure | first step | last step |",
            "|---|---|---|",
            *rows,
            "",
            "![curves](curves.png)",
            "",
            "## Use",
            "",
            "```python",
            loading_code(config.method, config.sft_model_path, run_dir),
            "```",
            "",
        ]
    )


def adapter_of(method: str) -> str:
    """The name of the adapter that is the policy."""
    return "joint" if method == "j-hydra-ppo" else "actor"


def loading_code(method: str, sft_path: str | Path, folder: str | Path) -> str:
    """Python that loads the trained policy with transformers and PEFT."""
    path = f"{folder}/{adapter_of(method)}"
    if method == "ppo":
        return (
            "from transformers import AutoModelForCausalLM\n\n"
            f'policy = AutoModelForCausalLM.from_pretrained("{path}")'
        )
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{sft_path}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{sft_path}")\n'
        f'policy = PeftModel.from_pretrained(model, "{path}")'
    )
