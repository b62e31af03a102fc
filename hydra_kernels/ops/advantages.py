"""From scores and log-probabilities to whitened advantages and returns, in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hydra_kernels import backends  # noqa: F401  registers the kernels
from hydra_kernels.backends import recording, registry
from hydra_kernels.backends.reference import advantages as _reference  # noqa: F401  registers it
from hydra_kernels.backends.token_ops import AdvantageInputs, state_dtype
from hydra_kernels.ops.gae import gae
from hydra_kernels.ops.kl_rewards import check_kl_arguments, kl_rewards
from hydra_kernels.ops.masked_whiten import masked_whiten, reduced_moments, whiten_by
from hydra_kernels.ops.token_tensors import (
    check_same_device,
    check_shape,
    dense,
    finite,
    in_unit_interval,
)

_OP = "advantages"


class Advantages(NamedTuple):
    """What a PPO update takes from a rollout; each (B, T), exactly 0 where masked."""

    advantages: Tensor
    returns: Tensor
    rewards: Tensor


def advantages(
    scores: Tensor,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    kl: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,
    whiten: bool = True,
    whiten_rewards: bool = False,
    reduce: Callable[[Tensor], Tensor] | None = None,
    backend: str | None = None,
) -> Advantages:
    """:func:`kl_rewards`, :func:`gae` and :func:`masked_whiten` in one call, fused where it can be.

    Each row is read once for rewards, advantages, returns and the moments of the advantages; a
    second pass whitens. Returns are of the advantages before whitening, as in TRL. Constants of the
    update: no gradient flows through them, and inputs that ask for one are detached.

    Args:
        scores: (B,) reward of each whole sequence.
        logprobs: (B, T) log-probability, in nats, of each token under the policy that sampled.
        ref_logprobs: (B, T) the same under the reference policy.
        values: (B, T) value of the state in which each token was chosen.
        mask: (B, T) bool, True where the token counts; elsewhere inputs may hold anything.
        kl_coef: Weight of the KL penalty. A number: a compiled caller is compiled anew for another.
        estimator: "k1", "k2", "k3" or "exact", as in :func:`kl_rewards`.
        kl: (B, T) divergence of each token's distribution, for estimator "exact" only.
        gamma: Discount of a step, in [0, 1].
        lam: Decay of the n-step estimates, in [0, 1].
        last_values: (B,) value after the last counted token of a sequence that was cut.
        whiten: Whether the advantages get mean 0 and variance 1 over the mask.
        whiten_rewards: Whether the rewards are first scaled to variance 1, around their mean. They
            then need a pass of their own.
        reduce: Sums a (3,) tensor over processes, as in :func:`masked_whiten`.
        backend: "cuda", "cpu", "triton" or "reference"; None for the first that can run these.

    Returns:
        ``(advantages, returns, rewards)``, float32 (float64 if an input is).

    Raises:
        ValueError: as the three ops.
        NotImplementedError: ``backend`` was named and cannot run these tensors.
    """
    check_kl_arguments(_OP, scores, logprobs, ref_logprobs, mask, estimator, kl)
    check_shape(_OP, mask.shape, values=values)
    if last_values is not None:
        check_shape(_OP, mask.shape[:1], last_values=last_values)
    check_same_device(_OP, values=values, mask=mask, last_values=last_values)
    (kl_coef,) = finite(_OP, kl_coef=kl_coef)
    gamma, lam = in_unit_interval(_OP, gamma=gamma, lam=lam)
    if estimator == "exact":
        logprobs = ref_logprobs = None

    if whiten_rewards:
        rewards = kl_rewards(
            scores,
            logprobs,
            ref_logprobs,
            mask,
            kl_coef=kl_coef,
            estimator=estimator,
            kl=kl,
            backend=backend,
        )
        rewards = masked_whiten(rewards, mask, shift_mean=False, reduce=reduce, backend=backend)
        advantage, returns = gae(
            rewards, values, mask, gamma=gamma, lam=lam, last_values=last_values, backend=backend
        )
        if whiten:
            advantage = masked_whiten(advantage, mask, reduce=reduce, backend=backend)
        return Advantages(advantage, returns, rewards)

    scores, logprobs, ref_logprobs, values, kl, last_values = map(
        dense, (scores, logprobs, ref_logprobs, values, kl, last_values)
    )
    mask = mask.contiguous()
    name = registry.select(
        _OP, backend, scores, logprobs, ref_logprobs, values, mask, kl, last_values
    )
    run = torch.ops.hydra.advantages if recording.watched() else _run
    rewards, advantage, returns, moments = run(
        *AdvantageInputs(
            scores,
            logprobs,
            ref_logprobs,
            values,
            mask,
            kl_coef,
            estimator,
            kl,
            gamma,
            lam,
            last_values,
        ),
        name,
    )
    if whiten:
        if reduce is not None:
            moments = reduced_moments(moments, reduce)
        advantage = whiten_by(advantage, mask, moments, True, name)
    return Advantages(advantage, returns, rewards)


def _run(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of AdvantageInputs, and the backend."""
    return registry.kernel(_OP, args[-1]).fwd(AdvantageInputs(*args[:-1]))


_compiled = torch.library.custom_op(
    f"hydra::{_OP}",
    _run,
    mutates_args=(),
    schema="(Tensor scores, Tensor? logprobs, Tensor? ref_logprobs, Tensor values, Tensor mask, "
    "float kl_coef, str estimator, Tensor? kl, float gamma, float lam, Tensor? last_values, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_compiled.register_fake
def _(*args):
    inputs = AdvantageInputs(*args[:-1])
    dtype = state_dtype(*(t for t in inputs if isinstance(t, Tensor) and t is not inputs.mask))
    rows = [inputs.mask.new_empty(inputs.mask.shape, dtype=dtype) for _ in range(3)]
    return (*rows, inputs.mask.new_empty(3, dtype=torch.float64))
