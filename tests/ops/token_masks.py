"""Masks of tokens in the shapes that go wrong: holes, empty rows, one token, padding on a side."""

import torch
from hypothesis import strategies as st

ROWS = {
    "all": lambda T: torch.ones(T, dtype=torch.bool),
    "none": lambda T: torch.zeros(T, dtype=torch.bool),
    "one": lambda T: torch.arange(T) == torch.randint(T, ()),
    "right padded": lambda T: torch.arange(T) < torch.randint(T + 1, ()),
    "left padded": lambda T: torch.arange(T) >= torch.randint(T + 1, ()),
    "holes": lambda T: torch.rand(T) < 0.5,
}


def make_mask(rows, T):
    """One row of each kind named."""
    return torch.stack([ROWS[row](T) for row in rows]) if rows else torch.zeros(0, T).bool()


def every_kind(B, T):
    """(B, T), the kinds of row in turn."""
    return make_mask([list(ROWS)[row % len(ROWS)] for row in range(B)], T)


def poisoned(tensor, mask, poison=torch.nan):
    """What does not count, replaced by something that spreads."""
    return torch.where(mask, tensor, poison)


rows = st.lists(st.sampled_from(sorted(ROWS)), min_size=1, max_size=4)
lengths = st.integers(1, 70)
seeds = st.integers(0, 2**20)
