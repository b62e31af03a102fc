"""The objectives of Hydra-SFT on a batch of pairs, as sums, and what they say of a reward head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hydra_rlhf import objectives, packing
from hydra_rlhf.model import HydraModel
from hydra_rlhf.pairs import PairBatch
from hydra_rlhf.sft_config import (
    LIKELIHOOD_OBJECTIVES,
    REWARD_OBJECTIVES,
    TEXT_OBJECTIVES,
    SFTConfig,
)

CALIBRATION_BINS = 10
PAIR_FIGURES = {
    "rm": "rm_loss",
    "rank": "rank_loss",
    "correct": "accuracy",
    "reward_margin": "reward_margin",
}


class PairLoss(nn.Module):
    """The objective as a module, so that accelerate can wrap it for any number of processes.

    ``forward`` returns sums, not means: ``train`` divides them by the counts of the whole batch.
    """

    def __init__(self, model: HydraModel, config: SFTConfig, role: str | None):
        super().__init__()
        self.model = model
        self.config = config
        self.role = role

    def forward(self, batch: PairBatch) -> dict[str, Tensor]:
        """0-d float32 sums: ``sft`` over tokens and the rest over pairs.

        ``difference``, (B,) r_w - r_l, is there where the reward head is trained.
        """
        config, model = self.config, self.model
        hidden = self._hidden(batch, self.role)  # (rows, L, D)
        sums: dict[str, Tensor] = {}
        if config.objective in REWARD_OBJECTIVES:
            rewards = model._head("reward", hidden)  # (rows, L) float32 under autocast too
            sums.update(reward_losses(rewards, batch, config))
        if config.objective in TEXT_OBJECTIVES:
            rows = hidden.flatten(0, 1).index_select(0, batch.positions)  # (M, D)
            reference = self._reference(batch) if config.objective == "dpo" else None
            out = model.lm_head.logprob(rows, batch.targets, ref_hidden=reference)
            is_chosen = batch.owners < batch.num_chosen
            sums["sft"] = -torch.where(is_chosen, out.logprobs, 0.0).sum()
            if config.objective in LIKELIHOOD_OBJECTIVES:
                sums.update(likelihood_losses(out.logprobs, out.ref_logprobs, batch, config))
        return sums

    @torch.no_grad()
    def _reference(self, batch: PairBatch) -> Tensor:
        """(M, D) of the same decoder with the adapter off."""
        return self._hidden(batch, None).flatten(0, 1).index_select(0, batch.positions)

    def _hidden(self, batch: PairBatch, role: str | None) -> Tensor:
        if batch.packed is not None:
            return packing.hidden(self.model, batch.packed, role)
        return self.model.hidden(batch.input_ids, batch.attention_mask, role=role)


def reward_losses(rewards: Tensor, batch: PairBatch, config: SFTConfig) -> dict[str, Tensor]:
    """The reward head's loss and figures.

    Args:
        rewards: (rows, L) the reward head at every position.

    Returns:
        ``rm``, ``center``, ``correct``, ``reward_margin``: 0-d float32 sums over pairs;
        ``difference``: (B,) r_w - r_l at the last tokens.
    """
    at_last = rewards.gather(1, batch.last[:, None]).squeeze(1)  # (rows,)
    chosen, rejected = batch.split(at_last)
    margin = batch.margin if config.use_margins else torch.zeros_like(batch.margin)
    if config.rm_loss == "last":
        loss = objectives.reward_last(chosen, rejected, margin)
    else:
        loss = objectives.reward_diverged(rewards, batch, margin)
    return {
        "rm": loss,
        "center": (chosen + rejected).square().sum(),
        "correct": _ranked_right(chosen, rejected),
        "reward_margin": (chosen - rejected).sum(),
        "difference": chosen - rejected,
    }


def likelihood_losses(
    logprobs: Tensor, ref_logprobs: Tensor | None, batch: PairBatch, config: SFTConfig
) -> dict[str, Tensor]:
    """The loss of an objective that compares how likely the responses are, and its figures.

    Args:
        logprobs: (M,) of both responses' tokens.
        ref_logprobs: (M,) under the reference; for dpo.
    """
    if config.objective == "dpo":
        assert ref_logprobs is not None
        chosen, rejected = batch.split(objectives.per_row(logprobs - ref_logprobs, batch))
        loss = objectives.dpo(chosen, rejected, beta=config.beta)
    else:
        means = objectives.per_row(logprobs, batch) / objectives.token_counts(batch)
        chosen, rejected = batch.split(means)
        one = objectives.rrhf if config.objective == "rrhf" else objectives.pro
        loss = one(chosen, rejected)
    return {
        "rank": loss,
        "correct": _ranked_right(chosen, rejected),
        "reward_margin": (chosen - rejected).detach().sum(),
    }


def _ranked_right(chosen: Tensor, rejected: Tensor) -> Tensor:
    """How many pairs are; a tie, as of a reward head that is still 0, is half a pair: chance."""
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).sum()


def calibration_error(differences: Tensor, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error of a reward model's rankings.

    A pair is ranked right with the stated probability ``sigmoid(|d|)``, in [0.5, 1]. Over equal
    bins of it: sum of (share of the pairs) * |mean stated - share ranked right|. Guo et al. 2017,
    arXiv:1706.04599, eq. 5.

    Args:
        differences: (n,) ``r_w - r_l``.
    """
    stated = torch.sigmoid(differences.double().abs())
    right = (differences > 0).double()
    which = ((stated - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.double).index_add_(0, which, stated - right)
    return (gaps.abs().sum() / len(differences)).item()
