"""Matrix products on a CPU with float32 results, for few rows rounded as for many.

BLAS sums over the inner size in pieces, and takes other pieces for few rows than for many: then a
row's sums depend on how many others there are. Given the pieces of the many, the few agree.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from hydra_kernels.backends import extension

# MKL's is 384 on processors with AVX-512; the rest are common choices.
PIECES = (384, 256, 512, 320, 192, 128)


def takes(dtype: torch.dtype) -> bool:
    """Whether matrices of ``dtype`` are multiplied as they are, without a float32 copy."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and extension.has_bf16_blas)


def multiply(out: Tensor, a: Tensor, b: Tensor, *, adds: bool = False, piece: int = 0) -> None:
    """``out = a b``, or ``out += a b``, with ``piece`` of the inner size at once (0: all of it).

    Args:
        out: (m, n) float32, with contiguous columns.
        a: (m, k), of a dtype that is taken. The rows or the columns of a bfloat16 one are dense.
        b: (k, n), likewise.
    """
    k = a.shape[1]
    if a.dtype == torch.bfloat16:
        assert out.shape[0] == a.shape[0]  # BLAS would look no further
        extension.module.linear_logprob_product_cpu(  # type: ignore[union-attr]
            a.data_ptr(),
            *_layout(a),
            b.data_ptr(),
            *_layout(b),
            *out.shape,
            k,
            piece or k,
            adds,
            out.data_ptr(),
            out.stride(0),
        )
        return
    for begin in range(0, k, piece or k):
        some = slice(begin, begin + (piece or k))
        if adds or begin:
            out.addmm_(a[:, some], b[some])
        else:
            torch.mm(a[:, some], b[some], out=out)


def _layout(matrix: Tensor) -> tuple[int, bool]:
    """How far rows are apart, and whether these are its columns."""
    rows, columns = matrix.stride()
    if columns == 1 and rows >= matrix.shape[1]:
        return rows, False
    assert rows == 1 and columns >= matrix.shape[0]
    return columns, True


@functools.cache
def pieces(
    sizes: tuple[int, ...],
    inner: int,
    outers: tuple[int, ...],
    backward: bool,
    dtype: torch.dtype,
    num_threads: int,
) -> dict[int, int]:
    """The numbers of rows, largest first, that can be had rounded alike, each with its piece.

    Which ones do depends on the library, the processor, the number of threads and the shape, and is
    documented nowhere: so products of one matrix are compared, once a shape.

    Args:
        sizes: Numbers of rows, largest first. The first one is what the others are compared with.
        inner: The size that is summed over, or each of them if ``backward``.
        outers: Numbers of columns, or the one of them.
        backward: Adds to what is there, and the second matrix is not transposed.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    cases = []
    for outer in outers:
        k, n = (outer, inner) if backward else (inner, outer)
        a = randn(sizes[0], k).to(dtype)
        b = randn(n, k).to(dtype).t()
        b = b.contiguous() if backward else b
        before = randn(sizes[0], n)
        large = before.clone()
        multiply(large, a, b, adds=backward)
        cases.append((a, b, before, large))

    def agree(size: int, piece: int) -> bool:
        for a, b, before, large in cases:
            for rows in (slice(None, size), slice(-size, None)):
                small = before[rows].clone()
                multiply(small, a[rows], b, adds=backward, piece=piece)
                if not torch.equal(large[rows], small):
                    return False
        return True

    found = {sizes[0]: 0}
    for size in sizes[1:]:
        tried: Iterable[int] = (0, *(p for p in PIECES if p < max(inner, *outers)))
        piece = next((p for p in tried if agree(size, p)), None)
        if piece is not None:
            found[size] = piece
    return found
