"""Generalised advantage estimation in CUDA C++: csrc/cuda/gae.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.cuda.device import wrong_device
from hydra_kernels.backends.token_ops import addresses, float32_only


@functools.lru_cache(maxsize=1024)
def segments(B: int, T: int, device: int) -> tuple[int, int]:
    """Tiles of a segment, and segments of a row: more than one where rows are few and long."""
    module = extension.module
    tiles = max(1, module.gae_segment_tiles_cuda(B, T, device))  # type: ignore[union-attr]
    return tiles, max(1, module.gae_segments_cuda(T, tiles))  # type: ignore[union-attr]


def fwd(
    rewards: Tensor,  # (B, T) float32, contiguous, as are all tensors below
    values: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    gamma: float,
    lam: float,
    last_values: Tensor | None,  # (B,)
) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    B, T = mask.shape
    tiles, num_segments = segments(B, T, mask.device.index)
    maps = rewards.new_empty((B, num_segments, 3)) if num_segments > 1 else None
    extension.module.gae_fwd_cuda(  # type: ignore[union-attr]
        *addresses(rewards, values, mask, last_values),
        B,
        T,
        gamma,
        lam,
        tiles,
        *addresses(maps, advantages, returns),
        mask.device.index,
        torch.cuda.current_stream(mask.device).cuda_stream,
    )
    return advantages, returns


registry.register(
    "gae",
    "cuda",
    registry.Kernel(fwd, None, float32_only(wrong_device), missing=extension.missing_cuda),
)
