"""linear_logprob on a CPU: blocks of logits by BLAS, used up at once by C++.

A tile of rows times a block of the vocabulary is all that exists of the logits. The sizes of both
are fixed before the number of rows is looked at, because BLAS may round differently for another
shape: so the result of a row does not depend on the batch in which it sits.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hydra_kernels.backends import extension, registry
from hydra_kernels.backends.cpu.products import multiply, pieces, takes
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
# Share of the budget that logits may take until backward, and the depth from which on that is
# faster than their product: fresh pages for 8 MB were measured at 0.7 to 2.5 ms on one Xeon, by
# what the allocator had given back to the system, and the product at this depth at 4 ms. By
# bfloat16 tiles the product is faster, and what is gained here less: 3%, and 10% at 1024.
SAVED_SHARE = 4
SAVED_DEPTH = 256
# Whatever torch's default dtype and device are: the kernels are given addresses.
_FLOAT: Any = {"dtype": torch.float32, "device": "cpu"}


def unsupported(*tensors: Tensor | None) -> list[str]:
    return [
        *registry.wrong_device("cpu", *tensors),
        *registry.wrong_dtype((torch.float32, torch.float16, torch.bfloat16), *tensors),
    ]


def saves_unasked(hidden: Tensor, weight: Tensor, ref_hidden: Tensor | None) -> bool:
    """Whether forward had better keep the logits in float32, which changes no bit and takes little
    memory."""
    V, D = weight.shape
    if D < SAVED_DEPTH:
        return False
    saved = 4 * hidden.shape[0] * V * (1 if ref_hidden is None else 2)
    return saved * SAVED_SHARE <= _budget_mb() * 2**20


def sizes_of(n: int, V: int) -> tuple[int, int, int]:
    """Rows that ``n`` are padded to, and rows and columns of a buffer of logits; with every tile
    that BLAS may be found to round alike."""
    tiles = [size for _, size in _tiles(n, (ROWS, *SMALLER))]
    return sum(tiles), max(tiles), max(_blocks(V, _columns(_budget_mb()))[1])


def fwd(
    inputs: LogprobInputs, save: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
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
    saved = [
        None if save is None or r is None else hidden.new_empty(M, V, dtype=save)
        for r in (rows, ref_rows)
    ]
    sums = torch.empty(8, n, **_FLOAT)
    for first, count in walk.blocks:
        head = walk.head(first, count)
        for begin, size in walk.tiles:
            inside = min(size, n - begin)
            parts = [None if store is None else store[begin:, first:] for store in saved]
            z, z_ref = walk.products(rows, ref_rows, head, begin, inside, parts)
            for part, block in zip(parts, (z, z_ref), strict=True):
                if part is not None and block is not None and block is not part:
                    part = part[:inside, :count]
                    # Rounded to the dtype it is kept in, so that backward sees the same.
                    block[:inside, :count].copy_(part.copy_(block[:inside, :count]))
            extension.module.linear_logprob_sums_cpu(  # type: ignore[union-attr]
                z.data_ptr(),
                0 if z_ref is None else z_ref.data_ptr(),
                z.stride(0),
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
    for store in saved:
        if store is not None:
            store[n:].zero_()
    if kept is not None:
        results = torch.zeros(5, M, **_FLOAT).index_copy_(1, kept, results)
        norms = torch.zeros(4, M, **_FLOAT).index_copy_(1, kept, norms)
    return results, norms, saved[0], saved[1]


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
    dz = walk.dlogits() if n else None
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
                z.stride(0),
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
                dz.data_ptr(),
                dz.dtype == torch.bfloat16,
                dz.stride(0),
            )
            if dhidden is not None:
                if inside < size:  # the last tile's padding, never in the way of a real row
                    dz[inside:size].zero_()
                walk.add_product(dhidden, dz, head, begin, size, count)
            if dhead is not None:
                assert rows is not None
                x = rows[begin : begin + inside, :D]
                multiply(dhead, dz[:inside, :count].t(), x, adds=begin > 0)
            if dbias is not None:
                dbias[first : first + count] += dz[:inside, :count].sum(0, dtype=torch.float32)
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
        dtype: of the matrices that are multiplied.
    """

    def __init__(self, weight: Tensor, n: int, backward: bool):
        self.weight = weight
        V, D = weight.shape
        self.depth = max(D, LEAST_DEPTH)
        self.dtype = weight.dtype if takes(weight.dtype) else torch.float32
        self.blocks, counts = _blocks(V, _columns(_budget_mb()))
        self.stride = max(counts)
        sizes = functools.partial(_sizes, self.depth, counts)
        here = (torch.get_num_threads(), self.dtype)
        self._forward = sizes(False, *here) if n else {}
        self._backward = sizes(True, *here) if n and backward else self._forward
        self.tiles = _tiles(n, tuple(self._backward))
        self.padded = sum(size for _, size in self.tiles)
        largest = max((size for _, size in self.tiles), default=0)
        self._shape = (largest, self.stride)
        self._buffers: list[Tensor] = []
        self._head: Tensor | None = None
        dense = weight.stride(1) == 1 and weight.stride(0) >= D
        alike = weight.dtype == self.dtype and D == self.depth
        self._as_it_is = alike and (dense or self.dtype == torch.float32)

    def pack(self, rows: Tensor, kept: Tensor | None) -> Tensor:
        """(padded, depth): the rows that count, and zeros."""
        rows = rows if kept is None else rows[kept]
        if rows.dtype == self.dtype and rows.shape == (self.padded, self.depth):
            return rows.contiguous()
        packed = torch.zeros(self.padded, self.depth, dtype=self.dtype, device="cpu")
        packed[: rows.shape[0], : rows.shape[1]] = rows
        return packed

    def head(self, first: int, count: int) -> Tensor:
        """(count or LEAST_COLUMNS, depth): a block of the weight."""
        block = self.weight[first : first + count]
        if self._as_it_is and count >= LEAST_COLUMNS:
            return block
        if self._head is None:
            self._head = torch.zeros(self.stride, self.depth, dtype=self.dtype, device="cpu")
        self._head[:count, : block.shape[1]] = block
        return self._head[: max(count, LEAST_COLUMNS)]

    def products(
        self,
        rows: Tensor | None,
        ref_rows: Tensor | None,
        head: Tensor,
        begin: int,
        inside: int,
        parts: Sequence[Tensor | None] = (None, None),
    ) -> tuple[Tensor, Tensor | None]:
        """The products of ``inside`` rows, and of no more behind them than a tile here needs: in
        ``parts`` where they fit, or else in the buffers."""
        size = min(s for s in self._forward if s >= inside)
        out: list[Tensor | None] = [None, None]
        for i, (x, part) in enumerate(zip((rows, ref_rows), parts, strict=True)):
            if x is None:
                continue
            fits = part is not None and part.dtype == torch.float32
            if not fits or part.shape[0] < size or part.shape[1] < head.shape[0]:
                part = self._buffer(i)
            multiply(
                part[:size, : head.shape[0]],
                x[begin : begin + size],
                head.t(),
                piece=self._forward[size].forward,
            )
            out[i] = part
        assert out[0] is not None
        return out[0], out[1]

    def restore(self, saved: Tensor, ref_saved: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits as they were in forward: where they are, or else in the buffers."""
        if saved.dtype == torch.float32:
            return saved, ref_saved
        out = [None if s is None else self._buffer(i) for i, s in enumerate((saved, ref_saved))]
        for buffer, store in zip(out, (saved, ref_saved), strict=True):
            if buffer is not None and store is not None:
                buffer[: store.shape[0], : store.shape[1]] = store
        assert out[0] is not None
        return out[0], out[1]

    def dlogits(self) -> Tensor:
        """What the gradients of a pair's logits are written to: the buffer that may hold these."""
        buffer = self._buffer(0)
        return buffer if self.dtype == torch.float32 else buffer.view(self.dtype)

    def add_product(
        self, dhidden: Tensor, dz: Tensor, head: Tensor, begin: int, size: int, count: int
    ) -> None:
        multiply(
            dhidden[begin : begin + size],
            dz[:size, :count],
            head[:count],
            adds=True,
            piece=self._backward[size].backward,
        )

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


@functools.cache
def _blocks(V: int, columns: int) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """Blocks of nearly one size, multiples of 16 but for the last, so that no block is tiny; and
    how many columns their products have, each number once."""
    units = -(-V // 16)
    number = -(-V // columns)
    edges = [min(16 * (units * i // number), V) for i in range(number + 1)]
    blocks = [(a, b - a) for a, b in itertools.pairwise(edges)]
    return blocks, tuple(sorted({max(count, LEAST_COLUMNS) for _, count in blocks}))


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


class _Pieces(NamedTuple):
    """How much of the inner size BLAS gets at once (0: all of it)."""

    forward: int
    backward: int


@functools.cache
def _sizes(
    depth: int,
    counts: tuple[int, ...],
    backward: bool,
    num_threads: int,
    dtype: torch.dtype = torch.float32,
) -> dict[int, _Pieces]:
    """Sizes of tiles, largest first, that BLAS can be made to round alike wherever a row sits.

    The products of backward sum over the columns of a block, and may agree for fewer sizes than
    those over the depth.
    """
    rest = (dtype, num_threads)
    there = pieces((ROWS, *SMALLER), depth, counts, False, *rest)
    if not backward:
        return {size: _Pieces(piece, 0) for size, piece in there.items()}
    back = pieces((ROWS, *SMALLER), depth, counts, True, *rest)
    return {s: _Pieces(piece, back[s]) for s, piece in there.items() if s in back}


registry.register(
    "linear_logprob", "cpu", registry.Kernel(fwd, bwd, unsupported, missing=extension.missing)
)
