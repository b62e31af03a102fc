"""Whitening over a mask in C++: csrc/cpu/masked_whiten.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.token_ops import WhitenKernel, addresses, float32_only, on_cpu


def moments(
    x: Tensor,  # float32, contiguous
    mask: Tensor,  # bool, contiguous
) -> Tensor:
    out = x.new_empty(3, dtype=torch.float64)
    extension.module.masked_whiten_moments_cpu(  # type: ignore[union-attr]
        *addresses(x, mask), x.numel(), out.data_ptr()
    )
    return out


def fwd(
    x: Tensor,  # float32, contiguous
    mask: Tensor,  # bool, contiguous
    moments: Tensor,  # (3,) float64, contiguous
    shift_mean: bool,
) -> Tensor:
    out = torch.empty_like(x)
    extension.module.masked_whiten_fwd_cpu(  # type: ignore[union-attr]
        *addresses(x, mask), x.numel(), moments.data_ptr(), shift_mean, out.data_ptr()
    )
    return out


registry.register(
    "masked_whiten",
    "cpu",
    WhitenKernel(fwd, None, float32_only(on_cpu), missing=extension.missing, moments=moments),
)
