"""Block sizes of lora_linear's Triton kernels: the generic default first, then those to be timed
against it where that is asked for (backends/tuning.py)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton

from hydra_kernels.backends.triton.lora_linear_kernels import (
    lora_linear_append_kernel,
    lora_linear_contract_kernel,
    lora_linear_expand_kernel,
    lora_linear_reduce_kernel,
    lora_linear_shrink_kernel,
)

Config = dict[str, int]


def rank_block(ranks: int, dtype: torch.dtype) -> int:
    # Products in full float32 are not the tensor cores': more ranks at once spill.
    most = 16 if dtype == torch.float32 else 64
    return min(max(triton.next_power_of_2(ranks), 16), most)


def _config(m: int, c: int, r: int, num_warps: int, num_stages: int | None = None) -> Config:
    config = {"BLOCK_M": m, "BLOCK_C": c, "BLOCK_R": r, "num_warps": num_warps}
    return config if num_stages is None else {**config, "num_stages": num_stages}


@functools.cache
def shrink(ranks: int, dtype: torch.dtype, dropout: bool) -> tuple[Config, ...]:
    block = rank_block(ranks, dtype)
    wide = 64 if dtype == torch.float32 or (dropout and block > 32) else 128
    default = _config(64, wide, block, 4)
    if dtype == torch.float32:
        return default, _config(32, 64, block, 4), _config(64, 32, block, 4, 4)
    others = [
        _config(32, 128, block, 4, 4),
        _config(64, 64, block, 4, 5),
        _config(128, 64, block, 8, 4),
    ]
    if not dropout:
        others.append(_config(64, 256, block, 8, 3))
    return default, *others


@functools.cache
def expand(ranks: int, dtype: torch.dtype) -> Config:
    block = rank_block(ranks, dtype)
    if dtype == torch.float32:
        return _config(32, 64, block, 4)
    # Eight warps for the widest rank: four run out of registers on sm_80 (Triton 3.7).
    return _config(64, 128, block, 8 if block > 32 else 4)


@functools.cache
def append(ranks: int, dtype: torch.dtype, tma: bool) -> tuple[Config, ...]:
    """First not to: then the product is cuBLAS's, onto what expand has written."""
    # The sums of a wide product leave no registers for more ranks at once.
    block = min(rank_block(ranks, dtype), 32)
    blocks = [  # rows, columns, K; warps, stages; by the copy engine
        (128, 128, 64, 8, 3, 0),
        (128, 128, 64, 4, 4, 0),
        (128, 256, 64, 8, 3, 0),
        (256, 128, 64, 8, 3, 0),
        (64, 128, 64, 4, 4, 0),
    ]
    if tma:
        blocks += [(128, 256, 64, 8, 3, 1), (128, 256, 64, 8, 4, 1), (128, 128, 64, 4, 3, 1)]
    if dtype == torch.float32:
        blocks = []  # products on the ordinary cores: cuBLAS's are hard to beat
    names = ("BLOCK_M", "BLOCK_C", "BLOCK_K", "num_warps", "num_stages", "TMA")
    configs = [dict(zip(names, sizes, strict=True)) for sizes in blocks]
    shared = {"APPEND": 1, "BLOCK_R": block, "GROUP": 8}
    return {"APPEND": 0}, *({**config, **shared} for config in configs)


@functools.cache
def contract(ranks: int, dtype: torch.dtype, dropout: bool) -> tuple[Config, ...]:
    block = rank_block(ranks, dtype)
    if dtype == torch.float32:
        return _config(32, 64, block, 4), _config(32, 32, block, 4), _config(32, 64, block, 8)
    # As many columns as their sums leave registers for: each column block costs a part of dS.
    wide = {16: 256, 32: 128, 64: 64 if dropout else 128}[block]
    default = _config(64, wide, block, 8)
    others = [_config(32, wide, block, 8), _config(64, 64, block, 4), _config(128, 64, block, 8)]
    if block < 64:
        others.append(_config(64, 128, block, 4))
    return default, *(config for config in others if config != default)


def _build(config: Config, label: str, **options: Any) -> tuple[dict[str, int], dict[str, Any]]:
    """A config's blocks, and its launch options with those of compile_check."""
    blocks = {name: size for name, size in config.items() if name.startswith("BLOCK")}
    rest = {name: size for name, size in config.items() if name not in blocks}
    return blocks, {**rest, "label": f"{label} {'x'.join(map(str, config.values()))}", **options}


def aot_signatures() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """The kernels as they are launched for one adapter of each block of ranks."""
    for dtype, name, ranks in (
        (torch.bfloat16, "bf16", (16, 32, 64)),
        (torch.float32, "fp32", (16,)),
    ):
        for rank in ranks:
            for dropout in (False, True):
                yield from _of_rank(dtype, name, rank, dropout)
            if rank <= 32:  # its widest block of ranks
                yield from _appended(dtype, name, rank)
        for within in (None, "*i32:16"):
            yield (
                lora_linear_reduce_kernel,
                {"parts": "*fp32:16", "out": f"*{name}:16", "ids": "*i64:16", "owner": "*i64:16"}
                | {"within": within, "width": "i32:16"}
                | {"scale": "*fp32:16", "num_parts": "i32", "num_rows": "i32:16"}
                | {"num_ranks": "i32:16", "stride_row": "i32:16", "rows_per_id": "i32"},
                {"GATED": True, "HAS_IDS": True, "BLOCK": 512, "stride_rank": 1},
                {"label": name + " within" * (within is not None), "num_warps": 4},
            )


def _of_rank(
    dtype: torch.dtype, name: str, rank: int, dropout: bool
) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    label = f"{name} R={rank}{' dropout' if dropout else ''}"
    wide = f"*{name}:16"
    common = {
        **dict.fromkeys(("ids", "owner", "seed"), "*i64:16"),
        **dict.fromkeys(("num_rows", "num_cols", "num_ranks"), "i32:16"),
        **dict.fromkeys(("rows_per_id", "threshold"), "i32"),
    }
    flags = {"HAS_IDS": True, "HAS_DROPOUT": dropout}
    expects = ("wide_loads",) if dtype == torch.float32 else ("tensor_cores",)

    # What is timed on request is compiled for Hopper, as it is to be chosen there.
    for i, config in enumerate(shrink(rank, dtype, dropout)):
        archs = {"archs": (90,)} if i else {}
        blocks, options = _build(config, label, expects=expects, **archs)
        # A^T: columns are next to each other
        yield (
            lora_linear_shrink_kernel,
            {"x": wide, "f": wide, "s": wide, "scale": "*fp32:16", "stride_fr": "i32:16"} | common,
            {**flags, **blocks, "stride_fc": 1},
            options,
        )

    blocks, options = _build(expand(rank, dtype), label, expects=expects)
    for spans in (None, "*i32:16"):  # past one block of ranks
        yield (
            lora_linear_expand_kernel,
            {"s": wide, "f": wide, "bias": wide, "y": wide, "spans": spans, "num_ids": "i32"}
            | {"stride_s": "i32:16", "stride_fc": "i32:16"}
            | common,
            {**flags, **blocks, "HAS_BIAS": True, "stride_fr": 1},
            {**options, "label": options["label"] + " spans" * (spans is not None)},
        )

    for i, config in enumerate(contract(rank, dtype, dropout)):
        archs = {"archs": (90,)} if i else {}
        blocks, options = _build(config, label, expects=expects, **archs)
        both = not dropout  # dS and dB; with dropout, dA
        # Past MANY_RANKS rows have places for their own adapter's alone.
        for within in (None, "*i32:16") if both and rank == 64 and i == 0 else (None,):
            yield (
                lora_linear_contract_kernel,
                {"x": wide, "f": wide, "s": wide, "over_cols": "*fp32:16", "over_rows": "*fp32:16"}
                | {"stride_s": "i32:16", "stride_fc": "i32:16", "chunk": "i32:16"}
                | {"within": within, "width": "i32:16"}
                | common,
                {**flags, **blocks, "OVER_COLS": both, "OVER_ROWS": True, "stride_fr": 1},
                {**options, "label": options["label"] + " within" * (within is not None)},
            )


_SWITCHES = ("APPEND", "GROUP", "TMA")


def _appended(
    dtype: torch.dtype, name: str, rank: int
) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """None is the default: compiled for Hopper alone."""
    pointers = dict.fromkeys(("x", "w", "bias", "s", "f", "y"), f"*{name}:16")
    sizes = dict.fromkeys(("num_rows", "num_cols", "num_inner", "num_ranks"), "i32:16")
    strides = dict.fromkeys(("stride_wc", "stride_s", "stride_fc"), "i32:16")
    others: dict[str, Any] = {"ids": "*i64:16", "owner": "*i64:16"}
    others |= dict.fromkeys(("num_ids", "rows_per_id"), "i32")
    others["spans"] = "*i32:16" if rank > 16 else None  # each way once
    for config in append(rank, dtype, True):
        if config["APPEND"]:
            launched = {name: size for name, size in config.items() if name not in _SWITCHES}
            expects = ("tensor_cores", "wide_loads")
            label = f"{name} R={rank}{' TMA' if config['TMA'] else ''}"
            blocks, options = _build(launched, label, expects=expects, archs=(90,))
            flags: dict[str, Any] = {"HAS_IDS": True, "HAS_BIAS": True, "EVEN_K": True}
            flags |= {"GROUP": config["GROUP"], "TMA": config["TMA"]}
            signature = pointers | sizes | strides | others
            if config["TMA"]:
                m, c, k = (config[f"BLOCK_{size}"] for size in "MCK")
                for given, block in {"x": (m, k), "w": (c, k), "y": (m, c)}.items():
                    signature[given] = f"tensordesc<{name}[{block[0]},{block[1]}]>"
            constants = {**flags, **blocks, "stride_wk": 1, "stride_fr": 1}
            yield lora_linear_append_kernel, signature, constants, options
