"""RAFT: sample several answers a prompt, keep the best by reward, imitate it, again.

Dong, Xiong, Goyal et al. 2023, arXiv:2304.06767, algorithm 1. One model is policy (adapter
"actor"), and reward model (adapter off, reward head), as in PPO; the update is the cross-entropy of
``sft``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hydra_rlhf import packing, sft
from hydra_rlhf import rollout as rollouts
from hydra_rlhf.errors import UserError
from hydra_rlhf.model import HydraModel
from hydra_rlhf.pairs import EncodedPair, encode_prompts
from hydra_rlhf.records import Tracker
from hydra_rlhf.rollout import Rollout, Sampling
from hydra_rlhf.schedule import PromptBatches, sampling_seeds
from hydra_rlhf.sft_config import TITLES, SFTConfig
from hydra_rlhf.sft_resume import Course


def train(
    config: SFTConfig,
    model: HydraModel,
    tokenizer: Any,
    prompts: Sequence[str],
    tracker: Tracker,
    *,
    accelerator: Accelerator | None = None,
    stage: str = "sft",
    run_dir: str | Path | None = None,
    resume: bool = False,
) -> sft.SFTResult:
    """Train the adapter "actor" in place.

    Args:
        config: ``batch_size`` prompts a step, over ``max_steps`` or ``epochs`` of the prompts;
            ``num_samples`` (K of the paper), ``response_length`` and ``temperature`` of sampling.
        model: With the adapter "actor" and a trained reward head.
        tokenizer: Of the model.
        prompts: What to answer.
        tracker: For records and progress.
        accelerator: As in ``sft.train``.
        stage: The name in the records.
        run_dir, resume: As in ``sft.train``.

    Raises:
        UserError: no prompts, no adapter or no reward head; a prompt that leaves no room; nothing
            that can be resumed.
    """
    if "actor" not in model.adapters:
        raise UserError("raft needs lora_r: the reward model is the adapter off")
    if not bool(model.reward_head.weight.any()):
        raise UserError("raft needs a trained reward head beside the model")
    if not prompts:
        raise UserError("there are no prompts to train on")
    num_samples = config.num_samples
    accelerator = accelerator or sft.make_accelerator()
    steps = config.max_steps or max(1, round(config.epochs * len(prompts) / config.batch_size))
    config_of_step = replace(config, objective="sft")
    trainer = sft.Trainer(config_of_step, model, tokenizer, accelerator, steps, run_dir)
    encoded = encode_prompts(tokenizer, prompts)
    if config.packing:
        packing.check(model, max(map(len, encoded)) + config.response_length)
    sampling = Sampling(
        config.response_length,
        config.temperature,
        rollouts.stop_token_ids(tokenizer, "eos"),
        rollouts.pad_token_id(tokenizer),
    )
    order = PromptBatches(len(prompts), config.batch_size, config.seed)
    course = Course(
        config,
        trainer,
        [EncodedPair(row, [], [], None) for row in encoded],
        run_dir=run_dir,
        resume=resume,
        order=order,
    )
    with tracker.progress(TITLES["raft"], steps) as bar, course.stoppable():
        for step in range(course.first_step, steps + 1):
            chosen = [encoded[i] for i in next(order)]
            ids, mask = rollouts.pad_left(
                [row for row in chosen for _ in range(num_samples)],
                sampling.pad_id,
                accelerator.device,
            )
            with trainer.processes.gathered(model), torch.random.fork_rng(_cuda(model)):
                # The same answers in every process, whose generators dropout has moved apart.
                torch.manual_seed(sampling_seeds(config.seed, step, 1)[0])
                rollout = rollouts.generate(model, ids, mask, sampling)
            scores = score(model, rollout).view(-1, num_samples)  # (prompts, K)
            best = scores.argmax(1)
            answers = response_ids(rollout)
            batch = [
                EncodedPair(row, answers[i * num_samples + int(k)], [], None)
                for i, (row, k) in enumerate(zip(chosen, best, strict=True))
            ]
            figures, tokens = trainer.step(batch)
            course.tokens += tokens
            figures["objective/scores"] = float(scores.mean())
            figures["objective/best"] = float(scores.amax(1).mean())
            tracker.log(step, figures, stage)
            bar.update(
                step,
                reward=figures["objective/scores"],
                best=figures["objective/best"],
                loss=figures["sft_loss"],
            )
            if course.ends_after(step):
                break
    trainer.module.eval()
    return sft.result_of(course)


@torch.no_grad()
def score(model: HydraModel, rollout: Rollout) -> Tensor:
    """(B,) the reward head, adapter off, at the last token of each response."""
    scored = model.score(
        rollout.query_responses, rollout.attention_mask, rollout.response_mask, roles=["reward"]
    )
    assert scored.scores is not None
    return scored.scores


def _cuda(model: HydraModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def response_ids(rollout: Rollout) -> list[list[int]]:
    """The tokens of each response, its stop token included."""
    lengths = rollout.response_mask.sum(-1).tolist()
    responses = rollout.query_responses[:, rollout.context_length :].tolist()
    return [row[:length] for row, length in zip(responses, lengths, strict=True)]
