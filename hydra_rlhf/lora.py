"""Which layers of a decoder get adapters, and copying one adapter into another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import peft
import torch
import transformers
from torch import nn

from hydra_rlhf import trunk as trunks
from hydra_rlhf.errors import UserError


def default_lora_config(causal_lm: Any, **settings) -> peft.LoraConfig:
    """A LoraConfig over every linear layer of the decoder's blocks, rank 128 unless told.

    Not PEFT's "all-linear": that reaches projections outside the blocks (OPT's) and refuses
    ``layers_to_transform``.

    Args:
        causal_lm: The transformers model.
        settings: To ``peft.LoraConfig``; ``r`` also sets ``lora_alpha`` where that is not given.

    Raises:
        UserError: ``target_modules`` lists a name that no layer has.
    """
    trunk = trunks.trunk_of(causal_lm)
    targets = settings.get("target_modules")
    if targets is None:
        settings["target_modules"] = linear_names(trunk)
    elif not isinstance(targets, str):  # which PEFT takes as a pattern
        _check_targets(trunk, targets)
    settings.setdefault("r", 128)
    if settings.get("lora_alpha") is None:
        settings["lora_alpha"] = settings["r"]
    if any(isinstance(m, transformers.pytorch_utils.Conv1D) for m in trunk.modules()):
        settings.setdefault("fan_in_fan_out", True)  # GPT-2 keeps its weights (K, N)
    if settings.get("layers_to_transform") is not None:
        settings.setdefault("layers_pattern", trunks.blocks_name(trunk).split(".")[-1])
    return peft.LoraConfig(task_type="CAUSAL_LM", **settings)


def _check_targets(trunk: nn.Module, targets: Iterable[str]) -> None:
    """PEFT refuses only where no name at all is found, and says nothing of a mistyped one."""
    names = [f".{name}" for name, _ in trunk.named_modules()]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in names):
            known = ", ".join(linear_names(trunk))
            raise UserError(f"no layer of the decoder is named {target} (linear layers: {known})")


def linear_names(trunk: nn.Module) -> list[str]:
    """Names, inside a block, of the linear layers of a trunk's blocks, such as ``q_proj``."""
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    names = {
        name.rsplit(".", 1)[-1]
        for block in trunks.blocks(trunk)
        for name, module in block.named_modules()
        if isinstance(module, linear)
    }
    return sorted(names)


def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_" in name and f".{target}." in name:
                other = parameters.get(name.replace(f".{target}.", f".{source}."))
                if other is None or other.shape != parameter.shape:
                    raise UserError(
                        f"the {source} adapter has another rank or other layers than {target}'s"
                    )
                parameter.copy_(other)
