"""Clipped PPO loss in C++: csrc/cpu/ppo_loss.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.token_ops import PPOInputs, PPOKernel, addresses, float32_only, on_cpu


def fwd(inputs: PPOInputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns stats (10,), the gradient of policy_loss, and of ``(vf_coef or 1) * value_loss``."""
    stats = inputs.mask.new_empty(10, dtype=torch.float32)
    dlogprobs = None if inputs.logprobs is None else torch.empty_like(inputs.logprobs)
    dvalues = None if inputs.values is None else torch.empty_like(inputs.values)
    extension.module.ppo_loss_fwd_cpu(  # type: ignore[union-attr]
        *addresses(*inputs.tensors),
        inputs.mask.numel(),
        *inputs.coefs,
        inputs.vf_coef or 1.0,
        *addresses(stats, dlogprobs, dvalues),
    )
    return stats, dlogprobs, dvalues


registry.register(
    "ppo_loss",
    "cpu",
    PPOKernel(fwd, None, float32_only(on_cpu), missing=extension.missing, scaled=True),
)
