"""LoRA linear layers forward and backward by a chosen backend: eager and under torch.compile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_kernels.backends import recording, registry
from hydra_kernels.backends.lora_plan import Plan, saves_s
from hydra_kernels.backends.reference import lora_linear as reference
from hydra_kernels.ops.once import once

_OP = "lora_linear"


def run(
    chosen: str,
    plan: Plan,
    x: Tensor,
    adapter_ids: Tensor | None,
    seed: Tensor | None,
    tensors: tuple[Tensor | None, ...],  # weights, biases, lora_a, lora_b
) -> tuple[Tensor, ...]:
    traced = recording.watched()
    dtype: torch.dtype | None = None
    if traced or torch._C._is_any_autocast_enabled():
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # As F.linear: all of it in autocast's dtype.
            dtype = torch.get_autocast_dtype(device)
            base = 2 * len(plan.counts)
            tensors = (*(t if t is None else t.to(dtype) for t in tensors[:base]), *tensors[base:])
    if traced:
        p, n = len(plan.counts), len(plan.owners)
        x, tensors = _cast(dtype, plan, x, tensors)
        ys, _ = torch.ops.hydra.lora_linear_fwd(
            x,
            list(tensors[:p]),
            [t for t in tensors[p : 2 * p] if t is not None],
            list(tensors[2 * p : 2 * p + n]),
            list(tensors[2 * p + n :]),
            [t is not None for t in tensors[p : 2 * p]],
            *(list(field) for field in plan[:3]),
            plan.num_adapters,
            plan.dropout,
            adapter_ids,
            seed,
            chosen,
        )
        return tuple(ys)
    if torch.is_grad_enabled():
        # What Function.apply calls in the end, without the 5 us of asking about torch.func's
        # transforms, which the choice of the backend has asked about.
        return _apply(chosen, plan, adapter_ids, seed, dtype, x, *tensors)
    x, tensors = _cast(dtype, plan, x, tensors)
    return _forward(chosen, plan, adapter_ids, seed, x, tensors)[0]


def run_eager(
    chosen: str,
    plan: Plan,
    x: Tensor,
    adapter_ids: Tensor | None,
    seed: Tensor | None,
    tensors: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    """:func:`run` where ``recording.eager()`` holds."""
    if torch._C._is_any_autocast_enabled():
        return run(chosen, plan, x, adapter_ids, seed, tensors)
    if torch.is_grad_enabled():
        return _apply(chosen, plan, adapter_ids, seed, None, x, *tensors)
    return _forward(chosen, plan, adapter_ids, seed, x, tensors)[0]


def _cast(
    dtype: torch.dtype | None, plan: Plan, x: Tensor, tensors: tuple[Tensor | None, ...]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """x and the adapters in autocast's ``dtype``, in which the weights and biases are already."""
    if dtype is None:
        return x, tensors
    base = 2 * len(plan.counts)
    adapters = (t if t is None else t.to(dtype) for t in tensors[base:])
    return x.to(dtype), (*tensors[:base], *adapters)


def _unpack(plan: Plan, tensors: Sequence[Tensor | None]) -> tuple[Sequence, ...]:
    """The weights, biases, lora_a and lora_b."""
    if len(tensors) == 4:
        return tensors[:1], tensors[1:2], tensors[2:3], tensors[3:]
    p, n = len(plan.counts), len(plan.owners)
    return (
        tensors[:p],
        tensors[p : 2 * p],
        tensors[2 * p : 2 * p + n],
        tensors[2 * p + n :],
    )


def _forward(
    chosen: str,
    plan: Plan,
    adapter_ids: Tensor | None,
    seed: Tensor | None,
    x: Tensor,
    tensors: Sequence[Tensor | None],
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    kernel = registry.kernel(_OP, chosen)
    if x.dim() == 2:
        ys, s = kernel.fwd(x, *_unpack(plan, tensors), plan, adapter_ids, seed)
        return tuple(ys), s
    leading = x.shape[:-1]
    rows = x.reshape(leading.numel(), x.shape[-1])
    ys, s = kernel.fwd(rows, *_unpack(plan, tensors), plan, adapter_ids, seed)
    return tuple(y.view(leading + y.shape[1:]) for y in ys), s


def _backward(
    chosen: str,
    plan: Plan,
    adapter_ids: Tensor | None,
    seed: Tensor | None,
    x: Tensor,
    s: Tensor | None,
    tensors: Sequence[Tensor | None],
    dys: Sequence[Tensor | None],
    need: Sequence[bool],  # of x and of the tensors
) -> tuple[Tensor | None, list[Tensor | None]]:
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    flat = [
        dy if dy is None or dy.dim() == 2 else dy.reshape(rows.shape[0], dy.shape[-1]) for dy in dys
    ]
    weights, _, a, b = _unpack(plan, tensors)
    need_w, need_bias, need_a, need_b = _unpack(plan, need[1:])
    dx, das, dbs = registry.kernel(_OP, chosen).bwd(
        flat, rows, s, weights, a, b, plan, adapter_ids, seed, need[0], True in need_a,
        True in need_b,
    )  # fmt: skip
    grads: list[Tensor | None] = [None] * (2 * len(flat))
    if True in need_w or True in need_bias:
        for p, dy in enumerate(flat):
            if dy is not None and need_w[p]:
                grads[p] = torch.mm(dy.t(), rows)
            if dy is not None and need_bias[p]:
                grads[len(flat) + p] = dy.sum(0)
    grads += das
    grads += dbs
    if dx is not None and dx.shape != x.shape:
        dx = dx.view(x.shape)
    return dx, grads


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen, plan, adapter_ids, seed, dtype, x, *tensors):
        ys, s = _forward(chosen, plan, adapter_ids, seed, *_cast(dtype, plan, x, tensors))
        if x.dim() != 2:  # autograd refuses in-place changes of a function's outputs that are views
            ys = tuple(y.detach() for y in ys)
        ctx.set_materialize_grads(False)
        p = len(plan.counts)
        # As they came, which others hold too: a copy in autocast's dtype is made again in backward.
        ctx.save_for_backward(x, s, adapter_ids, seed, *tensors[:p], *tensors[2 * p :])
        ctx.plan, ctx.chosen, ctx.dtype = plan, chosen, dtype
        return ys

    @staticmethod
    def backward(ctx, *dys):
        saved = ctx.saved_tensors
        compiling = torch.compiler.is_compiling()
        many = not compiling and recording.any_batched(dys)
        gradients = _gradients_of_many if many else _gradients
        if not torch.is_grad_enabled() or compiling:
            return (None, None, None, None, None, *gradients(ctx, saved, dys))
        with torch.no_grad():
            found = gradients(ctx, saved, dys)
        return (None, None, None, None, None, *once(_OP, found, (saved[0], *saved[4:], *dys)))


def _gradients(
    ctx, saved: tuple, dys: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:  # of x and of the tensors
    x, s, adapter_ids, seed, *rest = saved
    need = ctx.needs_input_grad[5:]
    p = len(dys)
    tensors = (*rest[:p], *(None,) * p, *rest[p:])
    unread = [i for i in range(p) if dys[i] is None]  # not count(), which compares tensors
    if len(unread) == p:
        return (None,) * (1 + len(tensors))
    x, tensors = _cast(ctx.dtype, ctx.plan, x, tensors)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            dx, grads = _backward(ctx.chosen, ctx.plan, adapter_ids, seed, x, s, tensors, dys, need)
    else:
        dx, grads = _backward(ctx.chosen, ctx.plan, adapter_ids, seed, x, s, tensors, dys, need)
    if unread:
        unused = [dy is None for dy, n in zip(dys, ctx.plan.counts, strict=True) for _ in range(n)]
        for i, none in enumerate((*unused, *unused), start=2 * p):
            grads[i] = None if none else grads[i]
    return (dx, *grads)


def _gradients_of_many(
    ctx, saved: tuple, dys: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """:func:`_gradients` of upstream gradients that stand for many, which have no address."""
    plan: Plan = ctx.plan
    p = len(dys)
    x, _, adapter_ids, seed, *rest = saved
    biases = [weight.new_zeros(weight.shape[0]) for weight in rest[:p]]  # constants in a gradient
    need = ctx.needs_input_grad[5:]
    leaves = [
        t.detach().requires_grad_(wanted)
        for t, wanted in zip((x, *rest[:p], *biases, *rest[p:]), need, strict=True)
    ]
    with torch.enable_grad():
        cast = leaves if ctx.dtype is None else [t.to(ctx.dtype) for t in leaves]
        weights, added, a, b = _unpack(plan, cast[1:])
        ys, first = [], 0
        for weight, bias, count in zip(weights, added, plan.counts, strict=True):
            own = slice(first, first + count)
            args = (a[own], b[own], plan.scales[own], plan.owners[own], adapter_ids)
            ys.append(reference.lora_linear(cast[0], weight, bias, *args, plan.dropout, seed))
            first += count
    outputs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None]
    found = iter(
        torch.autograd.grad(
            [y for y, _ in outputs],
            [t for t in leaves if t.requires_grad],
            [dy for _, dy in outputs],
            allow_unused=True,
        )
    )
    return tuple(next(found) if t.requires_grad else None for t in leaves)


_apply = super(torch.autograd.Function, _LoraLinear).apply


# ---- under torch.compile: registered ops over the same kernels


@torch.library.custom_op("hydra::lora_linear_fwd", mutates_args=())
def _fwd_op(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    has_bias: Sequence[bool],
    counts: Sequence[int],
    owners: Sequence[int],
    scales: Sequence[float],
    num_adapters: int,
    dropout: float,
    adapter_ids: Tensor | None,
    seed: Tensor | None,
    chosen: str,
) -> tuple[list[Tensor], Tensor]:
    plan = Plan(tuple(counts), tuple(owners), tuple(scales), num_adapters, dropout)
    given = iter(biases)  # autograd takes no list with a None in it
    tensors = (*weights, *(next(given) if has else None for has in has_bias), *lora_a, *lora_b)
    ys, s = _forward(chosen, plan, adapter_ids, seed, x, tensors)
    # A registered op returns tensors only: an empty one stands for None.
    return list(ys), x.new_empty(0) if s is None else s


@_fwd_op.register_fake
def _(x, weights, biases, lora_a, lora_b, has_bias, *plan_ids_seed_and_chosen):
    ys = [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights]
    if not saves_s(plan_ids_seed_and_chosen[-1], x.dtype):
        return ys, x.new_empty(0)
    return ys, x.new_empty((x.shape[:-1].numel(), sum(a.shape[0] for a in lora_a)))


@torch.library.custom_op("hydra::lora_linear_bwd", mutates_args=())
def _bwd_op(
    dys: Sequence[Tensor],
    x: Tensor,
    s: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    counts: Sequence[int],
    owners: Sequence[int],
    scales: Sequence[float],
    num_adapters: int,
    dropout: float,
    adapter_ids: Tensor | None,
    seed: Tensor | None,
    chosen: str,
    need: Sequence[bool],
) -> list[Tensor]:
    """dx and the gradients of the weights, biases and adapters, empty where not asked for."""
    plan = Plan(tuple(counts), tuple(owners), tuple(scales), num_adapters, dropout)
    tensors = (*weights, *[None] * len(weights), *lora_a, *lora_b)
    saved = s if s.numel() else None
    dx, grads = _backward(chosen, plan, adapter_ids, seed, x, saved, tensors, dys, need)
    like = [x, *weights, *(w[:, 0] for w in weights), *lora_a, *lora_b]
    return [
        _own(g) if wanted else t.new_empty(0)
        for g, t, wanted in zip((dx, *grads), like, need, strict=True)
    ]


def _own(t: Tensor) -> Tensor:
    """``t`` in storage of its own, which a registered op must return; gradients share theirs."""
    if t.is_contiguous() and t.untyped_storage().nbytes() == t.numel() * t.element_size():
        return t
    return t.clone(memory_format=torch.contiguous_format)


@_bwd_op.register_fake
def _(dys, x, s, weights, lora_a, lora_b, counts, owners, scales, n, dropout, ids, seed, chosen,
      need):  # fmt: skip
    like = [x, *weights, *(w[:, 0] for w in weights), *lora_a, *lora_b]
    return [t.new_empty(t.shape if wanted else 0) for t, wanted in zip(like, need, strict=True)]


def _setup_context(ctx, inputs, output):
    x, weights, biases, a, b, has_bias, *plan, adapter_ids, seed, chosen = inputs
    ctx.save_for_backward(x, output[1], adapter_ids, seed, *weights, *a, *b)
    ctx.plan, ctx.chosen = plan, chosen
    given = iter(biases)
    ctx.need_bias = [has and next(given).requires_grad for has in has_bias]
    ctx.has_bias = has_bias


def _compiled_backward(ctx, dys, _s):
    x, s, adapter_ids, seed, *rest = ctx.saved_tensors
    p, n = len(ctx.plan[0]), len(ctx.plan[1])
    weights, a, b = rest[:p], rest[p : p + n], rest[p + n :]
    need = [
        x.requires_grad,
        *(w.requires_grad for w in weights),
        *ctx.need_bias,
        *(t.requires_grad for t in (*a, *b)),
    ]
    grads = torch.ops.hydra.lora_linear_bwd(
        list(dys), x, s, weights, a, b, *ctx.plan, adapter_ids, seed, ctx.chosen, need
    )
    dx, *rest = [g if wanted else None for g, wanted in zip(grads, need, strict=True)]
    dbiases = [g for g, has in zip(rest[p : 2 * p], ctx.has_bias, strict=True) if has]
    das, dbs = rest[2 * p : 2 * p + n], rest[2 * p + n :]
    return dx, rest[:p], dbiases, das, dbs, *(None,) * 9


_fwd_op.register_autograd(_compiled_backward, setup_context=_setup_context)
