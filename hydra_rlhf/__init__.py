"""RLHF with PPO on one base model.

>>> from hydra_rlhf import HydraModel, PPOConfig, ppo
>>> model = HydraModel.from_pretrained("runs/sft", adapters=("actor", "critic"))
>>> ppo.train(PPOConfig(max_steps=100), model, tokenizer, prompts, run_dir="runs/ppo")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra_rlhf.config import PPOConfig
    from hydra_rlhf.engine import RolloutEngine
    from hydra_rlhf.errors import UserError
    from hydra_rlhf.methods import MethodModels, build_method
    from hydra_rlhf.model import HydraModel

__version__ = "0.1.0"

# Imported when asked for: torch and transformers take seconds, and `hydra-rlhf --help` needs none.
_HOMES = {
    "HydraModel": "model",
    "MethodModels": "methods",
    "PPOConfig": "config",
    "RolloutEngine": "engine",
    "UserError": "errors",
    "build_method": "methods",
}

__all__ = [
    "HydraModel",
    "MethodModels",
    "PPOConfig",
    "RolloutEngine",
    "UserError",
    "build_method",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"hydra_rlhf.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hydra_rlhf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
