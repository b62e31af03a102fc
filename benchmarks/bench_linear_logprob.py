"""Log-probability and entropy of a head's output, with and without a reference and its exact KL.

"bare product" is what cannot be avoided: the products alone, of one operand after the other, into
one buffer. Forward needs one, and one more for a reference; backward as many again, since no logits
are kept, and one for the gradient of the rows (the head is frozen here, as with LoRA). "saved" is
ours with ``memory="save"``, which keeps the logits, as torch.compile does.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Absent, Shape, Work, differs, ours
from hydra_kernels import linear_logprob

OP = "linear_logprob"
MODES = ("fwd", "fwd+bwd", "fwd, reference", "fwd+bwd, reference")
PEERS = (
    "saved",
    "bare product",
    "eager",
    "torch.compile",
    "linear_cross_entropy (logprob only)",
    "liger (logprob only)",
    "cut-cross-entropy (logprob only)",
)
FLOOR = "bare product"
MEMORY = True
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16,)}
HALF = (torch.bfloat16,)
BOTH = (torch.float32, torch.bfloat16)
SHAPES = {
    "cpu": [
        Shape({"M": 256, "D": 256, "V": 8000}, "a small model's minibatch", quick=True),
        Shape({"M": 256, "D": 256, "V": 8000}, "the same in half precision", dtypes=HALF),
        Shape({"M": 64, "D": 1024, "V": 32000}, "few rows, of a deeper model", dtypes=BOTH),
        Shape({"M": 1024, "D": 512, "V": 32000}, "Llama 2's vocabulary", dtypes=BOTH),
        Shape({"M": 1024, "D": 512, "V": 151936}, "Qwen's vocabulary"),
        Shape({"M": 4096, "D": 1024, "V": 32000}, "more rows than one tile"),
        Shape({"M": 2048, "D": 256, "V": 151936}, "what memory is measured on"),
    ],
    "cuda": [
        Shape({"M": 8192, "D": 4096, "V": 32000}, "Llama 2 7B, 16 responses of 512", quick=True),
        Shape({"M": 8192, "D": 4096, "V": 128256}, "Llama 3 8B"),
    ],
}
SAMPLE = 16  # rows that are compared with float64


class Inputs(NamedTuple):
    hidden: Tensor  # (M, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (M,)
    ref_hidden: Tensor  # (M, D)
    upstream: Tensor  # (3, M): of logprobs, entropy and KL, one a token


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    M, D, V = (shape.sizes[n] for n in "MDV")
    hidden = torch.randn(M, D, device=device)
    ref_hidden = (hidden + 0.1 * torch.randn(M, D, device=device)).to(dtype)
    # logits around 3: neither uniform nor decided
    weight = (3.0 * D**-0.5 * torch.randn(V, D, device=device)).to(dtype)
    targets = torch.randint(V, (M,), device=device)
    upstream = torch.randn(3, M, device=device)
    return Inputs(hidden.to(dtype).requires_grad_(), weight, targets, ref_hidden, upstream)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, ref_hidden: Tensor | None):
    """As trainers write it."""
    logp = torch.log_softmax((hidden @ weight.T).float(), -1)
    p = logp.exp()
    logprobs = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    entropy = -(p * logp).sum(-1)
    if ref_hidden is None:
        return logprobs, entropy
    with torch.no_grad():
        logq = torch.log_softmax((ref_hidden @ weight.T).float(), -1)
    return logprobs, entropy, (p * (logp - logq)).sum(-1)


@functools.cache
def _compiled():
    return torch.compile(plain, dynamic=False)


def calls(tensors: Inputs, mode: str) -> dict:
    hidden, weight, targets, ref_hidden, upstream = tensors
    has_ref, backward = "reference" in mode, "bwd" in mode
    ref = ref_hidden if has_ref else None
    device = hidden.device.type

    def mine(backend: str | None, memory: str = "auto"):
        out = linear_logprob(
            hidden, weight, targets, ref_hidden=ref, memory=memory, backend=backend
        )
        return (out.logprobs, out.entropy, out.kl)[: 3 if has_ref else 2]

    def cross_entropy():
        options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=False)
        nll = torch.nn.functional.linear_cross_entropy(
            hidden, weight, targets, reduction="none", options=options
        )
        return (-nll,)

    def cut_cross_entropy():
        from cut_cross_entropy import linear_cross_entropy

        return (-linear_cross_entropy(hidden, weight, targets, reduction="none"),)

    def liger():
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        call = LigerFusedLinearCrossEntropyFunction.apply
        rest = (None, None, -100, 0.0, 0.0, "none")
        return (-call(hidden, weight, targets, *rest)[0],)

    functions = {name: functools.partial(mine, name) for name in ours(OP, device)}
    functions["eager"] = lambda: plain(hidden, weight, targets, ref)
    functions["torch.compile"] = lambda: _compiled()(hidden, weight, targets, ref)
    absent = {}
    if backward:
        functions["saved"] = functools.partial(mine, None, "save")
    peers = {
        "linear_cross_entropy (logprob only)": ("torch", cross_entropy),
        "liger (logprob only)": ("liger_kernel", liger),
        "cut-cross-entropy (logprob only)": ("cut_cross_entropy", cut_cross_entropy),
    }
    for name, (package, call) in peers.items():
        if has_ref:
            absent[name] = Absent("has neither a reference nor KL")
        elif package != "torch" and device != "cuda":
            absent[name] = Absent("its kernels need a GPU")
        elif importlib.util.find_spec(package) is None:
            absent[name] = Absent(f"{package} is not installed")
        elif package == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            absent[name] = Absent(f"torch {torch.__version__} has no linear_cross_entropy")
        else:
            functions[name] = call

    def step(forward):
        if not backward:
            with torch.no_grad():
                return forward()
        out = forward()
        loss = sum((t * g).sum() for t, g in zip(out, upstream, strict=False))
        return (*(t.detach() for t in out), *torch.autograd.grad(loss, hidden))

    rows = {name: functools.partial(step, forward) for name, forward in functions.items()}
    return {**rows, **absent, "bare product": functools.partial(_products, tensors, mode)}


@functools.lru_cache(maxsize=1)
def _buffers(M: int, D: int, V: int, dtype: torch.dtype, device: torch.device):
    return (
        torch.empty(M, V, dtype=dtype, device=device),
        torch.empty(M, D, dtype=dtype, device=device),
    )


def _products(tensors: Inputs, mode: str):
    x, weight = tensors.hidden.detach(), tensors.weight
    logits, dx = _buffers(*x.shape, weight.shape[0], x.dtype, x.device)
    times = 2 if "bwd" in mode else 1
    for _ in range(times):
        torch.mm(x, weight.T, out=logits)
        if "reference" in mode:
            torch.mm(tensors.ref_hidden, weight.T, out=logits)
    if "bwd" in mode:
        torch.mm(logits, weight, out=dx)
    return (logits,)


def check(tensors: Inputs, mode: str, row: str, out) -> str:
    rows = slice(None, SAMPLE)
    if row == "bare product":
        if mode.startswith("fwd+bwd"):
            return ""  # of its own products, each checked in the forward
        x = (tensors.ref_hidden if "reference" in mode else tensors.hidden).detach()
        return differs([out[0][rows]], [x[rows].double() @ tensors.weight.double().T])
    half = tensors.hidden.dtype != torch.float32
    exact = _exact(tensors, mode, "only" in row)
    return differs([t[rows] for t in out], exact, 5e-2 if half else 1e-4)


@functools.lru_cache(maxsize=2)  # of all rows of a table: a head in float64 takes its time
def _exact(tensors: Inputs, mode: str, logprob_only: bool) -> list[Tensor]:
    rows = slice(None, SAMPLE)
    hidden = tensors.hidden.detach()[rows].double().requires_grad_()
    weight, ref = tensors.weight.double(), tensors.ref_hidden[rows].double()
    exact = plain(hidden, weight, tensors.targets[rows], ref if "reference" in mode else None)
    if logprob_only:
        exact = exact[:1]
    if "bwd" in mode:
        loss = sum(
            (t * g).sum() for t, g in zip(exact, tensors.upstream[:, rows].double(), strict=False)
        )
        exact = (*exact, *torch.autograd.grad(loss, hidden))
    return [t.detach() for t in exact]


def num_products(mode: str) -> int:
    made = 2 if "reference" in mode else 1
    return 2 * made + 1 if "bwd" in mode else made


def work(shape: Shape, dtype: torch.dtype, mode: str) -> Work:
    """2 M D V a product; the head and the rows are read once, the gradient of the rows written."""
    M, D, V = (shape.sizes[n] for n in "MDV")
    rows = M * D * ((2 if "reference" in mode else 1) + ("bwd" in mode))
    return Work(bytes=dtype.itemsize * (V * D + rows), flops=2 * M * D * V * num_products(mode))
