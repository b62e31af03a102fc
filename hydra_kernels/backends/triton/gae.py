"""Generalised advantage estimation in Triton, as an associative scan of affine maps.

``csrc/include/hydra/gae.h`` has the algebra: what a token takes from its right is one number, the
carry, and a token maps the carry right of it to the carry left of it. A program scans its part of a
row block by block from the right. Where there are too few rows to fill a GPU, a row is cut into
segments: a first kernel reduces each to its map, and every program of the second applies the maps
of the segments right of its own, in their order, before it scans.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra_kernels.backends import launch, registry
from hydra_kernels.backends.token_ops import float32_only
from hydra_kernels.backends.triton import runtime

BLOCK_T = 1024
TILE = 1024  # tokens of a program's block: several rows where they are short
# Programs that fill a large GPU: 132 multiprocessors of an H100, 4 programs of 4 warps on each.
MANY_PROGRAMS = 512


@triton.jit
def compose(right_scale, right_shift, left_scale, left_shift):
    # In a reverse scan the first operand is what has been scanned, which lies on the right.
    return left_scale * right_scale, left_shift + left_scale * right_shift


@triton.jit
def _load_maps(rewards, values, mask, row_starts, offs_t, end, inside_b, scale, value_weight):
    """The maps of the tokens at offs_t, identities from end on and where the mask is False."""
    inside = inside_b & (offs_t < end)
    at = row_starts + offs_t
    keep = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    reward = tl.load(rewards + at, mask=keep, other=0.0)
    value = tl.load(values + at, mask=keep, other=0.0)
    map_scale = tl.where(keep, scale, 1.0)
    map_shift = value_weight * value + scale * reward  # 0 where not kept
    return map_scale, map_shift


@triton.jit
def gae_segment_kernel(
    rewards,
    values,
    mask,
    segment_maps,  # (B, num_segments, 2) float32
    B,
    T,
    scale,
    value_weight,
    SEGMENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The map of each segment's tokens, shifted by one as in gae_fwd_kernel."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    columns = tl.arange(0, BLOCK_T)[None, :]
    row_starts = row * T + tl.zeros([1, 1], dtype=tl.int64)
    inside_b = tl.full([1, 1], 1, dtype=tl.int1)
    total_scale = tl.full([1], 1.0, dtype=tl.float32)
    total_shift = tl.zeros([1], dtype=tl.float32)
    begin = segment * SEGMENT
    for back in range(0, SEGMENT, BLOCK_T):
        start = begin + SEGMENT - BLOCK_T - back
        if start < T:
            map_scale, map_shift = _load_maps(
                rewards,
                values,
                mask,
                row_starts,
                start + columns + 1,
                T,
                inside_b,
                scale,
                value_weight,
            )
            map_scale, map_shift = tl.associative_scan(
                (map_scale, map_shift), 1, compose, reverse=True
            )
            # Element 0 has the whole block; the block is left of what was totalled so far.
            block_scale = tl.sum(tl.where(columns == 0, map_scale, 0.0), axis=1)
            block_shift = tl.sum(tl.where(columns == 0, map_shift, 0.0), axis=1)
            total_shift = block_shift + block_scale * total_shift
            total_scale = block_scale * total_scale
    out = segment_maps + (row * tl.num_programs(1) + segment) * 2 + tl.arange(0, 1)
    tl.store(out, total_scale)
    tl.store(out + 1, total_shift)


@triton.jit
def gae_fwd_kernel(
    rewards,
    values,
    mask,
    last_values,
    segment_maps,  # (B, num_segments, 2) float32; None where there is one segment
    advantages,
    returns,
    B,
    T,
    gamma,
    scale,  # gamma lam
    value_weight,  # gamma (1 - lam)
    num_segments,
    num_blocks,  # of BLOCK_T tokens in a segment
    HAS_LAST: tl.constexpr,
    SPLIT: tl.constexpr,  # more than one segment
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    segment = tl.program_id(1)
    inside_row = rows < B
    inside_b = inside_row[:, None]
    row_starts = rows[:, None] * T
    columns = tl.arange(0, BLOCK_T)[None, :]

    carry = tl.zeros([BLOCK_B], dtype=tl.float32)
    if HAS_LAST:
        carry = gamma * tl.load(last_values + rows, mask=inside_row, other=0.0)
    if SPLIT:
        for back in range(0, num_segments - 1 - segment):
            right = segment_maps + (rows * num_segments + (num_segments - 1 - back)) * 2
            right_scale = tl.load(right, mask=inside_row, other=1.0)
            carry = tl.load(right + 1, mask=inside_row, other=0.0) + right_scale * carry

    for back in range(0, num_blocks):
        start = (segment * num_blocks + num_blocks - 1 - back) * BLOCK_T
        if start < T:
            offs_t = start + columns
            # A token needs the carry right of it, so position t scans the map of token t + 1.
            map_scale, map_shift = _load_maps(
                rewards, values, mask, row_starts, offs_t + 1, T, inside_b, scale, value_weight
            )
            map_scale, map_shift = tl.associative_scan(
                (map_scale, map_shift), 1, compose, reverse=True
            )
            from_right = map_shift + map_scale * carry[:, None]
            inside = inside_b & (offs_t < T)
            at = row_starts + offs_t
            keep = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
            # Selected after the loads, as in ppo_loss.py: then they are of 16 bytes.
            reward = tl.where(keep, tl.load(rewards + at, mask=inside), 0.0)
            value = tl.where(keep, tl.load(values + at, mask=inside), 0.0)
            advantage = tl.where(keep, (reward - value) + from_right, 0.0)
            tl.store(advantages + at, advantage, mask=inside)
            tl.store(returns + at, advantage + value, mask=inside)
            carry = tl.sum(tl.where(columns == 0, from_right, 0.0), axis=1)


def segment_blocks(B: int, T: int, block_t: int) -> int:
    """Blocks of ``block_t`` tokens that one program scans: all of a row, or fewer if rows are few.

    At least 4, so that the segments right of a program stay few against its own work.
    """
    blocks = max(1, triton.cdiv(T, block_t))
    programs = max(1, B)
    if programs >= MANY_PROGRAMS or blocks <= 4:
        return blocks
    return max(4, triton.cdiv(blocks * programs, MANY_PROGRAMS))


def fwd(
    rewards: Tensor,  # (B, T) float32, contiguous, as are all tensors below
    values: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    gamma: float,
    lam: float,
    last_values: Tensor | None,  # (B,)
) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    B, T = mask.shape
    if mask.numel() == 0:
        return advantages, returns
    block_t = min(BLOCK_T, triton.next_power_of_2(T))
    block_b = min(TILE // block_t, triton.next_power_of_2(B))
    num_blocks = segment_blocks(B, T, block_t)
    num_segments = triton.cdiv(T, num_blocks * block_t)
    flags = mask.view(torch.uint8)
    scale, value_weight = gamma * lam, gamma * (1.0 - lam)
    segment_maps = None
    with launch.on_device(mask):
        if num_segments > 1:
            segment_maps = rewards.new_empty((B, num_segments, 2))
            gae_segment_kernel[(B, num_segments)](
                rewards,
                values,
                flags,
                segment_maps,
                B,
                T,
                scale,
                value_weight,
                SEGMENT=num_blocks * block_t,
                BLOCK_T=block_t,
                num_warps=4,
            )
        gae_fwd_kernel[(triton.cdiv(B, block_b), num_segments)](
            rewards,
            values,
            flags,
            last_values,
            segment_maps,
            advantages,
            returns,
            B,
            T,
            gamma,
            scale,
            value_weight,
            num_segments,
            num_blocks,
            HAS_LAST=last_values is not None,
            SPLIT=num_segments > 1,
            BLOCK_B=block_b,
            BLOCK_T=block_t,
            num_warps=4,
        )
    return advantages, returns


def aot_signatures() -> Iterator[tuple[Any, dict[str, str | None], dict[str, Any], dict[str, Any]]]:
    """The kernels as they are launched on long and on short rows, for scripts/compile_check."""
    arrays = {"rewards": "*fp32:16", "values": "*fp32:16", "mask": "*u8:16"}
    numbers = {"B": "i32", "T": "i32:16", "scale": "fp32", "value_weight": "fp32"}
    yield (
        gae_segment_kernel,
        {**arrays, "segment_maps": "*fp32:16", **numbers},
        {"SEGMENT": 4 * BLOCK_T, "BLOCK_T": BLOCK_T},
        {"num_warps": 4},
    )
    signature = {**arrays, "advantages": "*fp32:16", "returns": "*fp32:16", **numbers}
    signature |= {"gamma": "fp32", "num_segments": "i32", "num_blocks": "i32"}
    yield (
        gae_fwd_kernel,
        {**signature, "last_values": None, "segment_maps": None},
        {"HAS_LAST": False, "SPLIT": False, "BLOCK_B": 1, "BLOCK_T": BLOCK_T},
        {"num_warps": 4, "label": "a row a program", "expects": ("wide_loads",)},
    )
    yield (
        gae_fwd_kernel,
        {**signature, "last_values": "*fp32:16", "segment_maps": "*fp32:16"},
        {"HAS_LAST": True, "SPLIT": True, "BLOCK_B": 1, "BLOCK_T": BLOCK_T},
        {"num_warps": 4, "label": "a segment a program", "expects": ("wide_loads",)},
    )
    yield (
        gae_fwd_kernel,
        {**signature, "last_values": "*fp32:16", "segment_maps": None},
        {"HAS_LAST": True, "SPLIT": False, "BLOCK_B": 16, "BLOCK_T": 64},
        {"num_warps": 4, "label": "16 short rows a program", "expects": ("wide_loads",)},
    )


registry.register(
    "gae",
    "triton",
    registry.Kernel(fwd, None, float32_only(runtime.wrong_device), missing=runtime.missing),
)
