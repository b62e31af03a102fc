"""A linear layer with per-row LoRA adapters in plain PyTorch: the definition of the op."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_kernels.backends import registry
from hydra_kernels.backends.reference import philox


def lora_linear(
    x: Tensor,  # (*, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    lora_a: Sequence[Tensor],  # (R_i, K)
    lora_b: Sequence[Tensor],  # (N, R_i)
    scaling: Sequence[float | Tensor],
    owners: Sequence[int],  # the id that switches each adapter on
    adapter_ids: Tensor | None,  # a leading part of x.shape[:-1]; None: every adapter on everywhere
    dropout: float,
    seed: Tensor | None,  # (2,) int64
) -> Tensor:
    y = F.linear(x, weight, bias)
    if dropout > 0.0:
        assert seed is not None
        kept = philox.keep(x.shape[:-1].numel(), x.shape[-1], dropout, seed).view(x.shape)
        # p = 1 keeps nothing: 1 / 0 must not meet the zeros
        x = torch.where(kept, x / max(1.0 - dropout, 2**-32), 0.0)
    result = y
    for owner, a, b, scale in zip(owners, lora_a, lora_b, scaling, strict=True):
        delta = F.linear(F.linear(x.to(a.dtype), a), b.to(a.dtype)) * scale
        if adapter_ids is None:
            result = result + delta
        else:
            on = adapter_ids == owner
            on = on.view(on.shape + (1,) * (x.dim() - on.dim()))
            result = torch.where(on, result + delta, result)
    return result.to(y.dtype)


for _op in ("lora_linear", "lora_linear_group"):
    registry.register(
        _op, registry.REFERENCE, registry.Kernel(lora_linear, None, lambda *tensors: [])
    )
