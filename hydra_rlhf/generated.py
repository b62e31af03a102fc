"""What the engine's rows leave behind: tokens, and what entered the first adapted block."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hydra_rlhf import trunk as trunks
from hydra_rlhf.decode_state import State
from hydra_rlhf.model import HydraModel
from hydra_rlhf.rollout import Rollout, Sampling, response_lengths
from hydra_rlhf.trunk import Prefix


class Generated(NamedTuple):
    """What :meth:`RolloutEngine.generate` returns, one row a prompt, T columns.

    Attributes:
        tokens: (N, T) int64; the pad id right of a response's end.
        lengths: (N,) int64, tokens of each response, its stop token included.
        ended: (N,) bool, True where a stop token came before the length ran out.
        logprobs: (N, T) float32 in nats under the policy at this temperature, before any filter; 0
            right of the end.
        sampled_logprobs: (N, T) as logprobs, under the filtered distribution that was sampled from.
        values: (N, T) float32, the value head at the state before each token; None unless asked.
        prefix: What entered the first adapted block, (N, P + T, D), 0 right of the end; None unless
            asked, or where the first block has an adapter.
    """

    tokens: Tensor
    lengths: Tensor
    ended: Tensor
    logprobs: Tensor
    sampled_logprobs: Tensor
    values: Tensor | None
    prefix: Prefix | None = None


def finish(out: dict[str, Tensor], sampling: Sampling, prefix: Prefix | None) -> Generated:
    """What the rows left behind, with nothing right of a response's end."""
    counted, ended = response_lengths(out["tokens"], sampling.stop_ids)
    return Generated(
        tokens=out["tokens"].masked_fill(~counted, sampling.pad_id),
        lengths=counted.sum(-1),
        ended=ended,
        logprobs=torch.where(counted, out["logprobs"], 0.0),
        sampled_logprobs=torch.where(counted, out["sampled_logprobs"], 0.0),
        values=torch.where(counted, out["values"], 0.0) if "values" in out else None,
        prefix=prefix,
    )


def as_rollout(
    out: Generated, input_ids: Tensor, attention_mask: Tensor, with_logprobs: bool
) -> Rollout:
    """As wide as the longest response."""
    width = int(out.lengths.max())
    mask = torch.arange(width, device=out.lengths.device) < out.lengths[:, None]
    prefix = out.prefix
    if prefix is not None:
        prefix = replace(prefix, hidden=prefix.hidden[:, : input_ids.shape[1] + width])
    return Rollout(
        query_responses=torch.cat([input_ids, out.tokens[:, :width]], dim=1),
        attention_mask=torch.cat([attention_mask, mask.to(attention_mask.dtype)], dim=1),
        response_mask=mask,
        ended=out.ended,
        logprobs=out.logprobs[:, :width] if with_logprobs else None,
        prefix=prefix,
    )


class Entering:
    """Within this context, what enters the first adapted block of every pass is written down.

    A pass over prompts leaves it for :meth:`taken`; a pass over one token a row puts it into
    ``state``, at the rows' slots. Off where the first block, or none, has an adapter.
    """

    def __init__(self, model: HydraModel, on: bool):
        every = trunks.blocks(model.trunk)
        self.layer = model.first_adapted_layer() if on else 0
        self.on = 0 < self.layer < len(every)
        self.state: State | None = None
        self._block = every[self.layer] if self.on else None
        self._hidden: Tensor | None = None
        self._as_tuple = False
        self._hooks: list = []

    def __enter__(self) -> None:
        if self._block is not None:
            before = self._block.register_forward_pre_hook(self._enters, with_kwargs=True)
            self._hooks = [before, self._block.register_forward_hook(self._leaves)]

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enters(self, block, args, kwargs) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.state is None:
            self._hidden = hidden
            return
        assert self.state.prefix is not None
        cache = self.state.cache
        self.state.prefix[cache.rows, cache.slot] = hidden[:, 0]

    def _leaves(self, block, args, out) -> None:
        self._as_tuple = isinstance(out, tuple)

    def taken(self) -> Tensor:
        """(B, P, D) of the last prompts' pass, once."""
        assert self._hidden is not None
        hidden, self._hidden = self._hidden, None
        return hidden

    def prefix(self, hidden: Tensor) -> Prefix:
        return Prefix(hidden, self.layer, self._as_tuple)
