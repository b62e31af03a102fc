"""Whitening over a mask in plain PyTorch: the definition every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels.backends import registry
from hydra_kernels.backends.token_ops import WhitenKernel, state_dtype

EPS = 1e-8  # TRL's, added to the variance


def masked_whiten_moments(x: Tensor, mask: Tensor) -> Tensor:
    counted = torch.where(mask, x.double(), 0.0)
    count = mask.sum(dtype=torch.float64)
    mean = counted.sum() / count.clamp(min=1.0)
    deviation = torch.where(mask, counted - mean, 0.0)
    return torch.stack((count, mean, deviation.square().sum()))


def masked_whiten_fwd(x: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool) -> Tensor:
    dtype = state_dtype(x)
    count, mean, m2 = moments.unbind()
    # one counted element has no unbiased variance; 0 leaves it at its mean
    variance = m2 / (count - 1.0).clamp(min=1.0)
    whitened = (x.double() - mean) * torch.rsqrt(variance + EPS)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0).to(dtype)


def _unsupported(*tensors: Tensor | None) -> list[str]:
    return []


registry.register(
    "masked_whiten",
    registry.REFERENCE,
    WhitenKernel(masked_whiten_fwd, None, _unsupported, moments=masked_whiten_moments),
)
