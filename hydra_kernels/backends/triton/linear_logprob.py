"""linear_logprob in Triton.

Forward: one kernel makes a block of logits on the tensor cores and adds it to its rows' statistics
before the next; the rows of the reference go through the same block of the head, which is thus read
once for both. Programs share out the rows and ranges of the vocabulary; a second kernel merges the
ranges in their order. Nothing is atomic and no block depends on the number of rows: a row's result
is the same every time and in every batch.

Backward: the logits are made once more, a chunk of the vocabulary at a time, and turned into their
gradient, from which the gradients of the rows and of the head are products.

Candidates of the tuning table, from Hopper on and for aligned rows in half precision: the kernels
of linear_logprob_tma_kernels.py, with blocks twice as wide, read through descriptors by the copy
engine (TMA), which leaves the registers that pointers take to the sums. 128 x 256 products need
three quarters of the bytes from L2 that 128 x 128 do.

Past 500 lines because each kernel is launched twice, by pointers and by descriptors, and what is
compiled without a GPU has to name every argument of both.
"""

from __future__ import annotations

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
    linear_logprob_dhidden_kernel,
    linear_logprob_dlogits_kernel,
    linear_logprob_fwd_kernel,
    linear_logprob_merge_kernel,
)
from hydra_kernels.backends.triton.linear_logprob_tma_kernels import (
    linear_logprob_dlogits_tma_kernel,
    linear_logprob_fwd_tma_kernel,
)

# Ranges of the vocabulary: with 128 rows a program, 1024 rows are 256 programs.
NUM_SPLITS = 32
NUM_SUMS = 8  # of a row in a range; half of them without a reference
# At most, where programs take their share of them in turn: then small ones cost nothing, and waste
# less of the last turn. 8192 rows by 32000 columns are 60.6 blocks for each of an H200's 132
# multiprocessors; in 32 ranges the longest share would be 64.
MANY_SPLITS = 192
MERGE_ROWS = 16
# Rows of blocks in flight together: 16 of 128 by 8 of 256 columns read 33 MB at D = 4096, which an
# H200's L2 of 50 MB holds.
GROUP = 16
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
    tma: int = 0  # whether the copy engine brings the blocks
    specialize: int = 0  # and then, whether for a group of warps of their own

    def config(self, m: str, n: str, k: str) -> dict[str, int]:
        """As a launch takes it, the blocks by the kernel's own names."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        how = {"TMA": self.tma, "SPECIALIZE": self.specialize, "GROUP": GROUP}
        return {m: self.m, n: self.n, k: self.k, **how, **options}


def _tiles(itemsize: int, has_ref: bool, has_softcap: bool, major: int) -> Tiles:
    """The largest blocks of logits whose kernels spill no register: scripts/compile_check.py."""
    if itemsize == 4:  # products on the ordinary cores
        return Tiles(32, 64, 16 if has_ref and major < 9 else 32, 8, 2)
    if has_ref:
        return Tiles(64, 128, 32 if major < 9 else 64, 8, 3)
    return Tiles(64 if has_softcap or major >= 10 else 128, 128, 64, 8, 3)


def _candidates(
    itemsize: int, has_ref: bool, has_softcap: bool, major: int, tma: bool, plain: bool
) -> list[Tiles]:
    """The tiles of ``_tiles``, and those to be timed against it where that is asked for.

    ``plain`` where nothing is known of a column but its product: no bias, and no column beyond V.
    With two sums, Triton 3.6 specialises no other.
    """
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
    if tma and itemsize == 2 and not has_softcap:
        columns = 128 if has_ref else 256  # of the sums of both
        others += [Tiles(128, columns, 64, 8, stages, 1) for stages in (3, 4)]
        if plain or not has_ref:
            others += [Tiles(128, columns, 64, 4, stages, 1, 1) for stages in (3, 4)]
    return [default, *(tile for tile in others if tile != default)]


def _fwd_candidates(*given: Any) -> list[dict[str, int]]:
    return [tile.config("BLOCK_M", "BLOCK_V", "BLOCK_D") for tile in _candidates(*given)]


def _dlogits_candidates(*given: Any) -> list[dict[str, int]]:
    tiles = _candidates(*given)
    # A descriptor's block goes out through shared memory, beside those that come in; two halves of
    # two sums and their gradient are more than the registers of a group of warps.
    has_ref = given[1]
    fit = [t for t in tiles if not (has_ref if t.specialize else t.tma and t.num_stages > 3)]
    return [tile.config("BLOCK_M", "BLOCK_V", "BLOCK_D") for tile in fit]


def _dhidden_candidates(itemsize: int, tma: bool) -> list[dict[str, int]]:
    tiles = [Tiles(64, 64, 32, 8, 2)] if itemsize == 4 else [Tiles(128, 128, 64, 8, 3)]
    if itemsize == 2:
        tiles += [Tiles(128, 128, 64, 8, 4), Tiles(128, 64, 64, 4, 4), Tiles(64, 256, 64, 8, 3)]
        if tma:
            tiles += [Tiles(128, 256, 64, 8, stages, 1) for stages in (3, 4)]
            tiles += [Tiles(128, 128, 64, 8, 4, 1)]
    return [tile.config("BLOCK_M", "BLOCK_D", "BLOCK_V") for tile in tiles]


def _choose(
    kernel: str, inputs: LogprobInputs, saved: bool, run: Callable[[tuning.Config], tuning.Outputs]
) -> tuning.Config:
    """Not by M: a row's result is the same in every batch, so its blocks are."""
    hidden, weight, ref_hidden = inputs.hidden, inputs.weight, inputs.ref_hidden
    has_ref, has_softcap = ref_hidden is not None, inputs.softcap > 0.0
    itemsize, major = hidden.element_size(), runtime.major(hidden.device)
    read = (hidden, weight) if ref_hidden is None else (hidden, weight, ref_hidden)
    # The addresses of logits to be saved leave the wide blocks no registers.
    tma = itemsize == 2 and not saved and runtime.has_tma(*read)
    sizes = {"V": weight.shape[0], "D": hidden.shape[1], "itemsize": itemsize}
    sizes |= {"reference": int(has_ref), "softcap": int(has_softcap), "tma": int(tma)}
    of_kernel = _fwd_candidates if kernel == "linear_logprob_fwd" else _dlogits_candidates
    plain = inputs.bias is None
    if kernel == "linear_logprob_fwd":
        width = 128 if has_ref else 256
        plain = plain and weight.shape[0] % (_blocks_of_split(weight.shape[0], width) * width) == 0
    sizes |= {"plain": int(plain)}
    candidates = of_kernel(itemsize, has_ref, has_softcap, major, tma, plain)
    return tuning.choose(kernel, hidden, sizes, candidates, run)


def _blocks_of_split(V: int, block_v: int, most: int = MANY_SPLITS) -> int:
    """Blocks in each of ``most`` splits or fewer: a few more, where so none is left over."""
    blocks = triton.cdiv(V, block_v)
    least = triton.cdiv(blocks, most)
    if V % block_v:
        return least
    return next((n for n in range(least, 2 * least + 1) if blocks % n == 0), least)


def _described(inputs: LogprobInputs, config: tuning.Config) -> tuple[Any, Any, Any]:
    """hidden, ref_hidden and weight as the copy engine takes them."""
    hidden, weight, ref_hidden = inputs.hidden, inputs.weight, inputs.ref_hidden
    rows = [config["BLOCK_M"], config["BLOCK_D"]]
    head = runtime.descriptor(weight, [config["BLOCK_V"], config["BLOCK_D"]])
    if config["SPECIALIZE"]:  # which makes those of the rows itself
        return hidden, ref_hidden, head
    return (
        runtime.descriptor(hidden, rows),
        None if ref_hidden is None else runtime.descriptor(ref_hidden, rows),
        head,
    )


def _options(config: tuning.Config, *known: str) -> dict[str, int]:
    """A config for a kernel that knows no other way to be scheduled than the ``known``."""
    return {k: n for k, n in config.items() if k in known or k not in ("TMA", "SPECIALIZE")}


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
    if runtime.INTERPRETED and any(t is not None and t.dtype == torch.bfloat16 for t in tensors):
        reasons.append("Triton's interpreter gets bfloat16 products wrong")
    return reasons


def fwd(
    inputs: LogprobInputs, save: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns results (5, M), norms (4, M), and the logits of both where they are to be saved, in
    the dtype of hidden."""
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

    flags: dict[str, Any] = {
        "HAS_REF": has_ref,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap > 0.0,
        "PRECISION": _precision(hidden.dtype),
    }

    def run(config: tuning.Config) -> tuning.Outputs:
        block_v, num_rows = config["BLOCK_V"], triton.cdiv(M, config["BLOCK_M"])
        num_blocks = triton.cdiv(triton.cdiv(V, block_v), NUM_SPLITS)
        if config["TMA"]:
            num_blocks = _blocks_of_split(V, block_v, MANY_SPLITS)
        num_splits = triton.cdiv(V, num_blocks * block_v)
        sums = results.new_empty(num_splits, NUM_SUMS if has_ref else NUM_SUMS // 2, M)
        if config["TMA"]:
            programs = min(num_rows * num_splits, runtime.multiprocessors(hidden.device))
            runtime.launch_with_scratch(
                linear_logprob_fwd_tma_kernel[(programs,)],
                *_described(inputs, config),
                dense_bias,
                targets,
                temperature,
                sums,
                M,
                V,
                D,
                *_strides(ref_hidden, hidden, weight)[:4:2],
                softcap,
                ignore_index,
                num_blocks,
                EVEN_V=V % (num_blocks * block_v) == 0,
                **flags,
                **_options(config, "SPECIALIZE"),
            )
        else:
            linear_logprob_fwd_kernel[(num_rows * num_splits,)](
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
                num_blocks * block_v,
                SAVE=save is not None,
                EVEN_D=D % config["BLOCK_D"] == 0,
                EVEN_V=V % block_v == 0,
                **flags,
                **_options(config),
            )
        linear_logprob_merge_kernel[(triton.cdiv(M, MERGE_ROWS),)](
            sums,
            targets,
            temperature,
            results,
            norms,
            M,
            V,
            ignore_index,
            num_splits,
            HAS_REF=has_ref,
            BLOCK_M=MERGE_ROWS,
            BLOCK_S=triton.next_power_of_2(num_splits),
            num_warps=4,
        )
        return results, norms, saved, ref_saved

    with launch.on_device(hidden):
        run(_choose("linear_logprob_fwd", inputs, save is not None, run))
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

    flags: dict[str, Any] = {
        "HAS_REF": has_ref,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap > 0.0,
        "PRECISION": precision,
    }

    def make_dlogits(config: tuning.Config, first: int = 0) -> Tensor:
        count = min(chunk, V - first)
        blocks = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(count, config["BLOCK_V"])
        of_rows = targets, temperature, upstream, entropy, kl, norms
        if config["TMA"]:
            dz: Any = dlogits
            if not config["SPECIALIZE"]:
                dz = runtime.descriptor(dlogits, [config["BLOCK_M"], config["BLOCK_V"]])
            programs = min(blocks, runtime.multiprocessors(hidden.device))
            runtime.launch_with_scratch(
                linear_logprob_dlogits_tma_kernel[(programs,)],
                *_described(inputs, config),
                dense_bias,
                *of_rows,
                dz,
                M,
                V,
                D,
                *_strides(ref_hidden, hidden, weight)[:4:2],
                softcap,
                ignore_index,
                first,
                count,
                chunk,
                **flags,
                **_options(config, "SPECIALIZE"),
            )
        else:
            linear_logprob_dlogits_kernel[(blocks,)](
                hidden,
                ref_hidden,
                weight,
                dense_bias,
                *of_rows,
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
                count,
                chunk,
                SAVED=saved is not None,
                EVEN_D=D % config["BLOCK_D"] == 0,
                **flags,
                **_options(config),
            )
        return dlogits

    def add_to_dhidden(config: tuning.Config, first: int, out: Tensor) -> Tensor:
        count = min(chunk, V - first)
        dz, w = dlogits, weight
        if config["TMA"]:
            # Of the chunk's columns those that are there: beyond, nothing was written.
            rows = [config["BLOCK_M"], config["BLOCK_V"]]
            dz = runtime.descriptor(dlogits[:, :count], rows)
            w = runtime.descriptor(weight, [config["BLOCK_V"], config["BLOCK_D"]])
        blocks = triton.cdiv(D, config["BLOCK_D"]) * triton.cdiv(M, config["BLOCK_M"])
        linear_logprob_dhidden_kernel[(blocks,)](
            dz,
            w,
            out,
            M,
            D,
            *weight.stride(),
            first,
            count,
            chunk,
            PRECISION=precision,
            **_options(config, "TMA"),
        )
        return out

    for first in range(0, V, chunk) if M else ():
        count = min(chunk, V - first)
        with launch.on_device(hidden):
            kept = saved is not None
            make_dlogits(_choose("linear_logprob_dlogits", inputs, kept, make_dlogits), first)
            if dhidden is not None:

                def trial(config: tuning.Config) -> Tensor:  # on a sum of its own
                    return add_to_dhidden(config, 0, norms.new_zeros(M, D))

                tma = itemsize == 2 and runtime.has_tma(weight)
                config = tuning.choose(
                    "linear_logprob_dhidden",
                    hidden,
                    {"D": D, "itemsize": itemsize, "tma": int(tma)},
                    _dhidden_candidates(itemsize, tma),
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
            "softcap": "fp32",
            "ignore_index": "i32",
            **sizes,
        }
        label = dtype + " with reference" * has_ref + " softcap" * softcap
        flags: dict[str, Any] = {"HAS_REF": has_ref, "HAS_BIAS": False, "HAS_SOFTCAP": softcap}
        flags["PRECISION"] = precision
        # What is timed on request is compiled for Hopper, as it is to be chosen there.
        more = arch == 90 and not softcap
        of_kernel = itemsize, has_ref, softcap, arch // 10, itemsize == 2, True
        for config in _fwd_candidates(*of_kernel)[: None if more else 1]:
            signature = _described_as(inputs, config, dtype) | {"sums": "*fp32:16"}
            both = config["TMA"] and not (config["SPECIALIZE"] and has_ref)
            for even in (True, False) if both else (True,):
                told = label + " uneven" * (not even)
                known = ("SPECIALIZE",) if config["TMA"] else ()
                sizes_of, options = _launched(config, told, arch, expects, *known)
                flags["EVEN_V"] = even
                if config["TMA"]:
                    signature["num_blocks"] = "i32"
                    yield linear_logprob_fwd_tma_kernel, signature, flags | sizes_of, options
                else:
                    signature["split_size"] = "i32:16"
                    more_flags = {**unit, "EVEN_D": True, "SAVE": False}
                    constants = flags | more_flags | sizes_of
                    yield linear_logprob_fwd_kernel, signature, constants, options
        del flags["EVEN_V"]
        for config in _dlogits_candidates(*of_kernel)[: None if more else 1]:
            signature = _described_as(inputs, config, dtype)
            signature |= dict.fromkeys(("upstream", "entropy", "kl", "norms"), "*fp32:16")
            signature |= {"dlogits": given, "first": "i32:16", "chunk": "i32:16", "count": "i32"}
            known = ("SPECIALIZE",) if config["TMA"] else ()
            sizes_of, options = _launched(config, label, arch, expects, *known)
            if config["TMA"]:
                if not config["SPECIALIZE"]:
                    rows = f"{config['BLOCK_M']},{config['BLOCK_V']}"
                    signature["dlogits"] = f"tensordesc<{dtype}[{rows}]>"
                yield linear_logprob_dlogits_tma_kernel, signature, flags | sizes_of, options
            else:
                constants = {**flags, **unit, "EVEN_D": True, "SAVED": False, **sizes_of}
                yield linear_logprob_dlogits_kernel, signature, constants, options
        if has_ref or softcap:
            continue
        for config in _dhidden_candidates(itemsize, itemsize == 2)[: None if more else 1]:
            signature = {"dlogits": given, "weight": given, "dhidden": "*fp32:16", "M": "i32"}
            signature |= {"D": "i32:16", "count": "i32"}
            signature |= dict.fromkeys(("stride_wv", "first", "chunk"), "i32:16")
            if config["TMA"]:
                rows, inner = f"{config['BLOCK_M']},{config['BLOCK_V']}", config["BLOCK_V"]
                signature["dlogits"] = f"tensordesc<{dtype}[{rows}]>"
                signature["weight"] = f"tensordesc<{dtype}[{inner},{config['BLOCK_D']}]>"
            sizes_of, options = _launched(config, dtype, arch, expects, "TMA")
            constants = {"PRECISION": precision, "stride_wd": 1, **sizes_of}
            yield linear_logprob_dhidden_kernel, signature, constants, options
    for has_ref in (False, True):
        signature = {"sums": "*fp32:16", "targets": "*i64:16", "results": "*fp32:16"}
        signature |= {
            "temperature": "*fp32:16",
            "norms": "*fp32:16",
            "M": "i32",
            "V": "i32",
            "ignore_index": "i32",
        }
        signature |= {"num_splits": "i32"}
        label = "with reference" * has_ref
        yield (
            linear_logprob_merge_kernel,
            signature,
            {
                "HAS_REF": has_ref,
                "BLOCK_M": MERGE_ROWS,
                "BLOCK_S": triton.next_power_of_2(MANY_SPLITS),
            },
            {"num_warps": 4, "num_stages": 1, "label": label},
        )


def _described_as(inputs: dict[str, Any], config: tuning.Config, dtype: str) -> dict[str, Any]:
    """The types of ``_described``, or of the pointers in its place."""
    if not config["TMA"]:
        strides = {"stride_hm": "i32:16", "stride_rm": "i32:16", "stride_wv": "i32:16"}
        return {**inputs, **strides, "saved": None, "ref_saved": None}
    rows = f"tensordesc<{dtype}[{config['BLOCK_M']},{config['BLOCK_D']}]>"
    weight = f"tensordesc<{dtype}[{config['BLOCK_V']},{config['BLOCK_D']}]>"
    described = inputs | {"weight": weight, "stride_hm": "i32:16", "stride_rm": "i32:16"}
    if config["SPECIALIZE"]:
        return described
    ref_hidden = rows if inputs["ref_hidden"] else None
    return described | {"hidden": rows, "ref_hidden": ref_hidden}


def _launched(
    config: tuning.Config, label: str, arch: int, expects: tuple[str, ...], *known: str
) -> tuple[dict[str, int], dict[str, Any]]:
    """A config's constexprs, and its launch options with those of compile_check."""
    taken = _options(config, *known).items()
    sizes = {name: size for name, size in taken if not name.startswith("num_")}
    how = ("TMA", "SPECIALIZE")
    blocks = "x".join(str(size) for name, size in config.items() if name not in (*how, "GROUP"))
    options = {name: size for name, size in config.items() if name.startswith("num_")}
    label = " ".join([label, blocks, *(name for name in how if config[name])])
    return sizes, {**options, "label": label, "archs": (arch,), "expects": expects}


registry.register(
    "linear_logprob", "triton", registry.Kernel(fwd, bwd, unsupported, missing=runtime.missing)
)
