"""Which rank of which adapter runs on which row, as the kernels of lora_linear are told."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_kernels.backends import launch
from hydra_kernels.backends.lora_plan import Plan, columns

#: Past this, float32 sums of every rank for every row would be most of what backward allocates.
MANY_RANKS = 256


class Gates:
    """The tensors that say which rank runs on which row."""

    def __init__(self, plan: Plan, ranks: Sequence[int], ids: Tensor | None, x: Tensor) -> None:
        self.owner, self.scale = columns(plan, tuple(ranks), torch.float32, x.device)
        self.plan, self.adapter_ranks, self.part = plan, tuple(ranks), (0, sum(ranks))
        self.ids = None if ids is None or ids.numel() == 0 else ids.contiguous()
        count = 1 if self.ids is None else self.ids.numel()
        self.rows_per_id = max(x.shape[0] // count, 1)

    def ranks(self, start: int, stop: int) -> Gates:
        part = Gates.__new__(Gates)
        part.owner, part.scale = self.owner[start:stop], self.scale[start:stop]
        part.plan, part.adapter_ranks, part.part = self.plan, self.adapter_ranks, (start, stop)
        part.ids, part.rows_per_id = self.ids, self.rows_per_id
        return part

    def spans(self, block: int) -> Tensor | None:
        """(ids, 2) int32: an id's first rank and the one after its last; None where all ranks are
        one block, and the search would cost more than it saves."""
        start, stop = self.part
        if self.ids is None or stop - start <= block:
            return None
        device = self.owner.device
        if device.type != "cuda":
            return _spans(self.plan, self.adapter_ranks, start, stop, device)
        key = (Gates, self.plan, self.adapter_ranks, start, stop, device)
        return launch.constant(
            key, device, lambda: _spans(self.plan, self.adapter_ranks, start, stop, device)
        )

    def width(self) -> int:
        """Of a row of what only a row's own adapter has, where that saves much: else 0."""
        start, stop = self.part
        if self.ids is None or stop - start <= MANY_RANKS:
            return 0
        widest = max(self._places()) + 1
        return widest if 2 * widest <= stop - start else 0

    def within(self) -> Tensor | None:
        """(R,) int32: where in such a row a rank has its place; None where rows have all ranks."""
        if not self.width():
            return None
        device = self.owner.device
        places = self._places()
        if device.type != "cuda":
            return launch.table(places, torch.int32, device)
        key = ("within", self.plan, self.adapter_ranks, self.part, device)
        return launch.constant(key, device, lambda: _counted(places, device))

    def _places(self) -> tuple[int, ...]:
        return _places(self.plan, self.adapter_ranks, *self.part)


@functools.lru_cache(maxsize=4096)
def _places(plan: Plan, ranks: tuple[int, ...], start: int, stop: int) -> tuple[int, ...]:
    """Of each rank, how many of the same owner come before it."""
    owners = [o for o, rank in zip(plan.owners, ranks, strict=True) for _ in range(rank)]
    before = [0] * plan.num_adapters
    places = []
    for owner in owners[start:stop]:
        places.append(before[owner])
        before[owner] += 1
    return tuple(places)


def _counted(places: tuple[int, ...], device: torch.device) -> Tensor:
    """``places`` without a copy from the host: a run of them counts up."""
    out = torch.empty(len(places), dtype=torch.int32, device=device)
    start = 0
    for stop in range(1, len(places) + 1):
        if stop == len(places) or places[stop] != places[stop - 1] + 1:
            torch.arange(places[start], places[stop - 1] + 1, out=out[start:stop])
            start = stop
    return out


def _spans(
    plan: Plan, ranks: tuple[int, ...], start: int, stop: int, device: torch.device
) -> Tensor:
    owners = [o for o, rank in zip(plan.owners, ranks, strict=True) for _ in range(rank)]
    spans = [[stop - start, 0] for _ in range(plan.num_adapters)]
    for rank, owner in enumerate(owners[start:stop]):
        spans[owner] = [min(spans[owner][0], rank), rank + 1]
    flat = [end for span in spans for end in span]
    return launch.table(flat, torch.int32, device).view(-1, 2)
