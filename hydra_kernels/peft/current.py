"""Which adapter ids the running thread's forward passes see."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

NO_BACKWARD = -1  # torch's id of the running backward pass where there is none


class Ids:
    """The adapter ids that a thread's forward passes see."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.index: Mapping[str, int] = {}
        # The backward pass within which they were entered: a recomputation that names its own.
        self.entered_in: int = NO_BACKWARD
        # The one adapter (or none) that an int names, so that eager mode runs and differentiates it
        # alone; None where a tensor decides on the device.
        self.only: Mapping[str, int] | None = None
        # Rows of the last input that had its sequences apart.
        self.tokens: int = -1

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


class Current(threading.local):
    """The running thread's ``Ids``; one of these for each fused model.

    Never in a state dict; a copy of a model, or a model read from a file, starts without ids.
    The ids are one step away because torch.compile of torch 2.11 takes a tensor that is itself an
    attribute of a threading.local for a constant.
    """

    now: Ids

    def __init__(self) -> None:  # in each thread that looks
        self.now = Ids()

    def __reduce__(self) -> tuple[type, tuple]:
        return Current, ()


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
