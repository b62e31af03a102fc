"""Which adapter runs on which row, and the same one when it is recomputed in backward."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as _torch_checkpoint

from hydra_kernels.ops.lora_arguments import check_range
from hydra_kernels.peft.current import Current, Usage, backward_pass
from hydra_kernels.peft.layer import FusedLinear
from hydra_kernels.peft.saved_modules import GatedModulesToSave, ModulesToSaveWrapper
from hydra_kernels.peft.siblings import group_siblings

BASE = "__base__"  # PEFT's name for no adapter, where it takes one name for each row


class IdsOfModel:
    """What :func:`adapter_ids` knows about a model, kept on it so that a switch is cheap.

    Modules of the model refer to ``current`` and ``usage`` alone, never to this: a cycle would keep
    a deleted model's memory until the garbage collector runs.
    """

    def __init__(self, model: nn.Module, current: Current) -> None:
        self.current = current
        self.adapters: tuple[tuple[str, Any], ...] = ()  # names and configs
        self.names: tuple[str, ...] = ()
        self.index: dict[str, int] = {}
        self.usage = Usage()
        self.scalars: dict[tuple[int, torch.device], Tensor] = {}
        self.layer: FusedLinear | None = None
        self.checkpointed: list[nn.Module] = []
        self.scan(model)

    def scan(self, model: nn.Module) -> None:
        """Looks through the modules again: adapters were added or deleted."""
        left = []
        for name, module in model.named_modules():
            if isinstance(module, FusedLinear):
                module._current = self.current
                module._usage = self.usage
                self.layer = module
            elif type(module) in (ModulesToSaveWrapper, GatedModulesToSave):
                module.__class__ = GatedModulesToSave
                module._current = self.current
            elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                left.append(f"{name} ({type(module).__name__})")
        if left:
            raise ValueError(
                "adapter_ids: these layers run PEFT's own code, which knows no ids: "
                + ", ".join(left)
                + " (fuse(model) takes the linear ones, and reports why not the others)"
            )
        group_siblings(model)
        # A module that checkpoints says so by this attribute, transformers' convention.
        self.checkpointed = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        owner = _owner(model)
        self.owner = weakref.ref(owner)
        self.adapters = tuple(owner.peft_config.items())
        self.names = tuple(name for name, _ in self.adapters)
        self.index = {name: i for i, name in enumerate(self.names)}

    def holds(self) -> bool:
        """Whether no adapter came, went or was replaced since the scan, nor a layer unfused."""
        owner, layer = self.owner(), self.layer
        return (
            owner is not None
            and tuple(owner.peft_config.items()) == self.adapters
            and (layer is None or layer.__dict__.get("_current") is self.current)
        )

    def wrap_checkpoints(self) -> None:
        for module in self.checkpointed:
            run = module.__dict__.get("_gradient_checkpointing_func")
            if type(run) is KeepingCheckpoint:
                if run.current is self.current:
                    continue
                run = run.run  # that of the model which this one is a copy of
            if run is not None:
                module._gradient_checkpointing_func = KeepingCheckpoint(run, self.current)

    @property
    def device(self) -> torch.device:
        """Where the model is now; it may have moved since it was scanned."""
        layer = self.layer
        if layer is None:
            return torch.device("cpu")
        return layer._modules["base_layer"].weight.device  # get_base_layer makes ten calls

    def id_of(self, adapter: int | str) -> int:
        if not isinstance(adapter, str):
            return operator.index(adapter)
        if adapter == BASE:
            return -1
        if adapter not in self.index:
            raise ValueError(
                f"adapter_ids: no adapter is called {adapter!r} (adapters: {', '.join(self.names)})"
            )
        return self.index[adapter]

    def __deepcopy__(self, memo: dict) -> None:
        return None  # the copy of a model is scanned anew when it is first given ids

    def __reduce__(self) -> tuple:
        return _nothing, ()


def _nothing() -> None:
    return None


class KeepingCheckpoint:
    """A model's checkpointing function, recomputing with the adapter ids of the forward pass."""

    def __init__(self, run: Callable, current: Current) -> None:
        self.run = run
        self.current = current

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        # A compiled graph recomputes from its own inputs, of which the ids are one.
        if not torch.compiler.is_compiling():
            function = _keep(self.current, function)
        return self.run(function, *args, **kwargs)


def _keep(current: Current, function: Callable) -> Callable:
    now = current.now
    ids, index, only = now.ids, now.index, now.only

    def with_ids_of_forward(*args: Any, **kwargs: Any) -> Any:
        before = current.now.replace(ids, index, backward_pass(), only)
        try:
            return function(*args, **kwargs)
        finally:
            current.now.replace(*before)

    return with_ids_of_forward


def adapter_names(model: nn.Module) -> list[str]:
    """Names of a PEFT model's adapters in the order they were added, which is that of their ids."""
    return list(_owner(model).peft_config)


def _owner(model: nn.Module) -> nn.Module:
    """The module that knows of the adapters: the model, or one in it where something wraps it."""
    for module in model.modules():
        if isinstance(getattr(module, "peft_config", None), dict):
            return module
    raise ValueError(f"{type(model).__name__} has no adapters of PEFT")


class adapter_ids:  # noqa: N801  a context manager, named as it reads
    """Within this context, which adapter runs on which sequence or row of a fused model.

    Overrides PEFT's active adapters, but not ``disable_adapter``. Differentiable for every adapter
    whose parameters ask for it, and seen only by the thread that entered it. Gradient checkpointing
    of transformers models recomputes with the ids of the forward pass; a function that you
    checkpoint yourself needs :func:`checkpoint` or :func:`keep_adapter_ids`, and raises without.

    Args:
        model: A PEFT model whose LoRA layers are all fused.
        ids: An int for every row, or an integer tensor shaped () or as a leading part of the
            layers' inputs, (B,) or (B, T): i runs adapter ``adapter_names(model)[i]`` and -1 the
            base. A tensor is read on its device when a layer runs, so a captured CUDA graph and a
            compiled model obey new values in it. Names stand for their ids, "__base__" for -1; a
            sequence, one for each of B, is copied to the device. None is PEFT's own choice.

    A module in ``modules_to_save`` runs the copy of each row's adapter too. Where rows differ, or
    a tensor may say so, every copy is run on every row.

    Raises:
        ValueError: an id or a name is not one of the model's, or an adapted layer is neither a
            fused one nor in ``modules_to_save``.
    """

    __slots__ = ("_before", "_ids", "_model", "_only")

    def __init__(
        self, model: nn.Module, ids: int | str | Sequence[int | str] | Tensor | None
    ) -> None:
        known = model.__dict__.get("_hydra_model")
        if known is None:
            known = IdsOfModel(model, _current_of(model))
            model._hydra_model = known
        elif not known.holds():
            known.scan(model)
        self._only: dict[str, int] | None = None
        if isinstance(ids, str):
            ids = known.id_of(ids)
        elif isinstance(ids, Sequence):
            found = [known.id_of(each) for each in ids]
            ids = torch.tensor(found, dtype=torch.int64, device=known.device)
        if ids is not None and not isinstance(ids, Tensor):
            ids = operator.index(ids)
            self._only = {} if ids < 0 else {name: ids for name in known.names[ids : ids + 1]}
            ids = _scalar(known, ids)
        elif ids is not None:
            if ids.is_floating_point() or ids.dtype == torch.bool:
                raise ValueError(f"adapter_ids must be integers, got {ids.dtype}")
            check_range(ids, len(known.names))
        self._model = known
        self._ids = ids
        self._before: list[tuple] = []

    def __enter__(self) -> None:
        known = self._model
        if self._ids is not None:
            known.usage.used = True
        known.wrap_checkpoints()
        before = known.current.now.replace(self._ids, known.index, backward_pass(), self._only)
        self._before.append(before)

    def __exit__(self, *exception: object) -> None:
        self._model.current.now.replace(*self._before.pop())


def _current_of(model: nn.Module) -> Current:
    """The ids that the fused layers of ``model`` share, new where they share none yet."""
    for module in model.modules():
        if isinstance(module, FusedLinear | GatedModulesToSave) and "_current" in module.__dict__:
            return module._current
    return Current()


def _scalar(known: IdsOfModel, ids: int) -> Tensor:
    if not -1 <= ids < len(known.names):
        raise ValueError(
            f"adapter_ids must be between -1 and {len(known.names) - 1}, got {ids} "
            f"(adapters: {', '.join(known.names)})"
        )
    device = known.device
    found = known.scalars.get((ids, device))
    if found is None:
        with torch.inference_mode(False):  # kept for later calls, of which some may train
            found = known.scalars[ids, device] = torch.tensor(ids, device=device)
    return found


def keep_adapter_ids(model: nn.Module, function: Callable) -> Callable:
    """``function`` under the adapter ids that hold now, whenever and wherever it is called.

    For activation checkpointing done by hand: ``checkpoint(keep_adapter_ids(model, block), x)``.
    """
    return _keep(_current_of(model), function)


def checkpoint(model: nn.Module, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """``torch.utils.checkpoint.checkpoint`` that recomputes with the adapter ids of the forward."""
    return _torch_checkpoint(keep_adapter_ids(model, function), *args, **kwargs)
