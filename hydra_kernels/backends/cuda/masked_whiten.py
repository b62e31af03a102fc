"""Whitening over a mask in CUDA C++: csrc/cuda/masked_whiten.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hydra_kernels.backends import extension, launch, registry
from hydra_kernels.backends.cuda.device import wrong_device
from hydra_kernels.backends.token_ops import WhitenKernel, addresses, float32_only


@functools.lru_cache(maxsize=1024)
def _num_blocks(length: int, device: int) -> int:
    return extension.module.masked_whiten_blocks_cuda(length, device)  # type: ignore[union-attr]


def moments(
    x: Tensor,  # float32, contiguous
    mask: Tensor,  # bool, contiguous
) -> Tensor:
    num_blocks = _num_blocks(x.numel(), x.device.index)
    # One allocation for both: the result, and behind it the moments of each block. In this order,
    # since torch.compile takes for granted that a result begins where its storage does.
    scratch = x.new_empty(3 + num_blocks * 3, dtype=torch.float64)
    out, partial = scratch[:3], scratch[3:]
    extension.module.masked_whiten_moments_cuda(  # type: ignore[union-attr]
        *addresses(x, mask),
        x.numel(),
        *addresses(partial, launch.ticket(x.device), out),
        num_blocks,
        x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return out


def fwd(
    x: Tensor,  # float32, contiguous
    mask: Tensor,  # bool, contiguous
    moments: Tensor,  # (3,) float64, contiguous
    shift_mean: bool,
) -> Tensor:
    out = torch.empty_like(x)
    extension.module.masked_whiten_fwd_cuda(  # type: ignore[union-attr]
        *addresses(x, mask),
        x.numel(),
        moments.data_ptr(),
        shift_mean,
        out.data_ptr(),
        _num_blocks(x.numel(), x.device.index),
        x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return out


registry.register(
    "masked_whiten",
    "cuda",
    WhitenKernel(
        fwd, None, float32_only(wrong_device), missing=extension.missing_cuda, moments=moments
    ),
)
