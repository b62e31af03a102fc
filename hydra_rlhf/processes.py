"""The processes of a run, as ``accelerate launch`` started them, and what they tell each other.

Each process samples and scores its own share of a rollout's prompts; before every optimizer step
the gradients of the trained tensors, and of no others, are summed over all of them. That sum is
accelerate's ``reduce`` over flat buckets and not ``DistributedDataParallel``, because an update
here is two backward passes over sets that share no tensor, over two models in some methods, and
because a process that runs out of memory halves its microbatch alone: each may make another number
of passes, and only the sum at the end is common. It also holds no bucket between updates.

Under FSDP what is frozen is split over the processes (``sharding.py``). Passes are common then, and
so is the halving; what is trained is whole everywhere and its gradients are summed as ever. Under
DeepSpeed the optimizer is split (``zero.py``), which only an optimizer step takes notice of.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from hydra_rlhf import sharding, zero
from hydra_rlhf.errors import UserError
from hydra_rlhf.model import HydraModel
from hydra_rlhf.sharding import Sharding

BUCKET = 1 << 25  # elements of one sum: 128 MB of float32, beyond which links are saturated


class Processes:
    """What a step asks of the others. With one process everything is the identity.

    Args:
        accelerator: Of the run.

    Raises:
        UserError: it was launched in a way that splits or replaces the models.
    """

    def __init__(self, accelerator: Accelerator):
        refuse_unsupported(accelerator)
        self.sharding = Sharding(accelerator) if sharding.is_asked_for(accelerator) else None
        self.zero = zero.settings_of()
        self._accelerator = accelerator
        self.index = accelerator.process_index
        self.count = accelerator.num_processes

    @property
    def device(self) -> torch.device:
        return self._accelerator.device

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share(self, total: int) -> slice:
        """The part of ``total`` positions, a multiple of the processes, that is this one's."""
        size = total // self.count
        return slice(self.index * size, (self.index + 1) * size)

    def sum(self, tensor: Tensor) -> Tensor:
        if self.count == 1:
            return tensor
        return self._accelerator.reduce(tensor, reduction="sum")  # type: ignore[return-value]

    def gather(self, tensor: Tensor) -> Tensor:
        """Every process's rows, in the order of the processes."""
        return tensor if self.count == 1 else self._accelerator.gather(tensor)

    def gather_objects(self, item: Any) -> list[Any]:
        """One object a process, in their order. Small ones: they are pickled."""
        return [item] if self.count == 1 else gather_object([item])

    def any(self, flag: bool) -> bool:
        """Whether it is True anywhere; the same answer everywhere."""
        if self.count == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def split(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """``optimizer``, or where DeepSpeed was asked for one with its state on all processes."""
        if self.zero is None:
            return optimizer
        return zero.ZeroOptimizer(optimizer, self.zero, self._accelerator)

    @property
    def can_repeat(self) -> bool:
        """Whether passes that were broken off can be made again."""
        return self.sharding is None or self.sharding.can_recover

    def begin_passes(self) -> None:
        """Before passes that may run out of memory."""
        if self.sharding is not None:
            self.sharding.begin()

    def end_passes(self, failed: bool, rest: Callable[[], object]) -> bool:
        """Whether they have to be made again here.

        Args:
            failed: They ran out of memory in this process.
            rest: The same passes with little in them. Where passes are common, a process that
                failed takes part by it in those that the others still make, and all begin again.
        """
        if self.sharding is None:
            return failed
        if failed:
            self.sharding.make_up(rest)
        return self.any(failed)

    def gathered(self, model: HydraModel) -> contextlib.AbstractContextManager[None]:
        """Within it the model is whole in every process, whatever splits it."""
        return contextlib.nullcontext() if self.sharding is None else self.sharding.gathered(model)

    def combine(self, figures: Mapping[str, Tensor], kinds: Mapping[str, str]) -> dict[str, Tensor]:
        """Figures of one process each into those of all, in one transfer.

        Args:
            figures: Of one element each, the same names everywhere.
            kinds: "sum", "mean" or "max" by name; a name that is not there is a mean.
        """
        if self.count == 1 or not figures:
            return dict(figures)
        rows = self.gather(torch.stack([v.detach().double() for v in figures.values()])[None])
        by_kind = {"sum": rows.sum(0), "mean": rows.mean(0), "max": rows.amax(0)}
        return {
            name: by_kind[kinds.get(name, "mean")][i].to(value.dtype)
            for i, (name, value) in enumerate(figures.items())
        }

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces each gradient by the sum over the processes. A missing one is left missing."""
        if self.count == 1:
            return
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            flat = self.sum(torch.cat([gradient.flatten() for gradient in bucket]))
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def reduce_and_clip(self, parameters: Sequence[Tensor], limit: float) -> Tensor:
        """Means of the gradients over the processes, clipped to a norm; the norm before.

        Those of sharded parameters come as parts of the means.

        Args:
            parameters: Trained.
            limit: Of the norm of all gradients together; 0 for none.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        whole = [g for g in gradients if not isinstance(g, DTensor)]
        parts = [g.to_local() for g in gradients if isinstance(g, DTensor)]
        for gradient in whole:
            gradient.div_(self.count)
        self.sum_gradients(p for p in parameters if not isinstance(p.grad, DTensor))
        squares = self.sum(torch.nn.utils.get_total_norm(parts).to(self.device) ** 2)
        norm = (squares + torch.nn.utils.get_total_norm(whole).to(self.device) ** 2).sqrt()
        if limit:
            share = (limit / (norm + 1e-6)).clamp(max=1.0)
            for gradient in (*whole, *parts):
                gradient.mul_(share.to(gradient.device))
        return norm

    @torch.no_grad()
    def broadcast(self, parameters: Iterable[Tensor]) -> None:
        """Gives every process the values of the first."""
        if self.count > 1:
            for parameter in parameters:
                parameter.copy_(broadcast(parameter.detach().clone()))


_MEGATRON = (
    "this trainer does not run under Megatron-LM: launch with --multi_gpu, or with "
    "--use_fsdp --fsdp_version 2 to split the weights"
)


def make_accelerator(device: str = "auto", mixed_precision: str = "no") -> Accelerator:
    """accelerate's, for the processes that ``accelerate launch`` started.

    Where there is no GPU it is asked for the CPU by name: otherwise accelerate takes each process
    for the only one, and a run for as many runs.

    Raises:
        UserError: the device is not on this machine, or the launch is one that is not supported.
    """
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "false").lower() == "true":
        raise UserError(_MEGATRON)  # before accelerate asks for the package
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA device")
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    cpu = device == "cpu" or (launched and not torch.cuda.is_available())
    if not torch.cuda.is_available():
        # Else DeepSpeed, which others import where it is installed, prints that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not zero.is_asked_for():
        return Accelerator(cpu=cpu, mixed_precision=mixed_precision)
    zero.read_settings()  # what is wrong with them is said before anything is loaded
    return zero.make_accelerator(cpu=cpu, mixed_precision=mixed_precision)


def refuse_unsupported(accelerator: Accelerator) -> None:
    """Raises UserError for an Accelerator, perhaps made elsewhere, that this trainer cannot use."""
    kind = accelerator.distributed_type
    if kind == DistributedType.XLA:
        raise UserError("this trainer does not run under XLA: its kernels are for CPUs and CUDA")
    if kind == DistributedType.MEGATRON_LM:
        raise UserError(_MEGATRON)
    if kind == DistributedType.DEEPSPEED:
        raise UserError(
            "under DeepSpeed let this trainer make its Accelerator, or make it by "
            "hydra_rlhf.processes.make_accelerator: accelerate's own hands the whole model over"
        )


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype with at most BUCKET elements, or one larger tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        size = sum(t.numel() for t in bucket) + tensor.numel()
        if bucket and (size > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
