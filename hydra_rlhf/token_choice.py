"""The next token of every row from its logits, and what the step writes down about it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_kernels.replay import draw_tokens
from hydra_rlhf.decode_state import State
from hydra_rlhf.rollout import Sampling

# The token (B, 1), its log-probability, and the same under what it was drawn from.
Chosen = tuple[Tensor, Tensor, Tensor]


def uniforms_of(seeds: Sequence[int] | None, N: int, T: int, device: torch.device) -> Tensor:
    """(N, T) in [0, 1): all that sampling draws, so that a step draws nothing."""
    if seeds is None:
        return torch.rand(N, T, device=device)
    rows = [torch.rand(T, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows).to(device)


def is_filtered(sampling: Sampling) -> bool:
    """Whether tokens are left out by their rank or probability."""
    return sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0


def choose(logits: Tensor, state: State, sampling: Sampling) -> Chosen:
    """Draws from logits (B, V) float32 by the state's uniforms; changes nothing."""
    return draw_tokens(
        logits,
        state.uniforms,
        state.column,
        temperature=sampling.temperature,
        sample=sampling.do_sample,
        late=sampling.stop_ids,
        late_from=sampling.min_response_length,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )


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


def _put(buffer: Tensor, column: Tensor, value: Tensor, going: Tensor) -> None:
    buffer.scatter_(1, column, torch.where(going, value, buffer.gather(1, column)))
