"""LoRA linear layers on a CPU: torch's BLAS for the wide products, BLAS or C++ for the small ones.

The expanded adapter is written first and the wide product added to it, so that y is not passed over
again. In float32 and float64 without dropout the small products are BLAS's too: it was measured
faster than csrc/cpu/lora_linear.cpp there. With dropout, in bfloat16 and with adapters of another
dtype they are C++, which masks and widens x on its way into the product and keeps no copy of it.

s is not saved for backward but computed again: two products of rank R cost less than the memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.lora_plan import Plan, columns, concatenated, split_columns

_BLAS = frozenset({torch.float32, torch.float64})
_CPP = frozenset({torch.float32, torch.bfloat16})


def unsupported(*tensors: Tensor | None) -> list[str]:
    """``tensors`` are x, ids, the seed, the weights and biases, and the adapters."""
    reasons = registry.wrong_device("cpu", *tensors)
    found = {t.dtype for t in tensors if t is not None and t.is_floating_point()}
    if found - _CPP and found != {torch.float64}:
        names = ", ".join(sorted(str(dtype) for dtype in found))
        reasons.append(f"needs float32 and bfloat16, or float64 alone, got {names}")
    return reasons


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
    found = _shrunk(x, a, plan, ids, seed)
    if found is None:
        return [F.linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)], None
    s, alpha, blas = found
    if blas and len(b) == 1:
        return [_expanded(s, b[0], biases[0], alpha).addmm_(x, weights[0].t())], None
    ys = []
    start = 0
    for p, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        mine = plan.of_projection(b, p)
        rank = sum(t.shape[1] for t in mine)
        if blas:
            here = s if len(weights) == 1 else s[:, start : start + rank]
            y = _expanded(here, concatenated(mine, 1), bias, alpha)
        else:
            y = x.new_empty((x.shape[0], weight.shape[0]))
            _expand(s, start, mine, bias, 0.0, None, y)
        start += rank
        ys.append(y.addmm_(x, weight.t()))
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
    found = _shrunk(x, a, plan, ids, seed) if need_a or need_b or need_x else None
    das: list[Tensor | None] = [None] * len(a)
    dbs: list[Tensor | None] = [None] * len(b)
    dx: Tensor | None = None
    if found is None:
        if need_x:
            for dy, weight in zip(dys, weights, strict=True):
                if dy is not None:
                    dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        if need_a:
            das = [torch.zeros_like(t) for t in a]
        if need_b:
            dbs = [torch.zeros_like(t) for t in b]
        return dx, das, dbs
    s, alpha, blas = found
    run = _bwd_blas if blas else _bwd_cpp
    return run(dys, x, s, alpha, weights, a, b, plan, ids, seed, need_x, need_a, need_b)


def _shrunk(
    x: Tensor, a: Sequence[Tensor], plan: Plan, ids: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, float, bool] | None:
    """s, the factor that it still needs, and whether it is BLAS's; None where every row is off."""
    dtype = a[0].dtype
    if plan.dropout > 0.0 or dtype not in _BLAS or x.dtype != dtype:
        return _shrunk_by_cpp(x, a, plan, ids, seed)
    if ids is not None:
        if dtype == torch.float32:  # C++ gates in the same pass
            small = _shrink(x, a, False, plan.owners, plan.scales, plan, ids, 0.0, None)
            return None if small is None else (small[:, : sum(t.shape[0] for t in a)], 1.0, True)
        if not _any_on(ids, plan):
            return None
    s = torch.mm(x, concatenated(a, 0).t())
    if ids is None and len(a) == 1:
        return s, plan.scales[0], True
    return s, _gate(s, [t.shape[0] for t in a], plan, ids), True


def _any_on(ids: Tensor, plan: Plan) -> bool:
    if ids.numel() == 0:
        return False
    low, high = ids.aminmax()
    if low < -1 or high >= plan.num_adapters:
        raise ValueError(
            f"lora_linear: adapter_ids must be between -1 and {plan.num_adapters - 1}, "
            f"got {int(low) if low < -1 else int(high)}"
        )
    return bool(high >= 0)


def _gate(s: Tensor, ranks: Sequence[int], plan: Plan, ids: Tensor | None) -> float:
    """Scales s (M, sum R) in place and zeroes foreign blocks; returns the factor left to do."""
    if ids is None:
        scale = plan.scales[0]
        if all(other == scale for other in plan.scales):
            return scale
    owner, factor = columns(plan, tuple(ranks), s.dtype, s.device)
    if ids is None:
        s.mul_(factor)
    else:
        gate = (owner == ids.reshape(-1, 1)) * factor
        rows_per_id = s.shape[0] // max(gate.shape[0], 1)
        s.view(gate.shape[0], rows_per_id, s.shape[1]).mul_(gate.unsqueeze(1))
    return 1.0


def _expanded(s: Tensor, b: Tensor, bias: Tensor | None, alpha: float) -> Tensor:
    if bias is not None:
        return torch.addmm(bias, s, b.t(), alpha=alpha)
    if alpha == 1.0:
        return torch.mm(s, b.t())
    return torch.addmm(s.new_empty(()), s, b.t(), beta=0.0, alpha=alpha)


def _bwd_blas(
    dys, x, s, alpha, weights, a, b, plan, ids, seed, need_x, need_a, need_b
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    dbs: list[Tensor | None] = [None] * len(b)
    parts = []
    start = j = 0
    for p, dy in enumerate(dys):
        mine = plan.of_projection(b, p)
        ranks = [t.shape[1] for t in mine]
        if dy is None:
            parts.append(s.new_zeros((s.shape[0], sum(ranks))))
            dbs[j : j + len(mine)] = [torch.zeros_like(t) if need_b else None for t in mine]
        else:
            parts.append(torch.mm(dy, concatenated(mine, 1)))
            if need_b:
                db = torch.mm(dy.t(), s[:, start : start + sum(ranks)])
                if alpha != 1.0:
                    db.mul_(alpha)
                dbs[j : j + len(mine)] = split_columns(db, ranks)
        start += sum(ranks)
        j += len(mine)
    ranks = [t.shape[0] for t in a]
    das: list[Tensor | None] = [None] * len(a)
    dx: Tensor | None = None
    if need_a or need_x:
        ds = concatenated(parts, 1)
        factor = _gate(ds, ranks, plan, ids)
        if factor != 1.0:
            ds.mul_(factor)
        if need_a:
            das = list(torch.mm(ds.t(), x).split(ranks))
        if need_x:
            dx = torch.mm(ds, concatenated(a, 0))
            for dy, weight in zip(dys, weights, strict=True):
                if dy is not None:
                    dx.addmm_(dy, weight)
    return dx, das, dbs


# ---- through csrc/cpu/lora_linear.cpp


def _factors(tensors: Sequence[Tensor], transposed: bool, owners: Sequence[int]) -> list[int]:
    """Address, rank, strides along the rank and along the columns, and owner of each."""
    rank, col = (1, 0) if transposed else (0, 1)
    return [
        value
        for t, owner in zip(tensors, owners, strict=True)
        for value in (t.data_ptr(), t.shape[rank], t.stride(rank), t.stride(col), owner)
    ]


def _padded(rank: int) -> int:
    return -(-rank // 4) * 4


def _seed(seed: Tensor | None) -> list[int]:
    return [0, 0] if seed is None else seed.tolist()


def _shrink(
    x: Tensor,
    tensors: Sequence[Tensor],
    transposed: bool,
    owners: Sequence[int],
    scales: Sequence[float],
    plan: Plan,
    ids: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor | None:
    x = x.contiguous()
    rank = sum(t.shape[1 if transposed else 0] for t in tensors)
    s = torch.empty((x.shape[0], _padded(rank)), dtype=torch.float32)
    if ids is not None:
        ids = ids.to(torch.int64).contiguous()
    on = extension.module.lora_linear_shrink_cpu(  # type: ignore[union-attr]
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        x.shape[0],
        x.shape[1],
        x.shape[1],
        _factors(tensors, transposed, owners),
        scales,
        tensors[0].dtype == torch.bfloat16,
        0 if ids is None or ids.numel() == 0 else ids.data_ptr(),
        0 if ids is None else ids.numel(),
        plan.num_adapters,
        dropout,
        *_seed(seed),
        s.data_ptr(),
    )
    return s if on else None


def _shrunk_by_cpp(
    x: Tensor, a: Sequence[Tensor], plan: Plan, ids: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, float, bool] | None:
    grown = 1.0 / max(1.0 - plan.dropout, 2.0**-32)
    scales = [scale * grown for scale in plan.scales]
    s = _shrink(x, a, False, plan.owners, scales, plan, ids, plan.dropout, seed)
    return None if s is None else (s, 1.0, False)


def _expand(
    s: Tensor,  # (M, padded sum R)
    start: int,
    tensors: Sequence[Tensor],  # (N, R_j), or (R_j, K) as given by (K, R_j) views
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    y: Tensor,
) -> None:
    bias = None if bias is None else bias.contiguous()
    rank = sum(t.shape[1] for t in tensors)
    if start != 0 or s.shape[1] != _padded(rank):
        s = torch.nn.functional.pad(s[:, start : start + rank], (0, _padded(rank) - rank))
    extension.module.lora_linear_expand_cpu(  # type: ignore[union-attr]
        s.data_ptr(),
        y.shape[0],
        y.shape[1],
        _factors(tensors, True, (0,) * len(tensors)),
        tensors[0].dtype == torch.bfloat16,
        0 if bias is None else bias.data_ptr(),
        dropout,
        *_seed(seed),
        y.data_ptr(),
        y.dtype == torch.bfloat16,
    )


def _outer(
    s: Tensor,  # (M, padded sum R)
    x: Tensor,
    grads: Sequence[Tensor],  # (R_j, C) float32, or views of them
    dropout: float,
    seed: Tensor | None,
) -> None:
    x = x.contiguous()
    extension.module.lora_linear_outer_cpu(  # type: ignore[union-attr]
        s.data_ptr(),
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        x.shape[0],
        x.shape[1],
        x.shape[1],
        _factors(grads, False, (0,) * len(grads)),
        dropout,
        *_seed(seed),
    )


def _bwd_cpp(
    dys, x, s, alpha, weights, a, b, plan, ids, seed, need_x, need_a, need_b
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    dbs: list[Tensor | None] = [None] * len(b)
    parts = []
    start = j = 0
    for p, dy in enumerate(dys):
        mine = plan.of_projection(b, p)
        here = slice(j, j + len(mine))
        rank = sum(t.shape[1] for t in mine)
        if dy is None:
            parts.append(s.new_zeros((s.shape[0], rank)))
            dbs[here] = [torch.zeros_like(t) if need_b else None for t in mine]
        else:
            ds = _shrink(dy, mine, True, plan.owners[here], plan.scales[here], plan, ids, 0.0, None)
            assert ds is not None  # some row is on
            parts.append(ds[:, :rank] if len(dys) > 1 else ds)
            if need_b:
                grads = [torch.empty(t.shape, dtype=torch.float32) for t in mine]
                of_mine = s
                if len(dys) > 1:
                    of_mine = F.pad(s[:, start : start + rank], (0, _padded(rank) - rank))
                _outer(of_mine, dy, [g.t() for g in grads], 0.0, None)
                dbs[here] = [g.to(t.dtype) for g, t in zip(grads, mine, strict=True)]
        start += rank
        j += len(mine)
    das: list[Tensor | None] = [None] * len(a)
    dx: Tensor | None = None
    if not (need_a or need_x):
        return dx, das, dbs
    ds = parts[0]
    if len(parts) > 1:
        rank = sum(t.shape[0] for t in a)
        ds = F.pad(torch.cat(parts, 1), (0, _padded(rank) - rank))
    if plan.dropout > 0.0:
        ds.mul_(1.0 / max(1.0 - plan.dropout, 2.0**-32))
    if need_a:
        grads = [torch.empty(t.shape, dtype=torch.float32) for t in a]
        _outer(ds, x, grads, plan.dropout, seed)
        das = [g.to(t.dtype) for g, t in zip(grads, a, strict=True)]
    if need_x:
        dx = x.new_empty(x.shape)
        _expand(ds, 0, [t.t() for t in a], None, plan.dropout, seed, dx)
        for dy, weight in zip(dys, weights, strict=True):
            if dy is not None:
                dx.addmm_(dy, weight)
    return dx, das, dbs


for _op in ("lora_linear", "lora_linear_group"):
    registry.register(_op, "cpu", registry.Kernel(fwd, bwd, unsupported, missing=extension.missing))
