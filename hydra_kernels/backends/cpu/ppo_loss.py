"""Clipped PPO loss in C++: csrc/cpu/ppo_loss.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.token_ops import PPOKernel, addresses


def unsupported(*tensors: Tensor | None) -> list[str]:
    return [
        *registry.wrong_device("cpu", *tensors),
        *registry.wrong_dtype((torch.float32,), *tensors),
    ]


def fwd(
    logprobs: Tensor | None,  # (B, T) float32, contiguous, as are all tensors below
    values: Tensor | None,
    old_logprobs: Tensor | None,
    old_values: Tensor | None,
    advantages: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    kl: Tensor | None,
    mask: Tensor,  # bool
    cliprange: float,
    cliprange_value: float,
    vf_coef: float,
    ent_coef: float,
    kl_coef: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns stats (10,), the gradient of policy_loss, and of ``(vf_coef or 1) * value_loss``."""
    stats = torch.empty(10, dtype=torch.float32)
    dlogprobs = None if logprobs is None else torch.empty_like(logprobs)
    dvalues = None if values is None else torch.empty_like(values)
    tensors = (logprobs, values, old_logprobs, old_values, advantages, returns, entropy, kl)
    extension.module.ppo_loss_fwd_cpu(  # type: ignore[union-attr]
        *addresses(*tensors),
        mask.data_ptr(),
        mask.numel(),
        cliprange,
        cliprange_value,
        vf_coef,
        ent_coef,
        kl_coef,
        vf_coef or 1.0,
        stats.data_ptr(),
        *addresses(dlogprobs, dvalues),
    )
    return stats, dlogprobs, dvalues


registry.register(
    "ppo_loss",
    "cpu",
    PPOKernel(fwd, None, unsupported, missing=extension.missing, scaled=True),
)
