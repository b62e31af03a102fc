"""Drawing tokens from logits by numbers drawn before, so that a step itself draws nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_kernels.backends import recording


def draw_tokens(
    logits: Tensor,  # (B, V) float32
    uniforms: Tensor,  # (B, T) float32 in [0, 1)
    columns: Tensor,  # (B, 1) int64, which of its uniforms each row uses
    *,
    temperature: float = 1.0,
    sample: bool = True,
    late: Sequence[int] = (),
    late_from: int = 0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The next token of every row.

    The first token whose cumulative probability under ``softmax(logits / temperature)`` exceeds the
    row's uniform, or the likeliest.

    Args:
        logits: (B, V) float32.
        uniforms: (B, T) float32 in [0, 1).
        columns: (B, 1) int64.
        temperature: Divides the logits.
        sample: Draw; False takes the likeliest token.
        late: Tokens that have no probability in columns before ``late_from``.
        late_from: See ``late``.
        top_k, top_p, min_p: See :func:`filter_logprobs`.

    Returns:
        (B, 1) tokens int64; their log-probabilities in nats, float32; the same under what was drawn
        from, in which tokens that are filtered or came too early have no part.
    """
    arguments = (logits, uniforms, columns, temperature, sample, list(late), late_from, top_k)
    if recording.state.on:
        return torch.ops.hydra.draw_tokens(*arguments, top_p, min_p)
    return _draw(*arguments, top_p, min_p)


def filter_logprobs(
    logprobs: Tensor,  # (B, V)
    columns: Tensor,  # (B, 1)
    *,
    late: Sequence[int] = (),
    late_from: int = 0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """(B, V) log-probabilities of what may be drawn, normalised; -inf for the rest.

    One after another: ``late`` tokens go before ``late_from``; all but the ``top_k`` likeliest; a
    token when those likelier than it already hold ``top_p``; those below ``min_p`` times the
    likeliest.
    """
    scores = logprobs
    if late and late_from > 0:
        scores = without_early(scores, columns, late, late_from)
    if 0 < top_k < scores.shape[1]:
        worst = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < worst, -torch.inf)
    if top_p < 1.0:
        ordered, index = torch.softmax(scores, dim=-1).sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        beyond[:, 0] = False  # the likeliest stays, whatever top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), -torch.inf)
    if min_p > 0.0:
        least = scores.amax(-1, keepdim=True) + math.log(min_p)
        scores = scores.masked_fill(scores < least, -torch.inf)
    return scores if scores is logprobs else torch.log_softmax(scores, dim=-1)


def invert(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """(B, 1): the first token whose cumulative probability exceeds the uniform (B, 1)."""
    cumulative = logprobs.exp().cumsum(-1)  # (B, V)
    total = cumulative[:, -1:]
    # Below the total even after rounding, so that a token of probability 0 is never met.
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True)


def without_early(scores: Tensor, columns: Tensor, late: Sequence[int], late_from: int) -> Tensor:
    """A copy of scores (B, V), -inf for late tokens in rows whose column is before late_from."""
    early = columns < late_from  # (B, 1)
    scores = scores.clone()
    for token in late:
        column = scores[:, token : token + 1]
        column.copy_(torch.where(early, -torch.inf, column))
    return scores


def _draw(
    logits: Tensor,
    uniforms: Tensor,
    columns: Tensor,
    temperature: float,
    sample: bool,
    late: Sequence[int],
    late_from: int,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    drawn = filter_logprobs(
        logprobs,
        columns,
        late=late,
        late_from=late_from,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    if sample:
        token = invert(drawn, uniforms.gather(1, columns))
    else:
        token = drawn.argmax(-1, keepdim=True)
    return token, logprobs.gather(1, token), drawn.gather(1, token)


@torch.library.custom_op("hydra::draw_tokens", mutates_args=())
def _draw_op(
    logits: Tensor,
    uniforms: Tensor,
    columns: Tensor,
    temperature: float,
    sample: bool,
    late: Sequence[int],
    late_from: int,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Seen by a recorder; csrc/cpu/replay.cpp has the instruction."""
    arguments = (logits, uniforms, columns, temperature, sample, late, late_from, top_k)
    token, logprob, drawn = _draw(*arguments, top_p, min_p)
    return token.clone(), logprob.clone(), drawn.clone()
