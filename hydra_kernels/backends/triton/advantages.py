"""Rewards, advantages and their moments by the Triton kernels of the three ops, one after another.

Fused on the CPU and in CUDA C++; here each step is its own launch.
"""

from __future__ import annotations

from torch import Tensor

from hydra_kernels.backends import registry
from hydra_kernels.backends.token_ops import AdvantageInputs, float32_only
from hydra_kernels.backends.triton import gae, kl_rewards, masked_whiten, runtime


def fwd(inputs: AdvantageInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores, logprobs, ref_logprobs, values, mask, kl_coef, estimator, kl, gamma, lam, last = inputs
    rewards = kl_rewards.fwd(scores, logprobs, ref_logprobs, mask, kl_coef, estimator, kl)
    advantages, returns = gae.fwd(rewards, values, mask, gamma, lam, last)
    return rewards, advantages, returns, masked_whiten.moments(advantages, mask)


registry.register(
    "advantages",
    "triton",
    registry.Kernel(fwd, None, float32_only(runtime.wrong_device), missing=runtime.missing),
)
