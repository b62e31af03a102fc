"""One adapter on every row of tensors on a CPU: what a module's call is most of the time.

A call of some microseconds is not asked what a general one has to be.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hydra_kernels.backends import extension, recording, registry
from hydra_kernels.backends.cpu import lora_linear as cpu
from hydra_kernels.backends.lora_plan import Plan
from hydra_kernels.ops.lora_arguments import draw_seed
from hydra_kernels.ops.lora_passes import run_eager


def alone(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    dropout: float,
) -> Tensor | None:
    """``gated_linear`` of one adapter without ids; None where that has to look more closely.

    x, weight and the factors are plain tensors, of shapes, dtypes and devices that fit.
    """
    if (
        type(scaling) is not float
        or not (x.is_cpu and weight.is_cpu and lora_a.is_cpu)
        or not (bias is None or (bias.is_cpu and type(bias) in registry.PLAIN))
        or not cpu.takes(x, lora_a)
        or extension.module is None
        or registry.asked_for(None) not in _ASKED
        or torch._C._is_any_autocast_enabled()
        or not recording.eager()
    ):
        return None
    if dropout == 0.0 and not torch.is_grad_enabled():
        y = cpu.one_fwd(x, weight, bias, lora_a, lora_b, scaling)
        if y is not None:
            return y
    drawn = draw_seed(None, x.device) if dropout > 0.0 else None
    tensors = (weight, bias, lora_a, lora_b)
    return run_eager("cpu", _plan(scaling, dropout), x, None, drawn, tensors)[0]


_ASKED = (None, "cpu")


@functools.lru_cache(maxsize=4096)
def _plan(scaling: float, dropout: float) -> Plan:
    return Plan((1,), (0,), (scaling,), 1, dropout)
