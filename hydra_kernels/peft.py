"""PEFT models on :func:`hydra_kernels.lora_linear`.

A :class:`FusedLinear` is PEFT's ``lora.Linear`` with another forward: parameters, names in the
state dict, merging, initialisation and everything else stay PEFT's, and so does the forward itself
wherever the fast path does not cover what a layer is asked to do. Three ways in: :func:`fuse` for a
model that exists, :func:`register` for a config, :func:`fused_layers` around code that calls
``get_peft_model`` itself.

:func:`adapter_ids` names the adapter of every sequence or row, in training too, without touching
``requires_grad`` or any module, so switching costs the same for a model of any size.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint as _torch_checkpoint
from transformers.pytorch_utils import Conv1D

from hydra_kernels.ops.lora_linear import check_ids, gated_linear

__all__ = [
    "FusedLinear",
    "Report",
    "adapter_ids",
    "adapter_names",
    "checkpoint",
    "fuse",
    "fused_layers",
    "keep_adapter_ids",
    "register",
    "unfuse",
]

_log = logging.getLogger("hydra_kernels")
_NO_BACKWARD = -1  # torch's id of the running backward pass where there is none


@dataclass
class Report:
    """Which LoRA layers run fused, and why the others do not.

    Attributes:
        taken: Names of the layers that run fused.
        left: The reason for each layer that PEFT's own code runs, by name.
    """

    taken: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} LoRA layers fused, {len(self.left)} left to PEFT"]
        return "\n".join(lines + [f"  {name}: {why}" for name, why in self.left.items()])


class _Current(threading.local):
    """The adapter ids that the running thread's forward passes see; one for each fused model.

    Never in a state dict; a copy of a model, or a model read from a file, starts without ids.
    """

    ids: Tensor | None = None
    index: Mapping[str, int] = {}
    # The backward pass within which the ids were entered: a recomputation that names its own.
    entered_in: int = _NO_BACKWARD
    # The one adapter (or none) that an int names, so that eager mode runs and differentiates it
    # alone; None where a tensor decides on the device.
    only: Mapping[str, int] | None = None
    # Rows of the last input that had its sequences apart.
    tokens: int = -1

    def __init__(self) -> None:
        pass

    def __reduce__(self) -> tuple[type, tuple]:
        return _Current, ()

    def replace(
        self,
        ids: Tensor | None,
        index: Mapping[str, int],
        entered_in: int,
        only: Mapping[str, int] | None,
    ) -> tuple:
        before = self.ids, self.index, self.entered_in, self.only
        self.ids, self.index, self.entered_in, self.only = ids, index, entered_in, only
        return before


class _Model:
    """What :func:`adapter_ids` knows about a model, kept on it so that a switch is cheap."""

    def __init__(self, model: nn.Module, current: _Current) -> None:
        self.current = current
        self.names: tuple[str, ...] = ()
        self.index: dict[str, int] = {}
        self.used = False  # ids have been in use, so that a recomputation must know its own
        self.scalars: dict[tuple[int, torch.device], Tensor] = {}
        self.device = torch.device("cpu")
        self.checkpointed: list[nn.Module] = []
        self.scan(model)

    def scan(self, model: nn.Module) -> None:
        """Looks through the modules again: adapters were added or deleted."""
        left = []
        for name, module in model.named_modules():
            if isinstance(module, FusedLinear):
                module._current = self.current
                module._model = self
                self.device = module.get_base_layer().weight.device
            elif isinstance(module, LoraLayer):
                left.append(name)
        if left:
            raise ValueError(
                "adapter_ids: these LoRA layers run PEFT's own code, which knows no ids: "
                + ", ".join(left)
                + " (fuse(model) reports why)"
            )
        # A module that checkpoints says so by this attribute, transformers' convention.
        self.checkpointed = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self.names = tuple(adapter_names(model))
        self.index = {name: i for i, name in enumerate(self.names)}

    def wrap_checkpoints(self) -> None:
        for module in self.checkpointed:
            run = module.__dict__.get("_gradient_checkpointing_func")
            if type(run) is _KeepingCheckpoint:
                if run.model is self:
                    continue
                run = run.run  # that of the model which this one is a copy of
            if run is not None:
                module._gradient_checkpointing_func = _KeepingCheckpoint(run, self)

    def __deepcopy__(self, memo: dict) -> None:
        return None  # the copy of a model is scanned anew when it is first given ids

    def __reduce__(self) -> tuple:
        return _nothing, ()


def _nothing() -> None:
    return None


class _KeepingCheckpoint:
    """A model's checkpointing function, recomputing with the adapter ids of the forward pass."""

    def __init__(self, run: Callable, model: _Model | None) -> None:
        self.run = run
        self.model = model

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        # A compiled graph recomputes from its own inputs, of which the ids are one.
        if self.model is not None and not torch.compiler.is_compiling():
            function = _keep(self.model.current, function)
        return self.run(function, *args, **kwargs)


def _keep(current: _Current, function: Callable) -> Callable:
    ids, index, only = current.ids, current.index, current.only

    def with_ids_of_forward(*args: Any, **kwargs: Any) -> Any:
        before = current.replace(ids, index, _backward_pass(), only)
        try:
            return function(*args, **kwargs)
        finally:
            current.replace(*before)

    return with_ids_of_forward


def _backward_pass() -> int:
    """The id of the backward pass that this thread runs, -1 outside of one."""
    if torch.compiler.is_compiling():
        return _NO_BACKWARD
    return torch._C._current_graph_task_id()


class FusedLinear(lora.Linear):
    """PEFT's ``lora.Linear``, running on :func:`hydra_kernels.lora_linear` where that fits.

    PEFT's own forward runs, unchanged, for a merged or disabled layer, ``adapter_names``, variants
    (DoRA, aLoRA, ...), biases of lora_B, several active adapters under dropout, a base that is not
    exactly ``nn.Linear`` or ``Conv1D`` or has a tensor subclass for a weight, and hooks or an
    instance's own forward on a submodule.
    """

    # Shadowed on the instance when the model is first given ids.
    _current = _Current()
    _model: _Model | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        current = self._current
        if current.entered_in == _NO_BACKWARD and self._model is not None and self._model.used:
            self._refuse_unknown_ids()
        if current.ids is not None and not self._disable_adapters:
            # A compiled graph reads even an int on the device: the next one must not recompile it.
            index = current.index
            if not torch.compiler.is_compiling() and current.only is not None:
                index = current.only
            return self._gated_forward(x, current.ids, index, *args, **kwargs)
        if args or kwargs or self._disable_adapters or self.merged_adapters:
            return super().forward(x, *args, **kwargs)
        names = self._present(self.active_adapters)
        dropout = self._fast_dropout(x, names)
        if not names or dropout is None or (dropout > 0.0 and len(names) > 1):
            return super().forward(x)
        return self._fast_forward(x, names, range(len(names)), None, dropout, len(names))

    def _refuse_unknown_ids(self) -> None:
        if _backward_pass() != _NO_BACKWARD:
            raise RuntimeError(
                "a checkpointed forward pass is recomputed in backward, and which adapter ids it "
                "had is not known: checkpoint with hydra_kernels.peft.checkpoint or wrap the "
                "function in keep_adapter_ids, or enable gradient checkpointing before the first "
                "adapter_ids"
            )

    def _present(self, names: Any) -> list[str]:
        lora_a = self._modules["lora_A"]._modules
        return [name for name in names if name in lora_a]

    def _fast_dropout(self, x: Tensor, names: list[str]) -> float | None:
        """The dropout probability of the adapters, or None where PEFT's code has to run."""
        base = self._modules["base_layer"]
        modules = self._modules
        weight = base._parameters.get("weight")
        if (
            type(base) not in _BASES
            or not _is_bare(base)
            or not (_is_plain(weight) and _is_plain(x))
            or _has_any_global_hook()
        ):
            return None
        autocast = torch.is_autocast_enabled(x.device.type)
        if x.dtype != weight.dtype and not autocast:
            return None
        lora_a, lora_b = modules["lora_A"]._modules, modules["lora_B"]._modules
        drops = modules["lora_dropout"]._modules
        found: float | None = None
        dtype: torch.dtype | None = None
        device = x.device
        for name in names:
            a, b, drop = lora_a[name], lora_b[name], drops[name]
            if (
                type(a) is not nn.Linear
                or type(b) is not nn.Linear
                or type(drop) not in _DROPOUTS
                or not (_is_bare(a) and _is_bare(b) and _is_bare(drop))
                or name in self.lora_variant
                or b._parameters["bias"] is not None
                or a._parameters["bias"] is not None
            ):
                return None
            a_weight, b_weight = a._parameters["weight"], b._parameters["weight"]
            if not (type(a_weight) in _PLAIN and type(b_weight) in _PLAIN):
                return None
            if dtype is None:
                dtype = a_weight.dtype
            if (
                a_weight.dtype != dtype
                or b_weight.dtype != dtype
                or a_weight.device != device
                or b_weight.device != device
            ):
                return None
            scale = self.scaling[name]
            if isinstance(scale, Tensor) and (scale.requires_grad or scale.numel() != 1):
                return None
            p = drop.p if drop.training and type(drop) is nn.Dropout else 0.0
            if found is not None and p != found:
                return None
            found = p
        if dtype != x.dtype and not (self.cast_input_dtype_enabled or autocast):
            return None  # PEFT multiplies without a cast, which torch refuses
        return 0.0 if found is None else found

    def _fast_forward(
        self,
        x: Tensor,
        names: list[str],
        owners: Sequence[int],
        ids: Tensor | None,
        dropout: float,
        num_adapters: int,
    ) -> Tensor:
        base = self._modules["base_layer"]
        weight = base._parameters["weight"]
        lora_a, lora_b = self._modules["lora_A"]._modules, self._modules["lora_B"]._modules
        return gated_linear(
            x,
            weight.t() if type(base) is Conv1D else weight,
            base._parameters["bias"],
            [lora_a[name]._parameters["weight"] for name in names],
            [lora_b[name]._parameters["weight"] for name in names],
            [self.scaling[name] for name in names],
            owners,
            ids,
            dropout,
            num_adapters=num_adapters,
        )

    def _gated_forward(
        self, x: Tensor, ids: Tensor, index: Mapping[str, int], *args: Any, **kwargs: Any
    ) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names and hydra_kernels.peft.adapter_ids exclude each other")
        if self.merged_adapters:
            raise ValueError("adapter_ids: these adapters are merged, call unmerge_adapter first")
        if ids.device != x.device:
            ids = ids.to(x.device)
        names = self._present(index)
        if ids.dim() > 0:
            ids = self._spread(ids, x)
        dropout = None if args or kwargs else self._fast_dropout(x, names)
        if dropout is not None:
            if not names:
                return self.base_layer(x)
            owners = [index[name] for name in names]
            everywhere = not torch.compiler.is_compiling() and index is self._current.only
            return self._fast_forward(
                x, names, owners, None if everywhere else ids, dropout, len(self._current.index)
            )
        return self._gated_by_peft(x, ids, names, index, *args, **kwargs)

    def _spread(self, ids: Tensor, x: Tensor) -> Tensor:
        """``ids`` for the rows of a layer whose input (B, T) was flattened, as OPT's MLP does."""
        compiling = torch.compiler.is_compiling()
        if ids.dim() < x.dim() and ids.shape == x.shape[: ids.dim()]:
            if x.dim() > 2 and not compiling:
                self._current.tokens = x.shape[:-1].numel()
            return ids
        rows = x.shape[0]
        # Routed experts see rows in another order: only as many as the sequences have are theirs.
        whole = rows % max(ids.numel(), 1) == 0 if compiling else rows == self._current.tokens
        if x.dim() != 2 or not whole or ids.numel() == 0:
            raise ValueError(
                f"adapter_ids: {tuple(ids.shape)} is no leading part of {tuple(x.shape[:-1])}"
            )
        return ids.reshape(-1, 1).expand(-1, rows // ids.numel()).reshape(-1)

    def _gated_by_peft(
        self,
        x: Tensor,
        ids: Tensor,
        names: list[str],
        index: Mapping[str, int],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """One adapter after the other on every row, each kept only where its id stands."""
        variant_kwargs = {key: kwargs.pop(key, None) for key in lora.layer.VARIANT_KWARG_KEYS}
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        on_rows = ids.view(ids.shape + (1,) * (x.dim() - ids.dim()))
        for name in names:
            lora_a = self.lora_A[name]
            inputs = self._cast_input_dtype(x, lora_a.weight.dtype)
            if name in self.lora_variant:
                adapted = self.lora_variant[name].forward(
                    self, active_adapter=name, x=inputs, result=result, **variant_kwargs, **kwargs
                )
            else:
                delta = self.lora_B[name](lora_a(self.lora_dropout[name](inputs)))
                adapted = result + delta * self.scaling[name]
            result = torch.where(on_rows == index[name], adapted, result)
        return result.to(dtype)


_BASES = frozenset({nn.Linear, Conv1D})
_DROPOUTS = frozenset({nn.Dropout, nn.Identity})
_PLAIN = frozenset({nn.Parameter, Tensor})


def _is_plain(tensor: Tensor | None) -> bool:
    """A tensor without a subclass of its own, such as a quantised or a sharded one."""
    return type(tensor) in _PLAIN


def _is_bare(module: nn.Module) -> bool:
    """Whether calling ``module`` does nothing but its class's forward."""
    d = module.__dict__
    return not (
        d["_forward_hooks"]
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
        or "forward" in d
    )


def _reason_to_leave(module: nn.Module) -> str | None:
    """Why PEFT's own code has to run a LoRA layer; None where it can be fused."""
    if type(module) is not lora.Linear:
        return f"its class is {type(module).__module__}.{type(module).__qualname__}"
    base = module.base_layer
    if type(base) not in _BASES:
        return f"its base layer is {type(base).__module__}.{type(base).__qualname__}"
    if not _is_plain(base._parameters.get("weight")):
        return f"its base layer's weight is {type(base.weight).__qualname__}"
    if "forward" in module.__dict__:
        return "it has a forward of its own, set on the instance"
    return None


def fuse(model: nn.Module) -> Report:
    """Swaps the LoRA linears of a PEFT model for fused ones, in place.

    Only the class of a layer changes, so parameters, optimizers that hold them, hooks, the state
    dict, ``copy.deepcopy`` and ``torch.save`` go on as before. Layers that are fused already stay.

    Args:
        model: A ``PeftModel``, or any module with LoRA layers of PEFT inside.

    Returns:
        Which layers were taken, and why the others were left; logged as well.
    """
    report = Report()
    for name, module in model.named_modules():
        if isinstance(module, FusedLinear):
            report.taken.append(name)
        elif isinstance(module, LoraLayer):
            reason = _reason_to_leave(module)
            if reason is None:
                module.__class__ = FusedLinear
                report.taken.append(name)
            else:
                report.left[name] = reason
    model.__dict__.pop("_hydra_model", None)
    _log.info("%s", report)
    return report


def unfuse(model: nn.Module) -> None:
    """Gives every fused layer of ``model`` PEFT's own class back, in place."""
    for module in model.modules():
        if type(module) is FusedLinear:
            module.__dict__.pop("_current", None)
            module.__dict__.pop("_model", None)
            module.__class__ = lora.Linear
        module.__dict__.pop("_hydra_model", None)
        run = module.__dict__.get("_gradient_checkpointing_func")
        if type(run) is _KeepingCheckpoint:
            module._gradient_checkpointing_func = run.run


class _Factory:
    """What PEFT calls for a target of an exact type; None leaves the target to PEFT."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def __call__(
        self,
        target: nn.Module,
        adapter_name: str,
        config: Any = None,
        parameter_name: str | None = None,
        **kwargs: Any,
    ) -> FusedLinear | None:
        name = str(kwargs.get("target_name", ""))
        reason = None
        if parameter_name is not None:
            reason = f"its parameter {parameter_name} is the target"
        elif type(target) not in _BASES:
            reason = f"its class is {type(target).__module__}.{type(target).__qualname__}"
        elif not _is_plain(target._parameters.get("weight")):
            reason = f"its weight is {type(target.weight).__qualname__}"
        if reason is not None:
            self.report.left[name] = reason
            return None
        transposed = type(target) is Conv1D
        given = kwargs.get("fan_in_fan_out", transposed)
        if config is not None:
            given = config.fan_in_fan_out
            config.fan_in_fan_out = transposed
            kwargs["config"] = config
        if "fan_in_fan_out" in kwargs:
            kwargs["fan_in_fan_out"] = transposed
        if given != transposed:
            warnings.warn(
                f"fan_in_fan_out is set to {given} but the target module is "
                f"`{'Conv1D' if transposed else 'torch.nn.Linear'}`. "
                f"Setting fan_in_fan_out to {transposed}.",
                stacklevel=2,
            )
        self.report.taken.append(name)
        return FusedLinear(target, adapter_name, is_target_conv_1d_layer=transposed, **kwargs)


def register(lora_config: lora.LoraConfig) -> Report:
    """Makes PEFT build fused layers wherever it applies ``lora_config``.

    Uses PEFT's hook for custom modules. Targets that a fused layer does not cover get the layer
    that PEFT would have given them.

    Returns:
        A report that fills as PEFT creates layers.
    """
    report = Report()
    factory = _Factory(report)
    lora_config._register_custom_module({nn.Linear: factory, Conv1D: factory})
    return report


@contextmanager
def fused_layers() -> Iterator[Report]:
    """Within this context every LoRA linear that PEFT creates is a fused one.

    For trainers that call ``get_peft_model`` themselves. Yields a report that fills as PEFT creates
    layers; logged at the end.
    """
    report = Report()
    create = lora.LoraModel._create_new_module

    def create_fused(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> nn.Module:
        module = create(lora_config, adapter_name, target, **kwargs)
        name = str(kwargs.get("target_name", ""))
        reason = _reason_to_leave(module)
        if reason is None:
            module.__class__ = FusedLinear
            report.taken.append(name)
        else:
            report.left[name] = reason
        return module

    lora.LoraModel._create_new_module = staticmethod(create_fused)
    try:
        yield report
    finally:
        lora.LoraModel._create_new_module = staticmethod(create)
        _log.info("%s", report)


def adapter_names(model: nn.Module) -> list[str]:
    """Names of a PEFT model's adapters in the order they were added, which is that of their ids."""
    for module in model.modules():
        config = getattr(module, "peft_config", None)
        if isinstance(config, dict):
            return list(config)
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
            compiled model obey new values in it. None is PEFT's own choice.

    Raises:
        ValueError: an int is out of range, or a LoRA layer of the model is not fused.
    """

    __slots__ = ("_before", "_ids", "_model", "_only")

    def __init__(self, model: nn.Module, ids: int | Tensor | None) -> None:
        known = model.__dict__.get("_hydra_model")
        if known is None:
            known = _Model(model, _current_of(model))
            model._hydra_model = known
        else:
            config = getattr(model, "peft_config", None)
            if isinstance(config, dict) and tuple(config) != known.names:
                known.scan(model)
        self._only: dict[str, int] | None = None
        if ids is not None and not isinstance(ids, Tensor):
            self._only = {} if ids < 0 else {name: ids for name in known.names[ids : ids + 1]}
            ids = _scalar(known, ids)
        elif ids is not None:
            if ids.is_floating_point() or ids.dtype == torch.bool:
                raise ValueError(f"adapter_ids must be integers, got {ids.dtype}")
            check_ids(ids, len(known.names))
        self._model = known
        self._ids = ids
        self._before: list[tuple] = []

    def __enter__(self) -> None:
        known = self._model
        if self._ids is not None:
            known.used = True
        known.wrap_checkpoints()
        before = known.current.replace(self._ids, known.index, _backward_pass(), self._only)
        self._before.append(before)

    def __exit__(self, *exception: object) -> None:
        self._model.current.replace(*self._before.pop())


def _current_of(model: nn.Module) -> _Current:
    """The ids that the fused layers of ``model`` share, new where they share none yet."""
    for module in model.modules():
        if isinstance(module, FusedLinear) and "_current" in module.__dict__:
            return module._current
    return _Current()


def _scalar(known: _Model, ids: int) -> Tensor:
    if not -1 <= ids < len(known.names):
        raise ValueError(
            f"adapter_ids must be between -1 and {len(known.names) - 1}, got {ids} "
            f"(adapters: {', '.join(known.names)})"
        )
    found = known.scalars.get((ids, known.device))
    if found is None:
        found = known.scalars[ids, known.device] = torch.tensor(ids, device=known.device)
    return found


def keep_adapter_ids(model: nn.Module, function: Callable) -> Callable:
    """``function`` under the adapter ids that hold now, whenever and wherever it is called.

    For activation checkpointing done by hand: ``checkpoint(keep_adapter_ids(model, block), x)``.
    """
    return _keep(_current_of(model), function)


def checkpoint(model: nn.Module, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """``torch.utils.checkpoint.checkpoint`` that recomputes with the adapter ids of the forward."""
    return _torch_checkpoint(keep_adapter_ids(model, function), *args, **kwargs)
