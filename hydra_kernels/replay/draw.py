"""Drawing tokens from logits by numbers drawn before, so that a step itself draws nothing."""

from __future__ import annotations

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

    Returns:
        (B, 1) tokens int64; their log-probabilities in nats, float32; the same under what was drawn
        from, in which the tokens that came too early have no part.
    """
    if recording.state.on:
        return torch.ops.hydra.draw_tokens(
            logits, uniforms, columns, temperature, sample, list(late), late_from
        )
    return _draw(logits, uniforms, columns, temperature, sample, late, late_from)


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
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    drawn = logprobs
    if late and late_from > 0:
        drawn = torch.log_softmax(without_early(logprobs, columns, late, late_from), dim=-1)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Seen by a recorder; csrc/cpu/replay.cpp has the instruction."""
    token, logprob, drawn = _draw(logits, uniforms, columns, temperature, sample, late, late_from)
    return token.clone(), logprob.clone(), drawn.clone()
