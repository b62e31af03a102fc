"""Hydra-SFT: one decoder with a causal head and a reward head, trained on preference pairs.

``L = L_SFT(x, y_w) + gamma * L_RM(x, y_w, y_l)``: Santacroce, Lu, Yu, Li, Shen 2023,
arXiv:2309.00754, section 3.1. One pass over chosen and rejected serves both terms. The
cross-entropy goes through ``hydra_kernels.linear_logprob``, so that logits are never held.

Under gradient accumulation a step is the step of its whole batch: sums over tokens and pairs of a
microbatch are divided by the counts of the batch, not averaged twice.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

import hydra_kernels.peft
from hydra_rlhf import packing
from hydra_rlhf.errors import UserError
from hydra_rlhf.faults import BadUpdates, faults_folder, overflowed
from hydra_rlhf.model import HydraModel
from hydra_rlhf.pair_loss import PAIR_FIGURES, PairLoss, calibration_error
from hydra_rlhf.pairs import (
    EncodedPair,
    PairBatch,
    batches,
    collate,
    encode_alone,
    encode_pairs,
    mix,
)
from hydra_rlhf.processes import Processes, make_accelerator
from hydra_rlhf.records import Tracker
from hydra_rlhf.schedule import advance
from hydra_rlhf.sft_config import LIKELIHOOD_OBJECTIVES, REWARD_OBJECTIVES, TITLES, SFTConfig
from hydra_rlhf.sft_resume import Course

_log = logging.getLogger("hydra_rlhf")


@dataclass
class SFTResult:
    steps: int
    tokens: int  # of all rows that were trained on, padding not counted
    seconds: float
    final: dict[str, float]  # evaluation at the end: on eval_pairs, or empty without
    first_step: int = 1  # or the step after the checkpoint from which the run went on
    stopped_by: signal.Signals | None = None  # what ended the run early, after it was saved
    saved: bool = False  # whether the disk took the last checkpoint, in the first process


class Trainer:
    """The optimizer steps of a run.

    Args:
        config: Settings.
        model: Trained in place: its adapter "actor" where it has one, else all of it; and the
            reward head, where the objective has a reward loss.
        tokenizer: Pads.
        accelerator: Device, precision and processes.
        steps: How many there will be; the schedule depends on it.
        run_dir: Where ``faults/`` goes.
    """

    def __init__(
        self,
        config: SFTConfig,
        model: HydraModel,
        tokenizer: Any,
        accelerator: Accelerator,
        steps: int,
        run_dir: str | Path | None = None,
    ):
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.accelerator = accelerator
        self.role = "actor" if model.adapters else None
        self.processes = Processes(accelerator)
        self.bad = BadUpdates(config.max_bad_updates, faults_folder(run_dir, self.processes))
        torch.manual_seed(config.seed)
        self.module: nn.Module = PairLoss(model, config, self.role)
        _choose_trained(config, model)
        if self.processes.sharding is None:
            model.to(accelerator.device)
        else:
            if accelerator.mixed_precision == "fp16":
                raise UserError("sft cannot scale split gradients for fp16; use bf16 under FSDP")
            self.processes.sharding.shard(model, trained=True)
            whole = (p for p in model.parameters() if not isinstance(p, DTensor))
            self.processes.broadcast(p for p in whole if p.requires_grad)
        if self.processes.sharding is None:
            # Before the optimizer is made, which may move what is trained: to("cpu:0") copies it.
            self.module = accelerator.prepare(self.module)
        optimizer = self.processes.split(_optimizer(config, model))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(config, steps))
        self.optimizer: Any = optimizer
        if self.processes.sharding is None:
            self.optimizer = accelerator.prepare(optimizer)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.module.train()
        if config.gradient_checkpointing:
            _checkpoint(model.causal_lm)

    def step(self, batch: list[EncodedPair]) -> tuple[dict[str, float], int]:
        """One optimizer step on a batch of all processes; its figures, and its tokens.

        Raises:
            TrainingFault: ``config.max_bad_updates`` updates in a row were not finite.
        """
        config, accelerator = self.config, self.accelerator
        share = batch[accelerator.process_index :: accelerator.num_processes]
        # The counts of the batch over all processes are known to each: no reduction is needed.
        num_tokens = max(sum(len(pair.chosen) - (not pair.prompt) for pair in batch), 1)
        num_pairs = max(sum(bool(pair.rejected) for pair in batch), 1)
        world = accelerator.num_processes  # DDP averages gradients; ours are sums already divided
        sharded = self.processes.sharding is not None
        largest = math.ceil(len(batch) / world)
        micro = config.micro_batch_size or largest
        # Split weights are gathered by all in every pass, so that all make as many.
        passes = math.ceil((largest if sharded else max(len(share), 1)) / micro)
        totals: dict[str, Tensor] = {}
        for index in range(passes):
            piece = share[index * micro : (index + 1) * micro]
            collated = _collate(config, self.tokenizer, piece or batch[:1]).to(accelerator.device)
            last = index == passes - 1
            with contextlib.nullcontext() if last or sharded else accelerator.no_sync(self.module):
                sums = self.module(collated)
                sums.pop("difference", None)
                loss = _combine(config, sums, num_tokens, num_pairs)
                if not piece:  # fewer pairs than others have: take part in what is common
                    loss = loss * 0.0
                    sums = {name: value * 0.0 for name, value in sums.items()}
                accelerator.backward(loss * world)
            for name, value in sums.items():
                totals[name] = totals[name] + value.detach() if name in totals else value.detach()
        norm = self._clip()
        if world > 1:
            totals = accelerator.reduce(totals, reduction="sum")
        loss = _combine(config, totals, num_tokens, num_pairs)
        bad = self._is_bad(loss, norm, share or batch[:1])
        if not bad:
            self.optimizer.step()
        elif accelerator.scaler is not None:
            accelerator.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        figures = {"loss": float(loss), "bad_updates": float(bad)}
        if "sft" in totals:
            figures["sft_loss"] = float(totals["sft"]) / num_tokens
        for name, label in PAIR_FIGURES.items():
            if name in totals and any(pair.rejected for pair in batch):
                figures[label] = float(totals[name]) / num_pairs
        if config.max_grad_norm or sharded:
            figures["grad_norm"] = float(norm)
        figures["lr"] = float(self.schedule.get_last_lr()[0])
        advance(self.schedule)
        passed = sum(len(p.prompt) + len(p.chosen) for p in batch)
        if config.objective != "sft":
            passed += sum(len(p.prompt) + len(p.rejected) for p in batch if p.rejected)
        return figures, passed

    def _clip(self) -> Tensor:
        """The gradient's norm before clipping."""
        limit = self.config.max_grad_norm
        if self.processes.sharding is not None:
            return self.processes.reduce_and_clip(self.parameters, limit)
        if limit:
            return self.accelerator.clip_grad_norm_(self.parameters, limit)
        self.accelerator.unscale_gradients(self.optimizer)
        return get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _is_bad(self, loss: Tensor, norm: Tensor, share: list[EncodedPair]) -> bool:
        """Whether the update must be skipped; see ``faults``."""

        def batch() -> dict[str, Tensor]:
            made = _collate(self.config, self.tokenizer, share)
            return {n: t for n, t in made._asdict().items() if isinstance(t, Tensor)}

        step = self.schedule.last_epoch + 1
        figures = {"loss": loss, "grad_norm": norm.to(loss.device)}
        if overflowed(self.accelerator, {"grad_norm": norm}):
            return True
        return self.bad.is_bad(step, figures, batch)


def train(
    config: SFTConfig,
    model: HydraModel,
    tokenizer: Any,
    pairs: Sequence[Any],
    tracker: Tracker,
    *,
    eval_pairs: Sequence[Any] = (),
    demonstrations: Sequence[Any] = (),
    accelerator: Accelerator | None = None,
    stage: str = "sft",
    on_step: Callable[[int], None] | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
) -> SFTResult:
    """Train ``model`` in place on pairs, and on demonstrations besides or instead.

    A model without adapters is trained in full; one with the adapter "actor" trains that and the
    reward head (``merge_adapter`` folds it into the weights afterwards). With a ``run_dir``, where
    ``checkpoints/`` goes, SIGTERM and SIGINT save the run and end it between two steps; ``resume``
    goes on from the newest whole checkpoint there, with the steps of a run that never stopped.

    Raises:
        UserError: no pairs, a prompt that leaves no room for a response, packing that the model
            cannot do, or nothing that can be resumed.
        TrainingFault: ``config.max_bad_updates`` updates in a row were not finite.
    """
    accelerator = accelerator or make_accelerator()
    encoded, held_out = _encode(config, model, tokenizer, pairs, eval_pairs, demonstrations)
    plan = _plan_batches(config, encoded)
    trainer = Trainer(config, model, tokenizer, accelerator, len(plan), run_dir)
    if config.objective != "sft" and accelerator.is_main_process:
        _tell_of_ties(encoded)
    course = Course(config, trainer, encoded, run_dir=run_dir, resume=resume)
    shown: dict[str, float] = {}
    with tracker.progress(TITLES[config.objective], len(plan)) as bar, course.stoppable():
        for step, batch in enumerate(plan[course.step :], start=course.first_step):
            figures, tokens = trainer.step(batch)
            course.tokens += tokens
            figures["tokens_per_s"] = course.tokens / course.seconds
            last = step == len(plan)
            if held_out and (last or (config.eval_every and step % config.eval_every == 0)):
                course.final = evaluate(config, model, tokenizer, held_out, role=trainer.role)
                figures.update({f"eval_{k}": v for k, v in course.final.items()})
            tracker.log(step, figures, stage)
            shown.update(_to_show(config, figures))
            bar.update(step, **shown)
            if on_step is not None:
                on_step(step)
            if course.ends_after(step):
                break
    if held_out and course.first_step > len(plan):  # there was no step left to evaluate after
        course.final = evaluate(config, model, tokenizer, held_out, role=trainer.role)
    trainer.module.eval()
    return result_of(course)


def result_of(course: Course) -> SFTResult:
    return SFTResult(
        course.step,
        course.tokens,
        course.seconds,
        course.final,
        course.first_step,
        course.stopped_by,
        course.saved,
    )


@torch.no_grad()
def evaluate(
    config: SFTConfig,
    model: HydraModel,
    tokenizer: Any,
    pairs: Sequence[EncodedPair],
    *,
    role: str | None = None,
) -> dict[str, float]:
    """Means over held-out pairs.

    Returns:
        ``sft_loss`` in nats a token; ``rm_loss`` or ``rank_loss``; ``accuracy``, the share of pairs
        ranked right, by reward or by likelihood; ``reward_margin``, the mean difference;
        ``calibration``, the expected calibration error of ``sigmoid(|r_w - r_l|)`` as the
        probability that the ranking is right (10 bins; 0 is perfect).
    """
    was_training = model.training
    model.eval()
    module = PairLoss(model, config, role)
    totals: dict[str, float] = {}
    tokens, differences = 0, []
    ordered = sorted(pairs, key=len)
    for i in range(0, len(ordered), config.eval_batch_size):
        group = ordered[i : i + config.eval_batch_size]
        batch = _collate(config, tokenizer, group).to(_device(model))
        sums = module(batch)
        difference = sums.pop("difference", None)
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value.item()
        tokens += int((batch.owners < batch.num_chosen).sum())
        if difference is not None:
            differences.append(difference.cpu())
    model.train(was_training)
    means: dict[str, float] = {}
    if "sft" in totals:
        means["sft_loss"] = totals["sft"] / max(tokens, 1)
    count = sum(bool(pair.rejected) for pair in pairs)
    for name, label in PAIR_FIGURES.items():
        if name in totals and count:
            means[label] = totals[name] / count
    if differences and count:
        means["calibration"] = calibration_error(torch.cat(differences))
    return means


def merge_adapter(model: HydraModel) -> HydraModel:
    """A model without adapters whose weights have the adapter "actor" folded in.

    So saved, it is the SFT policy itself, and PPO's adapter-off pass is that policy.
    """
    hydra_kernels.peft.unfuse(model.base)
    merged = model.base.merge_and_unload(adapter_names=["actor"])  # type: ignore[operator]
    return HydraModel(merged, reward_head=model.reward_head)


def _combine(config: SFTConfig, sums: dict[str, Tensor], num_tokens: int, num_pairs: int) -> Tensor:
    """The objective of a batch from sums over its tokens and pairs."""
    loss = torch.zeros((), device=next(iter(sums.values())).device)
    if config.sft_weight and "sft" in sums:
        loss = loss + config.sft_weight * sums["sft"] / num_tokens
    if "rm" in sums:
        weight = config.gamma if config.objective == "hydra" else 1.0
        loss = loss + weight * (sums["rm"] + config.center_rewards * sums["center"]) / num_pairs
    if "rank" in sums:
        loss = loss + sums["rank"] / num_pairs
    return loss


def check_data(
    config: SFTConfig,
    model: HydraModel,
    tokenizer: Any,
    pairs: Sequence[Any],
    eval_pairs: Sequence[Any] = (),
    demonstrations: Sequence[Any] = (),
) -> None:
    """Raises the UserErrors of ``train`` about the data, before anything is written."""
    _encode(config, model, tokenizer, pairs, eval_pairs, demonstrations)


def _encode(
    config: SFTConfig,
    model: HydraModel,
    tokenizer: Any,
    pairs: Sequence[Any],
    eval_pairs: Sequence[Any],
    demonstrations: Sequence[Any],
) -> tuple[list[EncodedPair], list[EncodedPair]]:
    """What to train on, in one list, and what to evaluate on."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = min(n for n in (config.max_length, context, 2**31) if n is not None)
    if demonstrations and config.objective not in ("sft", "hydra"):
        raise UserError(f"objective {config.objective} has no use for answers without a pair")
    alone = []
    if demonstrations:
        alone = encode_alone(tokenizer, demonstrations, max_length=length)
    encoded = []
    if pairs or not alone:
        encoded = encode_pairs(tokenizer, pairs, max_length=length, what="training pair")
    held_out = []
    if eval_pairs:
        held_out = encode_pairs(tokenizer, eval_pairs, max_length=length, what="held-out pair")
    if config.packing:
        packing.check(model, max(map(len, [*encoded, *alone, *held_out])))
    return mix(encoded, alone, config.mix, seed=config.seed), held_out


def _tell_of_ties(encoded: Sequence[EncodedPair]) -> None:
    """Warns of pairs without a preference: as data that was joined wrongly, or cut short, has."""
    pairs = [pair for pair in encoded if pair.rejected]
    ties = sum(pair.chosen == pair.rejected for pair in pairs)
    if ties:
        _log.warning(
            "%d of %d pairs have the same answer chosen and rejected, as far as it fits the "
            "context: no ranking is learned from them",
            ties,
            len(pairs),
        )


def _plan_batches(config: SFTConfig, pairs: list[EncodedPair]) -> list[list[EncodedPair]]:
    each = math.ceil(len(pairs) / config.batch_size)
    steps = config.max_steps or max(1, round(config.epochs * each))
    plan: list[list[EncodedPair]] = []
    epoch = 0
    while len(plan) < steps:
        plan += batches(
            pairs,
            config.batch_size,
            seed=config.seed * 1_000_003 + epoch,
            group_by_length=config.group_by_length,
        )
        epoch += 1
    return plan[:steps]


def _choose_trained(config: SFTConfig, model: HydraModel) -> None:
    """Sets ``requires_grad``: of the reward head where it has a loss, and of all without LoRA."""
    if not model.adapters:
        for parameter in model.causal_lm.parameters():
            parameter.requires_grad_(True)
    model.reward_head.weight.requires_grad_(config.objective in REWARD_OBJECTIVES)
    # Not trained here, and DDP waits for whatever asks for a gradient.
    model.value_head.requires_grad_(False)


def _optimizer(config: SFTConfig, model: HydraModel) -> torch.optim.Optimizer:
    head = model.reward_head.weight
    body = list(model.causal_lm.parameters())
    if model.adapters:
        body = [p for n, p in model.named_parameters() if "lora_" in n and p.requires_grad]
    groups: list[dict[str, Any]] = []
    for matrix, weight_decay in ((True, config.weight_decay), (False, 0.0)):
        mine = [p for p in body if (p.ndim > 1) == matrix]
        for split in (True, False):  # one call of torch's fused step takes one kind of tensor
            params = [p for p in mine if isinstance(p, DTensor) == split]
            groups.append({"params": params, "weight_decay": weight_decay})
    if config.objective in REWARD_OBJECTIVES:
        rate = config.head_learning_rate or config.learning_rate
        groups.append({"params": [head], "weight_decay": config.weight_decay, "lr": rate})
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )


def _schedule(config: SFTConfig, steps: int) -> Callable[[int], float]:
    warmup = max(1, round(config.warmup_ratio * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.lr_scheduler == "constant":
            return 1.0
        done = (step - warmup) / max(1, steps - warmup)
        if config.lr_scheduler == "linear":
            return 1.0 - done
        return 0.5 * (1.0 + math.cos(math.pi * done))

    return factor


def _collate(config: SFTConfig, tokenizer: Any, pairs: list[EncodedPair]) -> PairBatch:
    pad = tokenizer.pad_token_id
    return collate(
        pairs,
        pad=tokenizer.eos_token_id if pad is None else pad,
        side=tokenizer.padding_side,
        both=config.objective != "sft",
        predict_both=config.objective in LIKELIHOOD_OBJECTIVES,
        packed=config.packing,
    )


def _to_show(config: SFTConfig, figures: dict[str, float]) -> dict[str, float]:
    names = {
        "loss": "loss",
        "sft_loss": "sft",
        "rm_loss": "rm",
        "rank_loss": "rank",
        "accuracy": "accuracy",
        "eval_accuracy": "held_out",
        "tokens_per_s": "tokens/s",
    }
    return {label: figures[name] for name, label in names.items() if name in figures}


def _checkpoint(causal_lm: Any) -> None:
    """transformers' own recomputation: unlike HydraModel's it repeats dropout."""
    enable = getattr(causal_lm, "activation_checkpointing_enable", None)  # its name from v5 on
    (enable or causal_lm.gradient_checkpointing_enable)({"use_reentrant": False})


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
