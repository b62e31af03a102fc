"""What the backends of lora_linear are told besides tensors: one description of a call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hydra_kernels.backends import launch


class Plan(NamedTuple):
    """Which adapters belong to which projection, and when they run.

    Adapters are listed projection after projection. Adapter j runs on the rows whose id is
    ``owners[j]``, or on every row of a call without ids, times ``scales[j]``.
    """

    counts: tuple[int, ...]  # adapters of each projection
    owners: tuple[int, ...]
    scales: tuple[float, ...]
    num_adapters: int  # ids are below this
    dropout: float

    def of_projection(self, tensors: Sequence[Tensor], projection: int) -> Sequence[Tensor]:
        if len(self.counts) == 1:
            return tensors
        start = sum(self.counts[:projection])
        return tensors[start : start + self.counts[projection]]


def columns(
    plan: Plan, ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(sum R,) each: the owner and the scale of every column of s."""
    if device.type == "cuda":
        key = (columns, plan, ranks, dtype, device)
        return launch.constant(key, device, lambda: _made(plan, ranks, dtype, device))
    return _columns(plan, ranks, dtype, device)


def _made(
    plan: Plan, ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    owners = [o for o, rank in zip(plan.owners, ranks, strict=True) for _ in range(rank)]
    scales = [s for s, rank in zip(plan.scales, ranks, strict=True) for _ in range(rank)]
    return launch.table(owners, torch.int64, device), launch.table(scales, dtype, device)


_columns = functools.lru_cache(maxsize=4096)(_made)


@functools.lru_cache(maxsize=4096)
def restricted(plan: Plan, only: int) -> tuple[tuple[int, ...], Plan]:
    """The adapters that run where every row's id is ``only``, and a plan of those, without ids."""
    which = tuple(j for j, owner in enumerate(plan.owners) if owner == only)
    projection = [p for p, count in enumerate(plan.counts) for _ in range(count)]
    counts = [0] * len(plan.counts)
    for j in which:
        counts[projection[j]] += 1
    scales = tuple(plan.scales[j] for j in which)
    return which, plan._replace(counts=tuple(counts), owners=(0,) * len(which), scales=scales)


def concatenated(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors), dim)


def split_columns(tensor: Tensor, ranks: Sequence[int]) -> tuple[Tensor, ...]:
    return tensor.split(list(ranks), 1) if len(ranks) > 1 else (tensor,)


def saves_s(backend: str, dtype: torch.dtype) -> bool:
    """Whether a forward in ``dtype`` keeps s for backward, in that dtype, or has it made again.

    Kept where it is small beside x: on a GPU, where reading x again is most of the product's time,
    and in half precision.
    """
    return backend == "triton" and dtype in (torch.float16, torch.bfloat16)
