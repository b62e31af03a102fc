"""How the settings of a command are declared."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text, as HfArgumentParser reads it."""
    return field(default=default, metadata={"help": help, **metadata})


def required(help: str) -> Any:
    """A field that must be given."""
    return field(metadata={"help": help})
