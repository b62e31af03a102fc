"""Whitening over a mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hydra_kernels import backends  # noqa: F401  registers the kernels
from hydra_kernels.backends import recording, registry
from hydra_kernels.backends.reference import masked_whiten as _reference  # noqa: F401  registers
from hydra_kernels.backends.token_ops import state_dtype
from hydra_kernels.ops.token_tensors import check_bool, check_same_device, check_shape, dense

_OP = "masked_whiten"


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    reduce: Callable[[Tensor], Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Counted elements scaled to unit variance and, with ``shift_mean``, moved to zero mean.

    ``(x - mean) / sqrt(var + 1e-8)``, plus ``mean`` again unless ``shift_mean``; mean and unbiased
    variance over the counted elements of the whole tensor, as TRL's ``masked_whiten``. A single
    counted element, which has no unbiased variance, counts as variance 0.

    A constant of the update: no gradient flows through it, and inputs that ask for one are
    detached. By hand: (1, 3) has mean 2 and variance 2, and gives (-0.7071, 0.7071), or with
    ``shift_mean=False`` (1.2929, 2.7071).

    Args:
        x: Any shape. May hold anything, NaN included, where masked.
        mask: The shape of ``x``, bool, True where the element counts.
        shift_mean: Whether the result has mean 0 rather than that of ``x``.
        reduce: Sums a tensor over the processes that share the batch, for instance ``lambda t:
            accelerator.reduce(t, "sum")``; called once with three numbers, a (3,) float64 tensor on
            ``x``'s device: count, sum and sum of squares. None whitens over this process alone.
        backend: "cuda", "cpu", "triton" or "reference"; None for the first that can run these.

    Returns:
        The shape of ``x``, float32 (float64 if ``x`` is), exactly 0 where masked.

    Raises:
        ValueError: shapes or devices differ, or mask is not bool.
        NotImplementedError: ``backend`` was named and cannot run these tensors.
    """
    check_bool(_OP, mask=mask)
    check_shape(_OP, mask.shape, x=x)
    check_same_device(_OP, x=x, mask=mask)
    x, mask = dense(x), mask.contiguous()
    name = registry.select(_OP, backend, x, mask)

    moments_of = _compiled_moments if recording.watched() else _run_moments
    moments = moments_of(x, mask, name)
    if reduce is not None:
        moments = reduced_moments(moments, reduce)
    return whiten_by(x, mask, moments, shift_mean, name)


def whiten_by(x: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool, backend: str) -> Tensor:
    """Whitens by moments that are already known."""
    run = _compiled if recording.watched() else _run
    return run(x, mask, moments, shift_mean, backend)


def reduced_moments(moments: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """The (3,) moments (count, mean, sum of squared deviations) of every process's elements."""
    count, mean, m2 = moments.unbind()
    # Sums add up over processes, moments about differing means do not. In float64 the difference
    # below keeps 8 digits for a mean 10^4 standard deviations from zero.
    sums = reduce(torch.stack((count, count * mean, m2 + count * mean * mean)))
    total, linear, square = sums.to(moments).unbind()
    mean = linear / total.clamp(min=1.0)
    return torch.stack((total, mean, (square - linear * mean).clamp(min=0.0)))


def _run_moments(x: Tensor, mask: Tensor, backend: str) -> Tensor:
    return registry.kernel(_OP, backend).moments(x, mask)  # type: ignore[attr-defined]


def _run(x: Tensor, mask: Tensor, moments: Tensor, shift_mean: bool, backend: str) -> Tensor:
    return registry.kernel(_OP, backend).fwd(x, mask, moments, shift_mean)


_compiled_moments = torch.library.custom_op(f"hydra::{_OP}_moments", _run_moments, mutates_args=())
_compiled = torch.library.custom_op(f"hydra::{_OP}", _run, mutates_args=())


@_compiled_moments.register_fake
def _(x, mask, backend):
    return x.new_empty(3, dtype=torch.float64)


@_compiled.register_fake
def _(x, mask, moments, shift_mean, backend):
    return x.new_empty(x.shape, dtype=state_dtype(x))
