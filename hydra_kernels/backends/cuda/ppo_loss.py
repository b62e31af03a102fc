"""Clipped PPO loss in CUDA C++: csrc/cuda/ppo_loss.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hydra_kernels.backends import extension, launch, registry
from hydra_kernels.backends.cuda.device import wrong_device
from hydra_kernels.backends.token_ops import PPOInputs, PPOKernel, addresses, float32_only


@functools.cache
def _num_blocks(num_tokens: int, device: int) -> int:
    return extension.module.ppo_loss_blocks_cuda(num_tokens, device)  # type: ignore[union-attr]


def fwd(inputs: PPOInputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns stats (10,), d policy loss / d logprobs and d value loss / d values per token."""
    mask = inputs.mask
    device = mask.device.index
    num_blocks = _num_blocks(mask.numel(), device)
    # One allocation for both: the result, and behind it the sums of each block. In this order,
    # since torch.compile takes for granted that a result begins where its storage does.
    scratch = mask.new_empty(10 + num_blocks * 9, dtype=torch.float32)
    stats, partial = scratch[:10], scratch[10:]
    dlogprobs = None if inputs.logprobs is None else torch.empty_like(inputs.logprobs)
    dvalues = None if inputs.values is None else torch.empty_like(inputs.values)
    extension.module.ppo_loss_fwd_cuda(  # type: ignore[union-attr]
        *addresses(*inputs.tensors),
        mask.numel(),
        *inputs.coefs,
        *addresses(stats, dlogprobs, dvalues, partial, launch.ticket(mask.device)),
        num_blocks,
        device,
        torch.cuda.current_stream(mask.device).cuda_stream,
    )
    return stats, dlogprobs, dvalues


registry.register(
    "ppo_loss",
    "cuda",
    PPOKernel(fwd, None, float32_only(wrong_device), missing=extension.missing_cuda),
)
