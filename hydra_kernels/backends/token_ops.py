"""What the backends of the token-level ops share: dtype of the state, estimators, kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hydra_kernels.backends import registry

#: In the order of KLEstimator in csrc/include/hydra/kl.h.
ESTIMATORS = ("k1", "k2", "k3", "exact")


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where a tensor is float64, else float32, whatever half precision came in."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def float32_only(wrong_device: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """``unsupported`` of kernels that take float32 alone."""

    def unsupported(*tensors: Tensor | None) -> list[str]:
        return [*wrong_device(*tensors), *registry.wrong_dtype((torch.float32,), *tensors)]

    return unsupported


def on_cpu(*tensors: Tensor | None) -> list[str]:
    """``wrong_device`` of the kernels in C++."""
    return registry.wrong_device("cpu", *tensors)


def addresses(*tensors: Tensor | None) -> list[int]:
    """What a binding takes: where each tensor is, 0 for an absent one."""
    return [0 if t is None else t.data_ptr() for t in tensors]


class PPOInputs(NamedTuple):
    """What the compiled backends of ``ppo_loss`` are given: (B, T) float32, contiguous."""

    logprobs: Tensor | None
    values: Tensor | None
    old_logprobs: Tensor | None
    old_values: Tensor | None
    advantages: Tensor | None
    returns: Tensor | None
    entropy: Tensor | None
    kl: Tensor | None
    mask: Tensor  # bool
    cliprange: float
    cliprange_value: float
    vf_coef: float
    ent_coef: float
    kl_coef: float

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:9]

    @property
    def coefs(self) -> tuple[float, ...]:
        return self[9:]


class AdvantageInputs(NamedTuple):
    """What the backends of ``advantages`` are given; contiguous, float32 where compiled."""

    scores: Tensor  # (B,)
    logprobs: Tensor | None  # (B, T)
    ref_logprobs: Tensor | None  # (B, T)
    values: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool
    kl_coef: float
    estimator: str
    kl: Tensor | None  # (B, T)
    gamma: float
    lam: float
    last_values: Tensor | None  # (B,)

    @property
    def penalised(self) -> Tensor | None:
        """The array of which the penalty is made: the divergence itself for "exact"."""
        return self.kl if self.estimator == "exact" else self.logprobs


def _no_moments(x: Tensor, mask: Tensor) -> Tensor:
    raise NotImplementedError


@dataclass(frozen=True)
class WhitenKernel(registry.Kernel):
    """A kernel in two halves, so that the moments can be all-reduced between them.

    Attributes:
        moments: ``(x, mask)`` to a (3,) float64 tensor: the number of counted elements, their mean,
            and the sum of the squares of their deviations from it.
    """

    moments: Callable[[Tensor, Tensor], Tensor] = _no_moments


@dataclass(frozen=True)
class PPOKernel(registry.Kernel):
    """A kernel of ``ppo_loss``, whose forward makes the gradients up to a factor.

    It is called in grad mode too, and so does nothing to its inputs that autograd would record.

    Attributes:
        scaled: The forward returns the gradients of ``policy_loss`` and of ``(vf_coef or 1) *
            value_loss``. False: the derivatives of each token's two losses, which are still to be
            multiplied by 1 / count; a GPU knows the count only when the pass is over.
    """

    scaled: bool = False
