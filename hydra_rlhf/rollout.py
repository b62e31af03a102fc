"""Sampling responses: prompts in, sequences with explicit lengths out.

Lengths are carried in masks, never read back from token ids, so a tokenizer whose padding token is
its end-of-sequence token works like any other. :class:`Engine` is what samples, of which there are
several; ``generate`` is transformers' own loop over the fused layers.
"""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hydra_rlhf.config import PPOConfig
from hydra_rlhf.errors import UserError
from hydra_rlhf.model import HydraModel
from hydra_rlhf.trunk import Prefix

_log = logging.getLogger("hydra_rlhf")


class Sampling(NamedTuple):
    """How to sample. ``stop_ids`` end a response and count as its last token."""

    response_length: int
    temperature: float
    stop_ids: tuple[int, ...]
    pad_id: int
    top_k: int = 0
    top_p: float = 1.0
    min_response_length: int = 0
    do_sample: bool = True
    min_p: float = 0.0


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError where no distribution has these settings."""
    least = torch.finfo(torch.float32).tiny  # below it logits divide to inf, whose softmax is NaN
    if sampling.response_length < 1:
        raise ValueError(f"response_length must be at least 1, got {sampling.response_length}")
    if not sampling.temperature >= least:
        raise ValueError(
            f"temperature must be at least {least:.2g}, got {sampling.temperature}; the likeliest "
            "token is taken by do_sample=False"
        )
    for name in ("top_p", "min_p"):
        if not 0.0 <= getattr(sampling, name) <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {getattr(sampling, name)}")


@dataclass
class Rollout:
    """A batch of sampled responses.

    Attributes:
        query_responses: (B, P + T) token ids: prompts padded on the left to P, responses padded
            on the right to T.
        attention_mask: (B, P + T) int64, 1 on every token of prompt and response.
        response_mask: (B, T) bool, True on the response's tokens, its stop token included.
        logprobs: (B, T) float32 under the sampling distribution before any filter, from
            generation itself; None where they were not asked for.
        ended: (B,) bool, True where a stop token came before the length ran out.
        prefix: What entered the first adapted block while the tokens were made; None where it was
            not asked for.
        foreign: Another program's kernels sampled, whose log-probabilities are not quite the
            trainer's: each token's policy loss is then weighted by the ratio of both. They are
            those of what was drawn from, filters included.
        prompts, responses: The texts; a response without its stop token.
        columns: The other columns of the data set, one entry a prompt.
    """

    query_responses: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    ended: Tensor
    logprobs: Tensor | None = None
    prefix: Prefix | None = None
    foreign: bool = False
    prompts: list[str] = field(default_factory=list)
    responses: list[str] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def context_length(self) -> int:
        """P, the width of the padded prompts."""
        return self.query_responses.shape[1] - self.response_mask.shape[1]

    @property
    def device(self) -> torch.device:
        return self.query_responses.device

    def __len__(self) -> int:
        return self.query_responses.shape[0]

    def rows(self, index: Tensor) -> Rollout:
        """Some of the sequences, without texts, columns and prefix."""
        return Rollout(
            self.query_responses[index],
            self.attention_mask[index],
            self.response_mask[index],
            self.ended[index],
            None if self.logprobs is None else self.logprobs[index],
        )


class Request(NamedTuple):
    """What an engine is called with; see :meth:`Engine.__call__`."""

    model: HydraModel
    input_ids: Tensor  # (B, P)
    attention_mask: Tensor  # (B, P)
    sampling: Sampling
    role: str
    with_logprobs: bool
    seeds: Sequence[int] | None
    keep_prefix: bool


class Engine(abc.ABC):
    """What samples responses: the one interface of the engines here and of your own.

    A class with ``sample`` is an engine; ``release`` and ``nbytes`` matter where memory is held
    from one call to the next. ``rollout_engine`` is one of ``config.ROLLOUT_ENGINES``, or as
    ``module:factory`` names a function that makes yours; see ``engines.py``.
    """

    def __call__(
        self,
        model: HydraModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        sampling: Sampling,
        *,
        role: str = "actor",
        with_logprobs: bool = False,
        seeds: Sequence[int] | None = None,
        keep_prefix: bool = False,
    ) -> Rollout:
        """Samples one response a prompt under a role's adapter.

        Args:
            model: Whose actor (or reference) samples, with its weights as they are now.
            input_ids: (B, P) prompts padded on the left.
            attention_mask: (B, P), nonzero where there is a token.
            sampling: See :func:`sampling_of`. A setting that cannot be obeyed is refused by name.
            role: actor or reference.
            with_logprobs: Also each token's log-probability; see :class:`Rollout`.
            seeds: One a prompt. The same seeds, prompts and weights give the same tokens; an
                engine says whether a prompt's tokens depend on its own seed alone. None draws from
                torch's generator.
            keep_prefix: Also what enters the first adapted block, from engines that see it.

        Returns:
            A :class:`Rollout` without texts. T is the longest response, at most response_length.

        Raises:
            UserError: the model or a setting is out of the engine's reach.
            ValueError: no distribution has these settings.
        """
        check_sampling(sampling)
        settings = (role, with_logprobs, seeds, keep_prefix)
        return self.sample(Request(model, input_ids, attention_mask, sampling, *settings))

    @abc.abstractmethod
    def sample(self, request: Request) -> Rollout:
        """What a call does."""

    def release(self) -> None:  # noqa: B027  there may be nothing to free
        """Frees what is held between calls: the next phase wants the memory."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held now."""
        return 0


def sampling_of(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> Sampling:
    """The sampler that a configuration describes; warns once when it is not the scored policy.

    Raises:
        UserError: the stop token is unknown or not one token, or nothing can end a response.
    """
    reasons = config.off_policy_reasons()
    if reasons:
        _log.warning(
            "the sampler is not the policy that is scored (%s): ratios start away from 1 and the "
            "KL estimates are biased, possibly below 0",
            "; ".join(reasons),
        )
    return Sampling(
        response_length=config.response_length,
        temperature=config.temperature,
        stop_ids=stop_token_ids(tokenizer, config.stop_token, config.stop_token_id),
        pad_id=pad_token_id(tokenizer),
        top_k=config.top_k,
        top_p=config.top_p,
        min_response_length=config.min_response_length,
    )


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, stop_token: str | None, stop_token_id: int | None = None
) -> tuple[int, ...]:
    """The ids that end a response: EOS where the tokenizer has one, and the custom stop token.

    Raises:
        UserError: the token is unknown, not a single token, or there is none at all.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if stop_token_id is not None:
        if not 0 <= stop_token_id < len(tokenizer):
            raise UserError(f"stop_token_id {stop_token_id} is not in the tokenizer")
        ids.append(stop_token_id)
    elif stop_token not in (None, "eos"):
        found = tokenizer.encode(stop_token, add_special_tokens=False)
        if len(found) != 1:
            raise UserError(f"stop_token {stop_token!r} is {len(found)} tokens, not one")
        ids.append(found[0])
    if not ids:
        raise UserError("the tokenizer has no EOS token; give stop_token or stop_token_id")
    return tuple(dict.fromkeys(ids))


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What to pad with. Which one does not matter, since lengths are explicit."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return 0 if tokenizer.eos_token_id is None else tokenizer.eos_token_id


class PromptTooLong(UserError):
    """A prompt leaves its response no room."""


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_length: int | None = None,
    apply_chat_template: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, P), padded on the left.

    A prompt that has BOS written out, as a chat template leaves it, gets no second one.

    Raises:
        UserError: a prompt is empty after tokenisation, or longer than ``max_length`` tokens
            (PromptTooLong), or there is no chat template to apply.
    """
    if apply_chat_template and tokenizer.chat_template is None:
        raise UserError("apply_chat_template: this tokenizer has no chat template")
    bos = getattr(tokenizer, "bos_token_id", None)
    encoded = []
    for i, prompt in enumerate(prompts):
        if apply_chat_template:
            turn = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            ids = tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = tokenizer.encode(prompt)
            if ids[:2] == [bos, bos]:
                ids = ids[1:]
            # Some tokenizers close every text with EOS; a prompt goes on.
            if ids and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
                ids = ids[:-1]
        if not ids:
            raise UserError(f"prompt {i + 1} has no tokens: {prompt!r:.60}")
        if max_length is not None and len(ids) > max_length:
            raise PromptTooLong(
                f"prompt {i + 1} has {len(ids)} tokens, more than {max_length}: {prompt!r:.60}"
            )
        encoded.append(ids)
    return pad_left(encoded, pad_token_id(tokenizer), device)


def pad_left(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(B, P) ids and mask, each sequence against the right edge."""
    width = max(len(ids) for ids in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.as_tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


def generate(
    model: HydraModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    sampling: Sampling,
    *,
    role: str = "actor",
    with_logprobs: bool = False,
    synced_gpus: bool = False,
) -> Rollout:
    """Samples one response a prompt under a role's adapter, with transformers' ``generate``.

    Args:
        model: Whose actor (or reference) samples.
        input_ids: (B, P) prompts padded on the left.
        attention_mask: (B, P).
        sampling: See :func:`sampling_of`.
        role: actor or reference.
        with_logprobs: Keep each token's log-probability, from generation's own logits: at most one
            step's (B, V) is held at a time.
        synced_gpus: As transformers': go on until every process is done.

    Returns:
        A :class:`Rollout` without texts. T is the longest response, not response_length.

    Raises:
        ValueError: no distribution has these settings.
    """
    check_sampling(sampling)
    keep = _SampledLogprobs(sampling.temperature) if with_logprobs else None
    config = GenerationConfig(
        max_new_tokens=sampling.response_length,
        do_sample=sampling.do_sample,
        temperature=sampling.temperature if sampling.do_sample else None,
        top_k=sampling.top_k if sampling.do_sample else None,
        top_p=sampling.top_p if sampling.do_sample else None,
        min_p=sampling.min_p if sampling.do_sample and sampling.min_p > 0.0 else None,
        eos_token_id=list(sampling.stop_ids),
        pad_token_id=sampling.pad_id,
        # From here on nothing may come from the checkpoint's own generation_config.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
        use_cache=True,
    )
    processors: list[LogitsProcessor] = [keep] if keep else []
    if sampling.min_response_length > 0 and sampling.stop_ids:
        # Not by the configuration's min_new_tokens, which would come before what keeps the
        # log-probabilities.
        processors.append(
            MinNewTokensLengthLogitsProcessor(
                input_ids.shape[1],
                sampling.min_response_length,
                list(sampling.stop_ids),
                device=str(input_ids.device),
            )
        )
    with plain_generation_config(model.causal_lm):
        sequences = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            synced_gpus=synced_gpus,
            role=role,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([keep.after_token] if keep else []),
        )
    responses = sequences[:, input_ids.shape[1] :]
    response_mask, ended = response_lengths(responses, sampling.stop_ids)
    return Rollout(
        query_responses=torch.cat(
            [input_ids, responses.masked_fill(~response_mask, sampling.pad_id)], dim=1
        ),
        attention_mask=torch.cat([attention_mask, response_mask.to(attention_mask.dtype)], dim=1),
        response_mask=response_mask,
        ended=ended,
        logprobs=None if keep is None else keep.logprobs(response_mask),
    )


def of_rows(
    rows: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]] | None,
    ended: Sequence[bool],
    input_ids: Tensor,
    attention_mask: Tensor,
    sampling: Sampling,
) -> Rollout:
    """Of each response's tokens, its stop token included, and their log-probabilities."""
    device = input_ids.device
    width = max(len(tokens) for tokens in rows)
    responses = torch.full((len(rows), width), sampling.pad_id, dtype=torch.long)
    scores = torch.zeros(len(rows), width)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, tokens in enumerate(rows):
        responses[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = True
        if logprobs is not None:
            scores[i, : len(tokens)] = torch.tensor(logprobs[i])
    mask = mask.to(device)
    return Rollout(
        query_responses=torch.cat([input_ids, responses.to(device)], dim=1),
        attention_mask=torch.cat([attention_mask, mask.to(attention_mask.dtype)], dim=1),
        response_mask=mask,
        ended=torch.tensor(ended, device=device),
        logprobs=None if logprobs is None else scores.to(device),
    )


@torch.no_grad()
def scored_logprobs(model: HydraModel, rollout: Rollout, role: str, temperature: float) -> Tensor:
    """(B, T) from one pass more, for an engine that has no log-probabilities of its own."""
    scored = model.score(
        rollout.query_responses,
        rollout.attention_mask,
        rollout.response_mask,
        roles=(role,),
        temperature=temperature,
    )
    found = scored.logprobs if role == "actor" else scored.ref_logprobs
    assert found is not None
    return found


def response_lengths(responses: Tensor, stop_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mask (B, T) of the tokens up to and with the first stop token, and (B,) whether one came."""
    stops = torch.isin(responses, torch.tensor(stop_ids, device=responses.device))
    before = stops.cumsum(-1) - stops.long()  # stop tokens strictly to the left
    return before == 0, stops.any(-1)


def decode(
    tokenizer: PreTrainedTokenizerBase, rollout: Rollout, *, skip_special_tokens: bool = True
) -> list[str]:
    """The response texts, without the stop token."""
    lengths = rollout.response_mask.sum(-1) - rollout.ended.long()
    responses = rollout.query_responses[:, rollout.context_length :].cpu()
    return [
        str(tokenizer.decode(row[:length], skip_special_tokens=skip_special_tokens))
        for row, length in zip(responses, lengths.tolist(), strict=True)
    ]


class _SampledLogprobs(LogitsProcessor):
    """Reads generation's logits as they go by, one step held at a time.

    Custom processors run in their order, before transformers' temperature and filters, so the
    distribution that the first one sees is the unfiltered one.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.step: Tensor | None = None  # (B, V) log-probabilities before the token is drawn
        self.tokens: list[Tensor] = []
        self.after_token = _AfterToken(self)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.step = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        return scores

    def logprobs(self, response_mask: Tensor) -> Tensor:
        every = torch.stack(self.tokens, dim=1)[:, : response_mask.shape[1]]
        return torch.where(response_mask, every, 0.0)


class _AfterToken(StoppingCriteria):
    """transformers calls this once the token of a step is known; it never stops anything."""

    def __init__(self, keep: _SampledLogprobs):
        self.keep = keep

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        assert self.keep.step is not None
        self.keep.tokens.append(self.keep.step.gather(1, input_ids[:, -1:]).squeeze(1))
        self.keep.step = None
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@contextlib.contextmanager
def plain_generation_config(causal_lm):
    """Hides the checkpoint's generation settings: generate() fills gaps in ours from them."""
    saved = causal_lm.generation_config
    causal_lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        causal_lm.generation_config = saved


def __getattr__(name: str) -> Any:
    # The engine builds on this module, so it is imported when it is asked for.
    if name == "RolloutEngine":
        from hydra_rlhf.engine import RolloutEngine

        return RolloutEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
