"""Sampling by transformers' continuous batching: a paged cache, requests that come and go.

Same model, same adapters: the pass runs in a thread of transformers' own, which is told the adapter
ids of the one that asked. Tokens are drawn from one stream for the whole batch, so seeds repeat a
batch and do not make a prompt independent of its neighbours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig
from transformers.generation import configuration_utils

import hydra_kernels.peft
from hydra_rlhf.errors import UserError
from hydra_rlhf.model import HydraModel
from hydra_rlhf.rollout import (
    Engine,
    Request,
    Rollout,
    Sampling,
    of_rows,
    plain_generation_config,
    scored_logprobs,
)
from hydra_rlhf.token_choice import is_filtered

_log = logging.getLogger("hydra_rlhf")
_PAGE = 32  # tokens: a response ends inside of its last page
_BATCH_TOKENS = 2048  # of a pass: prompts that are longer together are read in several


class ContinuousEngine(Engine):
    """Samples by ``generate_batch`` of transformers 5.4 or later.

    Log-probabilities are transformers' own where nothing is filtered. With top_k or top_p it gives
    those of the filtered distribution only: then the policy's are scored by one pass more.

    Args:
        settings: More for transformers' ``ContinuousBatchingConfig``, in place of what is chosen
            here: a cache that holds every prompt with its whole response.

    Raises:
        UserError: the installed transformers has no such configuration.
    """

    def __init__(self, **settings: Any):
        config: Any = getattr(configuration_utils, "ContinuousBatchingConfig", None)
        if config is None:
            raise UserError(
                "rollout_engine 'continuous' needs transformers 5.4 or later, whose continuous "
                f"batching returns log-probabilities; {transformers.__version__} is installed. "
                "Take rollout_engine 'hydra'"
            )
        self._config = config
        self._known = {f.name for f in dataclasses.fields(config)}
        unknown = sorted(set(settings) - self._known)
        if unknown:
            raise UserError(
                f"ContinuousBatchingConfig of transformers {transformers.__version__} has no "
                + ", ".join(unknown)
            )
        self._settings = settings
        self._said = False

    def sample(self, request: Request) -> Rollout:
        """``keep_prefix`` is not obeyed.

        Raises:
            UserError: a setting, or a model, that continuous batching leaves out.
        """
        model, input_ids, attention_mask, sampling, role, with_logprobs, seeds, _ = request
        _check(model, sampling)
        prompts = [
            row[kept].tolist() for row, kept in zip(input_ids, attention_mask.bool(), strict=True)
        ]
        own = with_logprobs and not is_filtered(sampling)
        rows, scores = self._generate(model, prompts, sampling, role, own, _one_seed(seeds))
        ended = [row[-1] in sampling.stop_ids for row in rows]
        rollout = of_rows(rows, scores, ended, input_ids, attention_mask, sampling)
        if with_logprobs and not own:
            if not self._said:
                self._said = True
                _log.info(
                    "continuous batching gives filtered log-probabilities: the policy's are scored"
                )
            rollout.logprobs = scored_logprobs(model, rollout, role, sampling.temperature)
        return rollout

    def _generate(
        self,
        model: HydraModel,
        prompts: list[list[int]],
        sampling: Sampling,
        role: str,
        with_logprobs: bool,
        seed: int,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        lm = model.causal_lm
        generation = GenerationConfig(
            max_new_tokens=sampling.response_length,
            do_sample=sampling.do_sample,
            temperature=sampling.temperature,
            top_k=sampling.top_k if sampling.do_sample else 0,
            top_p=sampling.top_p if sampling.do_sample else 1.0,
            eos_token_id=list(sampling.stop_ids),
            pad_token_id=sampling.pad_id,
        )
        if not sampling.do_sample and not with_logprobs:
            generation.temperature = None  # says nothing about the likeliest token
        devices = [lm.device] if lm.device.type == "cuda" else []
        with (
            model.no_dropout(),
            plain_generation_config(lm),
            _in_every_thread(model, role),
            torch.random.fork_rng(devices=devices),  # transformers seeds torch's own generators
        ):
            torch.manual_seed(seed)
            found = lm.generate_batch(
                prompts,
                generation_config=generation,
                continuous_batching_config=self._sized(prompts, sampling, with_logprobs, seed),
                progress_bar=False,
            )
        outs = list(found.values())
        wrong = [str(out.error) for out in outs if out.error is not None]
        if wrong or len(outs) != len(prompts):
            why = "; ".join(dict.fromkeys(wrong)) or "transformers logged why"
            raise RuntimeError(
                f"continuous batching answered {len(outs) - len(wrong)} of {len(prompts)} prompts: "
                + why
            )
        by_number = sorted(found, key=lambda name: int(name.rpartition("_")[2]))
        rows = [list(found[name].generated_tokens) for name in by_number]
        if not with_logprobs:
            return rows, None
        return rows, [list(found[name].logprobs) for name in by_number]

    def _sized(
        self, prompts: list[list[int]], sampling: Sampling, with_logprobs: bool, seed: int
    ) -> Any:
        """A cache for these prompts: transformers' default is most of the free memory."""
        page = "page_size" if "page_size" in self._known else "block_size"  # since 5.18
        pages = [-(-(len(ids) + sampling.response_length) // _PAGE) for ids in prompts]
        chosen = {
            page: _PAGE,
            "num_blocks": sum(pages) + 1,
            "max_batch_tokens": max(_BATCH_TOKENS, len(prompts)),
            "return_logprobs": with_logprobs,
            "seed": seed,
            # Attention as the trainer's: another kernel would sample from another distribution.
            "auto_switch_to_flash": False,
        }
        chosen = {name: value for name, value in chosen.items() if name in self._known}
        return self._config(**{**chosen, **self._settings})


def _check(model: HydraModel, sampling: Sampling) -> None:
    left_out = []
    if sampling.min_response_length > 0:
        left_out.append(f"min_response_length {sampling.min_response_length}")
    if sampling.min_p > 0.0:
        left_out.append(f"min_p {sampling.min_p}")
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        left_out.append("attn_logit_softcapping, which paged attention does without")
    if torch.is_autocast_enabled(model.device.type):
        left_out.append("mixed_precision, which its thread does not see")
    if left_out:
        raise UserError(
            f"rollout_engine 'continuous' cannot obey {', '.join(left_out)}: "
            "take rollout_engine 'hydra'"
        )
    if not hasattr(model.causal_lm, "generate_batch"):
        raise UserError(
            f"rollout_engine 'continuous': {type(model.causal_lm).__name__} has no generate_batch"
        )


@contextlib.contextmanager
def _in_every_thread(model: HydraModel, role: str) -> Iterator[None]:
    """Passes of the decoder run under a role's adapter in any thread.

    Adapter ids are each thread's own, and transformers generates in one that it starts.
    """
    stacks: list[contextlib.ExitStack] = []

    def enter(module: nn.Module, args: tuple) -> None:
        stack = contextlib.ExitStack()
        stacks.append(stack)
        if model.adapters:
            stack.enter_context(hydra_kernels.peft.adapter_ids(model.base, model.adapter_id(role)))

    def leave(module: nn.Module, args: tuple, out: Any) -> None:
        stacks.pop().close()

    hooks = [
        model.causal_lm.register_forward_pre_hook(enter),
        model.causal_lm.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _one_seed(seeds: Sequence[int] | None) -> int:
    """Of the whole batch, from every prompt's."""
    if seeds is None:
        return int(torch.randint(2**31, ()))
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + int(seed)) % (2**31 - 1)
    return mixed
