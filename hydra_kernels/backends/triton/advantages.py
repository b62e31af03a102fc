"""Rewards, advantages and their moments by the Triton kernels of the three ops, one after another.

Fused on the CPU and in CUDA C++; here each step is its own launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels.backends import registry
from hydra_kernels.backends.token_ops import AdvantageInputs
from hydra_kernels.backends.triton import gae, kl_rewards, masked_whiten, runtime


def unsupported(*tensors: Tensor | None) -> list[str]:
    return [*runtime.wrong_device(*tensors), *registry.wrong_dtype((torch.float32,), *tensors)]


def fwd(inputs: AdvantageInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores, logprobs, ref_logprobs, values, mask, kl_coef, estimator, kl, gamma, lam, last = inputs
    rewards = kl_rewards.fwd(scores, logprobs, ref_logprobs, mask, kl_coef, estimator, kl)
    advantages, returns = gae.fwd(rewards, values, mask, gamma, lam, last)
    return rewards, advantages, returns, masked_whiten.moments(advantages, mask)


registry.register(
    "advantages", "triton", registry.Kernel(fwd, None, unsupported, missing=runtime.missing)
)
