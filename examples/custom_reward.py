"""PPO against a reward function and rows of your own, from Python, and what is left afterwards.

    python examples/custom_reward.py RUN_FOLDER

On the command line, run in this folder, the same is
``hydra-rlhf ppo --reward-fn custom_reward:wanted_share --prompts rows.jsonl ...``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_model import pairs, write

from hydra_rlhf import PPOConfig, build_method, ppo
from hydra_rlhf.data import Prompt
from hydra_rlhf.evaluate import load_tokenizer


def wanted_share(prompts: list[str], completions: list[str], wanted: list[str]) -> list[float]:
    """Share of each answer that is in its row's ``wanted``: columns arrive by their names."""
    return [
        sum(letter in letters for letter in text) / max(len(text), 1)
        for text, letters in zip(completions, wanted, strict=True)
    ]


def main(folder: Path, steps: int = 8) -> list[float]:
    """Mean score of each step."""
    model = write(folder)
    tokenizer = load_tokenizer(model)
    rows = [Prompt(row["prompt"], {"wanted": "abcdefghijklmnopqrstuvwxyz "}) for row in pairs()]
    config = PPOConfig(
        sft_model_path=str(model),
        max_steps=steps,
        per_device_train_batch_size=32,
        response_length=12,
        temperature=1.0,
        lora_r=8,
        lora_last_k=2,  # the lower blocks run once a rollout, for every role
        learning_rate=1e-2,
        kl_coef=0.02,
    )
    # score_with_model=False: rewards come from elsewhere, so no reward model is held.
    models = build_method("hydra-ppo", model, lora=config, score_with_model=False)
    result = ppo.train(config, models, tokenizer, rows, reward_fn=wanted_share)
    models.save(folder / "ppo", base_model=str(model))  # actor/ and critic/ are PEFT folders
    scores = [metrics["objective/scores"] for metrics in result.metrics]
    print("scores:", " ".join(f"{score:.3f}" for score in scores))
    return scores


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/custom_reward"))
