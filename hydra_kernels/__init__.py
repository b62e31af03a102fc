"""Fused kernels for LoRA fine-tuning and RLHF."""

from hydra_kernels.backends.registry import available_backends
from hydra_kernels.ops.advantages import Advantages, advantages
from hydra_kernels.ops.gae import gae
from hydra_kernels.ops.kl_rewards import kl_rewards
from hydra_kernels.ops.linear_logprob import LinearLogprob, linear_logprob
from hydra_kernels.ops.lora_linear import lora_linear
from hydra_kernels.ops.masked_whiten import masked_whiten

__all__ = [
    "Advantages",
    "LinearLogprob",
    "advantages",
    "available_backends",
    "gae",
    "kl_rewards",
    "linear_logprob",
    "lora_linear",
    "masked_whiten",
]
