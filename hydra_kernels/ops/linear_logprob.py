"""Log-probability, entropy and exact KL of a linear head, without its logits in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hydra_kernels import backends  # noqa: F401  registers the kernels
from hydra_kernels.backends import recording, registry
from hydra_kernels.backends.cpu import linear_logprob as cpu
from hydra_kernels.backends.logprob_inputs import LogprobInputs, LogprobKept
from hydra_kernels.backends.reference import linear_logprob as reference
from hydra_kernels.ops.once import once

_OP = "linear_logprob"


class LinearLogprob(NamedTuple):
    """What :func:`linear_logprob` returns: float32 (float64 of that), shaped like ``targets``."""

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
    memory: str = "auto",
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
        memory: "recompute" makes the logits once more in backward; "save" keeps them, (M, V) in the
            dtype of hidden, which costs that memory and saves a product. In half precision "save"
            rounds them, in the forward too. "auto" saves where that is small and changes no bit:
            on a CPU in float32, whatever hidden is, of hidden and ref_hidden together at most a
            quarter of HYDRA_LOGPROB_BUDGET_MB (16 MiB by default), where D is 256 or more; else it
            recomputes.
        backend: "cuda", "cpu", "triton" or "reference"; None for the first that can run these.

    Returns:
        ``LinearLogprob(logprobs, entropy, logsumexp, ref_logprobs, kl)`` in nats, shaped like
        targets, float32 (float64 where hidden is); the last two are None without ref_hidden. kl is
        exactly 0, and so is its gradient, where ref_hidden equals hidden.

    Raises:
        ValueError: shapes, dtypes or values that do not fit.
        NotImplementedError: ``backend`` was named and cannot run these tensors.
    """
    if hidden.device.type != "meta" and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        ref_hidden = None if ref_hidden is None else ref_hidden.to(dtype)
    _check(hidden, weight, targets, bias, temperature, softcap, ref_hidden, ignore_index)

    if memory not in ("auto", "recompute", "save"):
        raise ValueError(
            f"{_OP}: memory must be 'recompute' or 'save', got {memory!r} ('auto' chooses)"
        )

    rows = hidden.reshape(-1, hidden.shape[-1])
    ref_rows = None if ref_hidden is None else ref_hidden.detach().reshape(rows.shape)
    flat_targets = targets.reshape(-1).long().contiguous()
    if not isinstance(temperature, Tensor):
        temperature = torch.full((), temperature, dtype=torch.float32, device=hidden.device)
    temperature = temperature.detach().reshape(())

    out: tuple[Tensor | None, ...]
    chosen = registry.select(_OP, backend, rows, weight, flat_targets, bias, ref_rows)
    if chosen == registry.REFERENCE:
        out = reference.linear_logprob(
            rows, weight, flat_targets, bias, temperature, softcap, ref_rows, ignore_index
        )
    else:
        args = (
            rows,
            weight,
            flat_targets,
            bias,
            temperature.float(),
            0.0 if softcap is None else float(softcap),
            ref_rows,
            ignore_index,
            _saved_as(memory, chosen, rows, weight, bias, ref_rows),
            chosen,
        )
        if recording.watched():
            out = torch.ops.hydra.linear_logprob_fwd(*args)[:5]
        else:
            out = _LinearLogprob.apply(*args)
        if ref_rows is None:
            out = (*out[:3], None, None)
    return LinearLogprob(*(None if t is None else t.reshape(targets.shape) for t in out))


def _saved_as(
    memory: str,
    chosen: str,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_rows: Tensor | None,
) -> torch.dtype | None:
    """What the logits are kept in until backward; None: they are made once more."""
    if memory == "recompute" or not torch.is_grad_enabled():
        return None
    if memory == "save":
        return rows.dtype
    differentiated = any(t is not None and t.requires_grad for t in (rows, weight, bias))
    saves = chosen == "cpu" and differentiated and cpu.saves_unasked(rows, weight, ref_rows)
    return torch.float32 if saves else None


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
    if targets.device.type == "cpu" and targets.numel() and recording.readable(targets):
        lowest, highest = targets.aminmax()
        if lowest >= 0 and highest < weight.shape[0]:
            return
        bad = targets[(targets != ignore_index) & ((targets < 0) | (targets >= weight.shape[0]))]
        if bad.numel():
            raise ValueError(
                f"{_OP}: targets must be in [0, {weight.shape[0]}) or {ignore_index}, "
                f"got {bad[0].item()}"
            )


def _fwd(inputs: LogprobInputs, save: torch.dtype | None, chosen: str) -> tuple[Tensor, ...]:
    """The five results; entropy and kl once more, norms, and the saved logits, empty where there
    are none."""
    results, norms, saved, ref_saved = registry.kernel(_OP, chosen).fwd(inputs, save)
    empty = norms.new_empty(0)
    return (
        # Copies: what is returned may not be a view of the rest.
        *(
            row.clone() if i < 3 or inputs.ref_hidden is not None else empty.clone()
            for i, row in enumerate(results.unbind(0))
        ),
        # Backward's own: a caller may change in place what is returned.
        results[1::3].clone(),
        norms,
        inputs.hidden.new_empty(0) if saved is None else saved,
        inputs.hidden.new_empty(0) if ref_saved is None else ref_saved,
    )


def _save(ctx, args: tuple, out: tuple[Tensor, ...]) -> None:
    inputs, save, chosen = LogprobInputs(*args[:8]), args[8], args[9]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], inputs.ref_hidden, *out[5:])
    ctx.rest = (inputs.softcap, inputs.ignore_index, save, chosen)


def _bwd_args(ctx, grads: tuple[Tensor | None, ...]) -> tuple | None:
    """The arguments of ``_bwd``; None where nothing has an upstream gradient."""
    *head, ref_hidden, means, norms, saved, ref_saved = ctx.saved_tensors
    # grads[3] is of the reference's log-probabilities, which are a constant; without a reference
    # grads[4] is of the empty tensor that stands for kl.
    upstream = (*grads[:3], None if ref_hidden is None else grads[4])
    if all(g is None for g in upstream):
        return None
    softcap, ignore_index, save, chosen = ctx.rest
    if upstream[3] is None:
        ref_hidden = None
    inputs = LogprobInputs(*head, softcap, ref_hidden, ignore_index)
    save_ref = save is not None and ref_hidden is not None
    kept = LogprobKept(
        *means, norms, None if save is None else saved, ref_saved if save_ref else None
    )
    need = ctx.needs_input_grad
    return (*upstream, *inputs, *kept, [need[0], need[1], need[3]], chosen)


def _bwd(*args) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias; the arguments are those of ``_BWD_SCHEMA``."""
    inputs, kept = LogprobInputs(*args[4:12]), LogprobKept(*args[12:17])
    wanted, chosen = args[17:]
    upstream = kept.norms.new_zeros(4, inputs.hidden.shape[0])
    for row, grad in zip(upstream, args[:4], strict=True):
        if grad is not None:
            row.copy_(grad)
    return registry.kernel(_OP, chosen).bwd(upstream, inputs, kept, tuple(wanted))


def _gradients_of_many(ctx, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Of hidden, weight and bias, by upstream gradients that stand for many: they have no address,
    so PyTorch's own operations make the results."""
    hidden, weight, targets, bias, temperature, ref_hidden = ctx.saved_tensors[:6]
    softcap, ignore_index = ctx.rest[:2]
    need = ctx.needs_input_grad
    leaves = [
        None if t is None else t.detach().requires_grad_(wanted)
        for t, wanted in zip((hidden, weight, bias), (need[0], need[1], need[3]), strict=True)
    ]
    with torch.enable_grad():
        rows, head, offset = leaves
        args = (targets, offset, temperature, softcap or None, ref_hidden, ignore_index)
        out = reference.linear_logprob(rows, head, *args)
    asked = [
        i for i, t in enumerate(out) if t is not None and t.requires_grad and grads[i] is not None
    ]
    found = iter(
        torch.autograd.grad(
            [out[i] for i in asked],
            [t for t in leaves if t is not None and t.requires_grad],
            [grads[i] for i in asked],
            allow_unused=True,
        )
    )
    return tuple(next(found) if t is not None and t.requires_grad else None for t in leaves)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        out = _fwd(LogprobInputs(*args[:8]), *args[8:])
        _save(ctx, args, out)
        ctx.mark_non_differentiable(out[3])
        return out[:5]

    @staticmethod
    def backward(ctx, *grads):
        with torch.no_grad():
            args = _bwd_args(ctx, grads)
            found: tuple[Tensor | None, ...]
            if args is None:
                found = (None,) * 3
            elif not torch.compiler.is_compiling() and recording.any_batched(grads):
                found = _gradients_of_many(ctx, grads)
            else:
                found = _bwd(*args)
        if args is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = once(_OP, found, (args[4], args[5], args[7], *grads))  # hidden, weight, bias
        dhidden, dweight, dbias = found
        return (dhidden, dweight, None, dbias, *(None,) * 6)


# The registered ops take what LogprobInputs and LogprobKept hold, one by one.
_INPUTS_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor temperature, "
    "float softcap, Tensor? ref_hidden, int ignore_index"
)
_KEPT_SCHEMA = "Tensor entropy, Tensor kl, Tensor norms, Tensor? saved, Tensor? ref_saved"
_UPSTREAM_SCHEMA = "Tensor? dlogprobs, Tensor? dentropy, Tensor? dlogsumexp, Tensor? dkl"
_FWD_SCHEMA = f"({_INPUTS_SCHEMA}, ScalarType? save, str chosen) -> ({', '.join(['Tensor'] * 9)})"
_BWD_SCHEMA = (
    f"({_UPSTREAM_SCHEMA}, {_INPUTS_SCHEMA}, {_KEPT_SCHEMA}, bool[] wanted, str chosen)"
    " -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("hydra::linear_logprob_fwd", mutates_args=(), schema=_FWD_SCHEMA)
def _fwd_op(*args):
    return _fwd(LogprobInputs(*args[:8]), *args[8:])


@_fwd_op.register_fake
def _(*args):
    inputs, save = LogprobInputs(*args[:8]), args[8]
    M, _, V = inputs.sizes
    has_ref = inputs.ref_hidden is not None
    row = inputs.hidden.new_empty(M, dtype=torch.float32)
    ref = row.new_empty(M if has_ref else 0)
    return (
        *(torch.empty_like(row) for _ in range(3)),
        ref,
        torch.empty_like(ref),
        row.new_empty(2, M),
        row.new_empty(4, M),
        *(
            inputs.hidden.new_empty((M, V) if kept else 0, dtype=save if kept else None)
            for kept in (save is not None, save is not None and has_ref)
        ),
    )


@torch.library.custom_op("hydra::linear_logprob_bwd", mutates_args=(), schema=_BWD_SCHEMA)
def _bwd_op(*args):
    # A registered op returns tensors only: an empty one stands for None.
    return tuple(args[4].new_empty(0) if t is None else t for t in _bwd(*args))


@_bwd_op.register_fake
def _(*args):
    hidden, weight, wanted = args[4], args[5], args[17]
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        hidden.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True)
    )


def _op_backward(ctx, *grads):
    args = _bwd_args(ctx, grads)
    none = (None,) * 3
    out = none if args is None else torch.ops.hydra.linear_logprob_bwd(*args)
    wanted = none if args is None else args[17]
    dhidden, dweight, dbias = (t if w else None for t, w in zip(out, wanted, strict=True))
    return (dhidden, dweight, None, dbias, *none, *none)


_fwd_op.register_autograd(
    _op_backward, setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output)
)
