"""The next token of every row from its logits, and what the step writes down about it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hydra_kernels.replay import draw_tokens, invert, without_early
from hydra_rlhf.decode_state import State
from hydra_rlhf.rollout import Sampling

# The token (B, 1), its log-probability, and the same under what it was drawn from.
Chosen = tuple[Tensor, Tensor, Tensor]


def is_filtered(sampling: Sampling) -> bool:
    """Whether tokens are left out by their rank or probability."""
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def choose(logits: Tensor, state: State, sampling: Sampling) -> Chosen:
    """Draws from logits (B, V) float32 by the state's uniforms; changes nothing."""
    if not is_filtered(sampling):
        return draw_tokens(
            logits,
            state.uniforms,
            state.column,
            temperature=sampling.temperature,
            sample=sampling.do_sample,
            late=sampling.stop_ids,
            late_from=sampling.min_response_length,
        )
    logprobs = torch.log_softmax(logits / sampling.temperature, dim=-1)
    filtered = filter_logprobs(logprobs, state.column, sampling)
    if sampling.do_sample:
        token = invert(filtered, state.uniforms.gather(1, state.column))
    else:
        token = filtered.argmax(-1, keepdim=True)
    return token, logprobs.gather(1, token), filtered.gather(1, token)


def write(state: State, chosen: Chosen, values: Tensor | None, sampling: Sampling) -> None:
    """Appends what was chosen to the rows that go on, and ends those that it ends."""
    token, logprob, sampled_logprob = chosen
    going = ~state.finished[:, None]  # (B, 1)
    # A row that has finished keeps its last token, which may have to be run once more.
    token = torch.where(going, token, state.token)
    _put(state.tokens, state.column, token, going)
    _put(state.logprobs, state.column, logprob, going)
    _put(state.sampled_logprobs, state.column, sampled_logprob, going)
    if state.values is not None and values is not None:
        _put(state.values, state.column, values, going)
    last = state.column == state.tokens.shape[1] - 1
    stop = torch.zeros_like(going)
    for stop_id in sampling.stop_ids:
        stop |= token == stop_id
    state.finished.logical_or_((last | stop).squeeze(1))
    state.column.add_((going & ~last).long())
    state.token.copy_(token)


def filter_logprobs(logprobs: Tensor, column: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) log-probabilities of what may be sampled, normalised; -inf for the rest."""
    scores = logprobs
    if sampling.min_response_length > 0:
        scores = without_early(scores, column, sampling.stop_ids, sampling.min_response_length)
    if 0 < sampling.top_k < scores.shape[1]:
        worst = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < worst, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, index = torch.softmax(scores, dim=-1).sort(dim=-1, descending=True)
        # A token goes when those before it already hold top_p: the likeliest always stays.
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), -torch.inf)
    if sampling.min_p > 0.0:
        least = scores.amax(-1, keepdim=True) + math.log(sampling.min_p)
        scores = scores.masked_fill(scores < least, -torch.inf)
    return scores if scores is logprobs else torch.log_softmax(scores, dim=-1)


def _put(buffer: Tensor, column: Tensor, value: Tensor, going: Tensor) -> None:
    buffer.scatter_(1, column, torch.where(going, value, buffer.gather(1, column)))
