"""Per-token rewards of RLHF: a KL penalty on every token and the score on the last."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels import backends  # noqa: F401  registers the kernels
from hydra_kernels.backends import recording, registry
from hydra_kernels.backends.reference import kl_rewards as _reference  # noqa: F401  registers it
from hydra_kernels.backends.token_ops import ESTIMATORS, state_dtype
from hydra_kernels.ops.token_tensors import (
    check_bool,
    check_same_device,
    check_shape,
    dense,
    finite,
)

_OP = "kl_rewards"


def check_kl_arguments(
    op: str,
    scores: Tensor,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    estimator: str,
    kl: Tensor | None,
) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"{op}: estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}"
        )
    if mask.dim() != 2:
        raise ValueError(f"{op}: mask must be (B, T), got {tuple(mask.shape)}")
    check_bool(op, mask=mask)
    check_shape(op, mask.shape[:1], scores=scores)
    if estimator == "exact":
        if kl is None:
            raise ValueError(f"{op}: estimator 'exact' needs kl, the divergence of each token")
        check_shape(op, mask.shape, kl=kl)
        check_same_device(op, scores=scores, mask=mask, kl=kl)
        return
    if kl is not None:
        raise ValueError(f"{op}: kl is read only by estimator 'exact', got {estimator!r}")
    if logprobs is None or ref_logprobs is None:
        raise ValueError(f"{op}: estimator {estimator!r} needs logprobs and ref_logprobs")
    check_shape(op, mask.shape, logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_same_device(op, scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)


def kl_rewards(
    scores: Tensor,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    kl: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Reward of each token: minus the KL penalty, plus the sequence's score on its last token.

    ``-kl_coef * KL_t + scores * [t is the last counted token]``, with Schulman's estimators of
    KL(policy || reference) from the sampled token ("Approximating KL Divergence", 2020), where
    ``r = exp(ref_logprobs - logprobs)``: ``k1 = -log r``, ``k2 = (log r)^2 / 2``,
    ``k3 = r - 1 - log r`` (``r`` saturates at e^60, so that finite inputs give finite rewards).

    A constant of the update: no gradient flows through it, and inputs that ask for one are
    detached. By hand: one token with ``logprobs`` -1, ``ref_logprobs`` -3, score 5, ``kl_coef`` 0.5
    gives ``5 - 0.5 * 2 = 4`` with k1.

    Args:
        scores: (B,) reward of each whole sequence. Not read where a row has no counted token.
        logprobs: (B, T) log-probability, in nats, of each sampled token under the policy that
            sampled; None is allowed with estimator "exact".
        ref_logprobs: (B, T) the same under the reference policy.
        mask: (B, T) bool, True where the token counts; it may have holes. Elsewhere inputs may hold
            anything, NaN included.
        kl_coef: Weight of the penalty. A number: a compiled caller is compiled anew for another.
        estimator: "k1", "k2", "k3", or "exact", which takes ``kl`` as it is.
        kl: (B, T) KL divergence of each token's distribution, for estimator "exact" only.
        backend: "cuda", "cpu", "triton" or "reference"; None for the first that can run these.

    Returns:
        (B, T) rewards, float32 (float64 if an input is), exactly 0 where masked.

    Raises:
        ValueError: shapes or devices differ, mask is not bool, kl_coef is not finite, or the
            estimator is unknown, lacks an input or has one it does not read.
        NotImplementedError: ``backend`` was named and cannot run these tensors.
    """
    check_kl_arguments(_OP, scores, logprobs, ref_logprobs, mask, estimator, kl)
    (kl_coef,) = finite(_OP, kl_coef=kl_coef)
    if estimator == "exact":
        logprobs = ref_logprobs = None
    scores, logprobs, ref_logprobs, kl = map(dense, (scores, logprobs, ref_logprobs, kl))
    mask = mask.contiguous()
    name = registry.select(_OP, backend, scores, logprobs, ref_logprobs, mask, kl)
    run = _compiled if recording.watched() else _run
    return run(scores, logprobs, ref_logprobs, mask, kl_coef, estimator, kl, name)


def _run(
    scores: Tensor,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    kl_coef: float,
    estimator: str,
    kl: Tensor | None,
    backend: str,
) -> Tensor:
    fwd = registry.kernel(_OP, backend).fwd
    return fwd(scores, logprobs, ref_logprobs, mask, kl_coef, estimator, kl)


_compiled = torch.library.custom_op(f"hydra::{_OP}", _run, mutates_args=())


@_compiled.register_fake
def _(scores, logprobs, ref_logprobs, mask, kl_coef, estimator, kl, backend):
    dtype = state_dtype(scores, logprobs, ref_logprobs, kl)
    return mask.new_empty(mask.shape, dtype=dtype)
