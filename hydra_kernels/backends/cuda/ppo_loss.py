"""Clipped PPO loss in CUDA C++: csrc/cuda/ppo_loss.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hydra_kernels.backends import extension, launch, registry
from hydra_kernels.backends.token_ops import PPOKernel


def unsupported(*tensors: Tensor | None) -> list[str]:
    return [
        *registry.wrong_device("cuda", *tensors),
        *registry.wrong_dtype((torch.float32,), *tensors),
    ]


@functools.cache
def _num_blocks(num_tokens: int, device: int) -> int:
    return extension.module.ppo_loss_blocks_cuda(num_tokens, device)  # type: ignore[union-attr]


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
    """Returns stats (10,), d policy loss / d logprobs and d value loss / d values per token."""
    device = mask.device.index
    num_blocks = _num_blocks(mask.numel(), device)
    # One allocation for both: the sums of each block, and behind them the result.
    scratch = mask.new_empty(num_blocks * 9 + 10, dtype=torch.float32)
    stats = scratch[num_blocks * 9 :]
    dlogprobs = None if logprobs is None else torch.empty_like(logprobs)
    dvalues = None if values is None else torch.empty_like(values)
    inputs = (
        logprobs,
        values,
        old_logprobs,
        old_values,
        advantages,
        returns,
        entropy,
        kl,
        mask,
    )
    extension.module.ppo_loss_fwd_cuda(  # type: ignore[union-attr]
        *(0 if t is None else t.data_ptr() for t in inputs),
        mask.numel(),
        cliprange,
        cliprange_value,
        vf_coef,
        ent_coef,
        kl_coef,
        stats.data_ptr(),
        0 if dlogprobs is None else dlogprobs.data_ptr(),
        0 if dvalues is None else dvalues.data_ptr(),
        scratch.data_ptr(),
        launch.ticket(mask.device).data_ptr(),
        num_blocks,
        device,
        torch.cuda.current_stream(mask.device).cuda_stream,
    )
    return stats, dlogprobs, dvalues


registry.register(
    "ppo_loss", "cuda", PPOKernel(fwd, None, unsupported, missing=extension.missing_cuda)
)
