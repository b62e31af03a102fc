"""Rewards, advantages and their moments in one CUDA C++ launch: csrc/cuda/advantages.cu.

Two launches where rows are few and long, as in ``gae``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels.backends import extension, launch, registry
from hydra_kernels.backends.cuda.gae import segments
from hydra_kernels.backends.token_ops import ESTIMATORS, addresses


def unsupported(*tensors: Tensor | None) -> list[str]:
    return [
        *registry.wrong_device("cuda", *tensors),
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
    if mask.numel() == 0:
        return rewards, advantages, returns, values.new_zeros(3, dtype=torch.float64)
    B, T = mask.shape
    tiles, num_segments = segments(B, T, mask.device.index)
    maps = values.new_empty((B, num_segments, 3)) if num_segments > 1 else None
    num_blocks = B * num_segments
    # One allocation for both: the moments of each block, and behind them the result.
    scratch = values.new_empty(num_blocks * 3 + 3, dtype=torch.float64)
    moments = scratch[num_blocks * 3 :]
    first = kl if estimator == "exact" else logprobs
    extension.module.advantages_fwd_cuda(  # type: ignore[union-attr]
        *addresses(scores, first, ref_logprobs, values, mask, last_values),
        B,
        T,
        kl_coef,
        ESTIMATORS.index(estimator),
        gamma,
        lam,
        tiles,
        *addresses(
            maps, rewards, advantages, returns, scratch, launch.ticket(mask.device), moments
        ),
        mask.device.index,
        torch.cuda.current_stream(mask.device).cuda_stream,
    )
    return rewards, advantages, returns, moments


registry.register(
    "advantages", "cuda", registry.Kernel(fwd, None, unsupported, missing=extension.missing_cuda)
)
