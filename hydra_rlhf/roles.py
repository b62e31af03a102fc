"""The roles that one decoder plays, what a scoring pass gives, and where its tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROLES = ("actor", "critic", "reference", "reward")
# Fields of Score are typed as what they hold when asked for.
ABSENT: Any = None


class Role(NamedTuple):
    adapter: str | None  # None is the decoder with adapters off
    head: str  # "lm", "value" or "reward"


class Score(NamedTuple):
    """What a rollout needs. Fields of roles that were not asked for are None.

    Attributes:
        logprobs: (B, T) float32, of each response token under the actor; 0 where masked.
        entropy: (B, T) float32, of the actor.
        ref_logprobs: (B, T) float32, under the reference.
        kl: (B, T) float32, exact KL(actor || reference) over the vocabulary.
        values: (B, T) float32, the critic's at the state before each response token; 0 where
            masked.
        scores: (B,) float32, the reward head at the last response token that counts.
    """

    logprobs: Tensor = ABSENT
    entropy: Tensor = ABSENT
    ref_logprobs: Tensor = ABSENT
    kl: Tensor = ABSENT
    values: Tensor = ABSENT
    scores: Tensor = ABSENT


def check_roles(roles: Sequence[str], *, kl: bool = False) -> None:
    """Raises ValueError for a role that does not exist, and for a KL without both its policies."""
    for role in roles:
        if role not in ROLES:
            raise ValueError(f"role must be one of {ROLES}, got {role!r}")
    if kl and not {"actor", "reference"} <= set(roles):
        raise ValueError(f"score: kl needs the roles actor and reference, got {tuple(roles)}")


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, L) positions that start at 0 on the first token of each row; 0 on padding to its left."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)


def last_token(response_mask: Tensor) -> Tensor:
    """(B,) index of the last True in each row of (B, T); -1 where a row has none."""
    columns = torch.arange(1, response_mask.shape[1] + 1, device=response_mask.device)
    return (response_mask * columns).amax(-1) - 1
