"""What the machine itself reaches: a copy in its memory and a bare matrix product.

The shares in the tables are of these, measured in the same run, never of a data sheet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Shape, Work, differs

OP = "ceilings"
MODES = ("copy", "product")
PEERS = ("torch",)
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float16, torch.float32)}
SHAPES = {
    "cpu": [Shape({"N": 2048}, "16 MiB in float32, past the L2 of any core", quick=True)],
    "cuda": [
        Shape({"N": 8192}, "128 MiB in bfloat16: past the L2, and it fills every multiprocessor",
              quick=True),
        Shape({"N": 16384}, "512 MiB in bfloat16: whether the larger one is faster still"),
    ],
}  # fmt: skip


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    n = shape.sizes["N"]
    # Random: products of zeros draw less power and run faster than any real one.
    return tuple(torch.randn(n, n, device=device).to(dtype) for _ in range(2))  # type: ignore[return-value]


def calls(tensors: tuple[Tensor, Tensor], mode: str) -> dict:
    a, b = tensors
    out = torch.empty_like(a)
    if mode == "copy":
        return {"torch": lambda: out.copy_(a)}
    return {"torch": lambda: torch.mm(a, b.T, out=out)}


def check(tensors: tuple[Tensor, Tensor], mode: str, row: str, out: Tensor) -> str:
    a, b = tensors
    rows = slice(0, 16)
    if mode == "copy":
        return "" if torch.equal(out, a) else "the copy differs"
    return differs([out[rows]], [a[rows].double() @ b.double().T])


def work(shape: Shape, dtype: torch.dtype, mode: str) -> Work:
    """A copy reads and writes N^2 elements; a product does 2 N^3 operations."""
    n = shape.sizes["N"]
    if mode == "copy":
        return Work(bytes=2 * n * n * dtype.itemsize)
    return Work(flops=2 * n**3)
