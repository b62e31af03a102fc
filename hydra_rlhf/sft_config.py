"""The settings of Hydra-SFT, and what its objectives have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hydra_rlhf.errors import UserError
from hydra_rlhf.settings import setting

REWARD_OBJECTIVES = ("hydra", "rm")
LIKELIHOOD_OBJECTIVES = ("dpo", "rrhf", "pro")
TEXT_OBJECTIVES = ("hydra", "sft", *LIKELIHOOD_OBJECTIVES)
TITLES = {
    "hydra": "Hydra-SFT",
    "sft": "SFT",
    "rm": "Reward model",
    "dpo": "DPO",
    "rrhf": "RRHF",
    "pro": "PRO",
    "raft": "RAFT",
}


@dataclass
class SFTConfig:
    """How Hydra-SFT trains."""

    _argument_group_name = "training"

    objective: Literal["hydra", "sft", "rm", "dpo", "rrhf", "pro", "raft"] = setting(
        "hydra",
        "hydra: both heads; sft: the causal head alone; rm: the reward head's loss alone; dpo, "
        "rrhf, pro: rankings of the pairs by their likelihood; raft: imitates the best of its own "
        "answers to the prompts. dpo and raft need --lora-r",
    )
    gamma: float = setting(0.1, "weight of the reward loss in the hydra objective")
    rm_loss: Literal["last", "diverged"] = setting(
        "last",
        "reward difference at the last token, or averaged over the tokens after the two differ",
    )
    beta: float = setting(
        0.1, "dpo: the pull towards the reference; pro: weight of the cross-entropy beside it"
    )
    center_rewards: float = setting(0.0, "weight of (r_w + r_l)^2, which keeps rewards around 0")
    use_margins: bool = setting(True, "subtract the pair's margin, where the data has one")
    mix: float | None = setting(
        None,
        "share of what is trained on that is --sft-data, in [0, 1): it is drawn from or repeated "
        "as that takes; each set once when not set",
    )
    learning_rate: float = setting(2e-5, "peak learning rate")
    head_learning_rate: float | None = setting(
        None, "peak learning rate of the reward head; that of the rest when not set"
    )
    weight_decay: float = setting(0.0, "AdamW weight decay, on matrices only")
    lr_scheduler: Literal["cosine", "linear", "constant"] = setting("cosine", "after warm-up")
    warmup_ratio: float = setting(0.05, "share of the steps that warm up from 0")
    max_grad_norm: float = setting(1.0, "gradient clipping; 0 for none")
    epochs: float = setting(1.0, "passes over the pairs")
    max_steps: int | None = setting(None, "stop after this many steps; overrides --epochs")
    batch_size: int = setting(32, "pairs per optimizer step, over all processes")
    micro_batch_size: int | None = setting(
        None, "pairs per forward on a process; the whole share of the batch when not set"
    )
    max_length: int | None = setting(
        None, "tokens of prompt and response; the model's context when not set"
    )
    group_by_length: bool = setting(True, "batch pairs of about the same length")
    packing: bool = setting(
        False,
        "lay a batch's rows end to end instead of padding them, none seeing another; the loss is "
        "that of the padded batch",
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in backward")
    lora_r: int = setting(0, "train LoRA of this rank, merged at the end; 0 trains all weights")
    lora_alpha: float | None = setting(None, "LoRA alpha; twice the rank when not set")
    lora_dropout: float = setting(0.0, "dropout in front of LoRA")
    eval_every: int = setting(0, "evaluate each n steps; 0 only at the end")
    eval_batch_size: int = setting(64, "pairs per forward in evaluation")
    save_steps: int = setting(0, "take a checkpoint every n steps; 0 only when stopped")
    save_total_limit: int | None = setting(None, "keep only the newest n checkpoints")
    max_bad_updates: int = setting(
        5,
        "updates in a row with a loss or gradient that is not finite before the run ends; those "
        "before it are skipped and counted in bad_updates",
    )
    num_samples: int = setting(8, "raft: answers a prompt, of which the best is imitated")
    response_length: int = setting(64, "raft: most tokens in an answer")
    temperature: float = setting(1.0, "raft: of sampling")
    seed: int = setting(0, "seed of the order of the data, of new weights and of dropout")

    def __post_init__(self) -> None:
        for name in (
            "gamma",
            "center_rewards",
            "weight_decay",
            "max_grad_norm",
            "lora_r",
            "beta",
            "save_steps",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in (
            "learning_rate",
            "epochs",
            "batch_size",
            "eval_batch_size",
            "max_bad_updates",
            "num_samples",
            "response_length",
            "temperature",
        ):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in (
            "max_steps",
            "micro_batch_size",
            "max_length",
            "head_learning_rate",
            "save_total_limit",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} must be above 0, got {value}")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"warmup_ratio must be in [0, 1), got {self.warmup_ratio}")
        if self.mix is not None and not 0 <= self.mix < 1:
            raise UserError(f"mix must be in [0, 1), got {self.mix}")
        if self.objective in ("dpo", "raft") and not self.lora_r:
            role = "reference" if self.objective == "dpo" else "reward model"
            raise UserError(
                f"objective {self.objective} needs lora_r: its {role} is the adapter off"
            )

    @property
    def sft_weight(self) -> float:
        """Weight of the chosen responses' cross-entropy in the objective."""
        return {"sft": 1.0, "hydra": 1.0, "rrhf": 1.0, "pro": self.beta}.get(self.objective, 0.0)
