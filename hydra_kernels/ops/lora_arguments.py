"""What lora_linear takes: its arguments in one form, and what is wrong with them."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_kernels.backends import launch, recording

OP = "lora_linear"

Scaling = float | Tensor | Sequence[float | Tensor]


def as_pairs(
    lora_a: Tensor | Sequence[Tensor], lora_b: Tensor | Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """One A and one B for each adapter."""
    if isinstance(lora_a, Tensor) and isinstance(lora_b, Tensor):
        return (lora_a,), (lora_b,)
    if isinstance(lora_a, Tensor) or isinstance(lora_b, Tensor):
        raise ValueError(f"{OP}: lora_a and lora_b must both be tensors or both sequences")
    return tuple(lora_a), tuple(lora_b)


def as_scales(scaling: Scaling, n: int) -> tuple[float | Tensor, ...]:
    """One scale for each of ``n`` adapters, none of which autograd follows."""
    if type(scaling) is float:
        return (scaling,) * n
    if isinstance(scaling, Tensor):
        scaling = scaling.detach()
        scales = tuple(scaling) if scaling.dim() > 0 else (scaling,) * n
    elif isinstance(scaling, Sequence):
        scales = tuple([s.detach() if isinstance(s, Tensor) else s for s in scaling])
    else:
        scales = (scaling,) * n
    if len(scales) != n:
        raise ValueError(f"{OP}: scaling must be one number or {n}, got {len(scales)}")
    return scales


def check_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: tuple[Tensor, ...],
    b: tuple[Tensor, ...],
    dropout: float,
) -> None:
    """Raises ValueError where shapes, dtypes or dropout do not fit; the like are checked once."""
    if torch.compiler.is_compiling():
        # A compiler would guard what is remembered, and compile anew after each eager call.
        _check_shapes(x, weight, bias, a, b, dropout)
        return
    key = (
        x.shape[-1:],
        x.dtype,
        weight.shape,
        weight.dtype,
        None if bias is None else (bias.shape, bias.dtype),
        *[(t.shape, t.dtype) for t in a],
        None,
        *[(t.shape, t.dtype) for t in b],
        dropout,
    )
    if key in _FITTING:
        return
    _check_shapes(x, weight, bias, a, b, dropout)
    alike = x.dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype)
    if alike:
        if len(_FITTING) >= 4096:
            _FITTING.clear()
        _FITTING.add(key)


_FITTING: set[tuple] = set()  # shapes and dtypes that have been looked at


def _check_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: tuple[Tensor, ...],
    b: tuple[Tensor, ...],
    dropout: float,
) -> None:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{OP}: x must be (*, K) and weight (N, K), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"{OP}: x must be of a floating-point dtype, got {x.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{OP}: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{OP}: x is {x.dtype} and weight {weight.dtype}")
    if (
        bias is not None
        and bias.dtype != weight.dtype
        and not torch.is_autocast_enabled(x.device.type)
    ):
        raise ValueError(f"{OP}: bias is {bias.dtype} and weight {weight.dtype}")
    if not a or len(a) != len(b):
        raise ValueError(
            f"{OP}: needs as many lora_b as lora_a, at least one, got {len(a)} and {len(b)}"
        )
    n, k = weight.shape
    for each_a, each_b in zip(a, b, strict=True):
        if (
            each_a.dim() != 2
            or each_b.dim() != 2
            or each_a.shape[1] != k
            or each_b.shape[0] != n
            or each_a.shape[0] != each_b.shape[1]
        ):
            raise ValueError(
                f"{OP}: lora_a must be (R, {k}) and lora_b ({n}, R), "
                f"got {tuple(each_a.shape)} and {tuple(each_b.shape)}"
            )
        if each_a.dtype != each_b.dtype or not each_a.is_floating_point():
            raise ValueError(
                f"{OP}: lora_a and its lora_b must have one floating-point dtype, "
                f"got {each_a.dtype} and {each_b.dtype}"
            )
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"{OP}: dropout must be in [0, 1], got {dropout}")


def check_kind(x: Tensor, adapter_ids: Tensor | None) -> None:
    """Raises ValueError unless they are integers that lie and are shaped as x's rows allow."""
    if adapter_ids is not None:
        if not isinstance(adapter_ids, Tensor):
            raise ValueError(
                f"{OP}: adapter_ids must be an integer tensor on {x.device} or None, "
                f"got {type(adapter_ids).__name__}"
            )
        if adapter_ids.dtype not in _INTEGERS:
            raise ValueError(f"{OP}: adapter_ids must be integers, got {adapter_ids.dtype}")
        if adapter_ids.device != x.device:
            raise ValueError(
                f"{OP}: adapter_ids must be on {x.device}, where x is, got {adapter_ids.device}"
            )
        if adapter_ids.shape != x.shape[:-1][: adapter_ids.dim()]:
            raise ValueError(
                f"{OP}: adapter_ids must be shaped as a leading part of {tuple(x.shape[:-1])}, "
                f"got {tuple(adapter_ids.shape)}"
            )


_INTEGERS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64})


def check_range(adapter_ids: Tensor, n: int) -> None:
    """Raises ValueError for an id outside -1 to ``n - 1``, where looking at it costs no sync."""
    if adapter_ids.numel() == 0 or not recording.readable(adapter_ids):
        return
    if adapter_ids.device.type != "cpu" and os.environ.get("HYDRA_CHECK") != "1":
        return
    low, high = (int(end) for end in torch.aminmax(adapter_ids))
    if low < -1 or high >= n:
        raise ValueError(
            f"{OP}: adapter_ids must be between -1 and {n - 1}, got {low if low < -1 else high}"
        )


def draw_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """(2,) int64 on ``device``, the seed and the offset of one call's dropout mask."""
    if seed is None:
        return torch.randint(2**63 - 1, (2,), device=device)
    if not isinstance(seed, Tensor):
        try:
            number = operator.index(seed)
        except TypeError:
            raise ValueError(
                f"{OP}: seed must be an int, a tensor or None, got {type(seed).__name__}"
            ) from None
        return launch.table((number, 0), torch.int64, device)
    if seed.dtype != torch.int64 or seed.numel() not in (1, 2) or seed.device != device:
        raise ValueError(
            f"{OP}: seed must hold one or two int64 on {device}, "
            f"got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
        )
    seed = seed.reshape(-1)
    return seed if seed.numel() == 2 else torch.cat((seed, torch.zeros_like(seed)))
