"""What is decided before the first step: seeds, the order of the prompts, the learning rates."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hydra_rlhf.config import PPOConfig
from hydra_rlhf.errors import UserError
from hydra_rlhf.methods import MethodModels
from hydra_rlhf.processes import Processes


def seed_everything(seed: int) -> None:
    """Seeds python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class PromptBatches:
    """Endless batches of prompt indices: every prompt once an epoch, shuffled anew each time.

    Args:
        num_prompts: How many there are.
        batch_size: How many a batch has.
        seed: Of the order.
        texts: The prompts, where a run that goes on is to have the same.
    """

    def __init__(
        self, num_prompts: int, batch_size: int, seed: int, texts: Iterable[str] | None = None
    ):
        self.num_prompts = num_prompts
        self.digest = None if texts is None else _digest(texts)
        self.batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[int] = []

    def __iter__(self) -> PromptBatches:
        return self

    def __next__(self) -> list[int]:
        while len(self._waiting) < self.batch_size:
            self._waiting += torch.randperm(self.num_prompts, generator=self._generator).tolist()
        batch = self._waiting[: self.batch_size]
        del self._waiting[: self.batch_size]
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_prompts": self.num_prompts,
            "digest": self.digest,
            "generator": self._generator.get_state(),
            "waiting": list(self._waiting),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError where the prompts are not those that they were."""
        if state["num_prompts"] != self.num_prompts:
            raise UserError(
                f"cannot resume: there were {state['num_prompts']} prompts and there are "
                f"{self.num_prompts}"
            )
        if state["digest"] != self.digest:
            raise UserError("cannot resume: the prompts are not what they were")
        self._generator.set_state(state["generator"])
        self._waiting = list(state["waiting"])


def _digest(texts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(repr(text).encode())  # its quotes part one from the next
    return found.hexdigest()


def sampling_seeds(seed: int, step: int, count: int) -> list[int]:
    """A seed for each of a step's ``count`` responses, whichever process samples it."""
    words = np.random.SeedSequence((seed % 2**32, step)).generate_state(count, np.uint64)
    return [int(word) for word in words]


def minibatches(
    local: int, num_mini_batches: int, processes: Processes, generator: torch.Generator
) -> list[Tensor]:
    """The rows of this process in each minibatch of an epoch.

    The rollout's positions, which were drawn at random, are cut into runs of ``num_mini_batches``,
    and each run gives one position to each minibatch. So minibatches are the same whatever the
    number of processes, and every process has as many rows of each.

    Args:
        local: Sequences that this process holds, a multiple of num_mini_batches.
        num_mini_batches: Minibatches of an epoch.
        processes: Who holds the others.
        generator: In the same state everywhere.
    """
    runs = local * processes.count // num_mini_batches
    places = torch.rand(runs, num_mini_batches, generator=generator).argsort(dim=1)
    mine = places[processes.share(runs)]
    first = torch.arange(len(mine))[:, None] * num_mini_batches
    return list((first + mine).unbind(dim=1))


def make_optimizer(
    config: PPOConfig, models: MethodModels, num_steps: int, processes: Processes | None = None
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW over two groups, actor and critic, and the schedule of both.

    Args:
        config: Settings.
        models: What is trained.
        num_steps: Of the run.
        processes: Over which it is split, where the launch asked for that.
    """
    groups: list[dict[str, Any]] = [
        {"params": models.actor_parameters(), "lr": config.learning_rate, "name": "actor"},
        {
            "params": models.critic_parameters(),
            "lr": config.critic_learning_rate or config.learning_rate,
            "name": "critic",
        },
    ]
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if processes is not None:
        optimizer = processes.split(optimizer)
    total = num_steps * config.num_ppo_epochs * config.num_mini_batches
    return optimizer, LambdaLR(optimizer, lambda done: lr_factor(config, done, total))


def advance(schedule: LambdaLR) -> None:
    """One step on, whether or not the update that it belongs to was skipped."""
    optimizer: Any = schedule.optimizer
    optimizer._opt_called = True  # else torch warns of a wrong order where it was
    schedule.step()


def lr_factor(config: PPOConfig, done: int, total: int) -> float:
    """Share of the learning rate after ``done`` of ``total`` optimizer steps."""
    if done < config.warmup_steps:
        return (done + 1) / (config.warmup_steps + 1)
    if config.lr_scheduler_type == "constant":
        return 1.0
    left = max(0.0, 1.0 - (done - config.warmup_steps) / max(total - config.warmup_steps, 1))
    return left if config.lr_scheduler_type == "linear" else 0.5 * (1 - math.cos(math.pi * left))
