"""The token-level ops between a rollout and its update: rewards, advantages, whitening, and all
three in one call. ``ppo_loss`` has a file of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Shape, Work, differs, ours
from hydra_kernels import advantages, gae, kl_rewards, masked_whiten

KL_COEF, GAMMA, LAM = 0.05, 1.0, 0.95
SHAPES = {
    "cpu": [
        Shape({"B": 8, "T": 53}, "the demo's: launching costs more than computing", quick=True),
        Shape({"B": 64, "T": 1024}, "a rollout, within the caches", quick=True),
        Shape({"B": 512, "T": 4096}, "past the caches"),
    ],
    "cuda": [
        Shape({"B": 64, "T": 1024}, "a rollout: launching costs more than computing", quick=True),
        Shape({"B": 512, "T": 4096}, "within the L2, or just past it"),
        Shape({"B": 4096, "T": 4096}, "past the L2: what memory gives"),
        Shape({"B": 1, "T": 131072}, "one row: the scan itself has to be parallel"),
    ],
}


class Inputs(NamedTuple):
    scores: Tensor  # (B,)
    logprobs: Tensor  # (B, T), as are the rest
    ref_logprobs: Tensor
    values: Tensor
    rewards: Tensor
    mask: Tensor


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Responses of random lengths, 0 behind their ends, as the plain loops need it."""
    B, T = shape.sizes["B"], shape.sizes["T"]
    lengths = torch.randint(T // 2, T + 1, (B, 1), device=device)
    mask = torch.arange(T, device=device) < lengths
    ref_logprobs = -5 * torch.rand(B, T, device=device)
    logprobs = ref_logprobs + 0.3 * torch.randn(B, T, device=device)
    values, rewards = torch.randn(2, B, T, device=device) * mask
    return Inputs(torch.randn(B, device=device), logprobs, ref_logprobs, values, rewards, mask)


def plain_kl_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor):
    """As trainers write it: the score by index at the end of a response."""
    rewards = -KL_COEF * (logprobs - ref_logprobs) * mask
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, mask.sum(1) - 1] += scores
    return rewards


def plain_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As trainers write it: a step of torch's operators for each token, from the last one."""
    advantage: Tensor | float = 0.0
    reverse = []
    for t in reversed(range(rewards.shape[1])):
        after = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + GAMMA * after - values[:, t]
        advantage = delta + GAMMA * LAM * advantage
        reverse.append(advantage)
    out = torch.stack(reverse[::-1], dim=1) * mask
    return out, (out + values) * mask


def plain_whiten(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = (((x - mean) ** 2) * mask).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def plain_advantages(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rewards = plain_kl_rewards(scores, logprobs, ref_logprobs, mask)
    advantage, returns = plain_gae(rewards, values, mask)
    return plain_whiten(advantage, mask), returns, rewards


def as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def bench(
    op: str,
    mine: Callable,
    plain: Callable,
    names: tuple[str, ...],
    work: Callable[[Shape, torch.dtype, str], Work],
    *,
    compiles: bool,
) -> SimpleNamespace:
    """A benchmark of ``mine`` against ``plain``, both called with the inputs of those names."""
    compiled = functools.cache(lambda: torch.compile(plain))

    def calls(tensors: Inputs, mode: str) -> dict:
        args = [getattr(tensors, name) for name in names]
        device = tensors.mask.device
        shape = Shape(dict(zip("BT", tensors.mask.shape, strict=True)), "")
        source = torch.randn(work(shape, torch.float32, mode).bytes // 8, device=device)
        rows: dict = {
            name: functools.partial(mine, *args, backend=name) for name in ours(op, device.type)
        }
        rows |= {"eager": lambda: plain(*args), "copy": lambda: (source, source.clone())}
        if compiles:
            rows["torch.compile"] = lambda: compiled()(*args)
        return rows

    def check(tensors: Inputs, mode: str, row: str, out) -> str:
        if row == "copy":
            return "" if torch.equal(*out) else "the copy differs"
        wide = [getattr(tensors, name) for name in names]
        wide = [t.double() if t.is_floating_point() else t for t in wide]
        exact = as_tuple(mine(*wide, backend="reference"))
        return differs(as_tuple(out), exact, 1e-5)

    return SimpleNamespace(
        OP=op,
        MODES=("fwd",),
        PEERS=("copy", "eager", *(["torch.compile"] if compiles else [])),
        FLOOR="copy",  # as many bytes as the op must move
        DTYPES={"cpu": (torch.float32,), "cuda": (torch.float32,)},
        SHAPES=SHAPES,
        inputs=inputs,
        calls=calls,
        check=check,
        work=work,
    )


def per_token(bytes_: int) -> Callable[[Shape, torch.dtype, str], Work]:
    return lambda shape, dtype, mode: Work(bytes=shape.sizes["B"] * shape.sizes["T"] * bytes_)


BENCHES = (
    bench(
        "kl_rewards",
        functools.partial(kl_rewards, kl_coef=KL_COEF),
        plain_kl_rewards,
        ("scores", "logprobs", "ref_logprobs", "mask"),
        per_token(2 * 4 + 1 + 4),  # reads two float32 and a bool, writes a float32
        compiles=True,
    ),
    bench(
        "gae",
        functools.partial(gae, gamma=GAMMA, lam=LAM),
        plain_gae,
        ("rewards", "values", "mask"),
        per_token(2 * 4 + 1 + 2 * 4),  # reads two float32 and a bool, writes two float32
        compiles=False,  # torch.compile unrolls the loop: minutes to compile at T=1024
    ),
    bench(
        "masked_whiten",
        masked_whiten,
        plain_whiten,
        ("rewards", "mask"),
        # twice a float32 and a bool, since the moments come first; writes a float32
        per_token(2 * (4 + 1) + 4),
        compiles=True,
    ),
    bench(
        "advantages",
        functools.partial(advantages, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM),
        plain_advantages,
        ("scores", "logprobs", "ref_logprobs", "values", "mask"),
        # reads three float32 and a bool, writes three float32; then reads a float32 and a bool and
        # writes a float32 again, to whiten
        per_token(3 * 4 + 1 + 3 * 4 + 4 + 1 + 4),
        compiles=False,
    ),
)
