"""What an SFT run has to remember to go on as if it had never stopped, as ``resume`` does for PPO.

The batches of every epoch follow from the seed and the examples, so that the place in the data is
the number of the step; a digest tells whether the examples are still those that they were.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import signal
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import Tensor

from hydra_rlhf import resume as resuming
from hydra_rlhf import sharding
from hydra_rlhf.checkpoint import (
    CheckpointStore,
    StopRequest,
    rng_state,
    save_state,
    stop_on_signal,
)
from hydra_rlhf.errors import UserError
from hydra_rlhf.pairs import EncodedPair
from hydra_rlhf.schedule import PromptBatches
from hydra_rlhf.sft_config import SFTConfig

if TYPE_CHECKING:
    from hydra_rlhf.sft import Trainer

# How long, how often, and on how much memory; see resume.MAY_CHANGE.
MAY_CHANGE = {
    "micro_batch_size",
    "epochs",
    "max_steps",
    "save_steps",
    "save_total_limit",
    "eval_every",
    "eval_batch_size",
    "max_bad_updates",
}

_log = logging.getLogger("hydra_rlhf")


class Course:
    """How far a run is, and its checkpoints.

    Attributes:
        step: Steps that are done.
        first_step: 1, or the step after the checkpoint from which the run went on.
        tokens: That were trained on.
        final: The last evaluation.
        stopped_by: The signal that ended the run early, after it was saved.
        saved: Whether the disk took the last checkpoint that was due; known to the first process.

    Args:
        config: Settings.
        trainer: What takes the steps.
        examples: All that is trained on.
        run_dir: Where ``checkpoints/`` goes; None keeps none.
        resume: Go on from the newest whole one, from the start where there is none.
        order: Of the prompts, where the trainer draws them as it goes.

    Raises:
        UserError: there is nothing that can be resumed, or it is of another run.
    """

    def __init__(
        self,
        config: SFTConfig,
        trainer: Trainer,
        examples: Sequence[EncodedPair],
        *,
        run_dir: str | Path | None = None,
        resume: bool = False,
        order: PromptBatches | None = None,
    ):
        self.config, self.trainer, self.order = config, trainer, order
        self.processes = trainer.processes
        self.step, self.first_step, self.tokens = 0, 1, 0
        self.final: dict[str, float] = {}
        self.stopped_by: signal.Signals | None = None
        self.saved = False
        self._before, self._started = 0.0, time.perf_counter()
        self._stop = StopRequest()
        self._store: CheckpointStore | None = None
        if run_dir is None:
            return
        refuse_split_weights(config, trainer.accelerator, resume)
        if is_split(config, trainer.accelerator):
            return
        self._count, self._digest = len(examples), digest(examples)
        self._store = CheckpointStore(
            Path(run_dir) / "checkpoints", save_total_limit=config.save_total_limit
        )
        if not resume:
            self._store.refuse_others()
        elif newest := self._store.latest():
            self._load(newest.path)
            self.first_step = self.step + 1

    @property
    def seconds(self) -> float:
        """Of training, those before the checkpoint included."""
        return self._before + time.perf_counter() - self._started

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Within it SIGTERM and SIGINT end the run between two steps, if it can be saved."""
        if self._store is None:
            yield
            return
        with stop_on_signal() as self._stop:
            yield

    def ends_after(self, step: int) -> bool:
        """Called after each step: saves where that is due; whether a signal ends the run here."""
        self.step = step
        if self._store is None:
            return False
        # A signal may have reached some processes only, and all must stop after one step.
        stopping = self.processes.any(bool(self._stop))
        if stopping or (self.config.save_steps and step % self.config.save_steps == 0):
            self._save()
        if stopping:
            self.stopped_by = self._stop.signal or signal.SIGTERM
            _log.warning("%s: stopping after step %d", self.stopped_by.name, step)
        return stopping

    def _save(self) -> None:
        assert self._store is not None
        rng = self.processes.gather_objects(rng_state())
        optimizer = self.trainer.optimizer.state_dict()  # by all: each may hold a part of it
        if self.processes.is_main:
            taken = resuming.take(
                self._store, self.step, lambda at: self._write(at, rng, optimizer)
            )
            self.saved = taken is not None

    def _write(self, folder: Path, rng: list[dict[str, Any]], optimizer: dict[str, Any]) -> None:
        scaler = self.trainer.accelerator.scaler
        if self.trainer.model.adapters:
            self.trainer.model.save_adapters(folder)
        resuming.save_trained(folder, self._trained())
        save_state(
            folder,
            {
                "step": self.step,
                "config": self._settings(),
                "examples": self._count,
                "digest": self._digest,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "final": self.final,
                "optimizer": optimizer,
                "schedule": self.trainer.schedule.state_dict(),
                "order": None if self.order is None else self.order.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "rng": rng,
            },
        )

    def _load(self, folder: Path) -> None:
        state, trained = resuming.read(folder)
        resuming.check_settings(folder, state["config"], self._settings(), MAY_CHANGE)
        if state["examples"] != self._count:
            raise UserError(
                f"cannot resume from {folder}: there were {state['examples']} examples and there "
                f"are {self._count}"
            )
        if state["digest"] != self._digest:
            raise UserError(
                f"cannot resume from {folder}: the examples, or their tokens, are not what they "
                "were"
            )
        resuming.put_back(folder, self._trained(), trained)
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        resuming.put_back_schedule(self.trainer.schedule, state["schedule"])
        if self.order is not None:
            self.order.load_state_dict(state["order"])
        if self.trainer.accelerator.scaler is not None and state["scaler"]:
            self.trainer.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.tokens, self.final = state["step"], state["tokens"], state["final"]
        self._before = state["seconds"]
        resuming.put_back_rng(self.processes, state["rng"])

    def _settings(self) -> dict[str, Any]:
        precision = self.trainer.accelerator.mixed_precision
        return {**dataclasses.asdict(self.config), "mixed_precision": precision}

    def _trained(self) -> list[tuple[str, Tensor]]:
        """What the optimizer trains."""
        ours = {id(p) for p in self.trainer.parameters}
        return [(n, p) for n, p in self.trainer.model.named_parameters() if id(p) in ours]


def is_split(config: SFTConfig, accelerator: Accelerator) -> bool:
    """Whether no process has all of what is trained."""
    return sharding.is_asked_for(accelerator) and not config.lora_r


def refuse_split_weights(config: SFTConfig, accelerator: Accelerator, resume: bool) -> None:
    """Raises UserError where checkpoints are asked for that cannot be taken."""
    if is_split(config, accelerator) and (resume or config.save_steps):
        raise UserError(
            "sft takes no checkpoints of weights that FSDP splits: leave out --save-steps and "
            "--resume, launch without FSDP, or train adapters (--lora-r)"
        )


def digest(examples: Sequence[EncodedPair]) -> str:
    """SHA-256 of every token and margin, in order."""
    found = hashlib.sha256()
    for one in examples:
        parts = (one.prompt, one.chosen, one.rejected)
        found.update(array("q", map(len, parts)).tobytes())
        for part in parts:
            found.update(array("q", part).tobytes())
        found.update(repr(one.margin).encode())
    return found.hexdigest()
