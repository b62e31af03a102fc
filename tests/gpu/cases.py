"""Every op on small tensors, with what may change between two replays of a captured graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import hydra_kernels
from hydra_kernels.backends import registry

HALF = (torch.float16, torch.bfloat16)


@dataclass
class Case:
    """An op's inputs, a call that returns its outputs and gradients, and new values for inputs."""

    inputs: dict[str, Tensor]
    differentiable: tuple[str, ...]
    call: Callable[[dict[str, Tensor], str], tuple[Tensor, ...]]
    changes: dict[str, Callable[[Tensor], Tensor]]

    def run(self, backend: str) -> tuple[Tensor, ...]:
        """Outputs, then gradients under fixed upstreams that are not ones."""
        leaves = [self.inputs[name] for name in self.differentiable]
        out = self.call(self.inputs, backend)
        if not leaves:
            return out
        total = sum((t.float() * (i + t.numel()) ** -0.5).sum() for i, t in enumerate(out))
        grads = torch.autograd.grad(total, leaves)
        return (*(t.detach() for t in out), *grads)

    def change(self, *names: str) -> None:
        """Writes new values into the inputs, at their old addresses."""
        with torch.no_grad():
            for name in names or self.changes:
                self.inputs[name].copy_(self.changes[name](self.inputs[name]))

    def to_double(self) -> Case:
        inputs = {
            name: t.detach().double().requires_grad_(t.requires_grad)
            if t.is_floating_point()
            else t.clone()
            for name, t in self.inputs.items()
        }
        return Case(inputs, self.differentiable, self.call, self.changes)


def fresh(t: Tensor) -> Tensor:
    return torch.randn_like(t)


def lora_linear(device: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Case:
    """Three sequences, two adapters of different rank, one sequence off."""
    B, T, K, N = 3, 13, 64, 96
    inputs = {
        "x": torch.randn(B, T, K, device=device).to(dtype).requires_grad_(),
        "weight": (torch.randn(N, K, device=device) / 8).to(dtype),
        "bias": torch.randn(N, device=device).to(dtype),
        "a0": (torch.randn(8, K, device=device) / 8).to(dtype).requires_grad_(),
        "a1": (torch.randn(4, K, device=device) / 8).to(dtype).requires_grad_(),
        "b0": (torch.randn(N, 8, device=device) / 3).to(dtype).requires_grad_(),
        "b1": (torch.randn(N, 4, device=device) / 2).to(dtype).requires_grad_(),
        "ids": torch.tensor([0, -1, 1], device=device),
        "seed": torch.tensor([7, 0], device=device),
    }

    def call(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        a, b, scaling = (t["a0"], t["a1"]), (t["b0"], t["b1"]), (0.5, 2.0)
        extra = {"dropout": dropout, "seed": t["seed"]} if dropout else {}
        return (
            hydra_kernels.lora_linear(
                t["x"], t["weight"], a, b, scaling, adapter_ids=t["ids"], bias=t["bias"],
                backend=backend, **extra,
            ),
        )  # fmt: skip

    changes = {"ids": lambda t: (t + 2) % 3 - 1, "x": fresh}
    if dropout:
        changes["seed"] = lambda t: t + 1
    return Case(inputs, ("x", "a0", "a1", "b0", "b1"), call, changes)


def lora_dropout(device: str) -> Case:
    return lora_linear(device, dropout=0.3)


def linear_logprob(device: str, dtype: torch.dtype = torch.float32) -> Case:
    """A vocabulary that nothing divides, a reference, ignored rows."""
    M, D, V = 19, 64, 517
    targets = torch.randint(V, (M,), device=device)
    targets[::5] = -100
    inputs = {
        "hidden": torch.randn(M, D, device=device).to(dtype).requires_grad_(),
        "weight": (torch.randn(V, D, device=device) / 4).to(dtype),
        "ref_hidden": torch.randn(M, D, device=device).to(dtype),
        "targets": targets,
        "temperature": torch.tensor(0.7, device=device),
    }

    def call(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        out = hydra_kernels.linear_logprob(
            t["hidden"], t["weight"], t["targets"], temperature=t["temperature"],
            ref_hidden=t["ref_hidden"], backend=backend,
        )  # fmt: skip
        return out.logprobs, out.entropy, out.kl

    changes = {
        "temperature": lambda t: t + 0.6,
        "hidden": fresh,
        "targets": lambda t: torch.where(t < 0, t, (t + 5) % V),
    }
    return Case(inputs, ("hidden",), call, changes)


def ppo_loss(device: str) -> Case:
    size = (3, 67)
    floats = ("logprobs", "values", "old_logprobs", "old_values", "advantages", "returns")
    inputs = {name: 0.3 * torch.randn(size, device=device) for name in floats}
    for name in ("logprobs", "values"):
        inputs[name].requires_grad_()
    inputs["mask"] = torch.rand(size, device=device) < 0.7

    def call(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        return hydra_kernels.ppo_loss(**t, backend=backend)[:1]

    changes = {"logprobs": fresh, "mask": torch.logical_not}
    return Case(inputs, ("logprobs", "values"), call, changes)


def gae(device: str) -> Case:
    size = (3, 67)
    inputs = {name: torch.randn(size, device=device) for name in ("rewards", "values")}
    inputs["mask"] = torch.arange(67, device=device) < torch.tensor([[67], [31], [1]]).to(device)

    def call(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        return tuple(hydra_kernels.gae(**t, gamma=0.99, backend=backend))

    return Case(inputs, (), call, {"rewards": fresh, "mask": lambda t: t.flip(0)})


def kl_rewards(device: str) -> Case:
    size = (3, 67)
    inputs = {
        "scores": torch.randn(3, device=device),
        "logprobs": -torch.rand(size, device=device),
        "ref_logprobs": -torch.rand(size, device=device),
        "mask": torch.rand(size, device=device) < 0.7,
    }

    def call(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        out = hydra_kernels.kl_rewards(**t, kl_coef=0.1, estimator="k3", backend=backend)
        return (out,)

    return Case(inputs, (), call, {"scores": fresh, "mask": torch.logical_not})


def masked_whiten(device: str) -> Case:
    size = (3, 67)
    inputs = {
        "x": torch.randn(size, device=device),
        "mask": torch.rand(size, device=device) < 0.7,
    }

    def call(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        return (hydra_kernels.masked_whiten(**t, backend=backend),)

    return Case(inputs, (), call, {"x": fresh, "mask": torch.logical_not})


CASES = {
    "lora_linear": lora_linear,
    "lora_dropout": lora_dropout,
    "linear_logprob": linear_logprob,
    "ppo_loss": ppo_loss,
    "gae": gae,
    "kl_rewards": kl_rewards,
    "masked_whiten": masked_whiten,
}


def op_of(name: str) -> str:
    return "lora_linear" if name == "lora_dropout" else name


def places(names=tuple(CASES)):
    """(case, backend, device): on the CPU what runs there; on a GPU every backend written.

    The interpreter of Triton's kernels is left to the ops' own tests.
    """
    found = []
    for name in names:
        for backend in registry.available_backends(op_of(name)):
            if backend in ("cpu", registry.REFERENCE):
                found.append(pytest.param(name, backend, "cpu", id=f"{name}-{backend}-on-cpu"))
        for backend in registry.backends(op_of(name)):
            # lora_linear in CUDA C++ only decodes: tests/ops/test_lora_linear_decode.py
            if backend != "cpu" and (op_of(name), backend) != ("lora_linear", "cuda"):
                mark = pytest.mark.gpu
                case = pytest.param(name, backend, "cuda", id=f"{name}-{backend}", marks=mark)
                found.append(case)
    return found


def require(name: str, backend: str) -> None:
    """Skips, with the install's reason, a backend that this install has not."""
    available = registry.available_backends(op_of(name))
    if backend not in available:
        pytest.skip(f"{backend}: {available.why_not[backend]}")
