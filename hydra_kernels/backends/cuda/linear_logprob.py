"""linear_logprob on a GPU: blocks of logits by cuBLAS, used up at once by CUDA C++.

The portable path: a block of logits is sized to stay in the L2 cache, where the kernel of
csrc/cuda/linear_logprob.cu finds it. The shape of every product is fixed before the number of rows
is looked at, because cuBLAS may round differently for another: rows are padded to whole tiles.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.cuda.device import wrong_device
from hydra_kernels.backends.logprob_inputs import LogprobInputs, LogprobKept

# 1024 rows by 8192 columns in float32: 32 MB of the 50 MB L2 cache of an H100 or H200.
ROWS = 1024
COLUMNS = 8192
DEFAULT_BUDGET_MB = 256
# As csrc/cuda/linear_logprob.cu has them.
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def unsupported(*tensors: Tensor | None) -> list[str]:
    return [
        *wrong_device(*tensors),
        *registry.wrong_dtype(tuple(_DTYPES), *tensors),
    ]


def fwd(
    inputs: LogprobInputs, save: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns results (5, M), norms (4, M), and the logits of both where they are to be saved, in
    the dtype of hidden."""
    hidden, ref_hidden, targets = inputs.hidden, inputs.ref_hidden, inputs.targets
    M, _, V = inputs.sizes
    walk = _Walk(inputs)
    rows = walk.pack(hidden)
    ref_rows = None if ref_hidden is None else walk.pack(ref_hidden)
    # Whole tiles, so that a product can be written where it stays.
    saved = hidden.new_empty(rows.shape[0], V) if save else None
    ref_saved = hidden.new_empty(rows.shape[0], V) if save and ref_rows is not None else None
    sums = hidden.new_empty(8, M, dtype=torch.float32)
    for first, count in walk.blocks:
        for begin in walk.tiles:
            part = (slice(begin, begin + ROWS), slice(first, first + count))
            z = walk.product(rows, part, saved)
            z_ref = None if ref_rows is None else walk.product(ref_rows, part, ref_saved)
            extension.module.linear_logprob_sums_cuda(  # type: ignore[union-attr]
                *walk.block(z, z_ref, part), sums.data_ptr() + 4 * begin, M, *walk.where
            )
    results = hidden.new_empty(5, M, dtype=torch.float32)
    norms = hidden.new_empty(4, M, dtype=torch.float32)
    extension.module.linear_logprob_finish_cuda(  # type: ignore[union-attr]
        sums.data_ptr(),
        targets.data_ptr(),
        inputs.ignore_index,
        V,
        M,
        ref_hidden is not None,
        results.data_ptr(),
        norms.data_ptr(),
        *walk.where,
    )
    return (
        results,
        norms,
        None if saved is None else saved[:M],
        None if ref_saved is None else ref_saved[:M],
    )


def bwd(
    upstream: Tensor,  # (4, M) float32: of logprobs, entropy, logsumexp and kl
    inputs: LogprobInputs,
    forward: LogprobKept,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of hidden, weight and bias, as far as they are wanted."""
    hidden, weight, ref_hidden = inputs.hidden, inputs.weight, inputs.ref_hidden
    entropy, kl, norms, saved, ref_saved = forward
    M, D, V = inputs.sizes
    walk = _Walk(inputs)
    rows = walk.pack(hidden)
    ref_rows = None if ref_hidden is None else walk.pack(ref_hidden)
    # Rows past M are read by the last tile's product, and their results thrown away.
    dlogits = hidden.new_zeros(ROWS, walk.stride)
    dhidden = torch.zeros_like(rows, dtype=torch.float32) if wanted[0] else None
    dweight = weight.new_zeros(V, D) if wanted[1] else None
    dbias = norms.new_zeros(V) if wanted[2] else None
    for first, count in walk.blocks if M else ():
        dhead = hidden.new_zeros(count, D, dtype=torch.float32) if wanted[1] else None
        for begin in walk.tiles:
            inside = min(ROWS, M - begin)
            part = (slice(begin, begin + ROWS), slice(first, first + count))
            z, z_ref = (None if s is None else s[part] for s in (saved, ref_saved))
            if z is None:
                z = walk.product(rows, part, None)
                z_ref = None if ref_rows is None else walk.product(ref_rows, part, None)
            extension.module.linear_logprob_grads_cuda(  # type: ignore[union-attr]
                *walk.block(z, z_ref, part),
                norms.data_ptr() + 4 * begin,
                entropy.data_ptr() + 4 * begin,
                0 if z_ref is None else kl.data_ptr() + 4 * begin,
                upstream.data_ptr() + 4 * begin,
                M,
                dlogits.data_ptr(),
                _DTYPES[dlogits.dtype],
                dlogits.stride(0),
                *walk.where,
            )
            dz = dlogits[:, :count]
            if dhidden is not None:
                _add_product(dhidden[part[0]], dz, weight[part[1]])
            if dhead is not None:
                _add_product(dhead, dz[:inside].t(), rows[begin : begin + inside])
            if dbias is not None:
                dbias[part[1]] += dz[:inside].sum(0, dtype=torch.float32)
        if dweight is not None and dhead is not None:
            dweight[first : first + count] = dhead
    return (
        None if dhidden is None else dhidden[:M].to(hidden.dtype),
        dweight,
        None if dbias is None else dbias.to(weight.dtype),
    )


def _columns() -> int:
    # Two blocks of logits and their gradient.
    budget_mb = float(os.environ.get("HYDRA_LOGPROB_BUDGET_MB") or DEFAULT_BUDGET_MB)
    affordable = int(budget_mb * 2**20 / (3 * 4 * ROWS)) // 64 * 64
    return max(64, min(COLUMNS, affordable))


def block_columns(V: int) -> int:
    """Columns of a buffer of logits."""
    return min(_columns(), -(-V // 64) * 64)


class _Walk:
    """Tiles of rows and blocks of the vocabulary, and what the kernels are told about each pair."""

    def __init__(self, inputs: LogprobInputs):
        self.inputs = inputs
        self.M, _, V = inputs.sizes
        self.bias = None if inputs.bias is None else inputs.bias.float().contiguous()
        columns = _columns()
        self.stride = block_columns(V)
        self.blocks = [(first, min(columns, V - first)) for first in range(0, V, columns)]
        self.tiles = range(0, self.M, ROWS)
        device = inputs.hidden.device
        self.where = (device.index, torch.cuda.current_stream(device).cuda_stream)
        self._buffers: dict[int, Tensor] = {}

    def pack(self, rows: Tensor) -> Tensor:
        """(whole tiles, D): rows that are ignored or not there are 0, so that NaN cannot enter."""
        packed = rows.new_zeros(len(self.tiles) * ROWS, rows.shape[1])
        keep = (self.inputs.targets != self.inputs.ignore_index).unsqueeze(-1)
        packed[: self.M] = torch.where(keep, rows, 0.0)
        return packed

    def product(self, rows: Tensor, part: tuple[slice, slice], saved: Tensor | None) -> Tensor:
        """hidden W^T of a tile and a block: float32, or in ``saved``, rounded to its dtype."""
        x, head = rows[part[0]], self.inputs.weight[part[1]].t()
        if saved is not None:
            return torch.mm(x, head, out=saved[part])
        key = rows.data_ptr()
        if key not in self._buffers:
            self._buffers[key] = x.new_empty(ROWS, self.stride, dtype=torch.float32)
        out = self._buffers[key][:, : head.shape[1]]
        if x.dtype == torch.float32:
            return torch.mm(x, head, out=out)
        return torch.mm(x, head, out_dtype=torch.float32, out=out)  # type: ignore[call-overload]

    def block(self, z: Tensor, z_ref: Tensor | None, part: tuple[slice, slice]) -> tuple:
        """The first arguments of the kernels' entries."""
        begin, first = part[0].start, part[1].start
        return (
            z.data_ptr(),
            0 if z_ref is None else z_ref.data_ptr(),
            _DTYPES[z.dtype],
            z.stride(0),
            min(ROWS, self.M - begin),
            first,
            part[1].stop - first,
            0 if self.bias is None else self.bias.data_ptr(),
            self.inputs.temperature.data_ptr(),
            self.inputs.softcap,
            self.inputs.targets.data_ptr() + 8 * begin,
            self.inputs.ignore_index,
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, accumulated in total's float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)  # type: ignore[call-overload]


registry.register(
    "linear_logprob", "cuda", registry.Kernel(fwd, bwd, unsupported, missing=extension.missing_cuda)
)
