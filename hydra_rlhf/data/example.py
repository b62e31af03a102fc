"""One row of data each: what every loader gives and every trainer takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """Something to be answered. ``extra`` holds the row's other columns."""

    prompt: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Demonstration:
    """A prompt and an answer to imitate. The text to train on is ``prompt + completion``."""

    prompt: str
    completion: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preference:
    """A prompt, a better answer and a worse one, each of which continues ``prompt``."""

    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None  # how much better, in the data's own units
    extra: dict[str, Any] = field(default_factory=dict)
