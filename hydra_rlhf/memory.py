"""How much memory each method takes, told before anything is loaded.

The models are built on torch's meta device (``shapes.py``), and the very code of PPO runs on them:
scoring, a forward and backward of each microbatch. A ledger adds up what would be held.

What is added up by formula: weights, adapters, optimizer states (exact), and generation (the KV
cache, one prefill and a step's logits).
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from hydra_kernels.ops.logprob_memory import linear_logprob_memory
from hydra_rlhf import experience, update
from hydra_rlhf.config import METHODS, PPOConfig
from hydra_rlhf.decode_state import kv_bytes
from hydra_rlhf.errors import UserError, first_line
from hydra_rlhf.ledger import Ledger, NotAlike
from hydra_rlhf.methods import MethodModels
from hydra_rlhf.rollout import Rollout
from hydra_rlhf.shapes import META, models_on_meta

PHASES = ("rollout", "score", "update")
DEVICES = ("cuda", "cpu")
CARD = 80e9
BUCKET = 256  # of the engine on a GPU


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
        kept: Of prefix and kv_cache what stays on the device while it scores and updates.
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
    kept: int
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

    @property
    def peak_phase(self) -> str:
        return max(PHASES, key=lambda phase: getattr(self, phase))

    def at_peak(self) -> dict[str, int]:
        """What the bytes of the highest peak are for; they add up to it."""
        parts = {
            "weights": self.weights + self.heads,
            "adapters": self.adapters,
            "optimizer": self.optimizer,
            "gradients": self.gradients if self.peak_phase == "update" else 0,
            "keys and values, prefix": self.kept,
        }
        if self.peak_phase == "rollout":
            parts["keys and values, prefix"] = self.kv_cache
        return parts | {"activations, logits": self.peak - sum(parts.values())}


class Planner:
    """Plans of one model, whatever the method and the batch. Nothing is walked through twice.

    Args:
        model_config: transformers' configuration of the decoder.
        config: Batch sizes, lengths, rank, dtype, checkpointing and reuse, as for a run.
        prompt_length: Width of the padded prompts.
        reward_config: Of a separate reward model or of a sequence classifier.
        device: "cuda" or "cpu": their kernels, and what is kept when, differ.
        card: Bytes of the device, of which sampling may keep a share between rollouts.
    """

    def __init__(
        self,
        model_config: transformers.PretrainedConfig,
        config: PPOConfig,
        *,
        prompt_length: int = 512,
        reward_config: transformers.PretrainedConfig | None = None,
        device: str = "cuda",
        card: float = CARD,
    ):
        if device not in DEVICES:
            raise UserError(f"device must be one of {', '.join(DEVICES)}; got {device!r}")
        self.model_config, self.config = model_config, config
        self.prompt_length, self.device, self.card = prompt_length, device, card
        self._reward, self._classifier = reward_config, 0
        if any("SequenceClassification" in name for name in _architectures(reward_config)):
            # It scores as a function does; what it holds while it runs is not counted.
            self._reward, self._classifier = None, _bytes_of_classifier(reward_config)
            self.config = replace(config, reward_fn=config.reward_fn or "classifier:score")
        self._ledger = Ledger()
        self._twins = True
        self._models: dict[str, MethodModels] = {}
        self._plans: dict[tuple, MethodPlan] = {}

    def plan(self, method: str | None = None, **changes: Any) -> MethodPlan:
        """The memory of one method.

        Args:
            method: In place of the configuration's.
            changes: To the configuration's batch sizes.

        Raises:
            UserError: the configuration cannot work, or the model has no known blocks.
        """
        config = replace(self.config, method=method or self.config.method, **changes)
        config.validate()
        key = (
            config.method,
            config.per_device_train_batch_size,
            config.gradient_accumulation_steps,
            config.num_mini_batches,
            min(config.local_rollout_forward_batch_size, config.local_batch_size),
        )
        if key not in self._plans:
            try:
                self._plans[key] = self._plan(config)
            except (ValueError, NotImplementedError, RuntimeError) as e:
                # RuntimeError: torch 2.13 has shapes for the grouped products of experts in
                # bfloat16 alone.
                dtype = config.dtype or self.model_config.dtype or "float32"
                kind = f"{self.model_config.model_type} in {dtype}"
                raise UserError(f"cannot plan for {kind}: {first_line(e)}") from e
        return self._plans[key]

    def largest_batch(self, budget: int, method: str | None = None) -> int:
        """Most sequences a microbatch and a rollout can have within ``budget`` bytes; 0 for none.

        It fits, and one more does not. Most of what is held grows by a constant a sequence, so a
        line through two plans says where to look.
        """

        def at(batch: int) -> MethodPlan:
            return self.plan(
                method,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=1,
                num_mini_batches=1,
                local_rollout_forward_batch_size=batch,
            )

        first = at(8)
        if first.static + first.optimizer >= budget:
            return 0  # held by any batch
        if first.peak > budget:
            # Without a line: blocks of logits still grow at these sizes.
            return bisect.bisect_right(range(1, 8), budget, key=lambda batch: at(batch).peak)
        low, high, other = first, None, at(16)
        for attempt in itertools.count():
            if other.peak <= budget:
                low = other
            elif high is None or other.batch_size < high.batch_size:
                high = other
            if high is not None and high.batch_size == low.batch_size + 1:
                break
            guess = _on_line(first, other, budget)
            if high is not None and attempt > 4:
                guess = (low.batch_size + high.batch_size) // 2  # it is no line
            most = 10**9 if high is None else high.batch_size - 1
            other = at(min(max(guess, low.batch_size + 1), most))
        return low.batch_size

    def _plan(self, config: PPOConfig) -> MethodPlan:
        try:
            return self._walked(config)
        except NotAlike:
            self._twins = False
            self._models.clear()
            return self._walked(config)

    def _models_of(self, config: PPOConfig) -> MethodModels:
        models = self._models.get(config.method)
        if models is None:
            models = models_on_meta(
                self.model_config,
                config,
                self._ledger,
                reward_config=self._reward,
                device=self.device,
                twins=self._twins,
            )
            for parameter in [*models.actor_parameters(), *models.critic_parameters()]:
                parameter.requires_grad_(True)
            self._models[config.method] = models
        return models

    def _walked(self, config: PPOConfig) -> MethodPlan:
        models = self._models_of(config)
        held = _bytes(p for model in models for p in [*model.parameters(), *model.buffers()])
        held += self._classifier
        heads = _bytes(
            p for m in models for h in (m.reward_head, m.value_head) for p in h.parameters()
        )
        adapters = _bytes(p for m in models for n, p in m.base.named_parameters() if "lora_" in n)
        gradients = _bytes([*models.actor_parameters(), *models.critic_parameters()])
        optimizer = 2 * gradients
        static = held + optimizer
        score, prefix, device_prefix = self._score(config, models)
        update = self._update(config, models)
        rollout, kv_cache, logits = self._rollout(config, models)
        # Graphs on a GPU keep their buffers from one rollout to the next, where those are small.
        recorded = self.device == "cuda" and config.rollout_engine == "hydra"
        kept = kv_cache if recorded and kv_cache <= self.card // 20 else 0
        return MethodPlan(
            method=config.method,
            batch_size=config.local_batch_size,
            weights=held - heads - adapters,
            heads=heads,
            adapters=adapters,
            gradients=gradients,
            optimizer=optimizer,
            prefix=prefix,
            kv_cache=kv_cache,
            logits=logits,
            activations=max(update - gradients, 0),
            kept=kept + device_prefix,
            rollout=static + rollout,
            score=static + kept + device_prefix + score,
            update=static + kept + device_prefix + update,
        )

    def _rollout(self, config: PPOConfig, models: MethodModels) -> tuple[int, int, int]:
        """The peak of sampling, keys and values at full length, and the largest logits of a run."""
        B, P, T = config.local_batch_size, self.prompt_length, config.response_length
        slots = P + T
        if self.device == "cuda" and config.rollout_engine == "hydra":
            P = -(-P // BUCKET) * BUCKET  # so that batches of all widths share graphs
            slots = -(-(P + T) // 8) * 8
        ledger = self._ledger
        prompts = _rollout(B, P - 1, 1)
        ledger.restart()
        with torch.no_grad(), ledger:
            models.actor.hidden(prompts.query_responses, prompts.attention_mask, role="actor")
        prefill = ledger.peak
        text = self.model_config.get_text_config()
        dtype = models.actor.trunk.dtype
        kv_row = kv_bytes(text, dtype.itemsize)
        kv_cache = B * slots * kv_row
        # float32 logits of a step: as read, divided by the temperature, and as probabilities.
        step_logits = 3 * B * text.vocab_size * 4
        if config.rollout_engine == "hydra":
            # Buffers of their full length from the first layer of the prompts' pass on.
            peak = kv_cache + max(prefill, step_logits)
        else:
            # A cache that grows by concatenation holds one layer's old and new tensors at once.
            growing = kv_cache // (2 * text.num_hidden_layers)
            peak = max(kv_cache + growing + step_logits, prefill + B * P * kv_row)
        rows = min(B, config.local_rollout_forward_batch_size) * T
        width = models.actor.lm_head.weight.shape[1]
        block = linear_logprob_memory(
            rows, width, text.vocab_size, dtype, device=self.device, reference=True
        )
        return peak, kv_cache, max(step_logits, sum(block[:2]))

    def _score(self, config: PPOConfig, models: MethodModels) -> tuple[int, int, int]:
        """The peak of scoring, shared activations of a rollout, and those of them on the device."""
        B, T = config.local_batch_size, config.response_length
        size = config.local_rollout_forward_batch_size
        chunk = min(B, size)
        rollout = _rollout(chunk, self.prompt_length, T)
        ledger = self._ledger
        ledger.restart()
        with torch.no_grad(), ledger:
            prefixes = experience.shared_prefixes(config, models, rollout)
        held = sum(p.nbytes for p in prefixes.values())
        computing = ledger.peak - held
        ledger.restart()
        with torch.no_grad(), ledger:
            keep = experience.kept_roles(config, models)
            roles = experience.scored_roles(config, config.reward_fn is None)
            experience.score_keeping(size, config, models, rollout, prefixes, roles, keep)
        prefix = held * B // chunk
        too_large = prefix > config.prefix_budget_gb * 1e9
        on_host = config.prefix_device == "cpu" or (config.prefix_device == "auto" and too_large)
        on_device = 0 if on_host and self.device != "cpu" else prefix
        return max(ledger.peak, computing), prefix, on_device

    def _update(self, config: PPOConfig, models: MethodModels) -> int:
        """The peak of one optimizer step's gradients and activations.

        Two microbatches are enough where there are more: the second runs beside full gradients.
        """
        micro = config.per_device_train_batch_size
        rows = min(2 * micro, config.local_mini_batch_size)
        rollout = _rollout(rows, self.prompt_length, config.response_length)
        with torch.no_grad():
            prefixes = experience.shared_prefixes(config, models, rollout)
        with META:
            per_token = torch.empty(rows, config.response_length)
        scored = experience.Experience(
            rollout, per_token, per_token, per_token, per_token, prefixes
        )
        trained = [*models.actor_parameters(), *models.critic_parameters()]
        accelerator: Any = _NoAccelerator()
        ledger = self._ledger
        ledger.restart()
        with ledger:
            if self.device == "cpu" and models.actor.adapters:
                # As update.room_for_gradients does.
                for parameter in trained:
                    if parameter.dtype == torch.float32:
                        parameter.grad = torch.empty_like(parameter)
            for part in torch.arange(rows).split(micro):
                for loss, _ in update.ppo_losses(
                    config, models, scored, part, part.to(META), accelerator, critic_only=False
                ):
                    loss.backward()
        for parameter in trained:
            parameter.grad = None
        return ledger.peak


def plan(
    model_config: transformers.PretrainedConfig,
    config: PPOConfig,
    *,
    method: str | None = None,
    **settings: Any,
) -> MethodPlan:
    """The memory of one method for a model; see :class:`Planner`, which ``settings`` go to."""
    return Planner(model_config, config, **settings).plan(method)


def plan_methods(
    model_config: transformers.PretrainedConfig,
    config: PPOConfig,
    *,
    methods: tuple[str, ...] = METHODS,
    **settings: Any,
) -> list[MethodPlan]:
    """:func:`plan` of each method, for one configuration otherwise."""
    planner = Planner(model_config, config, **settings)
    return [planner.plan(method) for method in methods]


def largest_batch(
    model_config: transformers.PretrainedConfig,
    config: PPOConfig,
    budget: int,
    *,
    method: str | None = None,
    **settings: Any,
) -> int:
    """:meth:`Planner.largest_batch` of one method."""
    return Planner(model_config, config, **settings).largest_batch(budget, method)


def _architectures(config: transformers.PretrainedConfig | None) -> list[str]:
    return [] if config is None else config.architectures or []


def _bytes_of_classifier(config: Any) -> int:
    with META:
        classifier = transformers.AutoModelForSequenceClassification.from_config(
            config, dtype=config.dtype or torch.float32
        )
    return _bytes([*classifier.parameters(), *classifier.buffers()])


def _on_line(a: MethodPlan, b: MethodPlan, budget: int) -> int:
    """The batch size at which a phase reaches ``budget`` if each grows as from ``a`` to ``b``."""
    reach = []
    for phase in PHASES:
        start, end = getattr(a, phase), getattr(b, phase)
        slope = max((end - start) / (b.batch_size - a.batch_size), 1.0)
        reach.append(a.batch_size + int((budget - start) / slope))
    return min(reach)


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


# Pictures

# Okabe and Ito's, which are told apart by those who do not see red and green.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


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
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    names = [p.method for p in plans]
    left = [0.0] * len(plans)
    for part, color in zip(plans[0].at_peak(), _COLORS, strict=True):
        widths = [p.at_peak()[part] / 1e9 for p in plans]
        if any(widths):
            bars = {"label": part, "color": color, "edgecolor": "white", "linewidth": 0.5}
            axes.barh(names, widths, left=left, **bars)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for p in plans:
        axes.annotate(
            f"{p.peak / 1e9:.1f}, {p.peak_phase}",
            (p.peak / 1e9, p.method),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    if budget is not None:
        axes.axvline(budget / 1e9, color="black", ls="--", label=f"to use: {budget / 1e9:.1f} GB")
    axes.margins(x=0.18)
    axes.invert_yaxis()
    axes.set_title(f"memory at its peak, batch of {plans[0].batch_size}", fontsize="medium")
    axes.set_xlabel("GB (1e9 bytes); at each bar its sum, and the phase in which it is reached")
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
