"""accelerate's trackers (W&B, MLflow, ...), which get the figures that the run folder gets."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState, tracking

from hydra_rlhf.errors import UserError


def known() -> dict[str, type[tracking.GeneralTracker]]:
    """The trackers by name, those that ``accelerate.tracking.register_tracker_class`` added too."""
    return {
        str(getattr(name, "value", name)): kind
        for name, kind in tracking.LOGGER_TYPE_TO_CLASS.items()
    }


def check(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that accelerate does not know or that is not installed."""
    every = known()
    for name in names:
        if name not in every:
            raise UserError(f"unknown tracker {name!r} (known: {', '.join(sorted(every))})")
        own = every[name].__module__ == tracking.__name__
        if own and importlib.util.find_spec(name) is None:
            raise UserError(f"tracker {name!r} is not installed: pip install {name}")


def start(
    names: Sequence[str], run_dir: Path, settings: Mapping[str, Any]
) -> list[tracking.GeneralTracker]:
    """Running trackers, which were told the settings of the run.

    Raises:
        UserError: see :func:`check`.
    """
    check(names)
    PartialState()  # they ask it which process they are in
    out: list[tracking.GeneralTracker] = []
    for name in names:
        kind: Any = known()[name]
        where = {"logging_dir": str(run_dir)} if kind.requires_logging_directory else {}
        if name == "wandb" and "WANDB_DIR" not in os.environ:
            where["dir"] = str(run_dir)  # else its files lie wherever the command was given
        tracker = kind(run_dir.name, **where)
        if hasattr(tracker, "start"):  # in older versions of accelerate making one starts it
            tracker.start()
        tracker.store_init_configuration(flat(settings))
        out.append(tracker)
    return out


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections of settings as one level (``ppo.seed``) of what every tracker takes, less None."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            simple = isinstance(value, (bool, int, float, str))
            out[f"{prefix}{name}"] = value if simple else str(value)
    return out
