"""How much memory each method takes, told before anything is loaded.

The models are built on torch's meta device (``shapes.py``), and the very code of PPO runs on them:
scoring, a forward and backward of each microbatch. A ledger adds up what would be held.

What is added up by formula: weights, adapters, optimizer states (exact), and generation (the KV
cache, one prefill and a step's logits).
"""

from __future__ import annotations

import bisect
import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from hydra_rlhf import experience, update
from hydra_rlhf.config import METHODS, PPOConfig
from hydra_rlhf.decode_state import kv_bytes
from hydra_rlhf.errors import UserError, first_line
from hydra_rlhf.methods import MethodModels
from hydra_rlhf.model import ROLES
from hydra_rlhf.rollout import Rollout
from hydra_rlhf.shapes import LOGIT_COLUMNS, LOGIT_ROWS, META, Ledger, models_on_meta

PHASES = ("rollout", "score", "update")


@dataclass(frozen=True)
class MethodPlan:
    """Bytes of one method at one batch size.

    Attributes:
        method: Its name.
        batch_size: Sequences in a rollout.
        weights: Frozen and trained decoders, every copy that the method holds.
        heads: Reward and value heads.
        adapters: LoRA factors.
        gradients: Of everything trained.
        optimizer: Adam's two moments.
        prefix: Shared activations kept for a rollout.
        kv_cache: Of generation at full length.
        logits: Of one step of generation, and the block that scoring holds.
        activations: What the update phase holds above gradients at its worst moment.
        rollout, score, update: Peak of each phase, everything held included.
    """

    method: str
    batch_size: int
    weights: int
    heads: int
    adapters: int
    gradients: int
    optimizer: int
    prefix: int
    kv_cache: int
    logits: int
    activations: int
    rollout: int
    score: int
    update: int

    @property
    def static(self) -> int:
        """Held from start to end before any optimizer state: weights, heads, adapters."""
        return self.weights + self.heads + self.adapters

    @property
    def peak(self) -> int:
        return max(self.rollout, self.score, self.update)


def plan(
    model_config: transformers.PretrainedConfig,
    config: PPOConfig,
    *,
    method: str | None = None,
    prompt_length: int = 512,
) -> MethodPlan:
    """The memory of one method for a model.

    Args:
        model_config: transformers' configuration of the decoder.
        config: Batch sizes, lengths, rank, dtype, checkpointing and reuse, as for a run.
        method: In place of ``config.method``.
        prompt_length: Width of the padded prompts.

    Raises:
        UserError: the configuration cannot work, or the model has no known blocks.
    """
    config = replace(config, method=method or config.method)
    config.validate()
    try:
        models = models_on_meta(model_config, config)
        return _plan(models, model_config, config, prompt_length)
    except (ValueError, NotImplementedError, RuntimeError) as e:
        # RuntimeError: torch 2.13 has shapes for the grouped products of experts in bfloat16 alone.
        kind = f"{model_config.model_type} in {config.dtype or model_config.dtype or 'float32'}"
        raise UserError(f"cannot plan for {kind}: {first_line(e)}") from e


def _plan(
    models: MethodModels,
    model_config: transformers.PretrainedConfig,
    config: PPOConfig,
    prompt_length: int,
) -> MethodPlan:
    held = _bytes(p for model in models for p in [*model.parameters(), *model.buffers()])
    heads = _bytes(p for m in models for h in (m.reward_head, m.value_head) for p in h.parameters())
    adapters = _bytes(p for m in models for n, p in m.base.named_parameters() if "lora_" in n)
    trained = [*models.actor_parameters(), *models.critic_parameters()]
    gradients = _bytes(trained)
    optimizer = 2 * gradients

    B, T = config.local_batch_size, config.response_length
    chunk = min(B, config.local_rollout_forward_batch_size)
    ledger = Ledger()
    rollout = _rollout(chunk, prompt_length, T)
    with torch.no_grad(), ledger:
        prefixes = experience.shared_prefixes(config, models, rollout)
    prefix_chunk = sum(p.nbytes for p in prefixes.values())
    ledger.restart(prefix_chunk)
    with torch.no_grad(), ledger:
        size = config.local_rollout_forward_batch_size
        keep = experience.kept_roles(config, models)
        experience.score_keeping(size, config, models, rollout, prefixes, ROLES, keep)
    score_peak = ledger.peak - prefix_chunk
    del prefixes
    update_peak = _update_peak(config, models, prompt_length)
    with torch.no_grad():
        prompts = _rollout(B, prompt_length - 1, 1)
        ledger.restart()
        with ledger:
            models.actor.hidden(prompts.query_responses, prompts.attention_mask, role="actor")
        prefill = ledger.peak
    prefix = 0
    if config.share_prefix:
        prefix = prefix_chunk * B // chunk
    device_prefix = 0 if config.prefix_device == "cpu" else prefix
    if config.prefix_device == "auto" and prefix > config.prefix_budget_gb * 1e9:
        device_prefix = 0

    text = model_config.get_text_config()
    itemsize = models.actor.trunk.dtype.itemsize
    kv_row = kv_bytes(text, itemsize)
    kv_cache = B * (prompt_length + T) * kv_row
    # float32 logits of a step are held as read, divided by the temperature, and as probabilities.
    step_logits = 3 * B * text.vocab_size * 4
    if config.rollout_engine == "hydra":
        # Buffers of their full length from the first layer of the prompts' pass on.
        rollout_peak = kv_cache + max(prefill, step_logits)
    else:
        # A cache that grows by concatenation holds one layer's old and new tensors at once.
        growing = kv_cache // (2 * text.num_hidden_layers)
        rollout_peak = max(kv_cache + growing + step_logits, prefill + B * prompt_length * kv_row)
    rows = min(LOGIT_ROWS, chunk * T)
    block = 2 * rows * min(LOGIT_COLUMNS, text.vocab_size) * 4
    static = held + optimizer
    return MethodPlan(
        method=config.method,
        batch_size=B,
        weights=held - heads - adapters,
        heads=heads,
        adapters=adapters,
        gradients=gradients,
        optimizer=optimizer,
        prefix=prefix,
        kv_cache=kv_cache,
        logits=max(step_logits, block),
        activations=max(update_peak - gradients, 0),
        rollout=static + rollout_peak,
        score=static + device_prefix + score_peak,
        update=static + device_prefix + update_peak,
    )


def plan_methods(
    model_config: transformers.PretrainedConfig,
    config: PPOConfig,
    *,
    prompt_length: int = 512,
    methods: tuple[str, ...] = METHODS,
) -> list[MethodPlan]:
    """:func:`plan` of each method, for one configuration otherwise."""
    return [plan(model_config, config, method=m, prompt_length=prompt_length) for m in methods]


def largest_batch(
    model_config: transformers.PretrainedConfig,
    config: PPOConfig,
    budget: int,
    *,
    method: str | None = None,
    prompt_length: int = 512,
) -> int:
    """Most sequences a microbatch and a rollout can have within ``budget`` bytes; 0 for none.

    Every phase grows with the batch by a constant a sequence, so two plans give the line.
    """

    def at(batch: int) -> MethodPlan:
        sized = replace(
            config,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            local_rollout_forward_batch_size=batch,
        )
        return plan(model_config, sized, method=method, prompt_length=prompt_length)

    # Above the sizes at which a kernel's block of logits is still growing.
    low = at(8)
    if low.static + low.optimizer >= budget:
        return 0  # held by any batch
    if low.peak > budget:
        # One plan a question: a 7b takes seconds for each.
        return bisect.bisect_right(range(1, 8), budget, key=lambda batch: at(batch).peak)
    high = at(16)
    best = 10**9
    for phase in PHASES:
        a, b = getattr(low, phase), getattr(high, phase)
        slope = max((b - a) / 8, 1.0)
        best = min(best, 8 + int((budget - a) / slope))
    return best


def _bytes(parameters: Any) -> int:
    """Of distinct tensors: a tied head counts once."""
    distinct = {id(p): p for p in parameters}
    return sum(p.numel() * p.element_size() for p in distinct.values())


def _rollout(B: int, P: int, T: int) -> Rollout:
    with META:
        return Rollout(
            torch.empty(B, P + T, dtype=torch.long),
            torch.empty(B, P + T, dtype=torch.long),
            torch.empty(B, T, dtype=torch.bool),
            torch.empty(B, dtype=torch.bool),
        )


class _NoAccelerator:
    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


def _update_peak(config: PPOConfig, models: MethodModels, prompt_length: int) -> int:
    """Peak of one optimizer step's gradients and activations.

    Two microbatches are enough where there are more: the second runs beside full gradients.
    """
    micro = config.per_device_train_batch_size
    rows = min(2 * micro, config.local_mini_batch_size)
    rollout = _rollout(rows, prompt_length, config.response_length)
    ledger = Ledger()
    with torch.no_grad():
        prefixes = experience.shared_prefixes(config, models, rollout)
    with META:
        per_token = torch.empty(rows, config.response_length)
    scored = experience.Experience(rollout, per_token, per_token, per_token, per_token, prefixes)
    trained = [*models.actor_parameters(), *models.critic_parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    accelerator: Any = _NoAccelerator()
    with ledger:
        for part in torch.arange(rows).split(micro):
            for loss, _ in update.ppo_losses(
                config, models, scored, part, part.to(META), accelerator, critic_only=False
            ):
                loss.backward()
    for parameter in trained:
        parameter.grad = None
    return ledger.peak


# Pictures


def draw(plans: list[MethodPlan], path: str | Path, *, budget: int | None = None) -> None:
    """A bar a method, stacked by what the bytes are for, as a PNG.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as e:
        raise UserError("the chart needs matplotlib: pip install 'hydra-rlhf[plot]'") from e
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    parts = ("weights", "adapters", "optimizer", "gradients", "activations", "prefix", "kv_cache")
    left = [0.0] * len(plans)
    names = [p.method for p in plans]
    for part in parts:
        widths = [getattr(p, part) / 1e9 for p in plans]
        axes.barh(names, widths, left=left, label=part.replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.plot([p.peak / 1e9 for p in plans], names, "k|", markersize=24, label="peak of a phase")
    if budget is not None:
        axes.axvline(budget / 1e9, color="black", linestyle="--", label="the card")
    axes.invert_yaxis()
    axes.set_xlabel("GB (1e9 bytes); phases do not hold all parts at once")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
