"""Linear layers with LoRA adapters that every row switches for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_kernels import backends  # noqa: F401  registers the kernels
from hydra_kernels.backends import recording, registry
from hydra_kernels.backends.lora_plan import Plan
from hydra_kernels.backends.reference import lora_linear as reference
from hydra_kernels.ops.lora_arguments import (
    OP,
    Scaling,
    as_pairs,
    as_scales,
    check_kind,
    check_layer,
    check_range,
    draw_seed,
)
from hydra_kernels.ops.lora_passes import run, run_eager

_GROUP = "lora_linear_group"


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    scaling: Scaling,
    *,
    adapter_ids: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""A linear layer plus, on each row, the LoRA adapter which that row names.

    ``y = x W^T + bias + scaling[i] * (dropout(x) A_i^T) B_i^T`` with ``i`` the row's adapter id:
    Hu et al. 2021, arXiv:2106.09685, eq. 3. With W = [[1, 0], [0, 1]], A = [[1, 2]], B = [[3], [4]]
    and scaling 0.5 the row (1, 1) gives (5.5, 7), and (1, 1) where its id is -1.

    Args:
        x: (\*, K). Differentiable once, as are the adapters, and weight and bias when they ask.
        weight: (N, K), in x's dtype.
        lora_a: (R, K), or one (R_i, K) for each adapter; may be float32 over a bfloat16 base.
        lora_b: (N, R), or one (N, R_i) for each adapter, in the dtype of its ``lora_a``.
        scaling: One number for all adapters, or one for each; numbers or tensors, constants to
            autograd. ``lora_alpha / r`` in PEFT.
        adapter_ids: Integers on x's device, shaped () or as a leading part of ``x.shape[:-1]``: one
            id a call, a sequence or a row. -1 is off. Read on the device when the op runs, so new
            values neither recompile nor recapture. None switches adapter 0 on everywhere.
        bias: (N,), in x's dtype.
        dropout: Probability, in [0, 1], of zeroing an element of x on its way into the adapter; the
            others grow by ``1 / (1 - dropout)``.
        seed: What the dropout mask is drawn from: an int, or int64 (1,) or (2,) on x's device, the
            seed and an offset. Equal seeds give equal masks, on every backend. None draws one from
            the device's default generator, so that every call, and every replay of a CUDA graph,
            has another mask, and recomputation under activation checkpointing has the same.
        backend: "cuda", "cpu", "triton" or "reference"; None for the first that can run these.

    Returns:
        (\*, N) in x's dtype. With every row off it is ``F.linear(x, weight, bias)``: bit for bit
        on a CPU, to the dtype's rounding on a GPU.

    Raises:
        ValueError: shapes or dtypes do not fit, or (on a CPU, and with ``HYDRA_CHECK=1`` on a GPU)
            an id is outside -1 to n - 1.
        NotImplementedError: ``backend`` was named and cannot run these tensors.
    """
    a, b = as_pairs(lora_a, lora_b)
    scales = as_scales(scaling, len(a))
    key = None
    known_kind = adapter_ids is None or isinstance(adapter_ids, Tensor)
    if known_kind and _are_floats(scales) and recording.eager():
        key = (
            registry.asked_for(backend),
            scales,
            dropout,
            len(a),
            *[
                None if t is None else (type(t), t.shape, t.dtype, t.is_cpu)
                for t in (x, adapter_ids, weight, bias, *a, *b)
            ],
        )
        plan = _PLANS.get(key)
        if plan is not None:
            drawn = draw_seed(seed, x.device) if dropout > 0.0 else None
            count = plan.counts[0]
            tensors = (weight, bias, *a[:count], *b[:count])
            return run_eager("cpu", plan, x, adapter_ids, drawn, tensors)[0]
    check_layer(x, weight, bias, a, b, dropout)
    check_kind(x, adapter_ids)
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        key = None  # fits under autocast alone
    owners = range(len(a))
    if adapter_ids is None:
        a, b, scales, owners = a[:1], b[:1], scales[:1], owners[:1]
    return _choose_and_run(
        x, weight, bias, a, b, scales, owners, adapter_ids, dropout, seed, len(owners), backend, key
    )


@dataclass(frozen=True)
class Projection:
    """One of several LoRA linear layers that read the same input; fields as in lora_linear."""

    weight: Tensor
    lora_a: Tensor | Sequence[Tensor]
    lora_b: Tensor | Sequence[Tensor]
    scaling: Scaling
    bias: Tensor | None = None


def lora_linear_group(
    x: Tensor,
    projections: Sequence[Projection],
    *,
    adapter_ids: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    r""":func:`lora_linear` of one x through several layers: queries, keys and values, say.

    x is read once for all the products with a lora_a and once for all their gradients, and the
    gradient of x is summed in one buffer.

    Args:
        x: (\*, K).
        projections: At least one; each with as many adapters as the others.
        adapter_ids, seed, backend: As in :func:`lora_linear`.
        dropout: As in :func:`lora_linear`; all projections see the same mask.

    Returns:
        (\*, N_p) for each projection.

    Raises:
        ValueError, NotImplementedError: As :func:`lora_linear` does.
    """
    if not projections:
        raise ValueError(f"{_GROUP}: needs at least one projection")
    pairs = [as_pairs(p.lora_a, p.lora_b) for p in projections]
    scales = [as_scales(p.scaling, len(a)) for p, (a, _) in zip(projections, pairs, strict=True)]
    for p, (a, b) in zip(projections, pairs, strict=True):
        check_layer(x, p.weight, p.bias, a, b, dropout)
    count = len(pairs[0][0])
    if any(len(a) != count for a, _ in pairs):
        raise ValueError(
            f"{_GROUP}: the projections must have as many adapters as each other, "
            f"got {', '.join(str(len(a)) for a, _ in pairs)}"
        )
    check_kind(x, adapter_ids)
    if adapter_ids is None:
        count = 1
    return gated_linear_group(
        x,
        [p.weight for p in projections],
        [p.bias for p in projections],
        [a[:count] for a, _ in pairs],
        [b[:count] for _, b in pairs],
        [each[:count] for each in scales],
        [range(count)] * len(projections),
        adapter_ids,
        dropout,
        seed,
        num_adapters=count,
        backend=backend,
    )


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float | Tensor],
    owners: Sequence[int],
    adapter_ids: Tensor | None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    num_adapters: int,
    backend: str | None = None,
) -> Tensor:
    """:func:`lora_linear` on arguments that fit, with the id that switches each adapter on.

    Adapter j runs on the rows whose id is ``owners[j]``, or on all of them where ``adapter_ids`` is
    None; ids are below ``num_adapters``. For modules, which know their shapes and hold only some of
    a model's adapters.
    """
    key = None
    if _are_floats(scaling) and recording.eager():
        tensors = (weight, bias, *lora_a, *lora_b)
        key = (
            registry.asked_for(backend),
            tuple(scaling),
            dropout,
            tuple(owners),
            num_adapters,
            *[
                None if t is None else (type(t), t.dtype, t.is_cpu)
                for t in (x, adapter_ids, *tensors)
            ],
        )
        plan = _PLANS.get(key)
        if plan is not None:
            drawn = draw_seed(seed, x.device) if dropout > 0.0 else None
            return run_eager("cpu", plan, x, adapter_ids, drawn, tensors)[0]
    return _choose_and_run(
        x, weight, bias, lora_a, lora_b, scaling, owners, adapter_ids, dropout, seed, num_adapters,
        backend, key,
    )  # fmt: skip


# What calls on a CPU were found to be, by all that decides it: classes, devices, dtypes and shapes.
_PLANS: dict[tuple, Plan] = {}


def _are_floats(scaling: Sequence[float | Tensor]) -> bool:
    for scale in scaling:
        if type(scale) is not float:
            return False
    return True


def _choose_and_run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float | Tensor],
    owners: Sequence[int],
    adapter_ids: Tensor | None,
    dropout: float,
    seed: int | Tensor | None,
    num_adapters: int,
    backend: str | None,
    key: tuple | None,  # in _PLANS, where the call may be remembered
) -> Tensor:
    drawn = draw_seed(seed, x.device) if dropout > 0.0 else None
    tensors = (weight, bias, *lora_a, *lora_b)
    chosen = _select(OP, backend, x, adapter_ids, drawn, tensors)
    if adapter_ids is not None and chosen != "cpu":  # whose kernel looks at them anyway
        check_range(adapter_ids, num_adapters)
    if chosen == registry.REFERENCE:
        return reference.lora_linear(
            x, weight, bias, lora_a, lora_b, scaling, owners, adapter_ids, dropout, drawn
        )
    given_b = lora_b
    lora_b, scales = _constant_scales(lora_b, scaling)
    plan = Plan((len(lora_a),), tuple(owners), scales, num_adapters, dropout)
    if key is not None and chosen == "cpu" and _are_plain(x, adapter_ids, *tensors):
        if len(_PLANS) >= 4096:
            _PLANS.clear()
        _PLANS[key] = plan
    if lora_b is not given_b:
        tensors = (weight, bias, *lora_a, *lora_b)
    return run(chosen, plan, x, adapter_ids, drawn, tensors)[0]


def _are_plain(*tensors: Tensor | None) -> bool:
    """Whether they are no more than memory, on a CPU."""
    return all(t is None or (type(t) in registry.PLAIN and t.is_cpu) for t in tensors)


def gated_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_a: Sequence[Sequence[Tensor]],
    lora_b: Sequence[Sequence[Tensor]],
    scaling: Sequence[Sequence[float | Tensor]],
    owners: Sequence[Sequence[int]],
    adapter_ids: Tensor | None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    num_adapters: int,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """:func:`gated_linear` of one x through several layers."""
    drawn = draw_seed(seed, x.device) if dropout > 0.0 else None
    a = [t for each in lora_a for t in each]
    b: Sequence[Tensor] = [t for each in lora_b for t in each]
    chosen = _select(_GROUP, backend, x, adapter_ids, drawn, (*weights, *biases, *a, *b))
    if adapter_ids is not None and chosen != "cpu":
        check_range(adapter_ids, num_adapters)
    if chosen == registry.REFERENCE:
        return tuple(
            reference.lora_linear(x, w, bias, a_p, b_p, s_p, o_p, adapter_ids, dropout, drawn)
            for w, bias, a_p, b_p, s_p, o_p in zip(
                weights, biases, lora_a, lora_b, scaling, owners, strict=True
            )
        )
    b, scales = _constant_scales(b, [s for each in scaling for s in each])
    plan = Plan(
        tuple(len(each) for each in lora_a),
        tuple(o for each in owners for o in each),
        scales,
        num_adapters,
        dropout,
    )
    return run(chosen, plan, x, adapter_ids, drawn, (*weights, *biases, *a, *b))


_CHOICES: dict[tuple, str] = {}


def _select(
    op: str,
    backend: str | None,
    x: Tensor,
    adapter_ids: Tensor | None,
    seed: Tensor | None,
    tensors: tuple[Tensor | None, ...],
) -> str:
    """registry.select, remembered on a CPU, whose backends ask for devices and dtypes alone."""
    if (
        torch.compiler.is_compiling()
        or not x.is_cpu
        or type(x) not in registry.PLAIN
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return registry.select(op, backend, x, adapter_ids, seed, *tensors)
    found: list = [
        op,
        registry.asked_for(backend),
        x.dtype,
        adapter_ids is None or adapter_ids.is_cpu,
        seed is None,
    ]
    for t in tensors:
        if t is not None and type(t) not in registry.PLAIN:
            return registry.select(op, backend, x, adapter_ids, seed, *tensors)
        found.append(None if t is None else t.dtype if t.is_cpu else t.device)
    key = tuple(found)
    chosen = _CHOICES.get(key)
    if chosen is None:
        chosen = registry.select(op, backend, x, adapter_ids, seed, *tensors)
        _CHOICES[key] = chosen
    return chosen


def _constant_scales(
    lora_b: Sequence[Tensor], scaling: Sequence[float | Tensor]
) -> tuple[Sequence[Tensor], tuple[float, ...]]:
    """The scales as numbers; one that is a tensor, read on its device, goes into its lora_b."""
    for scale in scaling:
        if isinstance(scale, Tensor):
            break
    else:
        return lora_b, tuple(scaling)
    b = [
        t * scale.detach().to(t.device, t.dtype) if isinstance(scale, Tensor) else t
        for t, scale in zip(lora_b, scaling, strict=True)
    ]
    return b, tuple(1.0 if isinstance(scale, Tensor) else scale for scale in scaling)
