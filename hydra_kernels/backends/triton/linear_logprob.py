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
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hydra_kernels.backends import launch, registry, tuning
from hydra_kernels.backends.logprob_inputs import LogprobInputs, LogprobKept
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
CHUNK_UNIT = (
    256  # columns of dlogits: a multiple of every candidate's BLOCK_V, forward and backward
)
DEFAULT_BUDGET_MB = 256


class Tiles(NamedTuple):
    """Sizes of the blocks of a product, and how it is scheduled."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    def config(self, m: str, n: str, k: str) -> dict[str, int]:
        """As a launch takes it, the blocks by the kernel's own names."""
        sizes = {m: self.m, n: self.n, k: self.k}
        return {**sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}


def _tiles(itemsize: int, has_ref: bool, has_softcap: bool, major: int) -> Tiles:
    """The largest blocks of logits whose kernels spill no register: scripts/compile_check.py."""
    if itemsize == 4:  # products on the ordinary cores
        return Tiles(32, 64, 16 if has_ref and major < 9 else 32, 8, 2)
    if has_ref:
        return Tiles(64, 128, 32 if major < 9 else 64, 8, 3)
    return Tiles(64 if has_softcap or major >= 10 else 128, 128, 64, 8, 3)


def _candidates(
    itemsize: int, has_ref: bool, has_softcap: bool, major: int
) -> list[dict[str, int]]:
    """The tiles of ``_tiles``, and those to be timed against it where that is asked for."""
    default = _tiles(itemsize, has_ref, has_softcap, major)
    others: list[Tiles] = []
    if itemsize == 2 and has_ref:
        others = [Tiles(64, 128, 64, 8, 4), Tiles(64, 64, 64, 4, 4), Tiles(128, 64, 64, 8, 4)]
    elif itemsize == 2:
        others = [
            Tiles(64, 128, 64, 4, 3),
            Tiles(64, 128, 64, 8, 4),
            Tiles(64, 256, 64, 8, 3),
            Tiles(128, 64, 64, 4, 4),
            Tiles(128, 128, 32, 8, 4),
            Tiles(128, 128, 64, 8, 4),
        ]
    tiles = [default, *(tile for tile in others if tile != default)]
    return [tile.config("BLOCK_M", "BLOCK_V", "BLOCK_D") for tile in tiles]


def _dhidden_candidates(itemsize: int) -> list[dict[str, int]]:
    tiles = [Tiles(64, 64, 32, 8, 2)] if itemsize == 4 else [Tiles(128, 128, 64, 8, 3)]
    if itemsize == 2:
        tiles += [Tiles(128, 128, 64, 8, 4), Tiles(128, 64, 64, 4, 4), Tiles(64, 256, 64, 8, 3)]
    return [tile.config("BLOCK_M", "BLOCK_D", "BLOCK_V") for tile in tiles]


@functools.cache
def _major(device: torch.device) -> int:
    """The GPU's compute capability, before the point; Hopper's for the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def _choose(
    kernel: str,
    hidden: Tensor,  # (M, D)
    V: int,
    has_ref: bool,
    has_softcap: bool,
    run: Callable[[tuning.Config], None],
) -> tuning.Config:
    """Not by M: a row's result is the same in every batch, so its blocks are."""
    itemsize, major = hidden.element_size(), _major(hidden.device)
    sizes = {"V": V, "D": hidden.shape[1], "itemsize": itemsize}
    sizes |= {"reference": int(has_ref), "softcap": int(has_softcap)}
    candidates = _candidates(itemsize, has_ref, has_softcap, major)
    return tuning.choose(kernel, hidden, sizes, candidates, run)


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


def fwd(inputs: LogprobInputs, save: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns results (5, M), norms (4, M), and the logits of both where they are to be saved."""
    hidden, weight, targets, bias, temperature, softcap, ref_hidden, ignore_index = inputs
    M, D, V = inputs.sizes
    has_ref = ref_hidden is not None
    results = targets.new_zeros(5, M, dtype=torch.float32)
    norms = torch.zeros_like(results[:4])
    # (M, V) before bias, softcap and temperature
    saved = hidden.new_empty(M, V) if save else None
    ref_saved = hidden.new_empty(M, V) if save and has_ref else None
    if M == 0:
        return results, norms, saved, ref_saved
    dense_bias = bias if bias is None else bias.contiguous()

    def run(config: tuning.Config) -> None:
        block_v = config["BLOCK_V"]
        split_size = triton.cdiv(triton.cdiv(V, block_v), NUM_SPLITS) * block_v
        num_splits = triton.cdiv(V, split_size)
        sums = results.new_empty(num_splits, NUM_SUMS.value, M)
        linear_logprob_fwd_kernel[(triton.cdiv(M, config["BLOCK_M"]), num_splits)](
            hidden,
            ref_hidden,
            weight,
            dense_bias,
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
            EVEN_D=D % config["BLOCK_D"] == 0,
            PRECISION=_precision(hidden.dtype),
            **config,
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

    with launch.on_device(hidden):
        run(_choose("linear_logprob_fwd", hidden, V, has_ref, softcap > 0.0, run))
    return results, norms, saved, ref_saved


def bwd(
    upstream: Tensor,  # (4, M) float32: of logprobs, entropy, logsumexp and kl
    inputs: LogprobInputs,
    forward: LogprobKept,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of hidden, weight and bias, as far as they are wanted."""
    hidden, weight, targets, bias, temperature, softcap, ref_hidden, ignore_index = inputs
    entropy, kl, norms, saved, ref_saved = forward
    M, D, V = inputs.sizes
    has_ref, itemsize = ref_hidden is not None, hidden.element_size()
    precision = _precision(hidden.dtype)
    dhidden = hidden.new_zeros(M, D, dtype=torch.float32) if wanted[0] else None
    dweight = weight.new_zeros(V, D) if wanted[1] else None
    dbias = norms.new_zeros(V) if wanted[2] else None
    rows = None
    if dweight is not None:
        # 0 times what an ignored row holds must be 0.
        rows = torch.where((targets != ignore_index).unsqueeze(-1), hidden, 0.0)
    chunk = min(_chunk(M, itemsize), triton.cdiv(V, CHUNK_UNIT) * CHUNK_UNIT)
    dlogits = hidden.new_empty(M, chunk)
    dense_bias = bias if bias is None else bias.contiguous()

    def make_dlogits(config: tuning.Config, first: int = 0) -> None:
        count = min(chunk, V - first)
        blocks = (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(count, config["BLOCK_V"]))
        linear_logprob_dlogits_kernel[blocks](
            hidden,
            ref_hidden,
            weight,
            dense_bias,
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
            EVEN_D=D % config["BLOCK_D"] == 0,
            PRECISION=precision,
            **config,
        )

    def add_to_dhidden(config: tuning.Config, first: int, out: Tensor) -> None:
        blocks = (triton.cdiv(D, config["BLOCK_D"]), triton.cdiv(M, config["BLOCK_M"]))
        linear_logprob_dhidden_kernel[blocks](
            dlogits,
            weight,
            out,
            M,
            V,
            D,
            *weight.stride(),
            first,
            chunk,
            PRECISION=precision,
            **config,
        )

    for first in range(0, V, chunk) if M else ():
        count = min(chunk, V - first)
        with launch.on_device(hidden):
            name = "linear_logprob_dlogits"
            make_dlogits(_choose(name, hidden, V, has_ref, softcap > 0.0, make_dlogits), first)
            if dhidden is not None:

                def trial(config: tuning.Config) -> None:  # on a sum of its own
                    add_to_dhidden(config, 0, norms.new_zeros(M, D))

                config = tuning.choose(
                    "linear_logprob_dhidden",
                    hidden,
                    {"D": D, "itemsize": itemsize},
                    _dhidden_candidates(itemsize),
                    trial,
                )
                add_to_dhidden(config, first, dhidden)
        if dweight is not None:
            torch.mm(dlogits[:, :count].t(), rows, out=dweight[first : first + count])
        if dbias is not None:
            dbias[first : first + count] = dlogits[:, :count].sum(0, dtype=torch.float32)
    return (
        None if dhidden is None else dhidden.to(hidden.dtype),
        dweight,
        None if dbias is None else dbias.to(weight.dtype),
    )


def _chunk(M: int, itemsize: int) -> int:
    """Columns of dlogits that the budget holds, at least one block of any candidate."""
    budget_mb = float(os.environ.get("HYDRA_LOGPROB_BUDGET_MB") or DEFAULT_BUDGET_MB)
    return max(1, int(budget_mb * 2**20 / (max(M, 1) * itemsize)) // CHUNK_UNIT) * CHUNK_UNIT


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
        precision = _precision(torch.float32 if itemsize == 4 else torch.bfloat16)
        expects = ("wide_loads", "tensor_cores") if itemsize == 2 else ()
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
        label = dtype + " with reference" * has_ref + " softcap" * softcap
        flags = {"HAS_REF": has_ref, "HAS_BIAS": False, "HAS_SOFTCAP": softcap, "EVEN_D": True}
        # What is timed on request is compiled for Hopper, as it is to be chosen there.
        candidates = _candidates(itemsize, has_ref, softcap, arch // 10)
        for tiles in candidates if arch == 90 and not softcap else candidates[:1]:
            options = {
                "num_warps": tiles["num_warps"],
                "num_stages": tiles["num_stages"],
                "label": f"{label} {_label(tiles)}",
                "archs": (arch,),
                "expects": expects,
            }
            blocks = {name: size for name, size in tiles.items() if name.startswith("BLOCK")}
            constexprs = unit | flags | blocks | {"PRECISION": precision}
            signature = inputs | {"sums": "*fp32:16", "split_size": "i32:16"}
            yield linear_logprob_fwd_kernel, signature, constexprs | {"SAVE": False}, options
            signature = inputs | dict.fromkeys(("upstream", "entropy", "kl", "norms"), "*fp32:16")
            signature |= {"dlogits": given, "first": "i32:16", "chunk": "i32:16"}
            yield linear_logprob_dlogits_kernel, signature, constexprs | {"SAVED": False}, options
        if has_ref or softcap:
            continue
        candidates = _dhidden_candidates(itemsize)
        for tiles in candidates if arch == 90 else candidates[:1]:
            options = {
                "num_warps": tiles["num_warps"],
                "num_stages": tiles["num_stages"],
                "label": f"{dtype} {_label(tiles)}",
                "archs": (arch,),
                "expects": expects,
            }
            signature = {"dlogits": given, "weight": given, "dhidden": "*fp32:16", **sizes}
            signature |= {"stride_wv": "i32:16", "first": "i32:16", "chunk": "i32:16"}
            blocks = {name: size for name, size in tiles.items() if name.startswith("BLOCK")}
            once = {"PRECISION": precision, "stride_wd": 1} | blocks
            yield linear_logprob_dhidden_kernel, signature, once, options
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


def _label(tiles: dict[str, int]) -> str:
    return "x".join(str(size) for size in tiles.values())


registry.register(
    "linear_logprob", "triton", registry.Kernel(fwd, bwd, unsupported, missing=runtime.missing)
)
