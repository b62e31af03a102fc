"""Launches of lora_linear's append kernel: the wide product and what s adds to it."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from hydra_kernels.backends import tuning
from hydra_kernels.backends.triton import runtime
from hydra_kernels.backends.triton.lora_linear_gates import Gates
from hydra_kernels.backends.triton.lora_linear_kernels import lora_linear_append_kernel


def describable(x: Tensor, weight: Tensor) -> bool:
    """Whether the copy engine can read these, and write their product, which does not exist yet."""
    return x.element_size() == 2 and weight.shape[0] % 8 == 0 and runtime.has_tma(x, weight)


def append(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (C, K)
    bias: Tensor | None,
    s: Tensor,  # (M, R), rows apart by its stride
    factor: Tensor,  # (C, R)
    gates: Gates,
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
