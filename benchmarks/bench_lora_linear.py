"""One LoRA layer beside the bare linear layer, PEFT's, and three calls with a backward by hand."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Absent, Shape, Work, differs, ours
from hydra_kernels import lora_linear

OP = "lora_linear"
DROPOUT = 0.05
MODES = ("fwd", "fwd+bwd", "fwd dropout", "fwd+bwd dropout")
PEERS = ("F.linear", "peft", "three calls")
FLOOR = "F.linear"  # what the layer costs without an adapter
MEMORY = True
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16,)}


def _shape(m: int, k: int, n: int, r: int, why: str, quick: bool = False) -> Shape:
    return Shape({"M": m, "K": k, "N": n, "R": r}, why, quick=quick)


SHAPES = {
    "cpu": [
        _shape(m, k, k, r, "a small model's layer", quick=(m, k, r) == (1024, 1024, 16))
        for m in (1024, 4096)
        for k in (1024, 2048)
        for r in (8, 16, 64)
    ],
    "cuda": [
        *(_shape(1, 4096, 4096, r, "one token: what W's bytes take") for r in (16, 64)),
        _shape(32, 4096, 4096, 16, "a batch that decodes", quick=True),
        *(_shape(8192, 4096, 4096, r, "training", quick=r == 16) for r in (16, 32, 64)),
        _shape(8192, 4096, 14336, 16, "training, an MLP"),
    ],
}


class Inputs(NamedTuple):
    x: Tensor  # (M, K)
    weight: Tensor  # (N, K)
    lora_a: Tensor  # (R, K)
    lora_b: Tensor  # (N, R)
    scaling: float
    upstream: Tensor  # (M, N)


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    m, k, n, r = shape.sizes.values()

    def random(*size: int) -> Tensor:
        return (torch.randn(size, device=device) / size[-1] ** 0.5).to(dtype)

    x, lora_a, lora_b = random(m, k), random(r, k), random(n, r)
    for leaf in (x, lora_a, lora_b):
        leaf.requires_grad_()
    return Inputs(x, random(n, k), lora_a, lora_b, 2.0, random(m, n))


class ThreeCalls(torch.autograd.Function):
    """Products one after the other, in place where that is possible, as unsloth writes them."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scaling):
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        return torch.mm(x, weight.t()).addmm_(torch.mm(x, a.t()), b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b = ctx.saved_tensors
        down = torch.mm(dy, b)
        da = torch.mm(down.t(), x).mul_(ctx.scaling)
        db = torch.mm(dy.t(), torch.mm(x, a.t())).mul_(ctx.scaling)
        dx = torch.mm(dy, weight).addmm_(down, a, alpha=ctx.scaling)
        return dx, None, da, db, None


@functools.cache
def _peft_layer(k: int, n: int, r: int, dropout: float):
    """A layer of PEFT, or why there is none; its weights are those of the inputs at each call."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return Absent("PEFT is not installed")
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["0"])
    return get_peft_model(nn.Sequential(nn.Linear(k, n, bias=False)), config).base_model.model[0]


def _peft(tensors: Inputs, dropout: float):
    r, k = tensors.lora_a.shape
    layer = _peft_layer(k, tensors.weight.shape[0], r, dropout)
    if isinstance(layer, Absent):
        return layer
    layer.base_layer.weight = nn.Parameter(tensors.weight, requires_grad=False)
    # The leaves themselves, so that gradients are taken in them.
    del layer.lora_A["default"].weight, layer.lora_B["default"].weight
    layer.lora_A["default"].weight = tensors.lora_a
    layer.lora_B["default"].weight = tensors.lora_b
    return lambda: layer(tensors.x)


def calls(tensors: Inputs, mode: str) -> dict:
    dropout = DROPOUT if "dropout" in mode else 0.0
    x, weight, lora_a, lora_b, scaling, upstream = tensors

    def mine(backend: str):
        return lora_linear(x, weight, lora_a, lora_b, scaling, dropout=dropout, backend=backend)

    functions = {
        **{name: functools.partial(mine, name) for name in ours(OP, x.device.type)},
        "F.linear": lambda: F.linear(x, weight),
        "peft": _peft(tensors, dropout),
        "three calls": lambda: ThreeCalls.apply(x, weight, lora_a, lora_b, scaling),
    }
    if dropout > 0.0:
        functions["three calls"] = Absent("is written without dropout")
    if x.shape[0] > 32 or mode != "fwd":
        functions.pop("cuda", None)  # decodes only

    def forward(name: str, f):
        with torch.set_grad_enabled(name != "cuda"):
            return (f(),)

    def both(name: str, f):
        leaves = (x,) if name == "F.linear" else (x, lora_a, lora_b)
        y = f()
        return (y, *torch.autograd.grad(y, leaves, upstream))

    run = both if "bwd" in mode else forward
    return {
        name: f if isinstance(f, Absent) else functools.partial(run, name, f)
        for name, f in functions.items()
    }


def check(tensors: Inputs, mode: str, row: str, out) -> str:
    """Against float64; under dropout, whose masks differ, the product of W alone, to within it."""
    with torch.no_grad():
        x, w, a, b, scaling, dy = (
            t.detach().double() if isinstance(t, Tensor) else t for t in tensors
        )
        base = (x @ w.T, dy @ w)
        if row == "F.linear":
            return differs(out, base[: len(out)])
        if "dropout" in mode:
            drop = (DROPOUT / (1 - DROPOUT)) ** 0.5  # of the adapter's part, in the mean
            delta = (scaling * x @ a.T @ b.T, scaling * dy @ b @ a)
            for got, plain, part in zip(out, base, delta, strict=False):
                error = (got.double() - plain - part).norm() / part.norm()
                if not error < 1.5 * drop + 0.05:
                    return f"the adapter's part is {error:.2f} of itself off, {drop:.2f} expected"
            return ""
        exact = (
            base[0] + scaling * x @ a.T @ b.T,
            base[1] + scaling * dy @ b @ a,
            scaling * (dy @ b).T @ x,
            scaling * dy.T @ (x @ a.T),
        )
        return differs(out, exact[: len(out)])


def work(shape: Shape, dtype: torch.dtype, mode: str) -> Work:
    """Forward: x W^T and two products of rank R; backward: dy W and four."""
    m, k, n, r = shape.sizes.values()
    flops = 2 * m * k * n + 2 * m * r * (k + n)
    size = dtype.itemsize
    moved = size * (m * k + n * k + m * n + r * (k + n))
    if "bwd" in mode:
        flops += 2 * m * k * n + 4 * m * r * (k + n)
        moved += size * (m * n + n * k + 2 * m * k + 2 * r * (k + n))
    return Work(bytes=moved, flops=flops)
