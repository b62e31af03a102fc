"""Per-token rewards in plain PyTorch: the definition every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels.backends import registry
from hydra_kernels.backends.token_ops import state_dtype

# exp(60) = 1e26 leaves float32 room for the coefficient and for a sum of tokens.
MAX_LOG_RATIO = 60.0


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Schulman's estimators of KL(policy || reference) from one sample of the policy."""
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    # k3 = (r - 1) - log r; expm1 keeps the digits of a ratio near 1
    return torch.expm1(log_ratio.clamp(max=MAX_LOG_RATIO)) - log_ratio


def last_counted(mask: Tensor) -> Tensor:
    """True at the last True of each row, nowhere in a row without one."""
    # cumsum from the right is 1 at the last counted token and at the masked ones left of it
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


def kl_rewards_fwd(
    scores: Tensor,  # (B,)
    logprobs: Tensor | None,  # (B, T)
    ref_logprobs: Tensor | None,  # (B, T)
    mask: Tensor,  # (B, T) bool
    kl_coef: float,
    estimator: str,
    kl: Tensor | None,  # (B, T)
) -> Tensor:
    dtype = state_dtype(scores, logprobs, ref_logprobs, kl)
    if estimator == "exact":
        estimate = kl.to(dtype)
    else:
        estimate = kl_estimate(logprobs.to(dtype), ref_logprobs.to(dtype), estimator)
    # where, not a product: masked positions may hold NaN
    rewards = torch.where(mask, -kl_coef * estimate, 0.0)
    return torch.where(last_counted(mask), rewards + scores.to(dtype)[:, None], rewards)


def _unsupported(*tensors: Tensor | None) -> list[str]:
    return []


registry.register(
    "kl_rewards", registry.REFERENCE, registry.Kernel(kl_rewards_fwd, None, _unsupported)
)
