"""linear_logprob on a CPU: blocks of logits by BLAS, used up at once by C++.

A tile of rows times a block of the vocabulary is all that exists of the logits. The sizes of both
are fixed before the number of rows is looked at, because BLAS may round differently for another
shape: so the result of a row does not depend on the batch in which it sits.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.logprob_inputs import LogprobInputs, LogprobKept

# Large enough for BLAS to reach its speed; a block of 4 MB stays in the second-level caches.
ROWS = 1024
COLUMNS = 1024
# Tiles for what is left over, where BLAS rounds them as it does ROWS.
SMALLER = (512, 256, 192, 128, 64, 32, 16)
# Below these BLAS takes matrix-vector code, which rounds by the row's position.
LEAST_COLUMNS = 64
LEAST_DEPTH = 16
DEFAULT_BUDGET_MB = 64
# Whatever torch's default dtype and device are: the kernels are given addresses.
_FLOAT: Any = {"dtype": torch.float32, "device": "cpu"}


def unsupported(*tensors: Tensor | None) -> list[str]:
    return [
        *registry.wrong_device("cpu", *tensors),
        *registry.wrong_dtype((torch.float32, torch.float16, torch.bfloat16), *tensors),
    ]


def fwd(inputs: LogprobInputs, save: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns results (5, M), norms (4, M), and the logits of both where they are to be saved."""
    hidden, weight, targets, bias, temperature, softcap, ref_hidden, ignore_index = inputs
    M, _, V = inputs.sizes
    kept = _kept(targets, ignore_index)
    if kept is not None:
        targets = targets[kept]
    n = targets.numel()
    walk = _Walk(weight, n, backward=False)
    rows = walk.pack(hidden, kept)
    ref_rows = None if ref_hidden is None else walk.pack(ref_hidden, kept)
    bias = None if bias is None else bias.float().contiguous()
    saved = [hidden.new_empty(M, V) if save and r is not None else None for r in (rows, ref_rows)]
    for store in saved:
        if store is not None:
            store[n:].zero_()
    sums = torch.empty(8, n, **_FLOAT)
    for first, count in walk.blocks:
        head = walk.head(first, count)
        for begin, size in walk.tiles:
            inside = min(size, n - begin)
            z, z_ref = walk.products(rows, ref_rows, head, begin, inside)
            if save:
                for store, block in zip(saved, (z, z_ref), strict=True):
                    if store is not None and block is not None:
                        part = store[begin : begin + inside, first : first + count]
                        # Rounded to the dtype it is kept in, so that backward sees the same.
                        block[:inside, :count].copy_(part.copy_(block[:inside, :count]))
            extension.module.linear_logprob_sums_cpu(  # type: ignore[union-attr]
                z.data_ptr(),
                0 if z_ref is None else z_ref.data_ptr(),
                walk.stride,
                inside,
                first,
                count,
                0 if bias is None else bias.data_ptr(),
                temperature.data_ptr(),
                softcap,
                targets.data_ptr() + 8 * begin,
                sums.data_ptr() + 4 * begin,
                n,
            )
    results, norms = torch.zeros(5, n, **_FLOAT), torch.empty(4, n, **_FLOAT)
    extension.module.linear_logprob_finish_cpu(  # type: ignore[union-attr]
        sums.data_ptr(), n, ref_hidden is not None, results.data_ptr(), norms.data_ptr()
    )
    if kept is not None:
        results = torch.zeros(5, M, **_FLOAT).index_copy_(1, kept, results)
        norms = torch.zeros(4, M, **_FLOAT).index_copy_(1, kept, norms)
    return results, norms, *(saved if save else (None, None))


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
    kept = _kept(targets, ignore_index)
    if kept is not None:
        targets, upstream = targets[kept], upstream[:, kept]
        entropy, norms = entropy[kept], norms[:, kept]
        kl = kl if ref_hidden is None else kl[kept]
    upstream, norms = upstream.contiguous(), norms.contiguous()
    entropy, kl = entropy.contiguous(), kl.contiguous()
    n = targets.numel()
    walk = _Walk(weight, n, backward=wanted[0])
    rows = walk.pack(hidden, kept) if saved is None or wanted[1] else None
    ref_rows = None
    if ref_hidden is not None and ref_saved is None:
        ref_rows = walk.pack(ref_hidden, kept)
    full_bias = None if bias is None else bias.float().contiguous()
    dhidden = torch.zeros(walk.padded, walk.depth, **_FLOAT) if wanted[0] else None
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else None
    dbias = torch.zeros(V, **_FLOAT) if wanted[2] else None
    if n == 0:
        dweight = None if dweight is None else dweight.zero_()
    for first, count in walk.blocks if n else ():
        head = walk.head(first, count)
        dhead = None
        if dweight is not None:
            dhead = dweight[first : first + count]
            if dhead.dtype != torch.float32:
                dhead = torch.empty(count, D, **_FLOAT)
        for begin, size in walk.tiles:
            inside = min(size, n - begin)
            if saved is None:
                z, z_ref = walk.products(rows, ref_rows, head, begin, inside)
            else:
                part = (slice(begin, begin + inside), slice(first, first + count))
                z, z_ref = walk.restore(saved[part], None if ref_saved is None else ref_saved[part])
            extension.module.linear_logprob_grads_cpu(  # type: ignore[union-attr]
                z.data_ptr(),
                0 if z_ref is None else z_ref.data_ptr(),
                walk.stride,
                inside,
                first,
                count,
                0 if full_bias is None else full_bias.data_ptr(),
                temperature.data_ptr(),
                softcap,
                targets.data_ptr() + 8 * begin,
                norms.data_ptr() + 4 * begin,
                entropy.data_ptr() + 4 * begin,
                0 if z_ref is None else kl.data_ptr() + 4 * begin,
                upstream.data_ptr() + 4 * begin,
                n,
            )
            if dhidden is not None:
                z[inside:size].zero_()  # the last tile's padding, never in the way of a real row
                dhidden[begin : begin + size].addmm_(z[:size, :count], head[:count])
            if dhead is not None:
                assert rows is not None
                dz, x = z[:inside, :count], rows[begin : begin + inside, :D]
                if begin == 0:
                    torch.mm(dz.t(), x, out=dhead)
                else:
                    dhead.addmm_(dz.t(), x)
            if dbias is not None:
                dbias[first : first + count] += z[:inside, :count].sum(0)
        if dweight is not None and dhead is not None and dhead.dtype != dweight.dtype:
            dweight[first : first + count] = dhead
    if dhidden is not None:
        dhidden = dhidden[:n, :D].to(hidden.dtype)
        if kept is not None:
            dhidden = hidden.new_zeros(M, D).index_copy_(0, kept, dhidden)
    return dhidden, dweight, None if dbias is None else dbias.to(weight.dtype)


def _kept(targets: Tensor, ignore_index: int) -> Tensor | None:
    """The rows that count, (n,), or None for all of them."""
    keep = targets != ignore_index
    return None if bool(keep.all()) else keep.nonzero().squeeze(1)


class _Walk:
    """Tiles of rows and blocks of the vocabulary, and the buffers for the logits of one such pair.

    Attributes:
        tiles: (first row, rows) of each tile; the last one may reach past n, up to ``padded``.
        blocks: (first column, columns) of each block.
        stride: columns in the buffers.
        depth: D, or more where D is too small.
    """

    def __init__(self, weight: Tensor, n: int, backward: bool):
        self.weight = weight
        V, D = weight.shape
        self.depth = max(D, LEAST_DEPTH)
        self.blocks = list(_blocks(V, _columns(_budget_mb())))
        counts = tuple(sorted({max(count, LEAST_COLUMNS) for _, count in self.blocks}))
        self.stride = max(counts)
        threads = torch.get_num_threads()
        self._sizes = _sizes(self.depth, counts, False, threads) if n else ()
        sizes = _sizes(self.depth, counts, True, threads) if n and backward else self._sizes
        self.tiles = _tiles(n, sizes)
        self.padded = sum(size for _, size in self.tiles)
        largest = max((size for _, size in self.tiles), default=0)
        self._shape = (largest, self.stride)
        self._buffers: list[Tensor] = []
        self._head: Tensor | None = None

    def pack(self, rows: Tensor, kept: Tensor | None) -> Tensor:
        """(padded, depth) float32: the rows that count, and zeros."""
        rows = rows if kept is None else rows[kept]
        if rows.dtype == torch.float32 and rows.shape == (self.padded, self.depth):
            return rows.contiguous()
        packed = torch.zeros(self.padded, self.depth, **_FLOAT)
        packed[: rows.shape[0], : rows.shape[1]] = rows
        return packed

    def head(self, first: int, count: int) -> Tensor:
        """(count or LEAST_COLUMNS, depth) float32: a block of the weight."""
        block = self.weight[first : first + count]
        D = block.shape[1]
        enough = count >= LEAST_COLUMNS and D == self.depth
        if enough and block.dtype == torch.float32:
            return block
        if self._head is None:
            self._head = torch.zeros(self.stride, self.depth, **_FLOAT)
        self._head[:count, :D] = block
        return self._head[: max(count, LEAST_COLUMNS)]

    def products(
        self, rows: Tensor | None, ref_rows: Tensor | None, head: Tensor, begin: int, inside: int
    ) -> tuple[Tensor, Tensor | None]:
        """The products of ``inside`` rows, and of no more behind them than a tile here needs."""
        size = min(s for s in self._sizes if s >= inside)
        out: list[Tensor | None] = [None, None]
        for i, x in enumerate((rows, ref_rows)):
            if x is not None:
                out[i] = self._buffer(i)
                torch.mm(
                    x[begin : begin + size], head.t(), out=self._buffer(i)[:size, : head.shape[0]]
                )
        assert out[0] is not None
        return out[0], out[1]

    def restore(self, saved: Tensor, ref_saved: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits as they were in forward, in the buffers."""
        out = [None if s is None else self._buffer(i) for i, s in enumerate((saved, ref_saved))]
        for buffer, store in zip(out, (saved, ref_saved), strict=True):
            if buffer is not None and store is not None:
                buffer[: store.shape[0], : store.shape[1]] = store
        assert out[0] is not None
        return out[0], out[1]

    def _buffer(self, i: int) -> Tensor:
        while len(self._buffers) <= i:
            self._buffers.append(torch.empty(self._shape, **_FLOAT))
        return self._buffers[i]


def _budget_mb() -> float:
    return float(os.environ.get("HYDRA_LOGPROB_BUDGET_MB") or DEFAULT_BUDGET_MB)


def _columns(budget_mb: float) -> int:
    """Columns of a block: those of a cache, or fewer where two buffers would exceed the budget."""
    affordable = int(budget_mb * 2**20 / (2 * 4 * ROWS))
    return max(LEAST_COLUMNS, min(COLUMNS, affordable))


def _blocks(V: int, columns: int) -> Iterator[tuple[int, int]]:
    """Blocks of nearly one size, multiples of 16 but for the last, so that no block is tiny."""
    units = -(-V // 16)
    number = -(-V // columns)
    first = 0
    for i in range(number):
        count = 16 * (units * (i + 1) // number - units * i // number)
        count = min(count, V - first)
        yield first, count
        first += count


def _tiles(n: int, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Whole tiles, then one that reaches up to a quarter of itself past the end, or smaller."""
    tiles, begin = [], 0
    while begin < n:
        rest = n - begin
        near = [s for s in sizes if 3 * s <= 4 * rest]
        size = near[0] if near else sizes[-1]
        tiles.append((begin, size))
        begin += size
    return tiles


@functools.cache
def _sizes(
    depth: int, counts: tuple[int, ...], backward: bool, num_threads: int
) -> tuple[int, ...]:
    """Sizes of tiles, largest first, for which BLAS rounds a row alike wherever it sits.

    Which ones do depends on the library, the processor, the number of threads and the shape, and is
    documented nowhere: so the products of one tile are compared, once a shape. Those of backward
    sum over the columns of a block, and agree for fewer sizes than those over the depth.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    products = [(depth, count, False) for count in counts]
    if backward:
        products += [(count, depth, True) for count in counts]
    agreeing = set(SMALLER)
    for inner, outer, transposed in products:
        x = torch.randn(ROWS, inner, generator=generator, **_FLOAT)
        w = torch.randn(outer, inner, generator=generator, **_FLOAT)
        w = w.t().contiguous().t() if transposed else w  # as in addmm_(dz, head)
        large = torch.zeros(ROWS, outer, **_FLOAT).addmm_(x, w.t())
        for size in sorted(agreeing):
            for rows in (slice(None, size), slice(-size, None)):
                small = torch.zeros(size, outer, **_FLOAT).addmm_(x[rows], w.t())
                if not torch.equal(large[rows], small):
                    agreeing.discard(size)
    return (ROWS, *sorted(agreeing, reverse=True))


registry.register(
    "linear_logprob", "cpu", registry.Kernel(fwd, bwd, unsupported, missing=extension.missing)
)
