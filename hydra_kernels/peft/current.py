"""Which adapter ids the running thread's forward passes see."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

NO_BACKWARD = -1  # torch's id of the running backward pass where there is none


class Current(threading.local):
    """The adapter ids that the running thread's forward passes see; one for each fused model.

    Never in a state dict; a copy of a model, or a model read from a file, starts without ids.
    """

    ids: Tensor | None = None
    index: Mapping[str, int] = {}
    # The backward pass within which the ids were entered: a recomputation that names its own.
    entered_in: int = NO_BACKWARD
    # The one adapter (or none) that an int names, so that eager mode runs and differentiates it
    # alone; None where a tensor decides on the device.
    only: Mapping[str, int] | None = None
    # Rows of the last input that had its sequences apart.
    tokens: int = -1

    def __init__(self) -> None:
        pass

    def __reduce__(self) -> tuple[type, tuple]:
        return Current, ()

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


class Usage:
    """Whether ids have been in use in a model, so that a recomputation must know its own."""

    __slots__ = ("used",)

    def __init__(self) -> None:
        self.used = False

    def __reduce__(self) -> tuple[type, tuple]:
        return Usage, ()  # a copy's ids have not been


def backward_pass() -> int:
    """The id of the backward pass that this thread runs, -1 outside of one."""
    if torch.compiler.is_compiling():
        return NO_BACKWARD
    return torch._C._current_graph_task_id()
