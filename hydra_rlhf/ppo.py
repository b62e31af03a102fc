"""PPO on one base model, or on four: the loop, from top to bottom.

Read :func:`train`. Its steps are numbered; each is a function below it. What the five methods
differ in (which models are held and which adapters they train) is in ``methods.py``, and one loop
serves them all.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import hydra_kernels
from hydra_rlhf import rollout as rollouts
from hydra_rlhf.checkpoint import CheckpointStore, StopRequest, stop_on_signal
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.engine import RolloutEngine
from hydra_rlhf.errors import UserError
from hydra_rlhf.faults import BadUpdates, Shrinking
from hydra_rlhf.methods import MethodModels, method_from_model
from hydra_rlhf.metrics import diagnose, explained_variance, to_floats, update_metrics
from hydra_rlhf.model import ROLES, HydraModel, Score
from hydra_rlhf.phases import Phases
from hydra_rlhf.processes import Processes
from hydra_rlhf.resume import RunState
from hydra_rlhf.rewards import (
    AdaptiveKLController,
    FixedKLController,
    RewardFn,
    RunningMoments,
    call_reward_fn,
    shape_scores,
)
from hydra_rlhf.rollout import Rollout, Sampling
from hydra_rlhf.schedule import (
    PromptBatches,
    make_optimizer,
    minibatches,
    sampling_seeds,
    seed_everything,
)
from hydra_rlhf.trunk import Prefix

_log = logging.getLogger("hydra_rlhf")


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...


class PromptLike(Protocol):
    """A prompt and the other columns of its row; see ``hydra_rlhf.data``."""

    prompt: str
    extra: dict[str, Any]


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
    """

    models: MethodModels
    metrics: list[dict[str, float]] = field(default_factory=list)
    diagnostics: list[str] = field(default_factory=list)
    seconds: float = 0.0
    first_step: int = 1
    stopped_by: signal.Signals | None = None


@dataclass
class Experience:
    """A scored rollout, ready for updates. All (B, T) float32, 0 where masked."""

    rollout: Rollout
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    prefixes: dict[int, Prefix]

    def tensors(self, rows: Tensor) -> dict[str, Tensor]:
        """What some sequences were trained on, to be written to a file."""
        index = rows.to(self.advantages.device)
        return {
            "query_responses": self.rollout.query_responses[index],
            "response_mask": self.rollout.response_mask[index],
            "old_logprobs": self.old_logprobs[index],
            "old_values": self.old_values[index],
            "advantages": self.advantages[index],
            "returns": self.returns[index],
        }


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
        tracker: Gets each step's metrics.
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
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    processes = Processes(accelerator)
    models = prepare_models(config, model, accelerator.device)
    if reward_fn is None and models.reward is None:
        raise UserError("there is no reward model; give a reward function")
    sampling = rollouts.sampling_of(config, tokenizer)
    check_lengths(config, models)
    num_steps = config.num_steps(len(prompts), processes.count)
    optimizer, scheduler = make_optimizer(config, models, num_steps)
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
        batches=PromptBatches(len(prompts), config.local_batch_size * processes.count, config.seed),
        shuffle=torch.Generator().manual_seed(config.seed + 1),
        processes=processes,
    )
    folder = None if run_dir is None else Path(run_dir)
    faults = "faults" if processes.is_main else f"faults/process-{processes.index}"
    run = Run(
        state,
        accelerator,
        tokenizer,
        prompts,
        list(eval_prompts or [])[: config.num_eval_prompts],
        reward_fn,
        Sampler(config, sampling),
        phases=Phases(accelerator.device),
        microbatch=Shrinking("per_device_train_batch_size", config.per_device_train_batch_size),
        scoring=Shrinking(
            "local_rollout_forward_batch_size", config.local_rollout_forward_batch_size
        ),
        num_steps=num_steps,
        on_samples=on_samples if processes.is_main else None,
        bad=BadUpdates(config.max_bad_updates, None if folder is None else folder / faults),
    )
    result = PPOResult(models)
    started = time.perf_counter()
    store = None
    if folder is not None:
        store = CheckpointStore(folder / "checkpoints", save_total_limit=config.save_total_limit)
        newest = store.latest() if resume else None
        if newest is not None:
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
                state.save(store, step)
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
    # 3. Score: log-probabilities of actor and reference, values, rewards.
    with phases("score"), run.accelerator.autocast(), torch.no_grad():
        prefixes = shared_prefixes(config, models, rollout)
        scored = score(
            config, models, rollout, prefixes, run.scoring, use_head=run.reward_fn is None
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
    # 5. Update: num_ppo_epochs passes over shuffled minibatches.
    with phases("update"):
        metrics |= update(run, step, experience)
    if prefixes:
        metrics |= saved_by_prefixes(run, step, prefixes, metrics["policy/updates_skipped"])
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
    metrics["perf/tokens_per_second"] = metrics["tokens/response"] / sum(
        phases.seconds[name] for name in ("rollout", "score", "advantages", "update")
    )
    return metrics


# 1. Set-up


def prepare_models(
    config: PPOConfig, model: HydraModel | MethodModels, device: torch.device
) -> MethodModels:
    """The method's models on the device, in eval mode: dropout would move the ratio from 1."""
    models = model if isinstance(model, MethodModels) else _from_one(config, model)
    if models.method != config.method:
        raise UserError(f"the models are for {models.method}, the configuration is {config.method}")
    for one in models:
        one.to(device).eval()
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


def context_limit(model: HydraModel) -> int | None:
    """Most tokens the model has positions for; None where its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


# 2. Rollout


class Sampler:
    """How responses are sampled: by an engine for each model, or by transformers' generate."""

    def __init__(self, config: PPOConfig, sampling: Sampling):
        self.sampling = sampling
        self._engines: dict[HydraModel, RolloutEngine] | None = None
        if config.rollout_engine == "hydra":
            self._engines = {}

    def __call__(
        self,
        model: HydraModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        role: str,
        with_logprobs: bool,
        seeds: Sequence[int],
    ) -> Rollout:
        arguments = (model, input_ids, attention_mask, self.sampling)
        if self._engines is None:
            return rollouts.generate(*arguments, role=role, with_logprobs=with_logprobs)
        engine = self._engines.get(model)
        if engine is None:
            engine = self._engines[model] = RolloutEngine(model)
        rollout = engine(*arguments, role=role, with_logprobs=with_logprobs, seeds=seeds)
        if not engine.graph:
            engine.release()  # the update has better use for the memory; a graph keeps its buffers
        return rollout


def sample(
    config: PPOConfig,
    model: HydraModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[str | PromptLike],
    sampler: Sampler,
    seeds: Sequence[int],
    *,
    role: str = "actor",
) -> Rollout:
    """Responses to a batch of prompts, a seed each, with texts and columns."""
    texts = [row if isinstance(row, str) else row.prompt for row in rows]
    limit = context_limit(model)
    most = config.max_prompt_length
    if limit is not None:
        most = min(most or limit, limit - config.response_length)
    input_ids, attention_mask = rollouts.encode_prompts(
        tokenizer,
        texts,
        max_length=most,
        apply_chat_template=config.apply_chat_template,
        device=model.device,
    )
    rollout = sampler(
        model,
        input_ids,
        attention_mask,
        role=role,
        with_logprobs=config.rollout_logprobs != "recompute",
        seeds=seeds,
    )
    rollout.prompts = texts
    rollout.responses = rollouts.decode(tokenizer, rollout)
    extras = [{} if isinstance(row, str) else row.extra for row in rows]
    names = dict.fromkeys(name for extra in extras for name in extra)
    rollout.columns = {name: [extra.get(name) for extra in extras] for name in names}
    return rollout


# 3. Score


def shared_prefixes(config: PPOConfig, models: MethodModels, rollout: Rollout) -> dict[int, Prefix]:
    """Activations below the first adapted block, kept where the budget says; may be empty."""
    if not config.share_prefix:
        return {}
    parts = [
        models.compute_prefixes(
            rollout.query_responses[rows.to(rollout.device)],
            rollout.attention_mask[rows.to(rollout.device)],
        )
        for rows in torch.arange(len(rollout)).split(config.local_rollout_forward_batch_size)
    ]
    prefixes = {i: Prefix.join([part[i] for part in parts]) for i in parts[0]}
    held = sum(prefix.nbytes for prefix in prefixes.values())
    offload = config.prefix_device == "cpu" or (
        config.prefix_device == "auto" and held > config.prefix_budget_gb * 1e9
    )
    if offload and rollout.device.type != "cpu":
        prefixes = {i: prefix.offload() for i, prefix in prefixes.items()}
    return prefixes


def saved_by_prefixes(
    run: Run, step: int, prefixes: dict[int, Prefix], skipped: float
) -> dict[str, float]:
    """What this process did not compute and read again, thanks to the shared prefixes."""
    config = run.state.config
    return run.state.models.prefix_savings(
        prefixes,
        scored_roles(config, run.reward_fn is None),
        updates=config.num_ppo_epochs - skipped / config.num_mini_batches,
        updated=("critic",) if step <= config.critic_warmup_steps else ("actor", "critic"),
        reuse=config.reuse_reference_reward,
    )


def scored_roles(config: PPOConfig, use_head: bool) -> list[str]:
    """The roles that scoring runs: not a function's reward, nor an actor already known."""
    roles = [role for role in ROLES if use_head or role != "reward"]
    if config.rollout_logprobs == "reuse":
        roles.remove("actor")
    return roles


def score(
    config: PPOConfig,
    models: MethodModels,
    rollout: Rollout,
    prefixes: dict[int, Prefix],
    scoring: Shrinking,
    *,
    use_head: bool = True,
) -> Score:
    """Everything a rollout needs, a few sequences at a time. Without gradient."""
    roles = scored_roles(config, use_head)

    def attempt(size: int) -> Score:
        return score_by(size, config, models, rollout, prefixes, roles)

    scored = scoring.run(attempt, clean_up=lambda: None)
    if config.rollout_logprobs == "reuse" and rollout.logprobs is not None:
        scored = scored._replace(logprobs=rollout.logprobs)
    if config.rollout_logprobs == "check":
        check_rollout_logprobs(rollout, scored, config.rollout_logprobs_tolerance)
    return scored


def score_by(
    size: int,
    config: PPOConfig,
    models: MethodModels,
    rollout: Rollout,
    prefixes: dict[int, Prefix],
    roles: Sequence[str],
) -> Score:
    """``models.score`` on ``size`` sequences at a time."""
    parts = []
    for rows in torch.arange(len(rollout)).split(size):
        passes = models.num_passes(roles, reuse=config.reuse_reference_reward)
        fits = passes * len(rows) <= size
        batch = rollout.rows(rows.to(rollout.device))
        parts.append(
            models.score(
                batch.query_responses,
                batch.attention_mask,
                batch.response_mask,
                roles=roles,
                batched=config.batched_score == "yes" or (config.batched_score == "auto" and fits),
                reuse_reference_reward=config.reuse_reference_reward,
                temperature=config.temperature,
                kl=config.kl_estimator == "exact",
                entropy=True,
                prefixes={i: prefix.rows(rows) for i, prefix in prefixes.items()},
            )
        )
    merged = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name, value in parts[0]._asdict().items()
        if value is not None
    }
    return Score(**merged)


def check_rollout_logprobs(rollout: Rollout, scored: Score, tolerance: float) -> None:
    """Raises RuntimeError when generation and scoring disagree on a token."""
    assert rollout.logprobs is not None and scored.logprobs is not None
    worst = float((rollout.logprobs - scored.logprobs).abs().max())
    if not worst <= tolerance:
        raise RuntimeError(
            f"rollout and forward log-probabilities differ by {worst:.3g} nats, more than "
            f"{tolerance:.3g}: the sampler filters tokens, runs in another precision, or its KV "
            "cache sees other positions than the scoring pass"
        )


def some_samples(rollout: Rollout, scored: Score, count: int) -> list[dict[str, Any]]:
    """The first few responses of a rollout, whose order is random, with what they scored."""
    kl = torch.where(rollout.response_mask, scored.logprobs - scored.ref_logprobs, 0.0).sum(-1)
    rows = zip(
        rollout.prompts[:count],
        rollout.responses,
        scored.scores[:count].tolist(),
        kl[:count].tolist(),
        rollout.ended[:count].tolist(),
        strict=False,
    )
    names = ("prompt", "response", "score", "kl", "ended")
    return [dict(zip(names, row, strict=True)) for row in rows]


# 4. Rewards and advantages


def make_experience(
    config: PPOConfig,
    rollout: Rollout,
    scored: Score,
    scores: Tensor,  # (B,) after shaping
    kl_coef: float,
    prefixes: dict[int, Prefix],
    processes: Processes,
) -> tuple[Experience, dict[str, float]]:
    """KL rewards, GAE and whitening, the last over all processes; with the rollout's metrics."""
    mask = rollout.response_mask
    rewards = hydra_kernels.kl_rewards(
        scores,
        scored.logprobs,
        scored.ref_logprobs,
        mask,
        kl_coef=kl_coef,
        estimator=config.kl_estimator,
        kl=scored.kl,
    )
    if config.whiten_rewards:
        rewards = hydra_kernels.masked_whiten(rewards, mask, shift_mean=False, reduce=processes.sum)
    advantages, returns = hydra_kernels.gae(
        rewards, scored.values, mask, gamma=config.gamma, lam=config.lam
    )
    if config.whiten_advantages:
        advantages = hydra_kernels.masked_whiten(advantages, mask, reduce=processes.sum)
    kl = scored.kl if scored.kl is not None else scored.logprobs - scored.ref_logprobs  # (B, T)
    sequence_kl = torch.where(mask, kl, 0.0).sum(-1)
    lengths = mask.sum(-1).float()
    # The sampled estimate of it, where the actor was not run again.
    entropy = -scored.logprobs if config.rollout_logprobs == "reuse" else scored.entropy
    metrics = {
        "objective/kl": sequence_kl.mean(),
        "objective/entropy": torch.where(mask, entropy, 0.0).sum(-1).mean(),
        "objective/non_score_reward": -kl_coef * sequence_kl.mean(),
        "objective/rlhf_reward": (scores - kl_coef * sequence_kl).mean(),
        "objective/scores": scored.scores.mean(),
        "objective/scores_std": processes.gather(scored.scores).std(correction=0),
        "objective/response_length": lengths.mean(),
        "val/num_eos_tokens": rollout.ended.sum(),
        "val/explained_variance": explained_variance(scored.values, returns, mask, processes.sum),
        "tokens/response": lengths.sum(),
    }
    if rollout.logprobs is not None and config.rollout_logprobs != "reuse":
        metrics["val/rollout_logprob_diff"] = (rollout.logprobs - scored.logprobs).abs().max()
    experience = Experience(rollout, scored.logprobs, scored.values, advantages, returns, prefixes)
    kinds = {
        "val/num_eos_tokens": "sum",
        "tokens/response": "sum",
        "val/rollout_logprob_diff": "max",
    }
    return experience, to_floats(processes.combine(metrics, kinds))


# 5. Update


def update(run: Run, step: int, experience: Experience) -> dict[str, float]:
    """All epochs over one rollout; returns the means of the updates' metrics."""
    config, optimizer, scheduler = run.state.config, run.state.optimizer, run.state.scheduler
    processes, mask = run.state.processes, experience.rollout.response_mask
    critic_only = step <= config.critic_warmup_steps
    history: list[dict[str, Tensor]] = []
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
                scheduler.step()  # the schedule is a function of the rollout, not of early stops
                continue

            def attempt(
                size: int, minibatch: Tensor = minibatch, total: Tensor = total
            ) -> dict[str, Tensor]:
                return update_minibatch(run, experience, minibatch, total, size, critic_only)

            # The one place where processes may part: what has run out of memory tries again.
            found = run.microbatch.run(attempt, clean_up=optimizer.zero_grad)
            found = processes.combine(found, UPDATE_KINDS)
            processes.sum_gradients(trained_parameters(optimizer))
            norms = clip_gradients(config, optimizer, run.accelerator)
            losses = {n: found[n] for n in ("policy_loss", "value_loss") if n in found}
            if run.bad.is_bad(step, losses | norms, experience.tensors(minibatch)):
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
            scheduler.step()
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
    critic_only: bool,
) -> dict[str, Tensor]:
    """Gradients of one optimizer step, a microbatch at a time; token-weighted means of its metrics.

    A microbatch's loss is a mean over its own tokens, so it weighs in by their share: the sum is
    the gradient of the whole minibatch, however it is cut, and over however many processes.
    """
    mask = experience.rollout.response_mask
    means: dict[str, Tensor] = {}
    config, models, accelerator = run.state.config, run.state.models, run.accelerator
    for rows in minibatch.split(size):
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
    actor's activations are gone, and each loss reaches only its own set.
    """
    batch = experience.rollout.rows(index)
    prefixes = {i: prefix.rows(rows) for i, prefix in experience.prefixes.items()}

    def forward(*roles: str, **kwargs) -> Score:
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
        new = forward("actor", "critic")
        out = loss_of(new)
        yield out.loss, policy_figures(out, new) | value_figures(out)
        return
    if not critic_only:
        new = forward("actor")
        out = loss_of(new)
        yield out.loss, policy_figures(out, new)
        del new, out
    # A joint adapter is the policy: while only the critic learns, only its head does.
    out = loss_of(forward("critic", detach_hidden=models.joint and critic_only))
    yield out.loss, value_figures(out)


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


# 6. Report


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
        torch.cat([torch.zeros(0, device=models.actor.device), *found[name]]).double()
        for name in ("actor", "reference", "kl")
    )
    wins = (scores > reference).double() + 0.5 * (scores == reference).double()
    sums = torch.stack([column.sum() for column in (scores, reference, kl, wins)])
    means = processes.sum(sums) / len(prompts)
    names = ("objective/scores", "objective/reference_scores", "objective/kl", "win_rate")
    return to_floats({f"eval/{name}": mean for name, mean in zip(names, means, strict=True)})


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
