"""The Triton kernels of lora_linear: shrink, expand, append, contract, reduce."""

import triton
import triton.language as tl

from hydra_kernels.backends.triton.tiles import tile_of


@triton.jit
def _kept(seed, rows, cols, num_cols, threshold, BLOCK: tl.constexpr):
    """(rows, BLOCK) bool of the columns ``cols`` on, a multiple of 8: see reference/philox."""
    key = tl.load(seed)
    offset = tl.load(seed + 1)
    groups_of_row = (num_cols + 7) // 8
    group = rows.to(tl.int64)[:, None] * groups_of_row + (
        cols // 8 + tl.arange(0, BLOCK // 8)[None, :]
    )
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = low * 0
    c2 = zero + (offset & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, c2, c3)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    draws = tl.interleave(words & 0xFFFF, words >> 16)
    return draws.to(tl.int32) >= threshold


@triton.jit
def _ids(ids, rows, inside, rows_per_id):
    """(rows,) int32, -1 where there is no row; a division of 64 bits is a hundred instructions."""
    return tl.load(ids + rows.to(tl.int32) // rows_per_id, mask=inside, other=-1).to(tl.int32)


@triton.jit
def _gate(ids, rows, inside, rows_per_id, owner, scale, offs_r, r_inside, HAS_IDS: tl.constexpr):
    """(rows, ranks) float32: each column's scale where its adapter is on."""
    factor = tl.load(scale + offs_r, mask=r_inside, other=0.0)
    if HAS_IDS:
        id_of_row = _ids(ids, rows, inside, rows_per_id)
        owner_of_rank = tl.load(owner + offs_r, mask=r_inside, other=-2).to(tl.int32)
        return tl.where(id_of_row[:, None] == owner_of_rank[None, :], factor[None, :], 0.0)
    return tl.where(inside[:, None], factor[None, :], 0.0)


@triton.jit
def lora_linear_shrink_kernel(
    x,  # (M, C)
    f,  # (C, R)
    s,  # (M, R)
    ids,
    owner,  # (R,)
    scale,  # (R,)
    seed,  # (2,) int64
    num_rows,
    num_cols,
    num_ranks,
    stride_fc,
    stride_fr,
    rows_per_id,
    threshold,
    HAS_IDS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < num_rows
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_inside = offs_r < num_ranks
    gate = _gate(ids, rows, inside, rows_per_id, owner, scale, offs_r, r_inside, HAS_IDS)
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if tl.max(tl.max(tl.abs(gate), axis=1), axis=0) > 0.0:
        for start in range(0, num_cols, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C)
            c_inside = offs_c < num_cols
            wide = tl.load(
                x + rows[:, None] * num_cols + offs_c[None, :],
                mask=inside[:, None] & c_inside[None, :],
                other=0.0,
            )
            if HAS_DROPOUT:
                keep = _kept(seed, rows, start, num_cols, threshold, BLOCK_C)
                wide = tl.where(keep, wide, 0.0)
            factor = tl.load(
                f + offs_c[:, None] * stride_fc + offs_r[None, :] * stride_fr,
                mask=c_inside[:, None] & r_inside[None, :],
                other=0.0,
            ).to(wide.dtype)
            total = tl.dot(wide, factor, total, input_precision="ieee")
    tl.store(
        s + rows[:, None] * num_ranks + offs_r[None, :],
        total * gate,
        mask=inside[:, None] & r_inside[None, :],
    )


@triton.jit
def _expanded(
    total, s, f, ids, owner, spans, num_ids, rows, inside, offs_c, c_inside, num_ranks,
    stride_s, stride_fc, stride_fr, rows_per_id,
    HAS_IDS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """total + s f^T; what no row of the block uses is not read."""
    start, stop = 0, num_ranks
    if spans is not None:  # from the first to the last rank of the block's own adapters
        span = _ids(ids, rows, inside, rows_per_id)
        has_one = (span >= 0) & (span < num_ids)
        start = tl.min(tl.load(spans + 2 * span, mask=has_one, other=num_ranks), 0)
        start = start // BLOCK_R * BLOCK_R
        stop = tl.max(tl.load(spans + 2 * span + 1, mask=has_one, other=0), 0)
    for r in range(start, stop, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        r_inside = offs_r < num_ranks
        any_on = 1
        if HAS_IDS:
            id_of_row = _ids(ids, rows, inside, rows_per_id)
            owner_of_rank = tl.load(owner + offs_r, mask=r_inside, other=-2).to(tl.int32)
            on = (id_of_row[:, None] == owner_of_rank[None, :]).to(tl.int32)
            any_on = tl.max(tl.max(on, axis=1), axis=0)
        if any_on > 0:
            small = tl.load(
                s + rows[:, None] * stride_s + offs_r[None, :],
                mask=inside[:, None] & r_inside[None, :],
                other=0.0,
            )
            factor = tl.load(
                f + offs_c[None, :] * stride_fc + offs_r[:, None] * stride_fr,
                mask=r_inside[:, None] & c_inside[None, :],
                other=0.0,
            ).to(small.dtype)
            total = tl.dot(small, factor, total, input_precision="ieee")
    return total


@triton.jit
def lora_linear_expand_kernel(
    s,  # (M, ld) of which R columns from `s` on
    f,  # (C, R)
    bias,  # (C,)
    y,  # (M, C)
    ids,
    owner,
    spans,  # (num_ids, 2) int32, or None: see _Gates
    num_ids,
    seed,
    num_rows,
    num_cols,
    num_ranks,
    stride_s,
    stride_fc,
    stride_fr,
    rows_per_id,
    threshold,
    HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < num_rows
    start = tl.program_id(1) * BLOCK_C
    offs_c = start + tl.arange(0, BLOCK_C)
    c_inside = offs_c < num_cols
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    total = _expanded(
        total, s, f, ids, owner, spans, num_ids, rows, inside, offs_c, c_inside, num_ranks,
        stride_s, stride_fc, stride_fr, rows_per_id, HAS_IDS, BLOCK_R,
    )  # fmt: skip
    if HAS_DROPOUT:
        keep = _kept(seed, rows, start, num_cols, threshold, BLOCK_C)
        total = tl.where(keep, total, 0.0)
    if HAS_BIAS:
        total += tl.load(bias + offs_c, mask=c_inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + rows[:, None] * num_cols + offs_c[None, :],
        total,
        mask=inside[:, None] & c_inside[None, :],
    )


@triton.jit
def lora_linear_append_kernel(
    x,  # (M, K), a descriptor with TMA, as are w and y
    w,  # (C, K)
    bias,  # (C,)
    s,  # (M, ld) of which R columns from `s` on
    f,  # (C, R)
    y,  # (M, C)
    ids,
    owner,
    spans,
    num_ids,
    num_rows,
    num_cols,
    num_inner,  # K
    num_ranks,
    stride_wc,
    stride_wk,
    stride_s,
    stride_fc,
    stride_fr,
    rows_per_id,
    HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """x w^T + bias, and s f^T as further steps of the same sums."""
    num_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_cols, BLOCK_C)
    row, col = tile_of(tl.program_id(0), num_tiles[0], num_tiles[1], GROUP)
    first_row, first_col = row * BLOCK_M, col * BLOCK_C
    rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    inside = rows < num_rows
    offs_c = first_col + tl.arange(0, BLOCK_C)
    c_inside = offs_c < num_cols
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    if TMA:
        for start in range(0, num_inner, BLOCK_K):
            wide = x.load([first_row, start])
            narrow = w.load([first_col, start])
            total = tl.dot(wide, narrow.T, total, input_precision="ieee")
    else:
        offs_k = tl.arange(0, BLOCK_K)
        x_at = x + rows[:, None] * num_inner + offs_k[None, :]
        w_at = w + offs_c[None, :].to(tl.int64) * stride_wc
        w_at += offs_k[:, None].to(tl.int64) * stride_wk
        for start in range(0, num_inner, BLOCK_K):
            x_mask, w_mask = inside[:, None], c_inside[None, :]
            if not EVEN_K:
                x_mask = x_mask & (start + offs_k < num_inner)[None, :]
                w_mask = w_mask & (start + offs_k < num_inner)[:, None]
            wide = tl.load(x_at, mask=x_mask, other=0.0)
            narrow = tl.load(w_at, mask=w_mask, other=0.0)
            total = tl.dot(wide, narrow, total, input_precision="ieee")
            x_at += BLOCK_K
            w_at += BLOCK_K * stride_wk
    total = _expanded(
        total, s, f, ids, owner, spans, num_ids, rows, inside, offs_c, c_inside, num_ranks,
        stride_s, stride_fc, stride_fr, rows_per_id, HAS_IDS, BLOCK_R,
    )  # fmt: skip
    if HAS_BIAS:
        total += tl.load(bias + offs_c, mask=c_inside, other=0.0).to(tl.float32)[None, :]
    if TMA:
        y.store([first_row, first_col], total.to(y.dtype))
    else:
        tl.store(
            y + rows[:, None] * num_cols + offs_c[None, :],
            total,
            mask=inside[:, None] & c_inside[None, :],
        )


@triton.jit
def lora_linear_contract_kernel(
    x,  # (M, C)
    f,  # (C, R)
    s,  # (M, ld) of which R columns from `s` on
    over_cols,  # (blocks of C, M, R) float32: parts of x f; (blocks of C, M, width) with ``within``
    over_rows,  # (chunks of M, C, R) float32: parts of drop(x)^T s
    ids,
    owner,
    within,  # (R,) int32, or None: see Gates
    width,
    seed,
    num_rows,
    num_cols,
    num_ranks,
    stride_s,
    stride_fc,
    stride_fr,
    rows_per_id,
    chunk,  # rows of a program, a multiple of BLOCK_M
    threshold,
    OVER_COLS: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    pid_c = tl.program_id(0)
    pid_m = tl.program_id(1).to(tl.int64)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_inside = offs_c < num_cols
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_inside = offs_r < num_ranks
    if HAS_IDS:
        owner_of_rank = tl.load(owner + offs_r, mask=r_inside, other=-2).to(tl.int32)
    if OVER_COLS:
        factor = tl.load(
            f + offs_c[:, None] * stride_fc + offs_r[None, :] * stride_fr,
            mask=c_inside[:, None] & r_inside[None, :],
            other=0.0,
        ).to(x.dtype.element_ty)
    total = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for start in range(0, chunk, BLOCK_M):
        rows = pid_m * chunk + start + tl.arange(0, BLOCK_M)
        inside = rows < num_rows
        any_on = 1
        if HAS_IDS:
            id_of_row = _ids(ids, rows, inside, rows_per_id)
            on = (id_of_row[:, None] == owner_of_rank[None, :]).to(tl.int32)
            any_on = tl.max(tl.max(on, axis=1), axis=0)
        part = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        if any_on > 0:
            wide = tl.load(
                x + rows[:, None] * num_cols + offs_c[None, :],
                mask=inside[:, None] & c_inside[None, :],
                other=0.0,
            )
            if OVER_COLS:
                part = tl.dot(wide, factor, part, input_precision="ieee")
            if OVER_ROWS:
                small = tl.load(
                    s + rows[:, None] * stride_s + offs_r[None, :],
                    mask=inside[:, None] & r_inside[None, :],
                    other=0.0,
                )
                if HAS_DROPOUT:
                    keep = _kept(seed, rows, pid_c * BLOCK_C, num_cols, threshold, BLOCK_C)
                    wide = tl.where(keep, wide, 0.0)
                total = tl.dot(tl.trans(wide), small, total, input_precision="ieee")
            if OVER_COLS:  # where it is off, reduce reads nothing
                at = pid_c.to(tl.int64) * num_rows + rows
                if within is None:
                    tl.store(
                        over_cols + at[:, None] * num_ranks + offs_r[None, :],
                        part,
                        mask=inside[:, None] & r_inside[None, :],
                    )
                else:
                    place = tl.load(within + offs_r, mask=r_inside, other=0)
                    tl.store(over_cols + at[:, None] * width + place[None, :], part, mask=on > 0)
    if OVER_ROWS:
        at = pid_m * num_cols + offs_c
        tl.store(
            over_rows + at[:, None] * num_ranks + offs_r[None, :],
            total,
            mask=c_inside[:, None] & r_inside[None, :],
        )


@triton.jit
def lora_linear_reduce_kernel(
    parts,  # (P, rows, R) float32, with ``within`` (P, rows, width)
    out,
    ids,
    owner,
    scale,
    within,
    width,
    num_parts,
    num_rows,
    num_ranks,
    stride_row,
    stride_rank,
    rows_per_id,
    GATED: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums the parts in their order; gated, times each rank's scale where its adapter is on."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(num_rows, tl.int64) * num_ranks  # a single row is a constant to the compiler
    inside = offs < size
    row = offs // num_ranks
    rank = offs % num_ranks
    on = inside
    if GATED and HAS_IDS:
        id_of_row = _ids(ids, row, inside, rows_per_id)
        on = inside & (id_of_row == tl.load(owner + rank, mask=inside, other=-2).to(tl.int32))
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    at, step = offs, size
    if within is not None:
        at = row * width + tl.load(within + rank, mask=inside, other=0)
        step = tl.cast(num_rows, tl.int64) * width
    for part in range(num_parts):
        total += tl.load(parts + part * step + at, mask=on, other=0.0)
    if GATED:
        total *= tl.load(scale + rank, mask=inside, other=0.0)
    tl.store(out + row * stride_row + rank * stride_rank, total, mask=inside)
