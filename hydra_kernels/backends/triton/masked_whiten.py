"""Whitening over a mask in Triton: the moments in one launch, the whitening in another.

Each program reduces its blocks to a count, a mean and a sum of squared deviations. The program that
finishes last, found by an atomic ticket, merges them: the ticket decides who merges, not in which
order, so the result is the same every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra_kernels.backends import launch, registry
from hydra_kernels.backends.token_ops import WhitenKernel, float32_only
from hydra_kernels.backends.triton import runtime

BLOCK = 1024
MAX_PROGRAMS = 512  # 4 on each multiprocessor of an H200; merged in one block, in registers
EPS = tl.constexpr(1e-8)  # kWhitenEps of csrc/include/hydra/whiten.h


@triton.jit
def masked_whiten_moments_kernel(
    x,
    mask,
    partial,  # (MAX_PROGRAMS, 3) float64
    ticket,  # (1,) int32, 0 before and after
    moments,  # (3,) float64: count, mean, sum of squared deviations
    length,
    num_rounds,  # blocks of a program
    BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    num_programs = tl.num_programs(0)
    count = tl.zeros([], dtype=tl.float64)
    mean = tl.zeros([], dtype=tl.float64)
    m2 = tl.zeros([], dtype=tl.float64)
    for turn in range(0, num_rounds):
        offs = (turn * num_programs + program) * BLOCK + tl.arange(0, BLOCK)
        inside = offs < length
        keep = inside & (tl.load(mask + offs, mask=inside, other=0) != 0)
        # Selected after the load, as in ppo_loss.py: then it is one of 16 bytes.
        element = tl.where(keep, tl.load(x + offs, mask=inside), 0.0).to(tl.float64)
        block_count = tl.sum(keep.to(tl.float64))
        block_mean = tl.sum(element) / tl.maximum(block_count, 1.0)
        deviation = tl.where(keep, element - block_mean, 0.0)
        block_m2 = tl.sum(deviation * deviation)
        # merge() of whiten.h
        total = count + block_count
        share = block_count / tl.maximum(total, 1.0)
        apart = block_mean - mean
        m2 += block_m2 + apart * apart * count * share
        mean += apart * share
        count = total
    tl.store(partial + program * 3, count)
    tl.store(partial + program * 3 + 1, mean)
    tl.store(partial + program * 3 + 2, m2)

    # Every thread's stores come before the ticket; acq_rel publishes them to the last program.
    tl.debug_barrier()
    mine = tl.atomic_add(ticket, 1, sem="acq_rel")
    if mine == num_programs - 1:
        offs = tl.arange(0, MAX_PROGRAMS)
        written = offs < num_programs
        # .cg: other programs wrote these, so not from the first-level cache
        counts = tl.load(partial + offs * 3, mask=written, other=0.0, cache_modifier=".cg")
        means = tl.load(partial + offs * 3 + 1, mask=written, other=0.0, cache_modifier=".cg")
        m2s = tl.load(partial + offs * 3 + 2, mask=written, other=0.0, cache_modifier=".cg")
        all_count = tl.sum(counts)
        all_mean = tl.sum(counts * means) / tl.maximum(all_count, 1.0)
        apart = means - all_mean
        all_m2 = tl.sum(m2s + counts * apart * apart)
        tl.store(moments, all_count)
        tl.store(moments + 1, all_mean)
        tl.store(moments + 2, all_m2)
        tl.store(ticket, 0)


@triton.jit
def masked_whiten_fwd_kernel(
    x,
    mask,
    moments,
    out,
    length,
    SHIFT_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count = tl.load(moments)
    mean = tl.load(moments + 1)
    # whitening() of whiten.h: one element counts as variance 0; the mean is a sum of two floats
    variance = tl.load(moments + 2) / tl.maximum(count - 1.0, 1.0)
    mean_high = mean.to(tl.float32)
    mean_low = (mean - mean_high.to(tl.float64)).to(tl.float32)
    scale = (1.0 / tl.sqrt(variance + EPS)).to(tl.float32)

    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < length
    keep = inside & (tl.load(mask + offs, mask=inside, other=0) != 0)
    element = tl.where(keep, tl.load(x + offs, mask=inside), 0.0)
    whitened = ((element - mean_high) - mean_low) * scale
    if not SHIFT_MEAN:
        whitened += mean_high
    tl.store(out + offs, tl.where(keep, whitened, 0.0), mask=inside)


def moments(
    x: Tensor,  # float32, contiguous
    mask: Tensor,  # bool, contiguous
) -> Tensor:
    blocks = max(1, triton.cdiv(x.numel(), BLOCK))  # one block writes the zeros of no elements
    num_programs = min(blocks, MAX_PROGRAMS)
    out = x.new_empty(3, dtype=torch.float64)
    partial = x.new_empty((num_programs, 3), dtype=torch.float64)
    with launch.on_device(x):
        masked_whiten_moments_kernel[(num_programs,)](
            x,
            mask.view(torch.uint8),
            partial,
            launch.ticket(x.device),
            out,
            x.numel(),
            triton.cdiv(blocks, num_programs),
            BLOCK=BLOCK,
            MAX_PROGRAMS=MAX_PROGRAMS,
            num_warps=8,
        )
    return out


def fwd(
    x: Tensor,  # float32, contiguous
    mask: Tensor,  # bool, contiguous
    moments: Tensor,  # (3,) float64, contiguous
    shift_mean: bool,
) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    with launch.on_device(x):
        masked_whiten_fwd_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x,
            mask.view(torch.uint8),
            moments,
            out,
            x.numel(),
            SHIFT_MEAN=shift_mean,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return out


def aot_signatures() -> Iterator[tuple[Any, dict[str, str | None], dict[str, Any], dict[str, Any]]]:
    """Both kernels as they are launched, for scripts/compile_check."""
    arrays: dict[str, str | None] = {"x": "*fp32:16", "mask": "*u8:16", "moments": "*fp64:16"}
    yield (
        masked_whiten_moments_kernel,
        {
            **arrays,
            "partial": "*fp64:16",
            "ticket": "*i32",
            "length": "i64:16",
            "num_rounds": "i32",
        },
        {"BLOCK": BLOCK, "MAX_PROGRAMS": MAX_PROGRAMS},
        {"num_warps": 8, "expects": ("wide_loads",)},
    )
    yield (
        masked_whiten_fwd_kernel,
        {**arrays, "out": "*fp32:16", "length": "i64:16"},
        {"SHIFT_MEAN": True, "BLOCK": BLOCK},
        {"num_warps": 8, "expects": ("wide_loads",)},
    )


registry.register(
    "masked_whiten",
    "triton",
    WhitenKernel(
        fwd, None, float32_only(runtime.wrong_device), missing=runtime.missing, moments=moments
    ),
)
