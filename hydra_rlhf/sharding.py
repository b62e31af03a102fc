"""The frozen weights of a run, split over its processes by FSDP2.

What takes the memory here is frozen: the base model, and in some methods whole models beside it.
Under ``accelerate launch --use_fsdp --fsdp_version 2`` each process holds a part of every frozen
weight inside the decoder's blocks; a block is gathered when it runs, forward and backward, and let
go after. The rest stays whole in every process: what is trained, which is small and whose gradients
are summed as they are without sharding; embeddings and causal head, which are read outside of any
module's forward.

torch's ``fully_shard`` is called here, with the settings of accelerate's plugin, and not by
``accelerator.prepare``: that shards every parameter, those in training and the head too, replaces
what the optimizer holds, and knows one model where a method may hold four.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hydra_rlhf import trunk as trunks
from hydra_rlhf.errors import UserError
from hydra_rlhf.model import HydraModel

_VERSION_1 = (
    "FSDP version 1 flattens weights that are read here one by one; launch with --fsdp_version 2"
)
_CHECKPOINTING = (
    "FSDP's activation checkpointing does not know which adapter a pass was under; launch without "
    "it and set --gradient-checkpointing"
)


def is_asked_for(accelerator: Accelerator) -> bool:
    """Whether the run was launched with FSDP over more than one process.

    On a CPU too, where accelerate reads the launcher's settings and leaves them unused.
    """
    wanted = accelerator.distributed_type == DistributedType.FSDP
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return wanted and accelerator.num_processes > 1


class Sharding:
    """Splits the frozen weights of models over the processes.

    Passes are then collective: every process has to make the same ones in the same order.

    Args:
        accelerator: Of a run for which :func:`is_asked_for`.

    Raises:
        UserError: its plugin asks for what does not work here.
    """

    def __init__(self, accelerator: Accelerator):
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        plugin = plugin or FullyShardedDataParallelPlugin()  # reads the launcher's settings
        if plugin.fsdp_version != 2:
            raise UserError(_VERSION_1)
        if plugin.activation_checkpointing:
            raise UserError(_CHECKPOINTING)
        self.device = accelerator.device
        self.reshard_after_forward = bool(plugin.reshard_after_forward)
        self._settings: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, (accelerator.num_processes,)),
            "reshard_after_forward": self.reshard_after_forward,
            "offload_policy": plugin.cpu_offload or OffloadPolicy(),
        }
        self._gathers: Any = _Gathers()  # torch's AllGather, which it does not export
        self._ran: dict[Any, None] = {}  # roots; the others have nothing to be reset

    def shard(self, model: HydraModel, *, trained: bool = False) -> None:
        """Splits what is frozen in ``model``'s blocks and moves the rest to the device.

        A block at a time, so that no more than one is ever whole on the device.

        Args:
            model: Changed in place.
            trained: Splits what is trained there too, except adapters; its gradients are then means
                over the processes, and split.
        """
        for block in trunks.blocks(model.trunk):
            whole = {
                p
                for n, p in block.named_parameters()
                if "lora_" in n or (p.requires_grad and not trained)
            }
            if len(whole) < len(list(block.parameters())):
                unit = fully_shard(block, ignored_params=whole, **self._settings)
                if self.can_recover:
                    unit.set_custom_all_gather(self._gathers)
        if _units(model):
            # The root of the blocks, with no weights of its own: through it the next block is
            # gathered while one runs.
            whole = {p for p in model.trunk.parameters() if not isinstance(p, DTensor)}
            root = fully_shard(model.trunk, ignored_params=whole, **self._settings)
            # Not the module that the hook is given, which may be a copy that runs some blocks.
            root.register_forward_pre_hook(lambda *_: self._ran.setdefault(root))
        # What is sharded is where it belongs, which with offloading is the CPU.
        model._apply(lambda t: t if isinstance(t, DTensor) else t.to(self.device))

    @contextlib.contextmanager
    def gathered(self, model: HydraModel) -> Iterator[None]:
        """Within it ``model`` is whole here and its passes, without gradient, are its own.

        Every process has to enter it.
        """
        units = _units(model)
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(self.reshard_after_forward, recurse=False)
                unit.reshard()

    # Recovery. A process that fails within a pass leaves the others waiting for its part of the
    # blocks that are still to run: it makes up for those before all are told.

    @property
    def can_recover(self) -> bool:
        """Whether this torch can be put back after a pass that was broken off (from 2.12 or so)."""
        return hasattr(FSDPModule, "reset_iter_state")

    def begin(self) -> None:
        """Before passes that may fail: from here on gathers are counted."""
        self._reset()
        self._gathers.made = 0

    def make_up(self, rest: Callable[[], object]) -> None:
        """After a failure: ``rest`` makes the same passes with less in them.

        The gathers that were made before are left out of it, so that the weights there are
        anything; only the others get something from it.
        """
        self._reset()
        self._gathers.skip, self._gathers.made = self._gathers.made, 0
        try:
            rest()
        finally:
            self._gathers.skip = 0
        self._reset()

    def _reset(self) -> None:
        # Also forgets the order of earlier passes, from which the next gather is foreseen.
        for root in self._ran if self.can_recover else ():
            root.reset_iter_state()


class _Gathers:
    """All-gathers of blocks, counted; the first ``skip`` of a repetition are left out."""

    def __init__(self) -> None:
        self.made = 0
        self.skip = 0

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        if self.skip:
            self.skip -= 1
            output_tensor.zero_()
            return None
        work = dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)
        self.made += 1
        return work


def _units(model: HydraModel) -> list[FSDPModule]:
    return [block for block in trunks.blocks(model.trunk) if isinstance(block, FSDPModule)]


def held_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the parameters that this process holds, and of all of them."""
    here = total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        here += local.numel() * local.element_size()
    return here, total
