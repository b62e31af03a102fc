"""Rewards, advantages and the moments to whiten them by, in plain PyTorch: one op after another."""

from __future__ import annotations

from torch import Tensor

from hydra_kernels.backends import registry
from hydra_kernels.backends.reference.gae import gae_fwd
from hydra_kernels.backends.reference.kl_rewards import kl_rewards_fwd
from hydra_kernels.backends.reference.masked_whiten import masked_whiten_moments
from hydra_kernels.backends.token_ops import AdvantageInputs, state_dtype


def advantages_fwd(inputs: AdvantageInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores, logprobs, ref_logprobs, values, mask, kl_coef, estimator, kl, gamma, lam, last = inputs
    dtype = state_dtype(scores, logprobs, ref_logprobs, values, kl, last)
    rewards = kl_rewards_fwd(scores, logprobs, ref_logprobs, mask, kl_coef, estimator, kl).to(dtype)
    advantages, returns = gae_fwd(rewards, values, mask, gamma, lam, last)
    return rewards, advantages, returns, masked_whiten_moments(advantages, mask)


def _unsupported(*tensors: Tensor | None) -> list[str]:
    return []


registry.register(
    "advantages", registry.REFERENCE, registry.Kernel(advantages_fwd, None, _unsupported)
)
