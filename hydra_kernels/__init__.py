"""Fused kernels for LoRA fine-tuning and RLHF, each with a plain PyTorch reference."""

from hydra_kernels.backends.registry import available_backends
from hydra_kernels.ops.advantages import Advantages, advantages
from hydra_kernels.ops.gae import gae
from hydra_kernels.ops.kl_rewards import kl_rewards
from hydra_kernels.ops.linear_logprob import LinearLogprob, linear_logprob
from hydra_kernels.ops.lora_linear import Projection, lora_linear, lora_linear_group
from hydra_kernels.ops.masked_whiten import masked_whiten
from hydra_kernels.ops.ppo_loss import PPOLoss, ppo_loss

__all__ = [
    "Advantages",
    "LinearLogprob",
    "PPOLoss",
    "Projection",
    "advantages",
    "available_backends",
    "gae",
    "kl_rewards",
    "linear_logprob",
    "lora_linear",
    "lora_linear_group",
    "masked_whiten",
    "ppo_loss",
]
