"""Clipped loss of policy and value function, with its nine statistics and both gradients."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Shape, Work, differs, ours
from hydra_kernels import ppo_loss

OP = "ppo_loss"
MODES = ("fwd", "fwd+bwd")
PEERS = ("copy", "eager", "torch.compile")
FLOOR = "copy"  # as many bytes as the op must move
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32,)}
SHAPES = {
    "cpu": [
        Shape({"B": 8, "T": 64}, "a minibatch of the demo: launching costs more than computing"),
        Shape({"B": 64, "T": 1024}, "a minibatch, within the caches", quick=True),
        Shape({"B": 512, "T": 1024}, "a whole batch, past the caches"),
    ],
    "cuda": [
        Shape({"B": 8, "T": 512}, "a minibatch: launching costs more than computing", quick=True),
        Shape({"B": 64, "T": 1024}, "a batch, within the L2"),
        Shape({"B": 512, "T": 4096}, "a large batch, about the size of an L2"),
        Shape({"B": 4096, "T": 2048}, "past the L2: what memory gives", quick=True),
    ],
}
CLIPRANGE, VF_COEF = 0.2, 0.1


class Inputs(NamedTuple):
    logprobs: Tensor  # (B, T), as are all
    values: Tensor
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    mask: Tensor


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    size = (shape.sizes["B"], shape.sizes["T"])
    old_logprobs = -5 * torch.rand(size, device=device)
    old_values = torch.randn(size, device=device)
    # 0.3: half of the ratios leave [0.8, 1.2], and a good part of the values their range
    logprobs = (old_logprobs + 0.3 * torch.randn(size, device=device)).requires_grad_()
    values = (old_values + 0.3 * torch.randn(size, device=device)).requires_grad_()
    logprobs, values = logprobs * 1, values * 1  # results of a model, not leaves
    advantages, returns = torch.randn(2, *size, device=device)
    lengths = torch.randint(size[1] // 2, size[1] + 1, (size[0], 1), device=device)
    mask = torch.arange(size[1], device=device) < lengths  # responses of random lengths
    return Inputs(logprobs, values, old_logprobs, old_values, advantages, returns, mask)


def plain(
    logprobs: Tensor,
    values: Tensor,
    old_logprobs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
) -> tuple[Tensor, ...]:
    """As trainers write it, with the statistics that they log."""
    count = mask.sum()

    def mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / count

    log_ratio = logprobs - old_logprobs
    ratio = torch.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1 - CLIPRANGE, 1 + CLIPRANGE)
    policy_loss = mean(torch.max(unclipped, clipped))
    near = torch.clamp(values, old_values - CLIPRANGE, old_values + CLIPRANGE)
    error, near_error = (values - returns) ** 2, (near - returns) ** 2
    value_loss = 0.5 * mean(torch.max(error, near_error))
    with torch.no_grad():
        approx_kl = mean(ratio - 1 - log_ratio)
        clipfrac = mean((clipped > unclipped).float())
        vf_clipfrac = mean((near_error > error).float())
        mean_ratio = mean(ratio)
    loss = policy_loss + VF_COEF * value_loss
    return loss, policy_loss, value_loss, approx_kl, clipfrac, vf_clipfrac, mean_ratio


@functools.cache
def _compiled():
    return torch.compile(plain)


def calls(tensors: Inputs, mode: str) -> dict:
    def mine(backend: str):
        out = ppo_loss(**tensors._asdict(), vf_coef=VF_COEF, backend=backend)
        names = ("loss", "policy_loss", "value_loss", "approx_kl", "clipfrac", "vf_clipfrac")
        return tuple(getattr(out, name) for name in (*names, "ratio"))

    def gradients(out: tuple[Tensor, ...]):
        return torch.autograd.grad(out[0], tensors[:2])

    functions = {
        **{name: functools.partial(mine, name) for name in ours(OP, tensors.mask.device.type)},
        "eager": lambda: plain(*tensors),
        "torch.compile": lambda: _compiled()(*tensors),
    }
    if mode == "fwd+bwd":
        functions = {k: lambda f=f: gradients(f()) for k, f in functions.items()}
    words = work(Shape(dict(zip("BT", tensors.mask.shape, strict=True)), ""), torch.float32, mode)
    source = torch.randn(words.bytes // 8, device=tensors.mask.device)
    return {**functions, "copy": lambda: (source, source.clone())}


def check(tensors: Inputs, mode: str, row: str, out) -> str:
    if row == "copy":
        return "" if torch.equal(*out) else "the copy differs"
    exact_inputs = Inputs(*(t.detach().double() if t.is_floating_point() else t for t in tensors))
    for t in exact_inputs[:2]:
        t.requires_grad_()
    exact: tuple[Tensor, ...] = plain(*exact_inputs)
    if mode == "fwd+bwd":
        exact = torch.autograd.grad(exact[0], exact_inputs[:2])
    # A ratio on the very edge of the clip range may fall on either side: its gradient is there or
    # not. One of ten thousand tokens doing so moves the norm by 1e-2 of itself.
    return differs(out, exact, 1e-2 if mode == "fwd+bwd" else 1e-4)


def work(shape: Shape, dtype: torch.dtype, mode: str) -> Work:
    """Reads six float32 and a bool a token; fwd+bwd also writes two float32, the gradients."""
    tokens = shape.sizes["B"] * shape.sizes["T"]
    return Work(bytes=tokens * (6 * 4 + 1 + (2 * 4 if mode == "fwd+bwd" else 0)))
