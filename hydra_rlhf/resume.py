"""What a PPO run has to remember to go on as if it had never stopped.

A checkpoint holds every number that the next step depends on: what the optimizer trains, its
moments, the schedule, the KL controller, the running statistics of the scores, the place in the
prompts, and the state of every random generator. The adapters and heads lie beside them in the form
in which they are used, so that a checkpoint is also a result.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hydra_rlhf.checkpoint import (
    CheckpointError,
    CheckpointStore,
    load_state,
    rng_state,
    save_state,
    set_rng_state,
)
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.errors import UserError
from hydra_rlhf.methods import MethodModels
from hydra_rlhf.processes import Processes
from hydra_rlhf.rewards import AdaptiveKLController, FixedKLController, RunningMoments
from hydra_rlhf.schedule import PromptBatches

TRAINED = "trained.safetensors"
# What may differ between a run and its continuation: how long, how often, and on how much memory.
# The sequences of an optimizer step may be split over more or fewer processes and microbatches.
MAY_CHANGE = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "total_episodes",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "num_eval_prompts",
    "sample_steps",
    "num_samples",
    "local_rollout_forward_batch_size",
    "keep_scoring_pass",
    "gather_for_generation",
    "prefix_device",
    "prefix_budget_gb",
    "sft_model_path",
    "reward_model_path",
    "max_bad_updates",
}

_log = logging.getLogger("hydra_rlhf")


@dataclass
class RunState:
    """The moving parts of a run; see the module."""

    config: PPOConfig
    models: MethodModels
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    kl_controller: FixedKLController | AdaptiveKLController
    moments: RunningMoments | None
    batches: PromptBatches
    shuffle: torch.Generator
    processes: Processes
    scaler: torch.amp.GradScaler | None = None  # of fp16

    def save(self, store: CheckpointStore, step: int) -> Path | None:
        """Takes the checkpoint of ``step``; None, and a warning, where the disk refuses.

        Called by every process; the first one writes, with the random generators of all.
        """
        rng = self.processes.gather_objects(rng_state())
        optimizer = self.optimizer.state_dict()  # by all: each may hold a part of it
        if not self.processes.is_main:
            return None
        return take(store, step, lambda folder: self._write(folder, step, rng, optimizer))

    def _write(
        self, folder: Path, step: int, rng: list[dict[str, Any]], optimizer: dict[str, Any]
    ) -> None:
        if self.models.actor.adapters:
            self.models.save(folder)
        save_trained(folder, self._trained())
        save_state(
            folder,
            {
                "step": step,
                "config": dataclasses.asdict(self.config),
                "optimizer": optimizer,
                "scheduler": self.scheduler.state_dict(),
                "kl_controller": dict(vars(self.kl_controller)),
                "moments": None if self.moments is None else dict(vars(self.moments)),
                "batches": self.batches.state_dict(),
                "shuffle": self.shuffle.get_state(),
                "minibatch": self._minibatch(),
                "scaler": None if self.scaler is None else self.scaler.state_dict(),
                "rng": rng,
            },
        )

    def load(self, folder: Path) -> int:
        """Puts back what was saved in a verified checkpoint; returns its step.

        Raises:
            UserError: it is of a run with other settings, or of another model.
        """
        state, trained = read(folder)
        check_settings(folder, state["config"], dataclasses.asdict(self.config), MAY_CHANGE)
        if state["minibatch"] != self._minibatch():
            raise UserError(
                f"cannot resume from {folder}: an optimizer step was of {state['minibatch']} "
                f"sequences and is of {self._minibatch()} (per_device_train_batch_size * "
                "gradient_accumulation_steps * processes)"
            )
        put_back(folder, self._trained(), trained)
        self.optimizer.load_state_dict(state["optimizer"])
        put_back_schedule(self.scheduler, state["scheduler"])
        vars(self.kl_controller).update(state["kl_controller"])
        if self.moments is not None:
            vars(self.moments).update(state["moments"])
        if self.scaler is not None and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.batches.load_state_dict(state["batches"])
        self.shuffle.set_state(state["shuffle"])
        put_back_rng(self.processes, state["rng"])
        return state["step"]

    def _minibatch(self) -> int:
        """Sequences behind one optimizer step, in all processes."""
        return self.config.local_mini_batch_size * self.processes.count

    def _trained(self) -> Sequence[tuple[str, Tensor]]:
        """What the optimizer trains, under names that depend on the method and model only."""
        return [
            (f"{group['name']}.{i:05d}", parameter)
            for group in self.optimizer.param_groups
            for i, parameter in enumerate(group["params"])
        ]


def take(store: CheckpointStore, step: int, write: Callable[[Path], None]) -> Path | None:
    """The checkpoint of ``step``; None, and a warning, where the disk refuses."""
    try:
        return store.save(step, write)
    except OSError as error:
        _log.warning(
            "the checkpoint of step %d was not written (%s); those before it stay", step, error
        )
        return None


def save_trained(folder: Path, trained: Iterable[tuple[str, Tensor]]) -> None:
    save_file({n: t.detach().cpu().contiguous() for n, t in trained}, folder / TRAINED)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State and trained tensors of a verified checkpoint.

    Raises:
        UserError: they do not read.
    """
    try:
        return load_state(folder), load_file(folder / TRAINED)
    except (CheckpointError, OSError, SafetensorError) as error:
        raise UserError(f"cannot resume from {folder}: {error}") from error


def check_settings(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], may_change: Container[str]
) -> None:
    """Raises UserError for the first setting that is not what it was and changes the numbers."""
    for name in sorted(set(now) | set(before)):
        if name not in may_change and now.get(name) != before.get(name):
            raise UserError(
                f"cannot resume from {folder}: {name} was {before.get(name)!r} and is "
                f"{now.get(name)!r}"
            )


@torch.no_grad()
def put_back(
    folder: Path, trained: Sequence[tuple[str, Tensor]], saved: Mapping[str, Tensor]
) -> None:
    """Copies what was saved into the tensors of those names.

    Raises:
        UserError: they have other names, shapes or dtypes.
    """
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in trained}
    if expected != {name: (tensor.shape, tensor.dtype) for name, tensor in saved.items()}:
        raise UserError(f"cannot resume from {folder}: it is of another model")
    for name, parameter in trained:
        parameter.copy_(saved[name])


def put_back_schedule(schedule: LambdaLR, saved: dict[str, Any]) -> None:
    """Its place; the rates there are those of the steps that there will be now.

    The optimizer has been put back before, with the rates of a run that may have been shorter.
    """
    schedule.load_state_dict(saved)
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    rates = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def put_back_rng(processes: Processes, saved: Sequence[dict[str, Any]]) -> None:
    """Each process its own generators' state, where it was there before."""
    if processes.index < len(saved):
        set_rng_state(saved[processes.index])
    else:
        _log.warning(
            "process %d was not there before: its random generators start anew", processes.index
        )
