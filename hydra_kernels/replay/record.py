"""Recording a function's tensor operations, and running them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hydra_kernels.replay.picks  # noqa: F401  registers its operations
from hydra_kernels.backends import extension, recording
from hydra_kernels.replay.lowering import Node, NotReplayable, Program
from hydra_kernels.replay.operations import lower


class Replay:
    """A function without arguments, recorded on the CPU and run again by :meth:`__call__`.

    Args:
        function: Reads and writes tensors that outlive it and returns some. It runs once, here,
            without gradient; it must be able to run again on the same inputs.

    Attributes:
        outputs: What ``function`` returned; every replay writes it anew.

    Raises:
        NotReplayable: an operation, a dtype or a layout that no instruction covers, or no compiled
            extension.
    """

    def __init__(self, function: Callable[[], tuple[Tensor, ...]]) -> None:
        missing = unavailable()
        if missing:
            raise NotReplayable("; ".join(missing))
        recorder = _Recorder()
        before = recording.state.on
        recording.state.on = True
        try:
            with torch.no_grad(), recorder:
                self.outputs = function()
        finally:
            recording.state.on = before
        self._program: Program = lower(recorder.nodes, self.outputs)
        self._words = torch.tensor(self._program.words, dtype=torch.int64)
        self._arena = torch.empty(self._program.arena, dtype=torch.uint8)
        self._table = torch.zeros(len(self._program.storages) + 1, dtype=torch.int64)
        self.refresh()

    def refresh(self) -> None:
        """Looks where the storages lie now: call it when one was resized."""
        addresses = [t.untyped_storage().data_ptr() for t in self._program.storages]
        self._table.copy_(torch.tensor([self._arena.data_ptr(), *addresses]))

    def __call__(self) -> None:
        """Runs the recorded operations on what the tensors hold now.

        Raises:
            IndexError: an index among them is outside of its tensor; nothing is read or written
                there.
        """
        extension.module.replay_cpu(  # type: ignore[union-attr]
            self._words.data_ptr(),
            self._words.numel(),
            self._table.data_ptr(),
            torch.get_num_threads(),
        )

    def __len__(self) -> int:
        """How many instructions a replay runs."""
        return self._program.count

    @property
    def nbytes(self) -> int:
        """Bytes held for what lies between the operations."""
        return self._program.arena


def unavailable() -> list[str]:
    """Why nothing can be replayed in this install; empty when it can."""
    return extension.missing()


class _Recorder(TorchDispatchMode):
    """Keeps every operation with its tensors, so that no address is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        self.nodes.append(Node(op, args, kwargs, out))
        return out
