"""LoRA linear layers on a CPU by BLAS alone: float64, and few rows of float32 without ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_kernels.backends.lora_plan import Plan, columns, concatenated, split_columns


def fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    plan: Plan,
    ids: Tensor | None,
) -> list[Tensor]:
    found = _shrunk(x, a, plan, ids)
    if found is None:
        return [F.linear(x, w, bias) for w, bias in zip(weights, biases, strict=True)]
    s, alpha = found
    ys = []
    start = 0
    for p, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        factor = concatenated(plan.of_projection(b, p), 1)
        here = s[:, start : start + factor.shape[1]]
        ys.append(F.linear(x, weight, bias).addmm_(here, factor.t(), alpha=alpha))
        start += factor.shape[1]
    return ys


def few_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    plan: Plan,
) -> list[Tensor]:
    """All adapters on all rows, in the fewest calls; each for itself, so that a group's outputs
    have the bits of its layers'."""
    ys = []
    start = 0
    for weight, bias, count in zip(weights, biases, plan.counts, strict=True):
        y = F.linear(x, weight, bias)
        for j in range(start, start + count):
            y.addmm_(F.linear(x, a[j]), b[j].t(), alpha=plan.scales[j])
        ys.append(y)
        start += count
    return ys


def bwd(
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
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]] | None:
    """dx and the gradients of the adapters; None where every row is off."""
    found = _shrunk(x, a, plan, ids)
    if found is None:
        return None
    s, alpha = found
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


def _shrunk(
    x: Tensor, a: Sequence[Tensor], plan: Plan, ids: Tensor | None
) -> tuple[Tensor, float] | None:
    """s and the factor that it still needs; None where every row is off."""
    if ids is not None and not _any_on(ids, plan):
        return None
    s = torch.mm(x, concatenated(a, 0).t())
    if ids is None and len(a) == 1:
        return s, plan.scales[0]
    return s, _gate(s, [t.shape[0] for t in a], plan, ids)


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
