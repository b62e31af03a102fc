"""Launches of lora_linear's joint kernel: how blocks are shared out, and which blocks there are."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from hydra_kernels.backends import launch, tuning
from hydra_kernels.backends.reference import philox
from hydra_kernels.backends.triton import runtime
from hydra_kernels.backends.triton.lora_linear_gates import Gates
from hydra_kernels.backends.triton.lora_linear_joint_kernels import (
    NUM_COUNTERS,
    lora_linear_joint_kernel,
)

Config = dict[str, int]

#: Of s. Beyond, the small product is no longer one that hides behind the wide one.
MAX_RANKS = 256
#: Blocks of rows of a unit: the time of one of y, as bytes through a multiprocessor, about.
MAX_BLOCKS_OF_UNIT = 4

_counters: dict[tuple[torch.device, int], Tensor] = {}


def covers(x: Tensor, weight: Tensor, ranks: int) -> bool:
    """Whether x (M, K) and weight (C, K), either way round in memory, and their product are what
    the copy engine can read and write."""
    if not 0 < ranks <= MAX_RANKS or x.element_size() != 2 or weight.shape[0] % 8:
        return False
    return x.dtype == weight.dtype and runtime.has_tma(x, _rows_of(weight))


def _rows_of(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.t()


def product(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (C, K)
    bias: Tensor | None,
    a: Tensor,  # (K, R)
    other: Tensor | None,  # (M, R)
    factor: Tensor,  # (C, ranks), for the first of the R
    gates: Gates,  # of the R
    dropout: float,
    seed: Tensor | None,
    config: tuning.Config,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y = x weight^T + bias + s factor^T; s = gate * (drop(x) a), (M, R); and where there is other
    float32 parts (P, K, R) of x^T other."""
    (m, k), (c, ranks) = x.shape, factor.shape
    all_ranks = a.shape[1]
    blocks = {n: size for n, size in config.items() if n not in ("JOINT", "PER_SM")}
    rows, cols, inner = (config[f"BLOCK_{size}"] for size in "MCK")
    programs = runtime.multiprocessors(x.device) * config["PER_SM"]
    row_blocks = triton.cdiv(m, rows)
    of_unit = blocks_of_unit(row_blocks, row_blocks * triton.cdiv(c, cols), programs)
    y, s = x.new_empty((m, c)), x.new_empty((m, all_ranks))
    parts = None
    if other is not None:
        units = triton.cdiv(row_blocks, of_unit)
        parts = x.new_empty((units, k, all_ranks), dtype=torch.float32)
    # Of W^T, in backward, and of GPT-2's weights the columns are next to each other in memory.
    in_rows = weight.stride(1) == 1
    block = [cols, inner] if in_rows else [inner, cols]
    lora_linear_joint_kernel[(programs,)](
        runtime.descriptor(x, [rows, inner]),
        runtime.descriptor(_rows_of(weight), block),
        a,
        s,
        s,
        other,
        parts,
        factor,
        bias,
        runtime.descriptor(y, [rows, cols]),
        launch.counters(_counters, NUM_COUNTERS, x.device),
        gates.ids,
        gates.owner,
        gates.scale,
        seed,
        m,
        c,
        k,
        all_ranks,
        ranks,
        of_unit,
        a.stride(0),
        a.stride(1),
        s.stride(0),
        0 if other is None else other.stride(0),
        factor.stride(0),
        factor.stride(1),
        gates.rows_per_id,
        philox.threshold(dropout),
        HAS_IDS=gates.ids is not None,
        HAS_BIAS=bias is not None,
        HAS_DROPOUT=dropout > 0.0,
        SUMS=other is not None,
        W_KC=not in_rows,
        AHEAD=ranks <= config["BLOCK_R"],
        **blocks,
    )
    return y, s, parts


def blocks_of_unit(row_blocks: int, tiles: int, programs: int) -> int:
    """So few units that programs with a block of y fewer than others do them all, where some have:
    then the units cost nothing at the end."""
    fewer = programs - tiles % programs
    return min(triton.cdiv(row_blocks, fewer), MAX_BLOCKS_OF_UNIT)


@functools.cache
def candidates(all_ranks: int, ranks: int, sums: bool) -> tuple[Config, ...]:
    """None is a default. Blocks of s by its own ranks, those added to y by the projection's."""
    small = min(max(triton.next_power_of_2(all_ranks), 16), 64)
    added = max(triton.next_power_of_2(ranks), 16)
    added = added if added <= 64 else 32  # in turn; more than one block of 64 at a time spills
    few = max(small, added) <= 32
    # Stages of a unit: what it has under way is what it waits for.
    blocks = [(128, 256, 64, 8, 3, 1, 6 if few or not sums else 3)]
    if few:  # with more ranks these spill
        blocks.append((256, 128, 64, 8, 3, 1, 4))
        blocks.append((128, 128, 64, 4, 2, 2, 3))  # one's loads behind the other's products
    names = ("BLOCK_M", "BLOCK_C", "BLOCK_K", "num_warps", "num_stages", "PER_SM", "STAGES")
    shared = {"JOINT": 1, "BLOCK_R": added, "BLOCK_S": small, "GROUP": 8}
    return tuple({**dict(zip(names, sizes, strict=True)), **shared} for sizes in blocks)


def aot_signatures() -> Iterator[tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """None is a default: compiled for Hopper, and the first for what has come after it."""
    for ranks, adapter in ((16, "bf16"), (32, "fp32"), (64, "bf16"), (128, "bf16")):
        for backward in (False, True):
            for i, config in enumerate(candidates(ranks, ranks, backward)):
                if adapter == "bf16" or i == 0:
                    archs = (90, 100) if i == 0 and ranks == 16 else (90,)
                    yield _signature(ranks, adapter, config, backward, archs)


def _signature(
    ranks: int, adapter: str, config: Config, backward: bool, archs: tuple[int, ...]
) -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]:
    m, c, k = (config[f"BLOCK_{size}"] for size in "MCK")
    narrow = f"{k},{c}" if backward else f"{c},{k}"
    signature: dict[str, Any] = {
        "x": f"tensordesc<bf16[{m},{k}]>",
        "w": f"tensordesc<bf16[{narrow}]>",
        "y": f"tensordesc<bf16[{m},{c}]>",
        **dict.fromkeys(("a", "f"), f"*{adapter}:16"),
        **dict.fromkeys(("s", "s_mine"), "*bf16:16"),
        "bias": None if backward else "*bf16:16",
        "other": "*bf16:16" if backward else None,
        "parts": "*fp32:16" if backward else None,
        **{"counters": "*i32:16", "scale": "*fp32:16", "seed": None},
        **dict.fromkeys(("ids", "owner"), "*i64:16"),
        **dict.fromkeys(("num_rows", "num_cols", "num_inner"), "i32:16"),
        **dict.fromkeys(("num_all_ranks", "num_ranks", "stride_s", "stride_other"), "i32:16"),
        **dict.fromkeys(("blocks_of_unit", "rows_per_id", "threshold"), "i32"),
    }
    # Of A^T columns are next to each other in memory, of B the ranks.
    apart, beside = ("stride_ak", "stride_fr"), ("stride_ar", "stride_fc")
    if not backward:
        apart, beside = beside, apart
    signature |= dict.fromkeys(apart, "i32:16")
    constants: dict[str, Any] = dict.fromkeys(beside, 1)
    constants |= {"HAS_IDS": True, "HAS_BIAS": not backward, "HAS_DROPOUT": False}
    constants |= {"SUMS": backward, "W_KC": backward, "AHEAD": ranks <= config["BLOCK_R"]}
    constants |= {n: v for n, v in config.items() if n.startswith("BLOCK")}
    constants |= {n: config[n] for n in ("GROUP", "STAGES")}
    label = f"{adapter} R={ranks} {m}x{c}x{k}{' backward' if backward else ''}"
    options: dict[str, Any] = {n: config[n] for n in ("num_warps", "num_stages")}
    options |= {"label": label, "archs": archs, "expects": ("tensor_cores", "wide_loads")}
    return lora_linear_joint_kernel, signature, constants, options
