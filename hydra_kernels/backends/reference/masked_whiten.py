"""Whitening over a mask in plain PyTorch: the definition every kernel is tested against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_kernels.backends import registry
from hydra_kernels.backends.state import state_dtype

EPS = 1e-8  # TRL's, added to the variance


@dataclass(frozen=True)
class WhitenKernel(registry.Kernel):
    """A kernel in two halves, so that the moments can be all-reduced between them.

    Attributes:
        moments: ``(x, mask)`` to a (3,) float64 tensor: the number of counted elements, their mean,
            and the sum of the squares of their deviations from it.
    """

    moments: Callable = None


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
