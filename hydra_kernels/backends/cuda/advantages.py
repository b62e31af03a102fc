"""Rewards, advantages and their moments in one CUDA C++ launch: csrc/cuda/advantages.cu.

Two launches where rows are few and long, as in ``gae``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels.backends import extension, launch, registry
from hydra_kernels.backends.cuda.device import wrong_device
from hydra_kernels.backends.cuda.gae import segments
from hydra_kernels.backends.token_ops import ESTIMATORS, AdvantageInputs, addresses, float32_only


def fwd(inputs: AdvantageInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores, _, ref_logprobs, values, mask, kl_coef, estimator, _, gamma, lam, last_values = inputs
    rewards, advantages, returns = (torch.empty_like(values) for _ in range(3))
    if mask.numel() == 0:
        return rewards, advantages, returns, values.new_zeros(3, dtype=torch.float64)
    B, T = mask.shape
    tiles, num_segments = segments(B, T, mask.device.index)
    maps = values.new_empty((B, num_segments, 3)) if num_segments > 1 else None
    num_blocks = B * num_segments
    # One allocation for both: the result, and behind it the moments of each block. In this order,
    # since torch.compile takes for granted that a result begins where its storage does.
    scratch = values.new_empty(3 + num_blocks * 3, dtype=torch.float64)
    moments, partial = scratch[:3], scratch[3:]
    extension.module.advantages_fwd_cuda(  # type: ignore[union-attr]
        *addresses(scores, inputs.penalised, ref_logprobs, values, mask, last_values),
        B,
        T,
        kl_coef,
        ESTIMATORS.index(estimator),
        gamma,
        lam,
        tiles,
        *addresses(
            maps, rewards, advantages, returns, partial, launch.ticket(mask.device), moments
        ),
        mask.device.index,
        torch.cuda.current_stream(mask.device).cuda_stream,
    )
    return rewards, advantages, returns, moments


registry.register(
    "advantages",
    "cuda",
    registry.Kernel(fwd, None, float32_only(wrong_device), missing=extension.missing_cuda),
)
