"""Per-token rewards in CUDA C++: csrc/cuda/kl_rewards.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.cuda.device import wrong_device
from hydra_kernels.backends.token_ops import ESTIMATORS, addresses, float32_only


def fwd(
    scores: Tensor,  # (B,) float32, contiguous, as are all tensors below
    logprobs: Tensor | None,  # (B, T)
    ref_logprobs: Tensor | None,  # (B, T)
    mask: Tensor,  # (B, T) bool
    kl_coef: float,
    estimator: str,
    kl: Tensor | None,  # (B, T)
) -> Tensor:
    rewards = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    extension.module.kl_rewards_fwd_cuda(  # type: ignore[union-attr]
        *addresses(scores, kl if estimator == "exact" else logprobs, ref_logprobs, mask),
        *mask.shape,
        kl_coef,
        ESTIMATORS.index(estimator),
        rewards.data_ptr(),
        mask.device.index,
        torch.cuda.current_stream(mask.device).cuda_stream,
    )
    return rewards


registry.register(
    "kl_rewards",
    "cuda",
    registry.Kernel(fwd, None, float32_only(wrong_device), missing=extension.missing_cuda),
)
