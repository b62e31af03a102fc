"""Generalised advantage estimation in plain PyTorch: the definition every kernel is tested against.

One step a token, from the right; the kernels run the same recurrence as a scan of affine maps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels.backends import registry
from hydra_kernels.backends.token_ops import state_dtype


def gae_fwd(
    rewards: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    gamma: float,
    lam: float,
    last_values: Tensor | None,  # (B,)
) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(rewards, values, last_values)
    rewards = torch.where(mask, rewards.to(dtype), 0.0)
    values = torch.where(mask, values.to(dtype), 0.0)

    B, T = mask.shape
    next_advantage = rewards.new_zeros(B)
    next_value = rewards.new_zeros(B) if last_values is None else last_values.to(dtype)
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(T)):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        counts = mask[:, t]
        # a masked position is not a step: what is right of it stays the next of what is left of it
        next_advantage = torch.where(counts, advantage, next_advantage)
        next_value = torch.where(counts, values[:, t], next_value)
        advantages[:, t] = torch.where(counts, advantage, 0.0)
    return advantages, advantages + values


def _unsupported(*tensors: Tensor | None) -> list[str]:
    return []


registry.register("gae", registry.REFERENCE, registry.Kernel(gae_fwd, None, _unsupported))
