"""PPO on one base model, or on four: the loop, from top to bottom.

Read :func:`train`. Its steps are numbered, each a function: set-up and evaluation below it,
sampling, scoring and advantages in ``experience.py``, gradients in ``update.py``. What the five
methods differ in (which models are held and which adapters they train) is in ``methods.py``, and
one loop serves them all.

Notation: B sequences of a rollout, P prompt columns, T response columns, L = P + T.

Sources: Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593; Huang et al.
2024, arXiv:2403.17031; Santacroce et al. 2023, arXiv:2309.00754. Metric names are TRL's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hydra_rlhf import rollout as rollouts
from hydra_rlhf.checkpoint import CheckpointStore, StopRequest, stop_on_signal
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.errors import UserError
from hydra_rlhf.experience import (
    PromptLike,
    Sampler,
    context_limit,
    kept_roles,
    make_experience,
    sample,
    score,
    scored_roles,
    shared_prefixes,
    some_samples,
)
from hydra_rlhf.faults import BadUpdates, Shrinking, faults_folder
from hydra_rlhf.methods import MethodModels, method_from_model
from hydra_rlhf.metrics import diagnose, to_floats
from hydra_rlhf.model import HydraModel, Score
from hydra_rlhf.phases import Phases
from hydra_rlhf.processes import Processes, make_accelerator
from hydra_rlhf.resume import RunState
from hydra_rlhf.rewards import (
    AdaptiveKLController,
    FixedKLController,
    RewardFn,
    RunningMoments,
    call_reward_fn,
    shape_scores,
)
from hydra_rlhf.schedule import (
    PromptBatches,
    make_optimizer,
    sampling_seeds,
    seed_everything,
)
from hydra_rlhf.sharding import Sharding
from hydra_rlhf.trunk import Prefix
from hydra_rlhf.update import trained_parameters, update

_log = logging.getLogger("hydra_rlhf")


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...


@dataclass
class PPOResult:
    """What a run leaves.

    Attributes:
        models: The trained models; ``models.save(folder)`` writes adapters and heads.
        metrics: One dictionary a step, in order.
        diagnostics: What looked wrong, each with its likely cause.
        seconds: Wall time.
        first_step: 1, or the step after the checkpoint from which the run went on.
        stopped_by: The signal that ended the run early, after it was saved.
        saved: Whether the disk took the last checkpoint that was due; known to the first process.
    """

    models: MethodModels
    metrics: list[dict[str, float]] = field(default_factory=list)
    diagnostics: list[str] = field(default_factory=list)
    seconds: float = 0.0
    first_step: int = 1
    stopped_by: signal.Signals | None = None
    saved: bool = False


def train(
    config: PPOConfig,
    model: HydraModel | MethodModels,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | PromptLike],
    *,
    reward_fn: RewardFn | None = None,
    eval_prompts: Sequence[str | PromptLike] | None = None,
    tracker: Tracker | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    on_samples: Callable[[int, list[dict[str, Any]]], None] | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
) -> PPOResult:
    """Trains a policy with PPO.

    Args:
        config: Settings; see :class:`PPOConfig`.
        model: The models of a method (``build_method``), or one model without adapters, from which
            ``config.method``'s are made.
        tokenizer: Of the policy.
        prompts: Texts, or rows with ``prompt`` and ``extra`` columns.
        reward_fn: Scores responses in place of the reward head; called as
            ``f(prompts=..., completions=..., **columns)``.
        eval_prompts: Held-out prompts, used every ``config.eval_steps`` steps.
        tracker: Gets each step's metrics: an ``accelerate.Accelerator``, a W&B run, or anything
            else with ``log(metrics, step)``.
        on_step: Called with (step from 1, metrics) after each step.
        on_samples: Called in the first process with (step, rows of prompt, response, score, kl)
            after every ``config.sample_steps`` rollouts, the first and the last.
        run_dir: Where ``checkpoints/`` and, after a fault, ``faults/`` go. With one, SIGTERM and
            SIGINT save the run and end it between two steps.
        resume: Go on from the newest whole checkpoint of ``run_dir``; from the start where there is
            none. The steps that follow are those of a run that never stopped.

    Returns:
        See :class:`PPOResult`.

    Raises:
        UserError: the configuration, the prompts or the reward function cannot work, or there is
            nothing that can be resumed.
        TrainingFault: ``config.max_bad_updates`` updates in a row were not finite.
    """
    # 1. Check and set up.
    config.validate()
    if not prompts:
        raise UserError("there are no prompts to train on")
    seed_everything(config.seed)
    accelerator = make_accelerator(mixed_precision=config.mixed_precision)
    processes = Processes(accelerator)
    models = prepare_models(config, model, accelerator.device, processes.sharding)
    if reward_fn is None and models.reward is None:
        raise UserError("there is no reward model; give a reward function")
    sampling = rollouts.sampling_of(config, tokenizer)
    check_lengths(config, models)
    num_steps = config.num_steps(len(prompts), processes.count)
    optimizer, scheduler = make_optimizer(config, models, num_steps, processes)
    processes.broadcast(trained_parameters(optimizer))
    if not processes.is_main:
        seed_everything(config.seed + processes.index)  # whatever a user's code draws
    kl_controller = (
        AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
        if config.kl_controller == "adaptive"
        else FixedKLController(config.kl_coef)
    )
    state = RunState(
        config,
        models,
        optimizer,
        scheduler,
        kl_controller,
        moments=RunningMoments() if config.use_score_scaling else None,
        batches=PromptBatches(
            len(prompts),
            config.local_batch_size * processes.count,
            config.seed,
            texts=(row if isinstance(row, str) else row.prompt for row in prompts),
        ),
        shuffle=torch.Generator().manual_seed(config.seed + 1),
        processes=processes,
        scaler=accelerator.scaler,
    )
    folder = None if run_dir is None else Path(run_dir)
    run = Run(
        state,
        accelerator,
        tokenizer,
        prompts,
        list(eval_prompts or [])[: config.num_eval_prompts],
        reward_fn,
        Sampler(config, sampling, processes),
        phases=Phases(accelerator.device),
        microbatch=Shrinking("per_device_train_batch_size", config.per_device_train_batch_size),
        scoring=Shrinking(
            "local_rollout_forward_batch_size", config.local_rollout_forward_batch_size
        ),
        num_steps=num_steps,
        on_samples=on_samples if processes.is_main else None,
        bad=BadUpdates(config.max_bad_updates, faults_folder(run_dir, processes)),
    )
    result = PPOResult(models)
    started = time.perf_counter()
    store = None
    if folder is not None:
        store = CheckpointStore(folder / "checkpoints", save_total_limit=config.save_total_limit)
        if not resume:
            store.refuse_others()
        elif newest := store.latest():
            result.first_step = state.load(newest.path) + 1

    with stop_on_signal() if store is not None else contextlib.nullcontext(StopRequest()) as stop:
        for step in range(result.first_step, num_steps + 1):
            metrics = train_step(run, step)  # steps 2 to 6
            # 7. Report, save.
            for message in diagnose(config, metrics):
                if message not in result.diagnostics:
                    result.diagnostics.append(message)
                    if processes.is_main:
                        _log.warning("step %d: %s", step, message)
            result.metrics.append(metrics)
            if tracker is not None:
                tracker.log(metrics, step)
            if on_step is not None:
                on_step(step, metrics)
            due = config.save_steps > 0 and step % config.save_steps == 0
            # A signal may have reached some processes only, and all must stop after one step.
            stopping = store is not None and processes.any(bool(stop))
            if store is not None and (due or stopping):
                result.saved = state.save(store, step) is not None
            if stopping:
                result.stopped_by = stop.signal or signal.SIGTERM
                _log.warning("%s: stopping after step %d", result.stopped_by.name, step)
                break
    result.seconds = time.perf_counter() - started
    return result


@dataclass
class Run:
    """What the steps of a run share; ``state`` is the part that a checkpoint holds."""

    state: RunState
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str | PromptLike]
    eval_prompts: Sequence[str | PromptLike]
    reward_fn: RewardFn | None
    sampler: Sampler
    phases: Phases
    microbatch: Shrinking
    scoring: Shrinking
    bad: BadUpdates
    num_steps: int
    on_samples: Callable[[int, list[dict[str, Any]]], None] | None = None


def train_step(run: Run, step: int) -> dict[str, float]:
    """One rollout and the updates on it; returns the step's metrics, those of all processes."""
    config, models, phases = run.state.config, run.state.models, run.phases
    processes = run.state.processes
    phases.clear()
    # 2. Rollout: sample a response to each prompt of the batch.
    with phases("rollout"), run.accelerator.autocast():
        batch = next(run.state.batches)
        mine = processes.share(len(batch))
        rows = [run.prompts[i] for i in batch[mine]]
        seeds = sampling_seeds(config.seed, step, len(batch))[mine]
        rollout = sample(config, models.actor, run.tokenizer, rows, run.sampler, seeds)
        kv_cache = run.sampler.kv_cache
    # 3. Score: log-probabilities of actor and reference, values, rewards.
    with phases("score"), run.accelerator.autocast(), torch.no_grad():
        prefixes = shared_prefixes(config, models, rollout)
        free = () if rollout.prefix is None else (0,)
        rollout.prefix = None  # prefixes has it, perhaps offloaded
        use_head = run.reward_fn is None
        keep = passes_to_keep(run, step)
        scored, graph = score(
            config,
            models,
            rollout,
            prefixes,
            run.scoring,
            processes,
            use_head=use_head,
            keep=keep,
        )
        if run.reward_fn is not None:
            raw = call_reward_fn(
                run.reward_fn, rollout.prompts, rollout.responses, rollout.columns, rollout.device
            )
            scored = scored._replace(scores=raw)
    every = config.sample_steps
    kept = step in (1, run.num_steps) or (every > 0 and step % every == 0)
    if run.on_samples is not None and every > 0 and kept:
        run.on_samples(step, some_samples(rollout, scored, config.num_samples))
    # 4. Rewards and advantages.
    with phases("advantages"), torch.no_grad():
        shaped = shape_scores(
            scored.scores,
            rollout.ended,
            missing_eos_penalty=config.missing_eos_penalty,
            missing_eos_score=config.missing_eos_score,
            moments=run.state.moments,
            center=config.use_score_norm,
            clip=config.score_clip,
            gather=processes.gather,
        )
        kl_coef = run.state.kl_controller.value
        experience, metrics = make_experience(
            config, rollout, scored, shaped, kl_coef, prefixes, processes
        )
        keep = keep if graph is not None else []
        experience.kept = graph
        del graph  # the experience alone holds its activations, and lets go of them
    # 5. Update: num_ppo_epochs passes over shuffled minibatches.
    with phases("update"):
        metrics |= update(run, step, experience)
    if prefixes:
        skipped = metrics["policy/updates_skipped"]
        metrics |= saved_by_prefixes(run, step, prefixes, skipped, keep, free)
    # 6. Adjust the KL coefficient, evaluate.
    metrics["objective/kl_coef"] = kl_coef
    run.state.kl_controller.update(metrics["objective/kl"], len(batch))
    if config.eval_steps and run.eval_prompts and step % config.eval_steps == 0:
        with phases("eval"), run.accelerator.autocast():
            metrics |= evaluate(
                config,
                models,
                run.tokenizer,
                run.eval_prompts,
                run.sampler,
                run.reward_fn,
                processes,
            )
    metrics["episode"] = float(step * len(batch))
    metrics |= phases.metrics()
    metrics["memory/kv_cache"] = float(kv_cache)
    metrics["perf/tokens_per_second"] = metrics["tokens/response"] / sum(
        phases.seconds[name] for name in ("rollout", "score", "advantages", "update")
    )
    return metrics


# 1. Set-up


def prepare_models(
    config: PPOConfig,
    model: HydraModel | MethodModels,
    device: torch.device,
    sharding: Sharding | None = None,
) -> MethodModels:
    """The method's models on the device, in eval mode: dropout would move the ratio from 1."""
    models = model if isinstance(model, MethodModels) else _from_one(config, model)
    if models.method != config.method:
        raise UserError(f"the models are for {models.method}, the configuration is {config.method}")
    for one in models:
        if sharding is None:
            one.to(device)
        else:
            sharding.shard(one)
        one.eval()
        if config.gradient_checkpointing:
            one.gradient_checkpointing_enable({"use_reentrant": config.use_reentrant})
    return models


def _from_one(config: PPOConfig, model: HydraModel) -> MethodModels:
    if not model.adapters:
        return method_from_model(config.method, model, lora=config)
    expected = {"hydra-ppo": ("actor", "critic"), "j-hydra-ppo": ("joint",)}.get(config.method)
    if model.adapters != expected:
        raise UserError(f"{config.method} cannot run on one model with adapters {model.adapters}")
    return MethodModels(config.method, model, model, model, model)


def check_lengths(config: PPOConfig, models: MethodModels) -> None:
    """Raises UserError when no prompt would fit beside the response."""
    limit = context_limit(models.actor)
    if limit is not None and config.response_length >= limit:
        raise UserError(
            f"response_length {config.response_length} leaves no room for a prompt: the model's "
            f"context is {limit} tokens"
        )


# 3. Score


def passes_to_keep(run: Run, step: int) -> list[str]:
    """Roles whose scoring pass the first epoch of this step can take over."""
    config = run.state.config
    if run.state.processes.sharding is not None or run.microbatch.size < config.local_batch_size:
        return []
    return kept_roles(config, run.state.models, step <= config.critic_warmup_steps)


# 6. Report


def saved_by_prefixes(
    run: Run,
    step: int,
    prefixes: dict[int, Prefix],
    skipped: float,
    kept: Sequence[str],
    free: Sequence[int],
) -> dict[str, float]:
    """What this process did not compute and read again, thanks to the shared prefixes."""
    config = run.state.config
    return run.state.models.prefix_savings(
        prefixes,
        scored_roles(config, run.reward_fn is None),
        # The first minibatch that is skipped was run, and told to stop.
        updates=config.num_ppo_epochs - max(skipped - 1, 0) / config.num_mini_batches,
        updated=("critic",) if step <= config.critic_warmup_steps else ("actor", "critic"),
        kept=kept,
        reuse=config.reuse_reference_reward,
        free=free,
    )


@torch.no_grad()
def evaluate(
    config: PPOConfig,
    models: MethodModels,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | PromptLike],
    sampler: Sampler,
    reward_fn: RewardFn | None,
    processes: Processes,
) -> dict[str, float]:
    """Actor against reference on held-out prompts: scores of both, win rate and KL.

    The generators of the training run are left as they were, so that evaluating changes nothing.
    """
    with torch.random.fork_rng(devices=_cuda_devices(models.actor.device)):
        torch.manual_seed(config.seed)
        found: dict[str, list[Tensor]] = {"actor": [], "reference": [], "kl": []}
        # Every process its own, as even as they go; one may have none.
        mine = list(range(len(prompts)))[processes.index :: processes.count]
        counted = len(mine)
        if processes.sharding is not None:
            # Passes are common: who has fewer takes the first prompt once more and drops it.
            mine += [0] * (math.ceil(len(prompts) / processes.count) - counted)
        every_seed = sampling_seeds(config.seed, 0, len(prompts))
        for start in range(0, len(mine), config.local_rollout_forward_batch_size):
            some = mine[start : start + config.local_rollout_forward_batch_size]
            rows, seeds = [prompts[i] for i in some], [every_seed[i] for i in some]
            for role, model in (("actor", models.actor), ("reference", models.reference)):
                rollout = sample(config, model, tokenizer, rows, sampler, seeds, role=role)
                roles = ["actor", "reference"] if role == "actor" else []
                if reward_fn is None:
                    roles.append("reward")
                out = Score()
                if roles:
                    out = models.score(
                        rollout.query_responses,
                        rollout.attention_mask,
                        rollout.response_mask,
                        roles=roles,
                        temperature=config.temperature,
                    )
                if reward_fn is not None:
                    scores = call_reward_fn(
                        reward_fn,
                        rollout.prompts,
                        rollout.responses,
                        rollout.columns,
                        rollout.device,
                    )
                    out = out._replace(scores=scores)
                found[role].append(out.scores)
                if role == "actor":
                    found["kl"].append((out.logprobs - out.ref_logprobs).sum(-1))
    scores, reference, kl = (
        torch.cat([torch.zeros(0, device=models.actor.device), *found[name]])[:counted].double()
        for name in ("actor", "reference", "kl")
    )
    wins = (scores > reference).double() + 0.5 * (scores == reference).double()
    sums = torch.stack([column.sum() for column in (scores, reference, kl, wins)])
    means = processes.sum(sums) / len(prompts)
    names = ("objective/scores", "objective/reference_scores", "objective/kl", "win_rate")
    return to_floats({f"eval/{name}": mean for name, mean in zip(names, means, strict=True)})


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
