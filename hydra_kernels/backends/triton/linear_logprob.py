"""linear_logprob in Triton.

Forward: one kernel makes a block of logits on the tensor cores and adds it to its rows' statistics
before the next; the rows of the reference go through the same block of the head, which is thus read
once for both. Programs share out the rows and ranges of the vocabulary; a second kernel merges the
ranges in their order. Nothing is atomic and no block depends on the number of rows: a row's result
is the same every time and in every batch.

Backward: the logits are made once more, a chunk of the vocabulary at a time, and turned into their
gradient, from which the gradients of the rows and of the head are products.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hydra_kernels.backends import launch, registry
from hydra_kernels.backends.triton import runtime
from hydra_kernels.backends.triton.linear_logprob_kernels import (
    NUM_SUMS,
    linear_logprob_dhidden_kernel,
    linear_logprob_dlogits_kernel,
    linear_logprob_fwd_kernel,
    linear_logprob_merge_kernel,
)

# Ranges of the vocabulary: with 128 rows a program, 1024 rows are 256 programs.
NUM_SPLITS = 32
MERGE_ROWS = 128
DEFAULT_BUDGET_MB = 256


class Tiles(NamedTuple):
    """Sizes of the blocks of a product, and how it is scheduled."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


def _tiles(itemsize: int, has_ref: bool, has_softcap: bool, major: int) -> Tiles:
    """The largest blocks of logits whose kernels spill no register: scripts/compile_check.py."""
    if itemsize == 4:  # products on the ordinary cores
        return Tiles(32, 64, 16 if has_ref and major < 9 else 32, 8, 2)
    if has_ref:
        return Tiles(64, 128, 32 if major < 9 else 64, 8, 3)
    return Tiles(64 if has_softcap or major >= 10 else 128, 128, 64, 8, 3)


def _dhidden_tiles(itemsize: int) -> Tiles:
    return Tiles(64, 64, 32, 8, 2) if itemsize == 4 else Tiles(128, 128, 64, 8, 3)


@functools.cache
def _major(device: torch.device) -> int:
    """The GPU's compute capability, before the point; Hopper's for the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def _precision(dtype: torch.dtype) -> str:
    # The default for float32 rounds the inputs to ten bits.
    return "ieee" if dtype == torch.float32 else "tf32"


def _strides(ref_hidden: Tensor | None, hidden: Tensor, weight: Tensor) -> tuple[int, ...]:
    ref = hidden if ref_hidden is None else ref_hidden
    return (*hidden.stride(), *ref.stride(), *weight.stride())


def unsupported(*tensors: Tensor | None) -> list[str]:
    reasons = [
        *runtime.wrong_device(*tensors),
        *registry.wrong_dtype((torch.float32, torch.float16, torch.bfloat16), *tensors),
    ]
    on_gpu = [t for t in tensors if t is not None and t.device.type == "cuda"]
    if any(_major(t.device) < 8 for t in on_gpu):
        reasons.append("needs compute capability 8.0 or newer")
    if runtime.INTERPRETED and any(t is not None and t.dtype == torch.bfloat16 for t in tensors):
        reasons.append("Triton's interpreter gets bfloat16 products wrong")
    return reasons


def fwd(
    hidden: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (M,) int64
    bias: Tensor | None,  # (V,)
    temperature: Tensor,  # () float32
    softcap: float,  # 0: none
    ref_hidden: Tensor | None,  # (M, D)
    ignore_index: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns results (5, M), norms (4, M), and the logits of both where they are to be saved."""
    (M, D), V = hidden.shape, weight.shape[0]
    has_ref = ref_hidden is not None
    results = targets.new_zeros(5, M, dtype=torch.float32)
    norms = torch.zeros_like(results[:4])
    # (M, V) before bias, softcap and temperature
    saved = hidden.new_empty(M, V) if save else None
    ref_saved = hidden.new_empty(M, V) if save and has_ref else None
    if M == 0:
        return results, norms, saved, ref_saved
    tiles = _tiles(hidden.element_size(), has_ref, softcap > 0.0, _major(hidden.device))
    split_size = triton.cdiv(triton.cdiv(V, tiles.n), NUM_SPLITS) * tiles.n
    num_splits = triton.cdiv(V, split_size)
    sums = results.new_empty(num_splits, NUM_SUMS.value, M)
    with launch.on_device(hidden):
        linear_logprob_fwd_kernel[(triton.cdiv(M, tiles.m), num_splits)](
            hidden,
            ref_hidden,
            weight,
            bias if bias is None else bias.contiguous(),
            targets,
            temperature,
            sums,
            saved,
            ref_saved,
            M,
            V,
            D,
            *_strides(ref_hidden, hidden, weight),
            softcap,
            ignore_index,
            split_size,
            HAS_REF=has_ref,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap > 0.0,
            SAVE=save,
            EVEN_D=D % tiles.k == 0,
            PRECISION=_precision(hidden.dtype),
            BLOCK_M=tiles.m,
            BLOCK_V=tiles.n,
            BLOCK_D=tiles.k,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        linear_logprob_merge_kernel[(triton.cdiv(M, MERGE_ROWS),)](
            sums,
            targets,
            results,
            norms,
            M,
            V,
            ignore_index,
            num_splits,
            HAS_REF=has_ref,
            BLOCK_M=MERGE_ROWS,
            num_warps=4,
        )
    return results, norms, saved, ref_saved


def bwd(
    upstream: Tensor,  # (4, M) float32: of logprobs, entropy, logsumexp and kl
    hidden: Tensor,  # (M, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (M,) int64
    bias: Tensor | None,  # (V,)
    temperature: Tensor,  # () float32
    softcap: float,
    ref_hidden: Tensor | None,  # (M, D), None where kl has no upstream
    ignore_index: int,
    entropy: Tensor,  # (M,)
    kl: Tensor,  # (M,)
    norms: Tensor,  # (4, M)
    saved: Tensor | None,  # (M, V) in hidden's dtype
    ref_saved: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of hidden, weight and bias, as far as they are wanted."""
    (M, D), V = hidden.shape, weight.shape[0]
    has_ref, itemsize = ref_hidden is not None, hidden.element_size()
    precision = _precision(hidden.dtype)
    tiles = _tiles(itemsize, has_ref, softcap > 0.0, _major(hidden.device))
    out_tiles = _dhidden_tiles(itemsize)
    dhidden = hidden.new_zeros(M, D, dtype=torch.float32) if wanted[0] else None
    dweight = weight.new_zeros(V, D) if wanted[1] else None
    dbias = norms.new_zeros(V) if wanted[2] else None
    rows = None
    if dweight is not None:
        # 0 times what an ignored row holds must be 0.
        rows = torch.where((targets != ignore_index).unsqueeze(-1), hidden, 0.0)
    chunk = min(_chunk(M, itemsize, tiles.n), triton.cdiv(V, tiles.n) * tiles.n)
    dlogits = hidden.new_empty(M, chunk)
    for first in range(0, V, chunk) if M else ():
        count = min(chunk, V - first)
        with launch.on_device(hidden):
            linear_logprob_dlogits_kernel[(triton.cdiv(M, tiles.m), triton.cdiv(count, tiles.n))](
                hidden,
                ref_hidden,
                weight,
                bias if bias is None else bias.contiguous(),
                targets,
                temperature,
                upstream,
                entropy,
                kl,
                norms,
                saved,
                ref_saved,
                dlogits,
                M,
                V,
                D,
                *_strides(ref_hidden, hidden, weight),
                softcap,
                ignore_index,
                first,
                chunk,
                HAS_REF=has_ref,
                HAS_BIAS=bias is not None,
                HAS_SOFTCAP=softcap > 0.0,
                SAVED=saved is not None,
                EVEN_D=D % tiles.k == 0,
                PRECISION=precision,
                BLOCK_M=tiles.m,
                BLOCK_V=tiles.n,
                BLOCK_D=tiles.k,
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )
            if dhidden is not None:
                linear_logprob_dhidden_kernel[
                    (triton.cdiv(D, out_tiles.n), triton.cdiv(M, out_tiles.m))
                ](
                    dlogits,
                    weight,
                    dhidden,
                    M,
                    V,
                    D,
                    *weight.stride(),
                    first,
                    chunk,
                    PRECISION=precision,
                    BLOCK_M=out_tiles.m,
                    BLOCK_D=out_tiles.n,
                    BLOCK_V=out_tiles.k,
                    num_warps=out_tiles.num_warps,
                    num_stages=out_tiles.num_stages,
                )
        if dweight is not None:
            torch.mm(dlogits[:, :count].t(), rows, out=dweight[first : first + count])
        if dbias is not None:
            dbias[first : first + count] = dlogits[:, :count].sum(0, dtype=torch.float32)
    return (
        None if dhidden is None else dhidden.to(hidden.dtype),
        dweight,
        None if dbias is None else dbias.to(weight.dtype),
    )


def _chunk(M: int, itemsize: int, multiple: int) -> int:
    """Columns of dlogits that the budget holds, at least one block."""
    budget_mb = float(os.environ.get("HYDRA_LOGPROB_BUDGET_MB") or DEFAULT_BUDGET_MB)
    return max(1, int(budget_mb * 2**20 / (max(M, 1) * itemsize)) // multiple) * multiple


def aot_signatures() -> Iterator[tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """The kernels as they are launched for a model in half precision and in float32."""
    sizes = {"M": "i32", "V": "i32", "D": "i32:16"}
    strides = {"stride_hm": "i32:16", "stride_rm": "i32:16", "stride_wv": "i32:16"}
    unit = {"stride_hd": 1, "stride_rd": 1, "stride_wd": 1}
    for dtype, arch, has_ref, softcap in itertools.product(
        ("bf16", "fp32"), (80, 90, 100), (False, True), (False, True)
    ):
        if softcap and dtype == "fp32":
            continue
        itemsize = 4 if dtype == "fp32" else 2
        tiles = _tiles(itemsize, has_ref, softcap, arch // 10)
        given = f"*{dtype}:16"
        inputs = {
            "hidden": given,
            "ref_hidden": given if has_ref else None,
            "weight": given,
            "bias": None,
            "targets": "*i64:16",
            "temperature": "*fp32:16",
            "saved": None,
            "ref_saved": None,
            "softcap": "fp32",
            "ignore_index": "i32",
            **sizes,
            **strides,
        }
        constexprs = unit | {
            "HAS_REF": has_ref,
            "HAS_BIAS": False,
            "HAS_SOFTCAP": softcap,
            "EVEN_D": True,
            "PRECISION": _precision(torch.float32 if itemsize == 4 else torch.bfloat16),
            "BLOCK_M": tiles.m,
            "BLOCK_V": tiles.n,
            "BLOCK_D": tiles.k,
        }
        label = dtype + " with reference" * has_ref + " softcap" * softcap
        options = {
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            "label": label,
            "archs": (arch,),
            "expects": ("wide_loads", "tensor_cores") if itemsize == 2 else (),
        }
        signature = inputs | {"sums": "*fp32:16", "split_size": "i32:16"}
        yield linear_logprob_fwd_kernel, signature, constexprs | {"SAVE": False}, options
        signature = inputs | dict.fromkeys(("upstream", "entropy", "kl", "norms"), "*fp32:16")
        signature |= {"dlogits": given, "first": "i32:16", "chunk": "i32:16"}
        yield linear_logprob_dlogits_kernel, signature, constexprs | {"SAVED": False}, options
        if not has_ref and not softcap:
            tiles = _dhidden_tiles(itemsize)
            signature = {"dlogits": given, "weight": given, "dhidden": "*fp32:16", **sizes}
            signature |= {"stride_wv": "i32:16", "first": "i32:16", "chunk": "i32:16"}
            constexprs = {"PRECISION": constexprs["PRECISION"], "stride_wd": 1}
            constexprs |= {"BLOCK_M": tiles.m, "BLOCK_D": tiles.n, "BLOCK_V": tiles.k}
            yield linear_logprob_dhidden_kernel, signature, constexprs, options | {"label": dtype}
    for has_ref in (False, True):
        signature = {"sums": "*fp32:16", "targets": "*i64:16", "results": "*fp32:16"}
        signature |= {"norms": "*fp32:16", "M": "i32", "V": "i32", "ignore_index": "i32"}
        signature |= {"num_splits": "i32"}
        label = "with reference" * has_ref
        yield (
            linear_logprob_merge_kernel,
            signature,
            {"HAS_REF": has_ref, "BLOCK_M": MERGE_ROWS},
            {"num_warps": 4, "num_stages": 1, "label": label},
        )


registry.register(
    "linear_logprob", "triton", registry.Kernel(fwd, bwd, unsupported, missing=runtime.missing)
)
