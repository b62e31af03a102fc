"""LoRA linear layers on a CPU: torch's BLAS for the wide products, C++ for the adapters.

csrc/cpu/lora_linear.cpp writes the adapters' part of y, and of dx, and torch adds the wide product
to it. It sorts the rows by their id, so that a row costs its own adapters alone, and takes x and dy
from memory once for all the small products. Where every row has the same adapter, nothing is
dropped and there are enough rows, W + scale B A is made in scratch memory instead: that passes over
W and not over x and y. Rows too few to be worth packing factors for are csrc/cpu/lora_few.cpp's,
which adds to the wide product, or BLAS's (lora_blas.py), as float64 always is.

s is not saved for backward but computed again while x is in the cache for dA.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.cpu import lora_blas
from hydra_kernels.backends.lora_plan import Plan, restricted

# As csrc/cpu/floats.h numbers them.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Rows up to which factors are not packed, measured: in float32, where BLAS takes over, and in less.
_FEW, _MANY = 16, 64
_FEW_SUMS = 256  # rows times ranks up to which lora_few.cpp is faster than BLAS in backward
_MIXED = -2
_SCRATCH = 4 << 20  # floats that a thread keeps for merged weights: 16 MB
_local = threading.local()


def unsupported(
    x: Tensor, ids: Tensor | None, seed: Tensor | None, *tensors: Tensor | None
) -> list[str]:
    """``tensors`` are the weights and biases, and the adapters."""
    reasons = registry.wrong_device("cpu", x, ids, seed, *tensors)
    found = {t.dtype for t in (x, *tensors) if t is not None}
    # A loop, because torch.compile of torch 2.11 cannot trace a set less a dict's keys.
    others = [dtype for dtype in found if dtype not in _DTYPES]
    if others and found != {torch.float64}:
        names = ", ".join(sorted(str(dtype) for dtype in found))
        reasons.append(f"needs float32, bfloat16 and float16, or float64 alone, got {names}")
    elif seed is not None and others:
        reasons.append("has no dropout in float64")
    return reasons


def _all_float32(x: Tensor, a: Sequence[Tensor]) -> bool:
    for t in a:
        if t.dtype is not torch.float32:
            return False
    return x.dtype is torch.float32


def fwd(
    x: Tensor,  # (M, K)
    weights: Sequence[Tensor],  # (N_p, K) for each projection
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],  # (R_j, K) for each adapter
    b: Sequence[Tensor],  # (N_p, R_j)
    plan: Plan,
    ids: Tensor | None,  # each stands for as many rows as the others
    seed: Tensor | None,  # (2,) int64
) -> tuple[list[Tensor], Tensor | None]:
    """Returns y (M, N_p) for each projection, and nothing to save."""
    if x.dtype is torch.float64:
        return lora_blas.fwd(x, weights, biases, a, b, plan, ids), None
    if ids is None and len(a) == 1 and len(weights) == 1 and plan.dropout == 0.0:
        y = one_fwd(x, weights[0], biases[0], a[0], b[0], plan.scales[0])
        if y is not None:
            return [y], None
    m = x.shape[0]
    if m <= _MANY and plan.dropout == 0.0:
        if m <= _FEW or x.dtype is not torch.float32:
            # Of several adapters on one row each would round y once more.
            if x.dtype is torch.float32 or ids is not None or max(plan.counts) < 2:
                return _few_fwd(_rows(x), weights, biases, a, b, plan, _long(ids)), None
        elif ids is None and _all_float32(x, a):
            return lora_blas.few_fwd(x, weights, biases, a, b, plan), None
    x, ids = _rows(x), _long(ids)
    if ids is not None:
        only = _only_id(ids, plan)
        if only != _MIXED:
            which, plan = restricted(plan, only)
            if not which:
                return [F.linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)], None
            a, b, ids = [a[j] for j in which], [b[j] for j in which], None
    if ids is None and _merges(x, weights, a, plan):
        return [
            F.linear(x, _merged(weight, *_of_projection(a, b, plan, p)), bias)
            for p, (weight, bias) in enumerate(zip(weights, biases, strict=True))
        ], None
    ys = []
    projections: list[int] = []
    for weight, bias in zip(weights, biases, strict=True):
        n = weight.shape[0]
        y = x.new_empty((x.shape[0], n))
        ys.append(y)
        projections += (n, y.data_ptr(), n, 0 if bias is None else bias.data_ptr())
        if bias is not None and n > 1 and bias.stride()[0] != 1:
            return fwd(x, weights, [_contiguous(t) for t in biases], a, b, plan, ids, seed)
    arguments = _arguments(x, a, b, (), (), projections, plan, ids, seed)
    if not extension.module.lora_linear_fwd_cpu(*arguments):  # type: ignore[union-attr]
        return [F.linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)], None
    for y, weight in zip(ys, weights, strict=True):
        y.addmm_(x, weight.t())
    return ys, None


def bwd(
    dys: Sequence[Tensor | None],  # (M, N_p)
    x: Tensor,
    s: Tensor | None,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    plan: Plan,
    ids: Tensor | None,
    seed: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Returns dx and the gradients of the adapters, None where not asked for."""
    m = x.shape[0]
    few = m <= _FEW and plan.dropout == 0.0 and _all_float32(x, a)
    if few and (ids is not None or m * sum([t.shape[0] for t in a]) <= _FEW_SUMS):
        return _few_bwd(dys, x, weights, a, b, plan, ids, need_x, need_a, need_b)
    if few or x.dtype is torch.float64:
        found = lora_blas.bwd(dys, x, weights, a, b, plan, ids, need_x, need_a, need_b)
        if found is not None:
            return found
        return _bwd_off(dys, weights, a, b, need_x, need_a, need_b)
    x, ids = _rows(x), _long(ids)
    if ids is not None:
        only = _only_id(ids, plan)
        if only != _MIXED:
            which, plan = restricted(plan, only)
            if not which:
                return _bwd_off(dys, weights, a, b, need_x, need_a, need_b)
            if len(which) < len(a):
                dx, some_das, some_dbs = bwd(
                    dys, x, s, weights, [a[j] for j in which], [b[j] for j in which], plan, None,
                    seed, need_x, need_a, need_b,
                )  # fmt: skip
                das = [torch.zeros_like(t) if need_a else None for t in a]
                dbs = [torch.zeros_like(t) if need_b else None for t in b]
                for j, da, db in zip(which, some_das, some_dbs, strict=True):
                    das[j], dbs[j] = da, db
                return dx, das, dbs
            ids = None
    das = [_new(t) if need_a else None for t in a]
    dbs = [_new(t) if need_b else None for t in b]
    merges = need_x and ids is None and _merges(x, weights, a, plan)
    dx = x.new_empty(x.shape) if need_x and not merges else None
    flat = [None if dy is None else _rows(dy) for dy in dys]
    projections: list[int] = []
    if need_a or need_b or (need_x and not merges):
        for dy, weight in zip(flat, weights, strict=True):
            if dy is None:
                projections += (weight.shape[0], 0, 0, 0)
            else:
                projections += (dy.shape[1], dy.data_ptr(), dy.stride(0), 0)
        arguments = _arguments(x, a, b, das, dbs, projections, plan, ids, seed)
        if not extension.module.lora_linear_bwd_cpu(  # type: ignore[union-attr]
            *arguments, 0 if dx is None else dx.data_ptr()
        ):
            return _bwd_off(dys, weights, a, b, need_x, need_a, need_b)
    for p, (dy, weight) in enumerate(zip(flat, weights, strict=True)):
        if not need_x or dy is None:
            continue
        if merges:
            weight = _merged(weight, *_of_projection(a, b, plan, p))
        dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
    return dx, das, dbs


def _bwd_off(dys, weights, a, b, need_x, need_a, need_b):
    """Where every row is off: of the base layer, and zeros."""
    dx = None
    for dy, weight in zip(dys, weights, strict=True):
        if need_x and dy is not None:
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    return (
        dx,
        [torch.zeros_like(t) if need_a else None for t in a],
        [torch.zeros_like(t) if need_b else None for t in b],
    )


def _only_id(ids: Tensor, plan: Plan) -> int:
    """The id that all rows have, -1 where there are none, _MIXED where they differ."""
    return extension.module.lora_linear_only_id_cpu(  # type: ignore[union-attr]
        ids.data_ptr(), ids.numel(), plan.num_adapters
    )


# ---- few rows


def takes(x: Tensor, a: Tensor) -> bool:
    """Whether there is C++ for these dtypes."""
    return x.dtype in _DTYPES and a.dtype in _DTYPES


def one_fwd(
    x: Tensor,  # (*, K)
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
) -> Tensor | None:
    """y (*, N) of one adapter on every row; None where the rows are not few, or not dense."""
    k = x.shape[-1]
    rows = x.numel() // max(k, 1)
    if rows > _MANY or not x.is_contiguous():
        return None
    n = weight.shape[0]
    if rows > _FEW and x.dtype is torch.float32:
        if a.dtype is not torch.float32:
            return None
        flat = x.view(rows, k)
        y = F.linear(flat, weight, bias)
        return y.addmm_(F.linear(flat, a), b.t(), alpha=scale).view(*x.shape[:-1], n)
    y = F.linear(x, weight, bias).contiguous()
    extension.module.lora_linear_few_fwd_cpu(  # type: ignore[union-attr]
        x.data_ptr(), _DTYPES[x.dtype], rows, k, k,
        (a.data_ptr(), b.data_ptr(), *a.stride(), *b.stride(), a.shape[0], 0, 0, 0, 0,
         _DTYPES[a.dtype]),
        (scale,), (n, y.data_ptr(), n, 0), 0, 0, 1,
    )  # fmt: skip
    return y


def _few_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    plan: Plan,
    ids: Tensor | None,
) -> list[Tensor]:
    ys = []
    projections: list[int] = []
    for weight, bias in zip(weights, biases, strict=True):
        y = F.linear(x, weight, bias)
        ys.append(y)
        n = weight.shape[0]
        projections += (n, y.data_ptr(), n, 0)
    at, m, *rest = _few(x, _factors(a, b, (), (), plan), projections, plan, ids)
    extension.module.lora_linear_few_fwd_cpu(  # type: ignore[union-attr]
        at, _DTYPES[x.dtype], m, *rest
    )
    return ys


def _few_bwd(
    dys: Sequence[Tensor | None],
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    plan: Plan,
    ids: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    x, ids = _rows(x), _long(ids)
    das = [_new(t) if need_a else None for t in a]
    dbs = [_new(t) if need_b else None for t in b]
    dx = None
    flat = [None if dy is None else _rows(dy) for dy in dys]
    projections: list[int] = []
    for dy, weight in zip(flat, weights, strict=True):
        if dy is None:
            projections += (weight.shape[0], 0, 0, 0)
            continue
        projections += (weight.shape[0], dy.data_ptr(), dy.stride()[0], 0)
        if need_x:
            dx = torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
    extension.module.lora_linear_few_bwd_cpu(  # type: ignore[union-attr]
        *_few(x, _factors(a, b, das, dbs, plan), projections, plan, ids), _address(dx)
    )
    return dx, das, dbs


def _few(
    x: Tensor, factors: list[int], projections: list[int], plan: Plan, ids: Tensor | None
) -> tuple:
    """What both entries of csrc/cpu/lora_few.cpp take, in their order."""
    m, k = x.shape
    at, count = (0, 0) if ids is None else (ids.data_ptr(), ids.numel())
    return (
        x.data_ptr(), m, k, x.stride()[0], factors, plan.scales, projections, at, count,
        plan.num_adapters,
    )  # fmt: skip


# ---- merged weights


def _merges(x: Tensor, weights: Sequence[Tensor], a: Sequence[Tensor], plan: Plan) -> bool:
    """Whether passing over W twice is less than over x and y: measured, and by their sizes."""
    if plan.dropout > 0.0:
        return False
    m, k = x.shape
    for w in weights:
        n = w.shape[0]
        if m * (k + n) < 4 * k * n or k * n > _SCRATCH or w.stride()[1] != 1:
            return False
    return _all_float32(x, a)


def _scratch(n: int, k: int) -> Tensor:
    """(n, k) of memory that the thread's next call takes again."""
    views = _local.__dict__.setdefault("views", {})  # of the thread's scratch, by their shape
    found = views.get((n, k))
    return _view_of_scratch(views, n, k) if found is None else found


def _view_of_scratch(views: dict[tuple[int, int], Tensor], n: int, k: int) -> Tensor:
    most = max(views.values(), key=Tensor.numel, default=None)
    if most is None or most.numel() < n * k:
        views.clear()
        most = torch.empty((n, k), dtype=torch.float32, device="cpu")
    views[n, k] = most.view(-1)[: n * k].view(n, k)
    return views[n, k]


def _of_projection(
    a: Sequence[Tensor], b: Sequence[Tensor], plan: Plan, projection: int
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[float]]:
    start = sum(plan.counts[:projection])
    here = slice(start, start + plan.counts[projection])
    return a[here], b[here], plan.scales[here]


def _merged(
    weight: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    """W + sum of scale B A, in scratch memory; W itself where there is nothing to add."""
    if not a:
        return weight
    n, k = weight.shape
    merged = _scratch(n, k)
    extension.module.lora_linear_merged_cpu(  # type: ignore[union-attr]
        weight.data_ptr(),
        weight.stride(0),
        n,
        k,
        _factors(a, b, (), (), Plan((len(a),), (0,) * len(a), (), 1, 0.0)),
        scales,
        merged.data_ptr(),
    )
    return merged


# ---- what the extension takes


def _rows(t: Tensor) -> Tensor:
    """With its columns next to each other."""
    return t if t.stride()[1] == 1 else t.contiguous()


def _new(t: Tensor) -> Tensor:
    """Contiguous and not initialised; new_empty(t.shape) takes a microsecond longer."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


def _long(ids: Tensor | None) -> Tensor | None:
    if ids is None or (ids.dtype == torch.int64 and ids.is_contiguous()):
        return ids
    return ids.to(torch.int64).contiguous()


def _factors(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    das: Sequence[Tensor | None],
    dbs: Sequence[Tensor | None],
    plan: Plan,
) -> list[int]:
    """The fields of csrc/cpu/lora_layout.h's Adapter, but for the scale, one after the other."""
    factors: list[int] = []
    j = da = db = 0
    for p, count in enumerate(plan.counts):
        for _ in range(count):
            each_a, each_b = a[j], b[j]
            if das:
                da, db = _address(das[j]), _address(dbs[j])
            factors += (
                each_a.data_ptr(),
                each_b.data_ptr(),
                *each_a.stride(),
                *each_b.stride(),
                each_a.shape[0],
                plan.owners[j],
                p,
                da,
                db,
                _DTYPES[each_a.dtype],
            )
            j += 1
    return factors


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _arguments(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    das: Sequence[Tensor | None],
    dbs: Sequence[Tensor | None],
    projections: list[int],
    plan: Plan,
    ids: Tensor | None,  # int64
    seed: Tensor | None,
) -> tuple:
    """What both entries of csrc/cpu/lora_linear.cpp take, in their order."""
    scales: Sequence[float] = plan.scales
    if plan.dropout > 0.0:
        grown = 1.0 / max(1.0 - plan.dropout, 2.0**-32)
        scales = [scale * grown for scale in scales]
    return (
        x.data_ptr(),
        _DTYPES[x.dtype],
        *x.shape,
        x.stride()[0],
        _factors(a, b, das, dbs, plan),
        scales,
        projections,
        0 if ids is None else ids.data_ptr(),
        0 if ids is None else ids.numel(),
        plan.num_adapters,
        plan.dropout,
        0 if seed is None else seed.data_ptr(),
    )


for _op in ("lora_linear", "lora_linear_group"):
    registry.register(_op, "cpu", registry.Kernel(fwd, bwd, unsupported, missing=extension.missing))
