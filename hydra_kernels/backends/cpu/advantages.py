"""Rewards, advantages and their moments in one C++ call: csrc/cpu/advantages.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.token_ops import ESTIMATORS, addresses


def unsupported(*tensors: Tensor | None) -> list[str]:
    return [
        *registry.wrong_device("cpu", *tensors),
        *registry.wrong_dtype((torch.float32,), *tensors),
    ]


def fwd(
    scores: Tensor,  # (B,) float32, contiguous, as are all tensors below
    logprobs: Tensor | None,  # (B, T)
    ref_logprobs: Tensor | None,  # (B, T)
    values: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    kl_coef: float,
    estimator: str,
    kl: Tensor | None,  # (B, T)
    gamma: float,
    lam: float,
    last_values: Tensor | None,  # (B,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rewards, advantages, returns = (torch.empty_like(values) for _ in range(3))
    moments = torch.empty(3, dtype=torch.float64)
    first = kl if estimator == "exact" else logprobs
    extension.module.advantages_fwd_cpu(  # type: ignore[union-attr]
        *addresses(scores, first, ref_logprobs, values, mask, last_values),
        *mask.shape,
        kl_coef,
        ESTIMATORS.index(estimator),
        gamma,
        lam,
        *addresses(rewards, advantages, returns, moments),
    )
    return rewards, advantages, returns, moments


registry.register(
    "advantages", "cpu", registry.Kernel(fwd, None, unsupported, missing=extension.missing)
)
