"""The three ways in, and the way back."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from hydra_kernels.peft.ids import KeepingCheckpoint
from hydra_kernels.peft.layer import FusedLinear, is_base, is_plain
from hydra_kernels.peft.reasons import reason_for_pefts_forward, reason_to_leave
from hydra_kernels.peft.saved_modules import GatedModulesToSave, ModulesToSaveWrapper
from hydra_kernels.peft.siblings import group_siblings

_log = logging.getLogger("hydra_kernels")


@dataclass
class Report:
    """Which LoRA layers run fused, and why the others do not.

    Attributes:
        taken: Names of the layers that were fused.
        left: The reason for each layer that PEFT's own code runs, by name.

    PEFT before 0.19 does not tell :func:`register` and :func:`fused_layers` a layer's name: there
    it is "layer 1" for the first that was created.
    """

    taken: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    _layers: WeakValueDictionary[str, FusedLinear] = field(
        default_factory=WeakValueDictionary, repr=False, compare=False
    )

    @property
    def waiting(self) -> dict[str, str]:
        """The reason for each fused layer that, as it is now, runs PEFT's own forward, by name.

        DoRA, biases of lora_B, hooks, ... A layer waits no longer once the reason has gone.
        """
        reasons = {name: reason_for_pefts_forward(layer) for name, layer in self._layers.items()}
        return {name: why for name, why in reasons.items() if why is not None}

    def name_of(self, created_with: Mapping[str, Any]) -> str:
        """The name that PEFT gave to the layer which it creates with these arguments."""
        number = len(self.taken) + len(self.left) + 1
        return str(created_with.get("target_name") or f"layer {number}")

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} LoRA layers fused, {len(self.left)} left to PEFT"]
        lines += _by_reason("left", self.left)
        lines += _by_reason("fused, but PEFT's forward runs", self.waiting)
        return "\n".join(lines)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layers": {}}  # which are another model's after unpickling

    def take(self, name: str, layer: FusedLinear) -> None:
        self.taken.append(name)
        self._layers[name] = layer

    def log(self, where: str) -> None:
        """To the log: as a warning where nothing runs faster, so that it is seen."""
        if not self.taken and not self.left:
            _log.warning("no LoRA layer of PEFT %s", where)
        elif len(self.waiting) == len(self.taken):
            _log.warning("%s", self)
        else:
            _log.info("%s", self)


def _by_reason(what: str, reasons: Mapping[str, str]) -> Iterator[str]:
    """One line for each reason: a large model has hundreds of layers and few reasons."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    for why, found in names.items():
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        yield f"  {what}: {found[0]}{more}: {why}"


def fuse(model: nn.Module) -> Report:
    """Swaps the LoRA linears of a PEFT model for fused ones, in place.

    Only the class of a layer changes, so parameters, optimizers that hold them, hooks, the state
    dict, ``copy.deepcopy`` and ``torch.save`` go on as before. Layers that are fused already stay.
    Layers whose parent's forward calls them on the same input run as a group, see ``siblings.py``.

    Args:
        model: A ``PeftModel``, or any module with LoRA layers of PEFT inside.

    Returns:
        Which layers were taken, and why the others were left; logged as well, as a warning where
        no layer runs faster.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"fuse: expected a model with LoRA layers, got {type(model).__name__}")
    report = Report()
    for name, module in model.named_modules():
        if isinstance(module, FusedLinear):
            report.take(name, module)
        elif isinstance(module, LoraLayer):
            reason = reason_to_leave(module)
            if reason is None:
                module.__class__ = FusedLinear
                report.take(name, module)
            else:
                report.left[name] = reason
    group_siblings(model)
    model.__dict__.pop("_hydra_model", None)
    report.log(f"in {type(model).__name__}: call fuse after get_peft_model")
    return report


def unfuse(model: nn.Module) -> None:
    """Gives every fused layer of ``model`` PEFT's own class back, in place."""
    for module in model.modules():
        if type(module) is FusedLinear:
            module.__dict__.pop("_current", None)
            module.__dict__.pop("_usage", None)
            module.__dict__.pop("_group", None)
            module.__class__ = lora.Linear
        elif type(module) is GatedModulesToSave:
            module.__dict__.pop("_current", None)
            module.__class__ = ModulesToSaveWrapper
        module.__dict__.pop("_hydra_model", None)
        run = module.__dict__.get("_gradient_checkpointing_func")
        if type(run) is KeepingCheckpoint:
            module._gradient_checkpointing_func = run.run


class _Factory:
    """What PEFT calls for a target of an exact type; None leaves the target to PEFT."""

    def __init__(self, report: Report | None = None) -> None:
        self.report = Report() if report is None else report

    def __deepcopy__(self, memo: dict) -> _Factory:
        return self  # a copied config's layers are to be in the report that register gave

    def __reduce__(self) -> tuple[type, tuple]:
        return _Factory, ()  # a model is saved with its configs

    def __call__(
        self,
        target: nn.Module,
        adapter_name: str,
        config: Any = None,
        parameter_name: str | None = None,
        **kwargs: Any,
    ) -> FusedLinear | None:
        name = self.report.name_of(kwargs)
        reason = None
        if parameter_name is not None:
            reason = f"its parameter {parameter_name} is the target"
        elif not is_base(target):
            reason = f"its class is {type(target).__module__}.{type(target).__qualname__}"
        elif not is_plain(target._parameters.get("weight")):
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
        layer = FusedLinear(target, adapter_name, is_target_conv_1d_layer=transposed, **kwargs)
        self.report.take(name, layer)
        return layer


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
        name = report.name_of(kwargs)
        # One made by a registered config, or by a context around this one, is fused already.
        reason = None if isinstance(module, FusedLinear) else reason_to_leave(module)
        if reason is None:
            if type(module) is lora.Linear:
                module.__class__ = FusedLinear
            report.take(name, module)
        else:
            report.left[name] = reason
        return module

    lora.LoraModel._create_new_module = staticmethod(create_fused)
    try:
        yield report
    finally:
        lora.LoraModel._create_new_module = staticmethod(create)
        report.log("was created within fused_layers")
