"""lora_linear's wide product and both small ones in one grid, for GPUs from Hopper on.

y = x w^T + bias + s f^T, where s = gate * (drop(x) a). Forward, x is the layer's input and a, f are
its A^T and B; backward, x is dY, the results are dX and s is dS, and dB comes out of the same read.

What it is for: a shrink of its own reads x before the wide product may begin, and waits for memory
all the while. Here some programs begin with it while the others already multiply: blocks of
rows are put together into units, and a program that has done a unit goes on with blocks of y. A
block of y needs s after its last step over K, so that its program seldom waits.

Why it cannot hang. Every program draws tickets until it gets one past those of the units. So

- each unit is done by exactly one program, and none waits while it does one;
- a program waits (for all units, once) only when every ticket of a unit has been drawn, that is,
  when each of them is done or in the hands of a program that runs and waits for nothing;
- whatever the order in which programs start and end, how many of them fit on the device, and what
  else runs there: also one after another, as the interpreter runs them, where the first does all.

The one ticket past the units which each program draws says which blocks of y are its own: it takes
every so manieth from there on. That is a partition of them, however tickets fall: those who began
with units have the largest tickets, and where blocks do not divide by programs, the fewer blocks.

What is written does not depend on who does it when: every element of s, of y and of the parts of dB
is one program's own sum, in one order.

Visibility: s is written by ordinary stores, not by the copy engine, and read by ordinary loads.
A barrier orders the stores of a program's threads before the release of the count of finished
units; its acquire by one thread, before a barrier, precedes the loads of the others.

The counters are zero at the start of a launch, and the last program to leave sets them back: it
leaves after all others have read them for the last time.
"""

import triton
import triton.language as tl

from hydra_kernels.backends.triton.lora_linear_kernels import _gate, _kept
from hydra_kernels.backends.triton.tiles import tile_of

# Of the counters: tickets drawn, units finished, programs that have left.
_TICKETS = tl.constexpr(0)
_FINISHED = tl.constexpr(1)
_LEFT = tl.constexpr(2)
NUM_COUNTERS = 4


@triton.jit
def _unit(
    x, a, s, other, parts, ids, owner, scale, seed, unit, first, last, num_rows, num_inner,
    num_ranks, stride_ak, stride_ar, stride_s, stride_other, rows_per_id, threshold,
    HAS_IDS: tl.constexpr, HAS_DROPOUT: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """s of the blocks of rows from first to last; with SUMS also x^T other over all of them."""
    for block in range(first, last):
        first_row = block * BLOCK_M
        rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
        inside = rows < num_rows
        for r in range(0, num_ranks, BLOCK_S):
            offs_r = r + tl.arange(0, BLOCK_S)
            r_inside = offs_r < num_ranks
            gate = _gate(ids, rows, inside, rows_per_id, owner, scale, offs_r, r_inside, HAS_IDS)
            total = tl.zeros((BLOCK_M, BLOCK_S), dtype=tl.float32)
            if SUMS:
                written = num_inner if block > first else 0
                at = parts + unit.to(tl.int64) * num_inner * num_ranks + offs_r[None, :]
            if tl.max(tl.max(tl.abs(gate), axis=1), axis=0) > 0.0:
                if SUMS:
                    small = tl.load(
                        other + rows[:, None] * stride_other + offs_r[None, :],
                        mask=inside[:, None] & r_inside[None, :],
                        other=0.0,
                    )
                for start in tl.range(0, num_inner, BLOCK_K, num_stages=STAGES):
                    offs_k = start + tl.arange(0, BLOCK_K)
                    mask = (offs_k < num_inner)[:, None] & r_inside[None, :]
                    wide = x.load([first_row, start])
                    if SUMS:
                        mine = at + offs_k[:, None].to(tl.int64) * num_ranks
                        # What this program has written for the unit's blocks before.
                        known = (offs_k < written)[:, None] & r_inside[None, :]
                        before = tl.load(mine, mask=known, other=0.0)
                        tl.store(mine, tl.dot(wide.T, small, before), mask=mask)
                    if HAS_DROPOUT:
                        keep = _kept(seed, rows, start, num_inner, threshold, BLOCK_K)
                        wide = tl.where(keep, wide, 0.0)
                    factor = tl.load(
                        a
                        + offs_k[:, None].to(tl.int64) * stride_ak
                        + offs_r[None, :].to(tl.int64) * stride_ar,
                        mask=mask,
                        other=0.0,
                    ).to(wide.dtype)
                    total = tl.dot(wide, factor, total)
            elif SUMS:
                if block == first:
                    for start in range(0, num_inner, BLOCK_K):
                        offs_k = start + tl.arange(0, BLOCK_K)
                        mask = (offs_k < num_inner)[:, None] & r_inside[None, :]
                        mine = at + offs_k[:, None].to(tl.int64) * num_ranks
                        tl.store(mine, tl.zeros((BLOCK_K, BLOCK_S), tl.float32), mask=mask)
            tl.store(
                s + rows[:, None] * stride_s + offs_r[None, :],
                # An infinity in a rank must not reach a row that is off.
                tl.where(gate != 0.0, total * gate, 0.0),
                mask=inside[:, None] & r_inside[None, :],
            )
        if SUMS:
            tl.debug_barrier()  # the next block reads what other threads have written to parts


@triton.jit
def _small(s, rows, inside, first, num_ranks, stride_s, BLOCK_R: tl.constexpr):
    """(rows, BLOCK_R) of s."""
    offs_r = first + tl.arange(0, BLOCK_R)
    at = s + rows[:, None] * stride_s + offs_r[None, :]
    return tl.load(at, mask=inside[:, None] & (offs_r < num_ranks)[None, :], other=0.0)


@triton.jit
def _narrow(f, offs_c, inside, first, num_ranks, stride_fc, stride_fr, BLOCK_R: tl.constexpr):
    """(BLOCK_R, columns) of f^T."""
    offs_r = first + tl.arange(0, BLOCK_R)
    at = offs_c.to(tl.int64)[None, :] * stride_fc + offs_r.to(tl.int64)[:, None] * stride_fr
    return tl.load(f + at, mask=(offs_r < num_ranks)[:, None] & inside[None, :], other=0.0)


@triton.jit
def _add(total, small, narrow):
    """total + small narrow; s is zero wherever its adapter is off, and B may be anything there."""
    any_on = tl.max(tl.max((small != 0.0).to(tl.int32), axis=1), axis=0)
    # Changes nothing below, but ties narrow to what is known only now: without it the compiler
    # waits for narrow, to copy it into shared memory, right where it is loaded.
    narrow = tl.where(any_on > 0, narrow, 0.0)
    if any_on > 0:
        total = tl.dot(small, narrow.to(small.dtype), total)
    return total


@triton.jit
def lora_linear_joint_kernel(
    x,  # (M, K), a descriptor, as are w and y
    w,  # (C, K), or with W_KC (K, C)
    a,  # (K, R): all that s has
    s,  # (M, R)
    s_mine,  # (M, ranks) of it, to which f belongs
    other,  # (M, R), with SUMS
    parts,  # (units, K, R) float32, with SUMS: x^T other
    f,  # (C, ranks)
    bias,  # (C,)
    y,  # (M, C)
    counters,  # (NUM_COUNTERS,) int32
    ids,
    owner,  # (R,)
    scale,  # (R,)
    seed,
    num_rows,
    num_cols,
    num_inner,  # K
    num_all_ranks,  # R
    num_ranks,
    blocks_of_unit,
    stride_ak,
    stride_ar,
    stride_s,
    stride_other,
    stride_fc,
    stride_fr,
    rows_per_id,
    threshold,
    HAS_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SUMS: tl.constexpr,
    W_KC: tl.constexpr,
    AHEAD: tl.constexpr,  # all ranks are one block
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    num_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_cols, BLOCK_C)
    units = tl.cdiv(num_tiles[0], blocks_of_unit)
    ticket = tl.atomic_add(counters + _TICKETS, 1, sem="relaxed")
    while ticket < units:
        first = ticket * blocks_of_unit
        last = tl.minimum(first + blocks_of_unit, num_tiles[0])
        _unit(
            x, a, s, other, parts, ids, owner, scale, seed, ticket, first, last, num_rows,
            num_inner, num_all_ranks, stride_ak, stride_ar, stride_s, stride_other, rows_per_id,
            threshold, HAS_IDS, HAS_DROPOUT, SUMS, BLOCK_M, BLOCK_K, BLOCK_S, STAGES,
        )  # fmt: skip
        tl.debug_barrier()  # every thread's part of s, before one thread says that it is there
        tl.atomic_add(counters + _FINISHED, 1, sem="release")
        ticket = tl.atomic_add(counters + _TICKETS, 1, sem="relaxed")

    programs = tl.num_programs(0)
    ready = 0  # whether s is
    for tile in range(ticket - units, num_tiles[0] * num_tiles[1], programs):
        row, col = tile_of(tile, num_tiles[0], num_tiles[1], GROUP)
        first_row, first_col = row * BLOCK_M, col * BLOCK_C
        rows = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
        inside = rows < num_rows
        offs_c = first_col + tl.arange(0, BLOCK_C)
        c_inside = offs_c < num_cols
        if AHEAD:  # under way while the tensor cores work
            small = _small(s_mine, rows, rows < num_rows * ready, 0, num_ranks, stride_s, BLOCK_R)
            narrow = _narrow(f, offs_c, c_inside, 0, num_ranks, stride_fc, stride_fr, BLOCK_R)
        if HAS_BIAS:
            added = tl.load(bias + offs_c, mask=c_inside, other=0.0)
        total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        for start in range(0, num_inner, BLOCK_K):
            wide = x.load([first_row, start])
            if W_KC:
                total = tl.dot(wide, w.load([start, first_col]), total)
            else:
                total = tl.dot(wide, w.load([first_col, start]).T, total)
        if ready == 0:
            while tl.atomic_add(counters + _FINISHED, 0, sem="acquire") < units:
                pass
            if AHEAD:
                small = _small(s_mine, rows, inside, 0, num_ranks, stride_s, BLOCK_R)
            ready = 1
        if AHEAD:
            total = _add(total, small, narrow)
        else:
            for r in tl.range(0, num_ranks, BLOCK_R, num_stages=1):
                small = _small(s_mine, rows, inside, r, num_ranks, stride_s, BLOCK_R)
                narrow = _narrow(f, offs_c, c_inside, r, num_ranks, stride_fc, stride_fr, BLOCK_R)
                total = _add(total, small, narrow)
        if HAS_BIAS:
            total += added.to(tl.float32)[None, :]
        y.store([first_row, first_col], total.to(y.dtype))

    if tl.atomic_add(counters + _LEFT, 1, sem="acq_rel") == programs - 1:
        tl.store(counters + tl.arange(0, 4), 0)
