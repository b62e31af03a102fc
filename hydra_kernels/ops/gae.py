"""Generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_kernels import backends  # noqa: F401  registers the kernels
from hydra_kernels.backends import recording, registry
from hydra_kernels.backends.reference import gae as _reference  # noqa: F401  registers it
from hydra_kernels.backends.token_ops import state_dtype
from hydra_kernels.ops.token_tensors import (
    check_bool,
    check_same_device,
    check_shape,
    dense,
    in_unit_interval,
)

_OP = "gae"


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantage and return of each token, by one scan of every row from the right.

    ``A_t = delta_t + gamma * lam * A_t'`` with ``delta_t = r_t + gamma * V_t' - V_t``, where ``t'``
    is the next *counted* token: Schulman et al. 2015, arXiv:1506.02438, eq. 16, truncated at the
    last counted token. A masked position is not a step, wherever it is; nothing right of the last
    counted token is read.

    A constant of the update: no gradient flows through it, and inputs that ask for one are
    detached. By hand: rewards (1, 2), values (0.5, 1), gamma 1, lam 0.5 give
    ``A_2 = 2 - 1 = 1``, ``A_1 = 1 + 1 - 0.5 + 0.5 * 1 = 2``, and returns (2.5, 2).

    Args:
        rewards: (B, T).
        values: (B, T) value of the state in which each token was chosen.
        mask: (B, T) bool, True where the token counts; it may have holes. Elsewhere rewards and
            values may hold anything, NaN included.
        gamma: Discount of a step, in [0, 1].
        lam: Decay of the n-step estimates, in [0, 1]: 0 is the one-step error, 1 Monte Carlo.
        last_values: (B,) value of the state after the last counted token, for a sequence that was
            cut rather than finished (0 in a row that finished); None for 0 everywhere.
        backend: "cuda", "cpu", "triton" or "reference"; None for the first that can run these.

    Returns:
        advantages: (B, T), float32 (float64 if an input is), exactly 0 where masked.
        returns: the same, ``advantages + values``.

    Raises:
        ValueError: shapes or devices differ, mask is not bool, or gamma or lam is outside [0, 1].
        NotImplementedError: ``backend`` was named and cannot run these tensors.
    """
    if mask.dim() != 2:
        raise ValueError(f"{_OP}: mask must be (B, T), got {tuple(mask.shape)}")
    check_bool(_OP, mask=mask)
    check_shape(_OP, mask.shape, rewards=rewards, values=values)
    if last_values is not None:
        check_shape(_OP, mask.shape[:1], last_values=last_values)
    check_same_device(_OP, rewards=rewards, values=values, mask=mask, last_values=last_values)
    gamma, lam = in_unit_interval(_OP, gamma=gamma, lam=lam)

    rewards, values, last_values = map(dense, (rewards, values, last_values))
    mask = mask.contiguous()
    name = registry.select(_OP, backend, rewards, values, mask, last_values)
    run = _compiled if recording.watched() else _run
    return run(rewards, values, mask, gamma, lam, last_values, name)


def _run(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    last_values: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    fwd = registry.kernel(_OP, backend).fwd
    return fwd(rewards, values, mask, gamma, lam, last_values)


_compiled = torch.library.custom_op(f"hydra::{_OP}", _run, mutates_args=())


@_compiled.register_fake
def _(rewards, values, mask, gamma, lam, last_values, backend):
    dtype = state_dtype(rewards, values, last_values)
    return mask.new_empty(mask.shape, dtype=dtype), mask.new_empty(mask.shape, dtype=dtype)
