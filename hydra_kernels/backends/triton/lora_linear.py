"""LoRA linear layers on a GPU: cuBLAS for the wide products, Triton for the small ones.

shrink: s = gate * (drop(x) A^T). expand: y = drop(s B^T) + bias, to which cuBLAS then adds the wide
product. append: the wide product and s B^T in one kernel, only where the tuning table or
HYDRA_AUTOTUNE=1 has found it to be faster than those two; from Hopper on it may read and write by
descriptors, where rows are aligned. joint (lora_linear_joint_kernels.py): shrink and append in one
grid, forward and in dX, again only where found to be faster. contract: the sums of backward over
rows and over columns, dS and dB in one read of dY and dA in one of x; it writes partial sums, which
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

import torch
import triton
from torch import Tensor

from hydra_kernels.backends import launch, registry, tuning
from hydra_kernels.backends.lora_plan import Plan, concatenated, saves_s, split_columns
from hydra_kernels.backends.reference import philox
from hydra_kernels.backends.triton import lora_linear_joint as joint
from hydra_kernels.backends.triton import lora_linear_tiles as tiles
from hydra_kernels.backends.triton import runtime
from hydra_kernels.backends.triton.lora_linear_append import append as _append
from hydra_kernels.backends.triton.lora_linear_append import describable
from hydra_kernels.backends.triton.lora_linear_gates import Gates
from hydra_kernels.backends.triton.lora_linear_kernels import (
    lora_linear_contract_kernel,
    lora_linear_expand_kernel,
    lora_linear_reduce_kernel,
    lora_linear_shrink_kernel,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported(*tensors: Tensor | None) -> list[str]:
    return [*runtime.wrong_device(*tensors), *registry.wrong_dtype(_DTYPES, *tensors)]


def _shrink(x: Tensor, a: Tensor, gates: Gates, dropout: float, seed: Tensor | None) -> Tensor:
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
    gates: Gates,
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


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor,
    factor: Tensor,
    gates: Gates,
    config: tuning.Config,
) -> Tensor:
    """x W^T + bias + s B^T."""
    if config["APPEND"]:
        return _append(x, weight, bias, s, factor, gates, config)
    return _add_product(_expand(s, factor, bias, gates, 0.0, None), x, weight.t())


def _later_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, factor: Tensor, gates: Gates
) -> Tensor:
    """x W^T + bias + s B^T, by whichever is known to be faster; by cuBLAS where neither is."""

    def run(config: tuning.Config) -> Tensor:
        return _product(x, weight, bias, s, factor, gates, config)

    (m, k), (c, ranks) = x.shape, factor.shape
    tma = describable(x, weight)
    candidates = tiles.append(ranks, x.dtype, tma)
    if m * c == 0:
        return run(candidates[0])
    # By M too: so does cuBLAS, which it is measured against, choose its kernels.
    sizes = {"M": m, "K": k, "N": c, "R": ranks, "itemsize": x.element_size(), "tma": int(tma)}
    return run(tuning.choose("lora_linear_append", x, sizes, candidates, run))


def _first_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,  # (sum R, K)
    factor: Tensor,  # (N, R) of the first ranks
    gates: Gates,  # of all ranks
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """s of all ranks, and x W^T + bias + s B^T, as ``_later_product`` or both by one kernel."""
    (m, k), (c, ranks) = x.shape, factor.shape
    mine = gates.ranks(0, ranks)

    def run(config: tuning.Config) -> tuple[Tensor, Tensor]:
        if config.get("JOINT"):
            y, s, _ = joint.product(
                x, weight, bias, a.t(), None, factor, gates, dropout, seed, config
            )
            return y, s
        s = _shrink(x, a, gates, dropout, seed)
        return _product(x, weight, bias, s[:, :ranks], factor, mine, config), s

    tma = describable(x, weight)
    whole = joint.covers(x, weight, a.shape[0])
    candidates = tiles.append(ranks, x.dtype, tma)
    if whole:
        candidates += joint.candidates(a.shape[0], ranks, False)
    if m * c == 0:
        return run(candidates[0])
    sizes = {"M": m, "K": k, "N": c, "R": ranks, "itemsize": x.element_size(), "tma": int(tma)}
    sizes |= {"sum_R": a.shape[0], "dropout": int(dropout > 0.0), "joint": int(whole)}
    return run(tuning.choose("lora_linear_fwd", x, sizes, candidates, run))


_PROGRAMS = 264  # two waves of an H200's 132 multiprocessors


def _contract(
    x: Tensor,  # (M, C)
    factor: Tensor | None,  # (C, R), for the sums over columns
    s: Tensor | None,  # (M, R), for the sums over rows
    gates: Gates,
    ranks: int,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Parts of x factor (P, M, R) and of drop(x)^T s (P, C, R), float32; of the first only what a
    row's own adapter has, (P, M, gates.width()), where that is much less."""
    m, c = x.shape
    width, within = (0, None) if factor is None else (gates.width(), gates.within())
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
            over_cols = x.new_empty((col_blocks, m, width or ranks), dtype=torch.float32)
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
            within,
            width,
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


def _reduce(parts: Tensor, out: Tensor, gates: Gates | None) -> Tensor:
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
        gates.within() if gated else None,
        gates.width() if gated else 0,
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


def _ds_db(
    dy: Tensor,  # (M, N)
    factor: Tensor | None,  # (N, R), to have dS
    s: Tensor | None,  # (M, R), to have dB
    gates: Gates,
    ds: Tensor,  # (M, R), is written
    dtype: torch.dtype,
) -> Tensor | None:
    """dB (N, R) in ``dtype``."""
    over_cols, over_rows = _contract(dy, factor, s, gates, ds.shape[1], 0.0, None)
    if over_cols is not None:
        _reduce(over_cols, ds, gates)
    if over_rows is None:
        return None
    return _reduce(over_rows, dy.new_empty((dy.shape[1], ds.shape[1]), dtype=dtype), None)


def _dx_ds_db(
    dy: Tensor,  # (M, N)
    weight: Tensor,  # (N, K)
    a: Tensor,  # (R, K)
    b: Tensor,  # (N, R)
    s: Tensor | None,  # (M, R), to have dB
    gates: Gates,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dY W + dS A, dS, and dB in ``dtype``: of a single projection and without dropout."""
    (m, n), (ranks, k) = dy.shape, a.shape

    def run(config: tuning.Config) -> tuple[Tensor, Tensor, Tensor | None]:
        if config["JOINT"]:
            dx, ds, parts = joint.product(
                dy, weight.t(), None, b, s, a.t(), gates, 0.0, None, config
            )
            if parts is None:
                return dx, ds, None
            return dx, ds, _reduce(parts, dy.new_empty((n, ranks), dtype=dtype), None)
        ds = dy.new_empty((m, ranks))
        db = _ds_db(dy, b, s, gates, ds, dtype)
        return _add_product(_expand(ds, a.t(), None, gates, 0.0, None), dy, weight), ds, db

    default = {"JOINT": 0}
    if m * k == 0 or not joint.covers(dy, weight.t(), ranks):
        return run(default)
    sizes = {"M": m, "K": k, "N": n, "R": ranks, "itemsize": dy.element_size()}
    sizes["sums"] = int(s is not None)
    candidates = default, *joint.candidates(ranks, ranks, s is not None)
    return run(tuning.choose("lora_linear_bwd", dy, sizes, candidates, run))


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
    gates = Gates(_grown(plan), [t.shape[0] for t in a], ids, x)
    ys = []
    start = 0
    with launch.on_device(x):
        for p, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            factor = concatenated(plan.of_projection(b, p), 1)
            stop = start + factor.shape[1]
            bias = None if bias is None else bias.contiguous()
            if p == 0:
                y, s = _first_product(
                    x, weight, bias, concatenated(a, 0), factor, gates, plan.dropout, seed
                )
            else:
                mine = gates.ranks(start, stop)
                y = _later_product(x, weight, bias, s[:, start:stop], factor, mine)
            ys.append(y)
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
    gates = Gates(_grown(plan), ranks, ids, x)
    factor_a = concatenated(a, 0)
    das: list[Tensor | None] = [None] * len(a)
    dbs: list[Tensor | None] = [None] * len(b)
    dx: Tensor | None = None
    db: Tensor | None
    with launch.on_device(x):
        if s is None and need_b:
            s = _shrink(x, factor_a, gates, plan.dropout, seed)
        kept = s if need_b else None
        if need_x and plan.dropout == 0.0 and len(dys) == 1 and dys[0] is not None:
            factor_b = concatenated(b, 1)
            dx, ds, db = _dx_ds_db(
                dys[0].contiguous(), weights[0], factor_a, factor_b, kept, gates, b[0].dtype
            )
            if db is not None:
                dbs = list(split_columns(db, ranks))
        else:
            ds = x.new_empty((x.shape[0], sum(ranks)))
            start = 0
            dbs = []
            for p, dy in enumerate(dys):
                mine = plan.of_projection(b, p)
                mine_ranks = [t.shape[1] for t in mine]
                stop = start + sum(mine_ranks)
                if dy is None:
                    ds[:, start:stop].zero_()
                    dbs += [torch.zeros_like(t) if need_b else None for t in mine]
                else:
                    db = _ds_db(
                        dy.contiguous(),
                        concatenated(mine, 1) if need_a or need_x else None,
                        None if kept is None else kept[:, start:stop],
                        gates.ranks(start, stop),
                        ds[:, start:stop],
                        mine[0].dtype,
                    )
                    dbs += [None] * len(mine) if db is None else split_columns(db, mine_ranks)
                start = stop
            if need_x:
                dx = _expand(ds, factor_a.t(), None, gates, plan.dropout, seed)
                for dy, weight in zip(dys, weights, strict=True):
                    if dy is not None:
                        dx = _add_product(dx, dy, weight)
        if need_a:
            _, over_rows = _contract(x, None, ds, gates, sum(ranks), plan.dropout, seed)
            da = a[0].new_empty((sum(ranks), x.shape[1]))
            _reduce(over_rows, da.t(), None)
            das = list(da.split(ranks))
    return dx, das, dbs


for _op in ("lora_linear", "lora_linear_group"):
    registry.register(
        _op, "triton", registry.Kernel(fwd, bwd, unsupported, missing=runtime.missing)
    )
