"""Query, key and value of grouped-query attention, each with an adapter: one op, and one by one."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Shape, Work, differs, ours
from hydra_kernels import Projection, lora_linear, lora_linear_group

OP = "lora_linear_group"
MODES = ("fwd", "fwd+bwd")
PEERS = ("F.linear", "one by one")
FLOOR = "F.linear"  # what the three layers cost without adapters
MEMORY = True
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16,)}
SCALING = 2.0
# N is that of all three; keys and values have a sixth of it each, as 32 heads that share 8.
SHAPES = {
    "cpu": [
        Shape({"M": 1024, "K": 1024, "N": 1536, "R": r}, "a small model's", quick=r == 16)
        for r in (16, 64)
    ],
    "cuda": [
        Shape({"M": 8192, "K": 4096, "N": 6144, "R": r}, "training", quick=r == 16)
        for r in (16, 32)
    ],
}


class Inputs(NamedTuple):
    x: Tensor  # (M, K)
    weights: tuple[Tensor, ...]  # (N_p, K)
    lora_a: tuple[Tensor, ...]  # (R, K)
    lora_b: tuple[Tensor, ...]  # (N_p, R)
    upstream: tuple[Tensor, ...]  # (M, N_p)


def _widths(n: int) -> tuple[int, int, int]:
    return n - 2 * (n // 6), n // 6, n // 6


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    m, k, n, r = shape.sizes.values()
    widths = _widths(n)

    def random(*size: int) -> Tensor:
        return (torch.randn(size, device=device) / size[-1] ** 0.5).to(dtype)

    found = Inputs(
        random(m, k),
        tuple(random(width, k) for width in widths),
        tuple(random(r, k) for _ in widths),
        tuple(random(width, r) for width in widths),
        tuple(random(m, width) for width in widths),
    )
    for leaf in (found.x, *found.lora_a, *found.lora_b):
        leaf.requires_grad_()
    return found


def calls(tensors: Inputs, mode: str) -> dict:
    x, weights, lora_a, lora_b, upstream = tensors
    parts = list(zip(weights, lora_a, lora_b, strict=True))

    def mine(backend: str):
        projections = [Projection(w, a, b, SCALING) for w, a, b in parts]
        return tuple(lora_linear_group(x, projections, backend=backend))

    functions = {
        **{name: functools.partial(mine, name) for name in ours(OP, x.device.type)},
        "F.linear": lambda: tuple(F.linear(x, w) for w in weights),
        "one by one": lambda: tuple(lora_linear(x, w, a, b, SCALING) for w, a, b in parts),
    }
    functions.pop("cuda", None)  # decodes only

    def both(name: str, f):
        leaves = (x,) if name == "F.linear" else (x, *lora_a, *lora_b)
        ys = f()
        return (*ys, *torch.autograd.grad(ys, leaves, upstream))

    if "bwd" not in mode:
        return functions
    return {name: functools.partial(both, name, f) for name, f in functions.items()}


def check(tensors: Inputs, mode: str, row: str, out) -> str:
    """Against float64."""
    with torch.no_grad():
        x = tensors.x.detach().double()
        given = (tensors.weights, tensors.lora_a, tensors.lora_b, tensors.upstream)
        layers = [tuple(t.detach().double() for t in layer) for layer in zip(*given, strict=True)]
        scale = 0.0 if row == "F.linear" else SCALING
        exact = [x @ w.T + scale * x @ a.T @ b.T for w, a, b, _ in layers]
        exact.append(sum(dy @ w + scale * dy @ b @ a for w, a, b, dy in layers))
        exact += [scale * (dy @ b).T @ x for _, a, b, dy in layers]
        exact += [scale * dy.T @ (x @ a.T) for _, a, b, dy in layers]
        return differs(out, exact[: len(out)])


def work(shape: Shape, dtype: torch.dtype, mode: str) -> Work:
    """As bench_lora_linear's, with one read of x for all, and one write of dX."""
    m, k, n, r = shape.sizes.values()
    small = r * (3 * k + n)
    flops = 2 * m * (k * n + small)
    size = dtype.itemsize
    moved = size * (m * k + n * k + m * n + small)
    if "bwd" in mode:
        flops += 2 * m * k * n + 4 * m * small
        moved += size * (m * n + n * k + 2 * m * k + 2 * small)
    return Work(bytes=moved, flops=flops)
