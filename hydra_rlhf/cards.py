"""Model cards: README.md in the folders that a PPO run leaves for others to load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from hydra_rlhf.config import PPOConfig

_ROLES = {
    "actor": "the policy",
    "critic": "the value function, with `heads/value_head.safetensors` beside this folder",
    "joint": "the policy, and its value function, with `heads/value_head.safetensors` beside this "
    "folder",
}
_FIGURES = (
    ("objective/scores", "mean score of the training prompts' responses"),
    ("objective/kl", "KL to the model it started from, nats a response"),
    ("objective/response_length", "tokens a response"),
    ("eval/win_rate", "win rate over that model on held-out prompts, by the same scores"),
)


def write_cards(
    folder: str | Path, config: PPOConfig, metrics: Mapping[str, float], data: str
) -> list[Path]:
    """Writes the card of every adapter (or model, for ``ppo``) in ``folder``; returns the files.

    Args:
        folder: Where ``MethodModels.save`` wrote.
        config: Of the run.
        metrics: Of its last step.
        data: What the prompts were.
    """
    written = []
    for name in _ROLES:
        part = Path(folder) / name
        if part.is_dir():
            file = part / "README.md"
            file.write_text(card(name, config, metrics, data), encoding="utf-8")
            written.append(file)
    return written


def card(name: str, config: PPOConfig, metrics: Mapping[str, float], data: str) -> str:
    """The card of one adapter, with the front matter that the Hugging Face hub reads."""
    whole = config.method == "ppo"
    front = {
        "base_model": config.sft_model_path,
        "library_name": "transformers" if whole else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf", "ppo", config.method] + ([] if whole else ["lora"]),
    }
    kind = "Model" if whole else f"LoRA adapter of rank {config.lora_r}"
    figures = [f"| {meaning} | {metrics[key]:.4g} |" for key, meaning in _FIGURES if key in metrics]
    reward = config.reward_fn or config.reward_model_path or "the reward head of the SFT model"
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
            "---",
            "",
            f"# {name}",
            "",
            f"{kind}: {_ROLES[name]}, trained with {config.method} by hydra-rlhf from "
            f"`{config.sft_model_path}`.",
            "",
            "## Use",
            "",
            "```python",
            *_loading(name, config),
            "```",
            "",
            "## Training",
            "",
            f"- Prompts: `{data}`",
            f"- Reward: `{reward}`",
            f"- KL penalty {config.kl_coef:g} ({config.kl_estimator}), learning rate "
            f"{config.learning_rate:g}, {config.num_ppo_epochs} epochs a rollout, temperature "
            f"{config.temperature:g}, at most {config.response_length} tokens a response, "
            f"seed {config.seed}",
            *(["", "| at the last step | |", "|---|---|", *figures] if figures else []),
            "",
            "## Limits",
            "",
            "It was trained to please one reward, and has been judged by nothing else here. A "
            "score that rises is not yet a better answer: look at samples.",
            "",
        ]
    )


def _loading(name: str, config: PPOConfig) -> list[str]:
    if config.method == "ppo":
        kind = "AutoModelForCausalLM" if name == "actor" else "AutoModel"
        return [
            f"from transformers import {kind}",
            "",
            f'model = {kind}.from_pretrained("path/to/{name}")  # this folder',
        ]
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({config.sft_model_path!r})",
        f'model = PeftModel.from_pretrained(base, "path/to/{name}")  # this folder',
    ]
