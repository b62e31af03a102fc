"""Generalised advantage estimation in C++: csrc/cpu/gae.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.token_ops import addresses, float32_only, on_cpu


def fwd(
    rewards: Tensor,  # (B, T) float32, contiguous, as are all tensors below
    values: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    gamma: float,
    lam: float,
    last_values: Tensor | None,  # (B,)
) -> tuple[Tensor, Tensor]:
    advantages = torch.empty_like(rewards)
    returns = torch.empty_like(rewards)
    extension.module.gae_fwd_cpu(  # type: ignore[union-attr]
        *addresses(rewards, values, mask, last_values),
        *mask.shape,
        gamma,
        lam,
        *addresses(advantages, returns),
    )
    return advantages, returns


registry.register(
    "gae", "cpu", registry.Kernel(fwd, None, float32_only(on_cpu), missing=extension.missing)
)
