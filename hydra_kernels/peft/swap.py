"""The three ways in, and the way back."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from hydra_kernels.peft.ids import KeepingCheckpoint
from hydra_kernels.peft.layer import FusedLinear, is_base, is_plain
from hydra_kernels.peft.siblings import group_siblings

_log = logging.getLogger("hydra_kernels")


@dataclass
class Report:
    """Which LoRA layers run fused, and why the others do not.

    Attributes:
        taken: Names of the layers that run fused.
        left: The reason for each layer that PEFT's own code runs, by name.

    PEFT before 0.19 does not tell :func:`register` and :func:`fused_layers` a layer's name: there
    it is "layer 1" for the first that was created.
    """

    taken: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def name_of(self, created_with: Mapping[str, Any]) -> str:
        """The name that PEFT gave to the layer which it creates with these arguments."""
        number = len(self.taken) + len(self.left) + 1
        return str(created_with.get("target_name") or f"layer {number}")

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} LoRA layers fused, {len(self.left)} left to PEFT"]
        return "\n".join(lines + [f"  {name}: {why}" for name, why in self.left.items()])


def _reason_to_leave(module: nn.Module) -> str | None:
    """Why PEFT's own code has to run a LoRA layer; None where it can be fused."""
    if type(module) is not lora.Linear:
        return f"its class is {type(module).__module__}.{type(module).__qualname__}"
    base = module.base_layer
    if not is_base(base):
        return f"its base layer is {type(base).__module__}.{type(base).__qualname__}"
    if not is_plain(base._parameters.get("weight")):
        return f"its base layer's weight is {type(base.weight).__qualname__}"
    if "forward" in module.__dict__:
        return "it has a forward of its own, set on the instance"
    return None


def fuse(model: nn.Module) -> Report:
    """Swaps the LoRA linears of a PEFT model for fused ones, in place.

    Only the class of a layer changes, so parameters, optimizers that hold them, hooks, the state
    dict, ``copy.deepcopy`` and ``torch.save`` go on as before. Layers that are fused already stay.
    Layers whose parent's forward calls them on the same input run as a group, see ``siblings.py``.

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
    group_siblings(model)
    model.__dict__.pop("_hydra_model", None)
    _log.info("%s", report)
    return report


def unfuse(model: nn.Module) -> None:
    """Gives every fused layer of ``model`` PEFT's own class back, in place."""
    for module in model.modules():
        if type(module) is FusedLinear:
            module.__dict__.pop("_current", None)
            module.__dict__.pop("_model", None)
            module.__dict__.pop("_group", None)
            module.__class__ = lora.Linear
        module.__dict__.pop("_hydra_model", None)
        run = module.__dict__.get("_gradient_checkpointing_func")
        if type(run) is KeepingCheckpoint:
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
        name = report.name_of(kwargs)
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
