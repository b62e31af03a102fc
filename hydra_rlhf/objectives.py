"""Losses on preference pairs, one function each, as sums over the pairs of a batch.

Summed and not averaged, so that the trainer can divide by the counts of a batch that it takes in
pieces. ``chosen`` and ``rejected`` are (B,) throughout: y_w and y_l of each pair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_rlhf.pairs import PairBatch


def reward_last(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """``-log sigmoid(r_w - r_l - margin)``, the rewards at the last token of each response.

    Ouyang et al. 2022, arXiv:2203.02155, eq. 1; the margin is that of Touvron et al. 2023,
    arXiv:2307.09288, eq. 2.
    """
    return -F.logsigmoid(chosen - rejected - margin).sum()


def reward_diverged(rewards: Tensor, batch: PairBatch, margin: Tensor) -> Tensor:
    """``reward_last`` at each position, averaged over those where the two responses differ.

    From the first token that differs to the end of the longer response; the shorter one keeps the
    reward of its last token.

    Args:
        rewards: (rows, L) the reward head at every position.
        batch: Where the responses lie.
        margin: (B,).
    """
    lengths = batch.last - batch.start + 1  # (rows,)
    longer = torch.maximum(*batch.split(lengths))
    steps = torch.arange(rewards.shape[1], device=rewards.device)  # (L,)
    index = batch.start[:, None] + torch.minimum(steps, lengths[:, None] - 1)  # (rows, L)
    chosen, rejected = batch.split(rewards.gather(1, index))
    counts = (steps >= batch.diverge[:, None]) & (steps < longer[:, None])  # (B, L)
    each = -F.logsigmoid(chosen - rejected - margin[:, None])
    return (torch.where(counts, each, 0.0).sum(1) / counts.sum(1)).sum()


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """``-log sigmoid(beta * (h_w - h_l))``, ``h = log pi(y|x) - log pi_ref(y|x)``.

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7.

    Args:
        chosen, rejected: (B,) ``h`` of each response, summed over its tokens.
        beta: Strength of the pull towards the reference.
    """
    return -F.logsigmoid(beta * (chosen - rejected)).sum()


def rrhf(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``max(0, p_l - p_w)``, ``p`` the mean log-probability of a response's tokens.

    Yuan et al. 2023, arXiv:2304.05302, section 3.1, for two responses. Its full loss adds the
    cross-entropy of the best one.
    """
    return (rejected - chosen).clamp(min=0.0).sum()


def pro(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``-log(exp p_w / (exp p_w + exp p_l))``, ``p`` the mean log-probability of the tokens.

    Song et al. 2023, arXiv:2306.17492, section 3, for a ranking of two. Its full loss adds beta
    times the cross-entropy of the best one.
    """
    return -F.logsigmoid(chosen - rejected).sum()


def per_row(values: Tensor, batch: PairBatch) -> Tensor:
    """(rows,) sums of (M,) values over the predicted tokens of each row."""
    sums = values.new_zeros(batch.input_ids.shape[0])
    return sums.index_add(0, batch.owners, values)


def token_counts(batch: PairBatch) -> Tensor:
    """(rows,) float32, how many tokens of each row are predicted; at least 1."""
    ones = torch.ones(batch.owners.shape, dtype=torch.float32, device=batch.owners.device)
    return per_row(ones, batch).clamp(min=1.0)
