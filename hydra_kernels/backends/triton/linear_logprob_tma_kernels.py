"""The kernels of ``linear_logprob`` whose blocks the copy engine (TMA) brings.

A program goes through its share of the blocks in one loop, so that the first loads of a block are
under way while the one before is summed up. With SPECIALIZE a group of warps only loads and two
others have half of the rows each: what one does after its product then runs beside the other's
product, as far apart as the blocks in flight let them get. What is outside of a descriptor is read
as 0; a row that does not count is read too, and reaches its own products alone.

With SPECIALIZE the rows' descriptors are made by the kernel: each of the two groups loads its half,
and Triton sets a descriptor's block right for that only where it sees it made. One made on the host
would bring whole blocks into the room of halves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hydra_kernels.backends.triton.linear_logprob_kernels import (
    LOG2E,
    LOWEST,
    add_block,
    capped_logits,
    gradient_of,
    store_sums,
)
from hydra_kernels.backends.triton.tiles import tile_of


@triton.jit
def linear_logprob_fwd_tma_kernel(
    hidden,  # (M, D): a descriptor, or a pointer with SPECIALIZE
    ref_hidden,
    weight,  # (V, D), a descriptor
    bias,  # (V,)
    targets,  # (M,) int64
    temperature,  # () float32
    sums,  # (num_splits, 4 or 8, M) float32
    M,
    V,
    D,
    stride_hm,  # the next two for SPECIALIZE
    stride_rm,
    softcap,
    ignore_index,
    num_blocks,  # of BLOCK_V columns in a split
    HAS_REF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_V: tl.constexpr,  # V is a multiple of a split
    SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_rows, num_splits = tl.cdiv(M, BLOCK_M), tl.cdiv(V, num_blocks * BLOCK_V)
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    units = tl.cdiv(num_rows * num_splits - program, num_programs)
    x, r = hidden, ref_hidden
    if SPECIALIZE:
        x = tl.make_tensor_descriptor(hidden, [M, D], [stride_hm, 1], [BLOCK_M, BLOCK_D])
        if HAS_REF:
            r = tl.make_tensor_descriptor(ref_hidden, [M, D], [stride_rm, 1], [BLOCK_M, BLOCK_D])
    scale = 1.0 / tl.load(temperature) * LOG2E
    row_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    difference = tl.zeros((BLOCK_M,), tl.float32)
    target_y = tl.zeros((BLOCK_M,), tl.float32)
    ref_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    ref_total = tl.zeros((BLOCK_M,), tl.float32)
    ref_target_y = tl.zeros((BLOCK_M,), tl.float32)
    for step in tl.range(0, units * num_blocks, flatten=not SPECIALIZE, warp_specialize=SPECIALIZE):
        unit = program + step // num_blocks * num_programs
        block = step % num_blocks
        row, split = tile_of(unit, num_rows, num_splits, GROUP)
        first_m, first_v = row * BLOCK_M, (split * num_blocks + block) * BLOCK_V
        offs_m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        target = tl.load(targets + offs_m, mask=offs_m < M, other=ignore_index)
        column = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)

        acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
        ref_acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            w = weight.load([first_v, start]).T
            acc = tl.dot(x.load([first_m, start]), w, acc, input_precision=PRECISION)
            if HAS_REF:
                ref_rows = r.load([first_m, start])
                ref_acc = tl.dot(ref_rows, w, ref_acc, input_precision=PRECISION)

        offs_v = first_v + tl.arange(0, BLOCK_V)
        inside_v = offs_v < V
        if EVEN_V:
            inside_v = tl.full((BLOCK_V,), 1, tl.int1)
        y, _ = capped_logits(acc, bias, offs_v, inside_v, softcap, HAS_BIAS, HAS_SOFTCAP)
        y = tl.where(inside_v[None, :], y, LOWEST)
        begins = block == 0  # of a split: nothing of the one before is left
        row_max = tl.where(begins, LOWEST, row_max)
        total = tl.where(begins, 0.0, total)
        weighted = tl.where(begins, 0.0, weighted)
        target_y = tl.where(begins, 0.0, target_y)
        if HAS_REF:
            difference = tl.where(begins, 0.0, difference)
            ref_max = tl.where(begins, LOWEST, ref_max)
            ref_total = tl.where(begins, 0.0, ref_total)
            ref_target_y = tl.where(begins, 0.0, ref_target_y)
        row_max, total, weighted, difference, target_y, ref_max, ref_total, ref_target_y = (
            add_block(
                y, ref_acc, bias, offs_v, inside_v, column, scale, softcap,
                row_max, total, weighted, difference, target_y, ref_max, ref_total, ref_target_y,
                HAS_REF, HAS_BIAS, HAS_SOFTCAP,
            )
        )  # fmt: skip
        store_sums(
            sums,
            split,
            M,
            offs_m,
            offs_m < tl.where(block == num_blocks - 1, M, 0),  # only then is the split whole
            row_max, total, weighted, difference, target_y, ref_max, ref_total, ref_target_y,
            HAS_REF,
        )  # fmt: skip
    if SPECIALIZE:
        # Once more what the last step has written. Triton 3.6 drops a loop that is specialised and
        # of which no result is used, its stores too.
        row, split = tile_of(program + (units - 1) * num_programs, num_rows, num_splits, GROUP)
        offs_m = (row * BLOCK_M).to(tl.int64) + tl.arange(0, BLOCK_M)
        store_sums(
            sums, split, M, offs_m, offs_m < M,
            row_max, total, weighted, difference, target_y, ref_max, ref_total, ref_target_y,
            HAS_REF,
        )  # fmt: skip


@triton.jit
def linear_logprob_dlogits_tma_kernel(
    hidden,  # (M, D): a descriptor, or a pointer with SPECIALIZE
    ref_hidden,
    weight,  # (V, D), a descriptor
    bias,  # (V,)
    targets,  # (M,) int64
    temperature,  # () float32
    upstream,  # (4, M) float32: of logprobs, entropy, logsumexp, kl
    entropy,  # (M,) float32
    kl,  # (M,) float32
    norms,  # (4, M) float32
    dlogits,  # (M, chunk): a descriptor, or a pointer with SPECIALIZE
    M,
    V,
    D,
    stride_hm,  # the next two for SPECIALIZE
    stride_rm,
    softcap,
    ignore_index,
    first,  # column of the chunk
    count,  # columns of it that there are
    chunk,
    HAS_REF: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    num_rows, num_cols = tl.cdiv(M, BLOCK_M), tl.cdiv(count, BLOCK_V)
    x, r = hidden, ref_hidden
    if SPECIALIZE:
        x = tl.make_tensor_descriptor(hidden, [M, D], [stride_hm, 1], [BLOCK_M, BLOCK_D])
        if HAS_REF:
            r = tl.make_tensor_descriptor(ref_hidden, [M, D], [stride_rm, 1], [BLOCK_M, BLOCK_D])
    for tile in tl.range(
        tl.program_id(0),
        num_rows * num_cols,
        tl.num_programs(0),
        flatten=not SPECIALIZE,
        warp_specialize=SPECIALIZE,
    ):
        row, col = tile_of(tile, num_rows, num_cols, GROUP)
        first_m, first_c = row * BLOCK_M, col * BLOCK_V
        offs_m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        target = tl.load(targets + offs_m, mask=offs_m < M, other=ignore_index)
        keep = target != ignore_index

        acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
        ref_acc = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            w = weight.load([first + first_c, start]).T
            acc = tl.dot(x.load([first_m, start]), w, acc, input_precision=PRECISION)
            if HAS_REF:
                ref_rows = r.load([first_m, start])
                ref_acc = tl.dot(ref_rows, w, ref_acc, input_precision=PRECISION)

        offs_c = first_c + tl.arange(0, BLOCK_V)
        offs_v = first + offs_c
        dz = gradient_of(
            acc, ref_acc, bias, temperature, upstream, entropy, kl, norms,
            M, offs_m, target, keep, first, count, offs_c, offs_v, offs_v < V, softcap,
            HAS_REF, HAS_BIAS, HAS_SOFTCAP,
        )  # fmt: skip
        if SPECIALIZE:  # each group of warps has half of the block, which no descriptor is of
            at = dlogits + offs_m[:, None] * chunk + offs_c[None, :]
            stored = (offs_m < M)[:, None] & (offs_c < chunk)[None, :]
            tl.store(at, dz.to(dlogits.dtype.element_ty), mask=stored)
        else:
            dlogits.store([first_m, first_c], dz.to(dlogits.dtype))
