"""Log-probability, entropy and exact KL of a linear head, without its logits in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hydra_kernels import backends  # noqa: F401  registers the kernels
from hydra_kernels.backends import registry
from hydra_kernels.backends.reference import linear_logprob as reference

_OP = "linear_logprob"


class LinearLogprob(NamedTuple):
    """What :func:`linear_logprob` returns; every tensor float32, shaped like ``targets``."""

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    ref_logprobs: Tensor | None
    kl: Tensor | None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> LinearLogprob:
    """Log-probability of each target, with the entropy and the KL of the whole distribution.

    Of ``z = cap(hidden W^T + bias) / temperature``, ``cap(x) = softcap tanh(x / softcap)``, and
    ``p = softmax(z)``, ``q = softmax(z_ref)``: ``log p[target]``, ``-sum p log p``,
    ``log sum exp z``, ``log q[target]`` and ``sum p (log p - log q)``, without ever holding z.
    The sums are taken in one pass (Milakov and Gimelshein 2018, arXiv:1805.02867, alg. 3).

    Differentiable once, in hidden, weight and bias, through logprobs, entropy, logsumexp and kl at
    once; the reference is a constant. Under autocast the matrix product takes autocast's dtype, as
    that of ``torch.nn.functional.linear`` does.

    Args:
        hidden: (..., D) input of the head. float32, float16 or bfloat16 (float64: the reference).
        weight: (V, D) as ``torch.nn.Linear`` stores it, in the dtype of hidden.
        targets: (...) integers in [0, V), or ignore_index. On a CPU a target outside of these is
            refused; on a GPU, where looking would be a synchronisation, its logprobs are NaN.
        bias: (V,), in the dtype of hidden.
        temperature: Above 0; a number or a tensor of one element. A tensor is read on its device
            at run time, so that a new value neither synchronises nor recompiles.
        softcap: Above 0 (Gemma 2: 30), None for none.
        ref_hidden: Like hidden: the input of the same head under the reference policy.
        ignore_index: Rows with this target give 0 and get no gradient, whatever they hold.
        backend: "cuda", "cpu", "triton" or "reference"; None for the first that can run these.

    Returns:
        ``LinearLogprob(logprobs, entropy, logsumexp, ref_logprobs, kl)``, float32 in nats, shaped
        like targets; the last two are None without ref_hidden. kl is exactly 0, and so is its
        gradient, where ref_hidden equals hidden.

    Raises:
        ValueError: shapes, dtypes or values that do not fit.
        NotImplementedError: ``backend`` was named and cannot run these tensors.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        ref_hidden = None if ref_hidden is None else ref_hidden.to(dtype)
    _check(hidden, weight, targets, bias, temperature, softcap, ref_hidden, ignore_index)

    if not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, dtype=torch.float32, device=hidden.device)
    temperature = temperature.detach().reshape(())
    rows = hidden.reshape(-1, hidden.shape[-1])
    ref_rows = None if ref_hidden is None else ref_hidden.detach().reshape(rows.shape)
    flat_targets = targets.reshape(-1).long()

    registry.select(_OP, backend, rows, weight, flat_targets, bias, temperature, ref_rows)
    out = reference.linear_logprob(
        rows, weight, flat_targets, bias, temperature, softcap, ref_rows, ignore_index
    )
    return LinearLogprob(*(None if t is None else t.reshape(targets.shape) for t in out))


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ref_hidden: Tensor | None,
    ignore_index: int,
) -> None:
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"{_OP}: weight must be (V, D), neither 0, got {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{_OP}: hidden must end in D = {weight.shape[1]}, as weight does, "
            f"got {tuple(hidden.shape)}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{_OP}: targets must be {tuple(hidden.shape[:-1])}, hidden's leading sizes, "
            f"got {tuple(targets.shape)}"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"{_OP}: targets must be integers, got {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{_OP}: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if ref_hidden is not None and ref_hidden.shape != hidden.shape:
        raise ValueError(
            f"{_OP}: ref_hidden must have hidden's shape {tuple(hidden.shape)}, "
            f"got {tuple(ref_hidden.shape)}"
        )
    given = {"hidden": hidden, "weight": weight, "bias": bias, "ref_hidden": ref_hidden}
    dtypes = {name: t.dtype for name, t in given.items() if t is not None}
    if len(set(dtypes.values())) != 1 or not hidden.is_floating_point():
        raise ValueError(
            f"{_OP}: needs one floating-point dtype, got "
            + ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        )
    devices = {t.device for t in (hidden, weight, targets, bias, ref_hidden) if t is not None}
    if isinstance(temperature, Tensor):
        devices.add(temperature.device)
        if temperature.numel() != 1 or not temperature.is_floating_point():
            raise ValueError(
                f"{_OP}: temperature must be a number or one floating-point element, "
                f"got {tuple(temperature.shape)} {temperature.dtype}"
            )
    elif not temperature > 0.0:
        raise ValueError(f"{_OP}: temperature must be above 0, got {temperature}")
    if len(devices) != 1:
        raise ValueError(
            f"{_OP}: tensors are on several devices: {', '.join(sorted(map(str, devices)))}"
        )
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"{_OP}: softcap must be above 0 or None, got {softcap}")
    if targets.device.type == "cpu" and targets.numel() and not torch.compiler.is_compiling():
        bad = targets[(targets != ignore_index) & ((targets < 0) | (targets >= weight.shape[0]))]
        if bad.numel():
            raise ValueError(
                f"{_OP}: targets must be in [0, {weight.shape[0]}) or {ignore_index}, "
                f"got {bad[0].item()}"
            )
