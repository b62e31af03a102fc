"""Steps 2 to 4 of PPO: sample responses, score them, and turn scores into advantages.

Functions of ``ppo.py``'s loop. B sequences, T response columns.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import hydra_kernels
from hydra_rlhf import rollout as rollouts
from hydra_rlhf.config import PPOConfig
from hydra_rlhf.engines import Engines
from hydra_rlhf.errors import UserError
from hydra_rlhf.faults import Shrinking
from hydra_rlhf.methods import MethodModels
from hydra_rlhf.metrics import explained_variance, to_floats
from hydra_rlhf.model import ROLES, HydraModel, Score
from hydra_rlhf.processes import Processes
from hydra_rlhf.rollout import Rollout, Sampling
from hydra_rlhf.trunk import Prefix
from hydra_rlhf.vllm_rollout import importance_weights


class PromptLike(Protocol):
    """A prompt and the other columns of its row; see ``hydra_rlhf.data``."""

    prompt: str
    extra: dict[str, Any]


@dataclass
class Experience:
    """A scored rollout, ready for updates. All (B, T) float32, 0 where masked.

    ``kept`` is a scoring pass with its graph, which stands for the first epoch's forward pass.
    """

    rollout: Rollout
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    prefixes: dict[int, Prefix]
    kept: Score | None = None

    def take_kept(self, index: Tensor) -> Score | None:
        """The kept pass, in the order of ``index``, and nothing from then on.

        None also where ``index`` is not the whole rollout: then the pass is let go.
        """
        kept, self.kept = self.kept, None
        if kept is None or len(index) != len(self.rollout):
            return None
        return Score(**{n: v[index] for n, v in kept._asdict().items() if v is not None})

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


# 2. Rollout


class Sampler:
    """How responses are sampled: by the run's engines, on a whole model."""

    def __init__(self, config: PPOConfig, sampling: Sampling, processes: Processes):
        self.sampling = sampling
        self.processes = processes
        self.engines = Engines(config, sampling, processes)
        self.keep_prefix = config.share_prefix and config.prefix_source == "rollout"
        self.kv_cache = 0  # bytes of keys and values behind the last rollout

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
        engine = self.engines.of(model)
        common = self.engines.common
        with contextlib.nullcontext() if common else self.processes.gathered(model):
            rollout = engine(
                model,
                input_ids,
                attention_mask,
                self.sampling,
                role=role,
                with_logprobs=with_logprobs,
                seeds=seeds,
                keep_prefix=self.keep_prefix,
            )
        self.kv_cache = engine.nbytes
        engine.release()  # the update has better use for the memory
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
        with_logprobs=config.rollout_logprobs != "recompute" or _compares_freely(config, model),
        seeds=seeds,
    )
    rollout.prompts = texts
    rollout.responses = rollouts.decode(tokenizer, rollout)
    extras = [{} if isinstance(row, str) else row.extra for row in rows]
    names = dict.fromkeys(name for extra in extras for name in extra)
    rollout.columns = {name: [extra.get(name) for extra in extras] for name in names}
    return rollout


def _compares_freely(config: PPOConfig, model: HydraModel) -> bool:
    """Whether the sampler's log-probabilities cost nothing, and have to be those of scoring.

    In lower precision the two differ by tenths of a nat for no fault of anybody.
    """
    exact = model.trunk.dtype == torch.float32 and config.mixed_precision == "no"
    return exact and config.rollout_engine == "hydra" and not config.off_policy_reasons()


def context_limit(model: HydraModel) -> int | None:
    """Most tokens the model has positions for; None where its configuration sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


# 3. Score


def shared_prefixes(config: PPOConfig, models: MethodModels, rollout: Rollout) -> dict[int, Prefix]:
    """Activations below the first adapted block, kept where the budget says; may be empty."""
    if not config.share_prefix:
        return {}
    # The actor's model is the first; its activations came with the rollout where they were kept.
    known = {} if rollout.prefix is None else {0: rollout.prefix}
    parts = [
        models.compute_prefixes(
            rollout.query_responses[rows.to(rollout.device)],
            rollout.attention_mask[rows.to(rollout.device)],
            known=known,
        )
        for rows in torch.arange(len(rollout)).split(config.local_rollout_forward_batch_size)
    ]
    prefixes = known | {i: Prefix.join([part[i] for part in parts]) for i in parts[0]}
    held = sum(prefix.nbytes for prefix in prefixes.values())
    offload = config.prefix_device == "cpu" or (
        config.prefix_device == "auto" and held > config.prefix_budget_gb * 1e9
    )
    if offload and rollout.device.type != "cpu":
        prefixes = {i: prefix.offload() for i, prefix in prefixes.items()}
    return prefixes


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
    processes: Processes,
    *,
    use_head: bool = True,
    keep: Sequence[str] = (),
) -> tuple[Score, Score | None]:
    """Everything a rollout needs, a few sequences at a time. Without gradient.

    The second is the pass of the roles to ``keep``, with its graph, where it was made in one.
    """
    roles = scored_roles(config, use_head)

    def attempt(size: int, most: int | None = None) -> tuple[Score, Score | None]:
        return score_keeping(size, config, models, rollout, prefixes, roles, keep, most=most)

    scored, kept = scoring.run(
        attempt,
        clean_up=lambda: None,
        processes=processes,
        rest=functools.partial(attempt, most=1),
    )
    if config.rollout_logprobs == "reuse" and rollout.logprobs is not None:
        scored = scored._replace(logprobs=rollout.logprobs)
    if config.rollout_logprobs == "check":
        check_rollout_logprobs(rollout, scored, config.rollout_logprobs_tolerance)
    return scored, kept


def kept_roles(config: PPOConfig, models: MethodModels, critic_only: bool = False) -> list[str]:
    """Roles whose scoring pass can stand for the first epoch's forward pass.

    Never two passes: the graph of one is what the update holds at a time anyway.
    """
    one = config.num_mini_batches == config.gradient_accumulation_steps == 1
    if not (config.keep_scoring_pass and one):
        return []
    if not models.joint:
        return ["critic"]
    exact = config.kl_estimator == "exact"  # needs actor and reference in one call
    return [] if critic_only or exact or config.detach_values else ["actor", "critic"]


def score_keeping(
    size: int,
    config: PPOConfig,
    models: MethodModels,
    rollout: Rollout,
    prefixes: dict[int, Prefix],
    roles: Sequence[str],
    keep: Sequence[str],
    *,
    most: int | None = None,
) -> tuple[Score, Score | None]:
    """:func:`score_by`, the roles to ``keep`` last and with gradients if all fit in one pass."""
    if not keep or size < len(rollout):
        return score_by(size, config, models, rollout, prefixes, roles, most=most), None
    rest = [role for role in roles if role not in keep]
    scored = score_by(size, config, models, rollout, prefixes, rest, most=most)
    with torch.enable_grad():
        kept = score_by(size, config, models, rollout, prefixes, keep, most=most)
    found = {n: v.detach() for n, v in kept._asdict().items() if v is not None}
    return scored._replace(**found), kept


def score_by(
    size: int,
    config: PPOConfig,
    models: MethodModels,
    rollout: Rollout,
    prefixes: dict[int, Prefix],
    roles: Sequence[str],
    *,
    most: int | None = None,
) -> Score:
    """``models.score`` on ``size`` sequences at a time, of which no more than ``most`` are run."""
    parts = []
    for rows in torch.arange(len(rollout)).split(size):
        batched = config.batched_score == "yes"
        if config.batched_score == "auto":
            needed = models.batched_bytes(
                roles,
                len(rows),
                rollout.query_responses.shape[1],
                reuse=config.reuse_reference_reward,
            )
            batched = needed <= config.batched_score_budget_gb * 1e9
        rows = rows[:most]
        batch = rollout.rows(rows.to(rollout.device))
        parts.append(
            models.score(
                batch.query_responses,
                batch.attention_mask,
                batch.response_mask,
                roles=roles,
                batched=batched,
                reuse_reference_reward=config.reuse_reference_reward,
                temperature=config.temperature,
                kl=config.kl_estimator == "exact" and "reference" in roles,
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
    given = rewards.double().sum(-1)  # (B,) score and penalty, by the estimator that trains
    if config.whiten_rewards:
        rewards = hydra_kernels.masked_whiten(rewards, mask, shift_mean=False, reduce=processes.sum)
    advantages, returns = hydra_kernels.gae(
        rewards, scored.values, mask, gamma=config.gamma, lam=config.lam
    )
    if config.whiten_advantages:
        advantages = hydra_kernels.masked_whiten(advantages, mask, reduce=processes.sum)
    if rollout.foreign:
        if rollout.logprobs is None or config.rollout_logprobs != "recompute":
            raise UserError(
                f"rollout_engine {config.rollout_engine!r} samples by other kernels: it has to "
                "give log-probabilities, and needs rollout_logprobs 'recompute'"
            )
        # A factor above 0 of an advantage is the same factor of the token's policy loss.
        weights = importance_weights(scored.logprobs, rollout.logprobs, mask, config.importance_cap)
        advantages = advantages * weights
    kl = scored.kl if scored.kl is not None else scored.logprobs - scored.ref_logprobs  # (B, T)
    sequence_kl = torch.where(mask, kl, 0.0).sum(-1)
    lengths = mask.sum(-1).float()
    # The sampled estimate of it, where the actor was not run again.
    entropy = -scored.logprobs if config.rollout_logprobs == "reuse" else scored.entropy
    metrics = {
        "objective/kl": sequence_kl.mean(),
        "objective/entropy": torch.where(mask, entropy, 0.0).sum(-1).mean(),
        "objective/non_score_reward": (given - scores).mean(),
        "objective/rlhf_reward": given.mean(),
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
