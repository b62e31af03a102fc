"""Rewards, advantages and their moments in one C++ call: csrc/cpu/advantages.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.token_ops import (
    ESTIMATORS,
    AdvantageInputs,
    addresses,
    float32_only,
    on_cpu,
)


def fwd(inputs: AdvantageInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rewards, advantages, returns = (torch.empty_like(inputs.values) for _ in range(3))
    moments = inputs.values.new_empty(3, dtype=torch.float64)
    scores, _, ref_logprobs, values, mask, kl_coef, estimator, _, gamma, lam, last_values = inputs
    extension.module.advantages_fwd_cpu(  # type: ignore[union-attr]
        *addresses(scores, inputs.penalised, ref_logprobs, values, mask, last_values),
        *mask.shape,
        kl_coef,
        ESTIMATORS.index(estimator),
        gamma,
        lam,
        *addresses(rewards, advantages, returns, moments),
    )
    return rewards, advantages, returns, moments


registry.register(
    "advantages", "cpu", registry.Kernel(fwd, None, float32_only(on_cpu), missing=extension.missing)
)
