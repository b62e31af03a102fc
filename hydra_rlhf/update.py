"""Step 5 of PPO: the gradients and optimizer steps of one rollout.

Functions of ``ppo.py``'s loop. What reaches every process is summed in :func:`update`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import hydra_kernels
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.experience import Experience
from hydra_rlhf.faults import overflowed
from hydra_rlhf.methods import MethodModels
from hydra_rlhf.metrics import update_metrics
from hydra_rlhf.model import Score
from hydra_rlhf.schedule import advance, minibatches

if TYPE_CHECKING:
    from hydra_rlhf.ppo import Run


def update(run: Run, step: int, experience: Experience) -> dict[str, float]:
    """All epochs over one rollout; returns the means of the updates' metrics."""
    config, optimizer, scheduler = run.state.config, run.state.optimizer, run.state.scheduler
    processes, mask = run.state.processes, experience.rollout.response_mask
    critic_only = step <= config.critic_warmup_steps
    history: list[dict[str, Tensor]] = []
    room = room_for_gradients(run, critic_only)
    stopped = False
    skipped = bad = 0
    for _ in range(config.num_ppo_epochs):
        order = minibatches(
            len(experience.rollout), config.num_mini_batches, processes, run.state.shuffle
        )
        totals = processes.sum(
            torch.stack([mask[rows.to(mask.device)].sum() for rows in order])
        ).clamp(min=1)
        for minibatch, total in zip(order, totals, strict=True):
            if stopped:
                skipped += 1
                advance(scheduler)  # the schedule is a function of the rollout, not of early stops
                continue

            attempt = functools.partial(
                update_minibatch,
                run,
                experience,
                minibatch,
                total,
                critic_only=critic_only,
                room=room,
            )
            # The one place where processes may part: what has run out of memory tries again.
            found = run.microbatch.run(
                attempt,
                clean_up=optimizer.zero_grad,
                processes=processes,
                rest=functools.partial(attempt, most=1),
            )
            found = processes.combine(found, UPDATE_KINDS)
            processes.sum_gradients(trained_parameters(optimizer))
            norms = clip_gradients(config, optimizer, run.accelerator)
            losses = {n: found[n] for n in ("policy_loss", "value_loss") if n in found}
            if overflowed(run.accelerator, norms) or run.bad.is_bad(
                step, losses | norms, functools.partial(experience.tensors, minibatch)
            ):
                bad += 1
            else:
                rates = {f"lr/{g['name']}": torch.tensor(g["lr"]) for g in optimizer.param_groups}
                history.append(found | norms | rates)
                if config.target_kl is not None and not critic_only:
                    stopped = bool(found["approx_kl"] > 1.5 * config.target_kl)
                if stopped:
                    skipped += 1
                else:
                    optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if run.accelerator.scaler is not None:
                run.accelerator.scaler.update()
            advance(scheduler)
    return update_metrics(history, skipped) | {"policy/bad_updates": float(bad)}


# How figures of processes add up: each mean was weighted by its share of all tokens.
UPDATE_KINDS = {
    "policy_loss": "sum",
    "entropy": "sum",
    "approx_kl": "sum",
    "clipfrac": "sum",
    "ratio": "sum",
    "ratio_max": "max",
    "value_loss": "sum",
    "vf_clipfrac": "sum",
}


def update_minibatch(
    run: Run,
    experience: Experience,
    minibatch: Tensor,  # (mini,) rows of this process's rollout, on the CPU
    total: Tensor,  # () tokens of the minibatch in all processes, at least 1
    size: int,  # of a microbatch
    *,
    critic_only: bool,
    room: Sequence[tuple[nn.Parameter, Tensor]] = (),
    most: int | None = None,  # sequences of it that are run
) -> dict[str, Tensor]:
    """Gradients of one optimizer step, a microbatch at a time; token-weighted means of its metrics.

    A microbatch's loss is a mean over its own tokens, so it weighs in by their share: the sum is
    the gradient of the whole minibatch, however it is cut, and over however many processes.
    """
    mask = experience.rollout.response_mask
    for parameter, place in room:
        parameter.grad = place.zero_()
    means: dict[str, Tensor] = {}
    config, models, accelerator = run.state.config, run.state.models, run.accelerator
    for rows in minibatch.split(size):
        rows = rows[:most]
        index = rows.to(mask.device)
        weight = mask[index].sum() / total
        losses = ppo_losses(config, models, experience, rows, index, accelerator, critic_only)
        found: dict[str, Tensor] = {}
        for loss, figures in losses:
            accelerator.backward(loss * weight)
            found |= figures
        for name, value in found.items():
            value = value.detach()
            if name == "ratio_max":
                means[name] = torch.maximum(means.get(name, value), value)
            else:
                means[name] = means.get(name, 0.0) + value * weight
    return means


def ppo_losses(
    config: PPOConfig,
    models: MethodModels,
    experience: Experience,
    rows: Tensor,
    index: Tensor,
    accelerator: Accelerator,
    critic_only: bool,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yields (loss, metrics) of each forward pass of a microbatch, to be sent back one by one.

    A joint adapter makes one pass with the combined loss. Else the critic's pass comes after the
    actor's activations are gone, and each loss reaches only its own set. A pass that scoring kept
    comes first, so that its activations go before others come.
    """
    batch = experience.rollout.rows(index)
    prefixes = {i: prefix.rows(rows) for i, prefix in experience.prefixes.items()}

    kept = experience.take_kept(index)

    def forward(*roles: str, **kwargs) -> Score:
        nonlocal kept
        if kept is not None:
            given, kept = kept, None
            return given
        with accelerator.autocast():
            return models.score(
                batch.query_responses,
                batch.attention_mask,
                batch.response_mask,
                roles=roles,
                temperature=config.temperature,
                entropy=True,
                prefixes=prefixes,
                **kwargs,
            )

    def loss_of(new: Score) -> hydra_kernels.PPOLoss:
        entropy = new.entropy
        if entropy is not None and config.ent_coef == 0.0:
            entropy = entropy.detach()
        return hydra_kernels.ppo_loss(
            new.logprobs,
            new.values,
            old_logprobs=experience.old_logprobs[index],
            old_values=experience.old_values[index],
            advantages=experience.advantages[index],
            returns=experience.returns[index],
            mask=batch.response_mask,
            cliprange=config.cliprange,
            cliprange_value=config.cliprange_value,
            vf_coef=config.vf_coef,
            entropy=entropy,
            ent_coef=config.ent_coef,
        )

    def policy_figures(out: hydra_kernels.PPOLoss, new: Score) -> dict[str, Tensor]:
        gap = torch.where(batch.response_mask, new.logprobs - experience.old_logprobs[index], 0.0)
        return {
            "policy_loss": out.policy_loss,
            "entropy": out.entropy,
            "approx_kl": out.approx_kl,
            "clipfrac": out.clipfrac,
            "ratio": out.ratio,
            "ratio_max": gap.detach().max().exp(),
        }

    def value_figures(out: hydra_kernels.PPOLoss) -> dict[str, Tensor]:
        return {"value_loss": out.value_loss, "vf_clipfrac": out.vf_clipfrac}

    if models.joint and not critic_only:
        new = forward("actor", "critic", detach_values=config.detach_values)
        out = loss_of(new)
        yield out.loss, policy_figures(out, new) | value_figures(out)
        return
    order = ("actor", "critic") if kept is None else ("critic", "actor")
    for role in ("critic",) if critic_only else order:
        # A joint adapter is the policy: while only the critic learns, only its head does.
        new = forward(role, detach_values=models.joint and critic_only)
        out = loss_of(new)
        yield out.loss, policy_figures(out, new) if role == "actor" else value_figures(out)
        del new, out


def room_for_gradients(run: Run, critic_only: bool) -> list[tuple[nn.Parameter, Tensor]]:
    """A place for the gradient of each adapter weight and head, all in one piece; on a CPU.

    Made in backward, each would lie where an activation was just freed, and the heap would have no
    hole left that the next pass's activations fit into: its resident set grew by 3 to 5 %. Empty
    where gradients are as large as the model, in parts, or on a device whose allocator has pools.
    """
    groups = run.state.optimizer.param_groups
    groups = [g for g in groups if g["name"] == "critic" or not critic_only]
    trained = [p for g in groups for p in g["params"] if p.dtype == torch.float32]
    on_cpu = run.state.models.actor.device.type == "cpu"
    if not (on_cpu and run.state.models.actor.adapters and run.state.processes.sharding is None):
        return []
    flat = torch.empty(sum(p.numel() for p in trained), dtype=torch.float32)
    places = flat.split([p.numel() for p in trained])
    return [(p, place.view_as(p)) for p, place in zip(trained, places, strict=True)]


def clip_gradients(
    config: PPOConfig, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Clips actor's and critic's gradients each to max_grad_norm; the norms before clipping."""
    accelerator.unscale_gradients(optimizer)
    norms = {}
    limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
    for group in optimizer.param_groups:
        norm = torch.nn.utils.clip_grad_norm_(group["params"], limit)
        norms[f"grad_norm/{group['name']}"] = norm
    return norms


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimizer trains, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
