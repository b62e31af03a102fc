"""LoRA linear layers on a GPU: cuBLAS for the wide products, Triton for the small ones.

shrink: s = gate * (drop(x) A^T). expand: y = drop(s B^T) + bias, to which cuBLAS then adds the wide
product. append: the wide product and s B^T in one kernel, only where the tuning table or
HYDRA_AUTOTUNE=1 has found it to be faster than those two; from Hopper on it may read and write by
descriptors, where rows are aligned. contract: the sums of backward over rows
and over columns, dS and dB in one read of dY and dA in one of x; it writes partial sums, which
reduce adds in their order, so that nothing depends on timing.

Blocks of rows with no adapter of a block of ranks skip its loads and products, by one test on the
device, so that a captured graph obeys new ids, and past a sum of ranks of one block the products do
not grow with adapters that are off.
With every row off nothing of x and dY is read for an adapter, and of the adapters only B, once for
each chunk of rows that makes dS. What is then still paid are the launches; zeros written as s, dS,
dA and dB and the partial sums of the last three; and, as no host knows that they could be left
out, the bias or zeros that the wide product is added to, forward and in dX (append has none
forward).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from hydra_kernels.backends import launch, registry, tuning
from hydra_kernels.backends.lora_plan import Plan, columns, concatenated, saves_s, split_columns
from hydra_kernels.backends.reference import philox
from hydra_kernels.backends.triton import lora_linear_tiles as tiles
from hydra_kernels.backends.triton import runtime
from hydra_kernels.backends.triton.lora_linear_kernels import (
    lora_linear_append_kernel,
    lora_linear_contract_kernel,
    lora_linear_expand_kernel,
    lora_linear_reduce_kernel,
    lora_linear_shrink_kernel,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(*tensors: Tensor | None) -> list[str]:
    return [*runtime.wrong_device(*tensors), *registry.wrong_dtype(_DTYPES, *tensors)]


class _Gates:
    """The tensors that say which rank runs on which row."""

    def __init__(self, plan: Plan, ranks: Sequence[int], ids: Tensor | None, x: Tensor) -> None:
        self.owner, self.scale = columns(plan, tuple(ranks), torch.float32, x.device)
        self.plan, self.adapter_ranks, self.part = plan, tuple(ranks), (0, sum(ranks))
        self.ids = None if ids is None or ids.numel() == 0 else ids.contiguous()
        count = 1 if self.ids is None else self.ids.numel()
        self.rows_per_id = max(x.shape[0] // count, 1)

    def ranks(self, start: int, stop: int) -> _Gates:
        part = _Gates.__new__(_Gates)
        part.owner, part.scale = self.owner[start:stop], self.scale[start:stop]
        part.plan, part.adapter_ranks, part.part = self.plan, self.adapter_ranks, (start, stop)
        part.ids, part.rows_per_id = self.ids, self.rows_per_id
        return part

    def spans(self, block: int) -> Tensor | None:
        """(ids, 2) int32: an id's first rank and the one after its last; None where all ranks are
        one block, and the search would cost more than it saves."""
        start, stop = self.part
        if self.ids is None or stop - start <= block:
            return None
        device = self.owner.device
        if device.type != "cuda":
            return _spans(self.plan, self.adapter_ranks, start, stop, device)
        key = (_Gates, self.plan, self.adapter_ranks, start, stop, device)
        return launch.constant(
            key, device, lambda: _spans(self.plan, self.adapter_ranks, start, stop, device)
        )


def _spans(
    plan: Plan, ranks: tuple[int, ...], start: int, stop: int, device: torch.device
) -> Tensor:
    owners = [o for o, rank in zip(plan.owners, ranks, strict=True) for _ in range(rank)]
    spans = [[stop - start, 0] for _ in range(plan.num_adapters)]
    for rank, owner in enumerate(owners[start:stop]):
        spans[owner] = [min(spans[owner][0], rank), rank + 1]
    flat = [end for span in spans for end in span]
    return launch.table(flat, torch.int32, device).view(-1, 2)


def _shrink(x: Tensor, a: Tensor, gates: _Gates, dropout: float, seed: Tensor | None) -> Tensor:
    """(M, R) in x's dtype, without the factor of dropout."""
    m, k = x.shape
    ranks = a.shape[0]
    s = x.new_empty((m, ranks))
    if s.numel() == 0:
        return s
    has_dropout = dropout > 0.0

    def run(config: tuning.Config) -> Tensor:
        grid = (triton.cdiv(m, config["BLOCK_M"]), triton.cdiv(ranks, config["BLOCK_R"]))
        lora_linear_shrink_kernel[grid](
            x,
            a,
            s,
            gates.ids,
            gates.owner,
            gates.scale,
            seed,
            m,
            k,
            ranks,
            a.stride(1),
            a.stride(0),
            gates.rows_per_id,
            philox.threshold(dropout),
            HAS_IDS=gates.ids is not None,
            HAS_DROPOUT=has_dropout,
            **config,
        )
        return s

    # Not by M: a row's result is the same in every batch, so its blocks are.
    sizes = {"K": k, "R": ranks, "itemsize": x.element_size(), "dropout": int(has_dropout)}
    candidates = tiles.shrink(ranks, x.dtype, has_dropout)
    run(tuning.choose("lora_linear_shrink", x, sizes, candidates, run))
    return s


def _expand(
    s: Tensor,  # (M, R), rows apart by its stride
    factor: Tensor,  # (C, R)
    bias: Tensor | None,
    gates: _Gates,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    m, c = s.shape[0], factor.shape[0]
    y = s.new_empty((m, c))
    if y.numel() == 0:
        return y
    config = tiles.expand(s.shape[1], s.dtype)
    grid = (triton.cdiv(m, config["BLOCK_M"]), triton.cdiv(c, config["BLOCK_C"]))
    lora_linear_expand_kernel[grid](
        s,
        factor,
        bias,
        y,
        gates.ids,
        gates.owner,
        gates.spans(config["BLOCK_R"]),
        gates.plan.num_adapters,
        seed,
        m,
        c,
        s.shape[1],
        s.stride(0),
        factor.stride(0),
        factor.stride(1),
        gates.rows_per_id,
        philox.threshold(dropout),
        HAS_IDS=gates.ids is not None,
        HAS_BIAS=bias is not None,
        HAS_DROPOUT=dropout > 0.0,
        **config,
    )
    return y


def _append(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (C, K)
    bias: Tensor | None,
    s: Tensor,  # (M, R), rows apart by its stride
    factor: Tensor,  # (C, R)
    gates: _Gates,
    config: tuning.Config,
) -> Tensor:
    """x W^T + bias + s B^T in one kernel."""
    m, k = x.shape
    c = weight.shape[0]
    y = x.new_empty((m, c))
    blocks = {name: size for name, size in config.items() if name != "APPEND"}
    given: tuple[Any, ...] = x, weight, y
    if config["TMA"]:
        rows, cols, inner = (config[f"BLOCK_{size}"] for size in "MCK")
        sizes = [rows, inner], [cols, inner], [rows, cols]
        given = tuple(map(runtime.descriptor, given, sizes))
    grid = (triton.cdiv(m, blocks["BLOCK_M"]) * triton.cdiv(c, blocks["BLOCK_C"]),)
    lora_linear_append_kernel[grid](
        *given[:2],
        bias,
        s,
        factor,
        given[2],
        gates.ids,
        gates.owner,
        gates.spans(blocks["BLOCK_R"]),
        gates.plan.num_adapters,
        m,
        c,
        k,
        factor.shape[1],
        weight.stride(0),
        weight.stride(1),
        s.stride(0),
        factor.stride(0),
        factor.stride(1),
        gates.rows_per_id,
        HAS_IDS=gates.ids is not None,
        HAS_BIAS=bias is not None,
        EVEN_K=k % blocks["BLOCK_K"] == 0,
        **blocks,
    )
    return y


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, factor: Tensor, gates: _Gates
) -> Tensor:
    """x W^T + bias + s B^T, by whichever is known to be faster; by cuBLAS where neither is."""

    def run(config: tuning.Config) -> Tensor:
        if config["APPEND"]:
            return _append(x, weight, bias, s, factor, gates, config)
        return _add_product(_expand(s, factor, bias, gates, 0.0, None), x, weight.t())

    (m, k), (c, ranks) = x.shape, factor.shape
    # The rows of y too, which does not exist yet.
    tma = x.element_size() == 2 and c % 8 == 0 and runtime.has_tma(x, weight)
    candidates = tiles.append(ranks, x.dtype, tma)
    if m * c == 0:
        return run(candidates[0])
    # By M too: so does cuBLAS, which it is measured against, choose its kernels.
    sizes = {"M": m, "K": k, "N": c, "R": ranks, "itemsize": x.element_size(), "tma": int(tma)}
    return run(tuning.choose("lora_linear_append", x, sizes, candidates, run))


_PROGRAMS = 264  # two waves of an H200's 132 multiprocessors


def _contract(
    x: Tensor,  # (M, C)
    factor: Tensor | None,  # (C, R), for the sums over columns
    s: Tensor | None,  # (M, R), for the sums over rows
    gates: _Gates,
    ranks: int,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Parts of x factor (P, M, R) and of drop(x)^T s (P, C, R), float32."""
    m, c = x.shape
    has_dropout = dropout > 0.0

    def run(config: tuning.Config) -> tuple[Tensor | None, Tensor | None]:
        col_blocks = triton.cdiv(c, config["BLOCK_C"])
        rank_blocks = triton.cdiv(ranks, config["BLOCK_R"])
        row_blocks = triton.cdiv(m, config["BLOCK_M"])
        chunks = min(row_blocks, max(1, _PROGRAMS // max(col_blocks * rank_blocks, 1)))
        blocks_of_chunk = triton.cdiv(row_blocks, max(chunks, 1))
        chunks = triton.cdiv(row_blocks, max(blocks_of_chunk, 1))
        over_cols = over_rows = None
        if factor is not None:
            over_cols = x.new_empty((col_blocks, m, ranks), dtype=torch.float32)
        if s is not None:
            over_rows = x.new_empty((chunks, c, ranks), dtype=torch.float32)
        if m * c * ranks == 0:
            return over_cols, over_rows
        lora_linear_contract_kernel[(col_blocks, chunks, rank_blocks)](
            x,
            factor,
            s,
            over_cols,
            over_rows,
            gates.ids,
            gates.owner,
            seed,
            m,
            c,
            ranks,
            0 if s is None else s.stride(0),
            0 if factor is None else factor.stride(0),
            0 if factor is None else factor.stride(1),
            gates.rows_per_id,
            blocks_of_chunk * config["BLOCK_M"],
            philox.threshold(dropout),
            OVER_COLS=factor is not None,
            OVER_ROWS=s is not None,
            HAS_IDS=gates.ids is not None,
            HAS_DROPOUT=has_dropout,
            **config,
        )
        return over_cols, over_rows

    def trial(config: tuning.Config) -> list[Tensor]:
        """With the sums over the parts, of which a choice has more or fewer."""
        over_cols, over_rows = run(config)
        sums = [] if over_cols is None else [_reduce(over_cols, x.new_empty(m, ranks), gates)]
        return (
            sums if over_rows is None else [*sums, _reduce(over_rows, x.new_empty(c, ranks), None)]
        )

    # Not by M, as in _shrink.
    sizes = {"C": c, "R": ranks, "itemsize": x.element_size(), "dropout": int(has_dropout)}
    sizes |= {"over_cols": int(factor is not None), "over_rows": int(s is not None)}
    candidates = tiles.contract(ranks, x.dtype, has_dropout)
    tried = trial if m * c * ranks else None
    return run(tuning.choose("lora_linear_contract", x, sizes, candidates, tried))


def _reduce(parts: Tensor, out: Tensor, gates: _Gates | None) -> Tensor:
    """Sums (P, rows, R) into out (rows, R), of any strides and dtype."""
    rows, ranks = out.shape
    if parts.shape[0] == 0:
        return out.zero_()
    if out.numel() == 0:
        return out
    gated = gates is not None
    has_ids = gated and gates.ids is not None
    block = 512
    lora_linear_reduce_kernel[(triton.cdiv(rows * ranks, block),)](
        parts,
        out,
        gates.ids if has_ids else None,
        gates.owner if gated else None,
        gates.scale if gated else None,
        parts.shape[0],
        rows,
        ranks,
        out.stride(0),
        out.stride(1),
        gates.rows_per_id if gated else 1,
        GATED=gated,
        HAS_IDS=has_ids,
        BLOCK=block,
        num_warps=4,
    )
    return out


def _grown(plan: Plan) -> Plan:
    """With the factor of dropout in the scales."""
    if plan.dropout == 0.0:
        return plan
    grown = 1.0 / max(1.0 - plan.dropout, 2.0**-32)
    return plan._replace(scales=tuple(scale * grown for scale in plan.scales))


def fwd(
    x: Tensor,  # (M, K)
    weights: Sequence[Tensor],  # (N_p, K) for each projection
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],  # (R_j, K) for each adapter
    b: Sequence[Tensor],  # (N_p, R_j)
    plan: Plan,
    ids: Tensor | None,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor | None]:
    """Returns y (M, N_p) for each projection, and s (M, sum R) to save."""
    x = x.contiguous()
    gates = _Gates(_grown(plan), [t.shape[0] for t in a], ids, x)
    ys = []
    start = 0
    with launch.on_device(x):
        s = _shrink(x, concatenated(a, 0), gates, plan.dropout, seed)
        for p, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            factor = concatenated(plan.of_projection(b, p), 1)
            stop = start + factor.shape[1]
            bias = None if bias is None else bias.contiguous()
            ys.append(_product(x, weight, bias, s[:, start:stop], factor, gates.ranks(start, stop)))
            start = stop
    return ys, s if saves_s("triton", x.dtype) else None


def _add_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    if y.device.type == "cpu" and y.dtype == torch.float16:  # interpreted: torch sums these in half
        return y.copy_(y.float().addmm_(x.float(), weight.float()))
    return y.addmm_(x, weight)


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
    x = x.contiguous()
    ranks = [t.shape[0] for t in a]
    gates = _Gates(_grown(plan), ranks, ids, x)
    factor_a = concatenated(a, 0)
    das: list[Tensor | None] = [None] * len(a)
    dbs: list[Tensor | None] = [None] * len(b)
    dx: Tensor | None = None
    with launch.on_device(x):
        if s is None and need_b:
            s = _shrink(x, factor_a, gates, plan.dropout, seed)
        ds = x.new_empty((x.shape[0], sum(ranks)))
        start = j = 0
        for p, dy in enumerate(dys):
            mine = plan.of_projection(b, p)
            mine_ranks = [t.shape[1] for t in mine]
            stop = start + sum(mine_ranks)
            here = gates.ranks(start, stop)
            if dy is None:
                ds[:, start:stop].zero_()
                grads = [torch.zeros_like(t) if need_b else None for t in mine]
            else:
                over_cols, over_rows = _contract(
                    dy.contiguous(),
                    concatenated(mine, 1) if need_a or need_x else None,
                    s[:, start:stop] if need_b else None,
                    here,
                    stop - start,
                    0.0,
                    None,
                )
                if over_cols is not None:
                    _reduce(over_cols, ds[:, start:stop], here)
                grads = [None] * len(mine)
                if over_rows is not None:
                    db = mine[0].new_empty((dy.shape[1], stop - start))
                    grads = list(split_columns(_reduce(over_rows, db, None), mine_ranks))
            dbs[j : j + len(mine)] = grads
            start = stop
            j += len(mine)
        if need_a:
            _, over_rows = _contract(x, None, ds, gates, sum(ranks), plan.dropout, seed)
            da = a[0].new_empty((sum(ranks), x.shape[1]))
            _reduce(over_rows, da.t(), None)
            das = list(da.split(ranks))
        if need_x:
            dx = _expand(ds, factor_a.t(), None, gates, plan.dropout, seed)
            for dy, weight in zip(dys, weights, strict=True):
                if dy is not None:
                    dx = _add_product(dx, dy, weight)
    return dx, das, dbs


for _op in ("lora_linear", "lora_linear_group"):
    registry.register(
        _op, "triton", registry.Kernel(fwd, bwd, unsupported, missing=runtime.missing)
    )
