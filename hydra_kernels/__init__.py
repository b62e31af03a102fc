"""Fused kernels for LoRA fine-tuning and RLHF."""

from hydra_kernels.ops.linear_logprob import LinearLogprob, linear_logprob

__all__ = ["LinearLogprob", "linear_logprob"]
