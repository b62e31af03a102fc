"""Per-token rewards in C++: csrc/cpu/kl_rewards.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.token_ops import ESTIMATORS, addresses, float32_only, on_cpu


def fwd(
    scores: Tensor,  # (B,) float32, contiguous, as are all tensors below
    logprobs: Tensor | None,  # (B, T)
    ref_logprobs: Tensor | None,  # (B, T)
    mask: Tensor,  # (B, T) bool
    kl_coef: float,
    estimator: str,
    kl: Tensor | None,  # (B, T)
) -> Tensor:
    rewards = torch.empty_like(mask, dtype=torch.float32)
    extension.module.kl_rewards_fwd_cpu(  # type: ignore[union-attr]
        *addresses(scores, kl if estimator == "exact" else logprobs, ref_logprobs, mask),
        *mask.shape,
        kl_coef,
        ESTIMATORS.index(estimator),
        rewards.data_ptr(),
    )
    return rewards


registry.register(
    "kl_rewards", "cpu", registry.Kernel(fwd, None, float32_only(on_cpu), missing=extension.missing)
)
