"""Why a LoRA layer is left to PEFT, or is fused and yet runs PEFT's forward: for reports."""

from __future__ import annotations

from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from hydra_kernels.peft.layer import DROPOUTS, FusedLinear, is_bare, is_base, is_plain


def reason_to_leave(module: nn.Module) -> str | None:
    """Why PEFT's own class has to stay on a LoRA layer; None where it can be fused."""
    if type(module) is not lora.Linear:
        return f"its class is {_class(module)}"
    base = module.base_layer
    if not is_base(base):
        return f"its base layer is {_class(base)}"
    if not is_plain(base._parameters.get("weight")):
        return f"its base layer's weight is {type(base.weight).__qualname__}"
    if "forward" in module.__dict__:
        return "it has a forward of its own, set on the instance"
    return None


def reason_for_pefts_forward(layer: FusedLinear) -> str | None:
    """Why a fused layer's next call, as the layer stands, runs PEFT's forward; None where not.

    What :meth:`FusedLinear.ready` asks, but for the input's dtype, in words.
    """
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    base = layer.base_layer
    if not is_base(base):
        return f"its base layer is {_class(base)}"
    if not is_plain(base._parameters.get("weight")):
        return f"its base layer's weight is {type(base.weight).__qualname__}"
    if not is_bare(base):
        return "its base layer has hooks, or a forward of its own"
    if _has_any_global_hook():
        return "there are hooks on all modules"
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return f"none of its adapters is active: {', '.join(layer.lora_A)}"
    for name in names:
        reason = _reason_of_adapter(layer, name)
        if reason is not None:
            return f"adapter {name} {reason}"
    dtypes = {layer.lora_A[name].weight.dtype for name in names}
    if len(dtypes) > 1:
        return f"its active adapters differ in dtype: {', '.join(sorted(map(str, dtypes)))}"
    drops = {drop.p for drop in (layer.lora_dropout[n] for n in names) if _drops(drop)}
    if drops and len(names) > 1:
        return "several active adapters have dropout"
    return None


def _reason_of_adapter(layer: FusedLinear, name: str) -> str | None:
    a, b, drop = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if name in layer.lora_variant:
        variant = layer.lora_variant[name]
        kind = variant if isinstance(variant, type) else type(variant)
        return f"is a variant of LoRA, {kind.__name__}"
    for what, module in (("lora_A", a), ("lora_B", b)):
        if type(module) is not nn.Linear:
            return f"has a {what} of class {_class(module)}"
    if type(drop) not in DROPOUTS:
        return f"has a dropout of class {_class(drop)}"
    if not (is_bare(a) and is_bare(b) and is_bare(drop)):
        return "has hooks, or a forward of its own, on its lora_A, lora_B or dropout"
    if a.bias is not None or b.bias is not None:
        return "has a bias (lora_bias)"
    weight = layer.base_layer.weight
    for each in (a._parameters.get("weight"), b._parameters.get("weight")):
        if not is_plain(each):
            return f"has a weight that is {type(each).__qualname__}"
        if each.dtype != a.weight.dtype:
            return f"has a lora_A in {a.weight.dtype} and a lora_B in {each.dtype}"
        if each.device != weight.device:
            return f"is on {each.device} and its base layer on {weight.device}"
    scale = layer.scaling[name]
    if isinstance(scale, Tensor) and (scale.requires_grad or scale.numel() != 1):
        return "has a scaling that is trained or not one number"
    return None


def _drops(module: nn.Module) -> bool:
    return type(module) is nn.Dropout and module.p > 0.0


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
