"""Several documents in one row, none of which sees another.

A batch's documents (prompt and response) are laid end to end into rows as long as its longest one,
so that next to nothing is padding. Each keeps its own positions and attends to itself alone,
through an attention mask with a block for each document. What comes back is laid out as it was, so
that a packed batch has the loss of the batch, not of another one: Krell et al. 2021,
arXiv:2107.02027, section 3.2, whose first-fit-decreasing it is too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hydra_rlhf.errors import UserError
from hydra_rlhf.model import HydraModel

DENSE = ("eager", "sdpa")  # implementations of attention that take a mask of any shape
_PROBE = (5, 3, 2)  # lengths of documents, of which the last two come into one row


class Packed(NamedTuple):
    """Rows of documents. R rows of W columns hold what N padded rows of L columns held."""

    input_ids: Tensor  # (R, W)
    positions: Tensor  # (R, W), from 0 in each document
    document: Tensor  # (R, W), from 0 in each row; -1 where there is none
    place: Tensor  # (N, L) index into R * W; 0 where the padded row has no token

    def to(self, device: torch.device) -> Packed:
        return Packed(*(part.to(device) for part in self))


def pack(input_ids: Tensor, attention_mask: Tensor) -> Packed:
    """Lay the rows of a padded batch end to end.

    Args:
        input_ids: (N, L), padded on either side.
        attention_mask: (N, L), nonzero where there is a token.
    """
    kept = attention_mask.bool()
    lengths = kept.sum(1)
    width = int(lengths.max())
    free: list[int] = []  # columns left in each row
    starts = [(0, 0)] * len(lengths)
    counts: list[int] = []
    order = torch.argsort(lengths, descending=True, stable=True).tolist()
    rank = [0] * len(lengths)
    for index in order:
        length = int(lengths[index])
        row = next((r for r, left in enumerate(free) if left >= length), len(free))
        if row == len(free):
            free.append(width)
            counts.append(0)
        starts[index] = (row, width - free[row])
        rank[index] = counts[row]
        counts[row] += 1
        free[row] -= length
    rows = len(free)
    first = torch.tensor([row * width + column for row, column in starts])
    inside = kept.cumsum(1) - 1  # (N, L) how many tokens of the document come before
    place = torch.where(kept, first[:, None] + inside, 0)

    def laid(values: Tensor, empty: int) -> Tensor:
        flat = torch.full((rows * width,), empty, dtype=torch.long)
        flat[place[kept]] = values.expand(kept.shape)[kept]
        return flat.view(rows, width)

    return Packed(
        input_ids=laid(input_ids, int(input_ids[~kept][0]) if not kept.all() else 0),
        positions=laid(inside, 0),
        document=laid(torch.tensor(rank)[:, None], -1),
        place=place,
    )


def blocks(document: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, 1, W, W) added to the scores of attention: 0 within a document and before, else -inf.

    An empty column sees itself, so that no row of the softmax is empty.
    """
    same = document[:, :, None] == document[:, None, :]
    seen = same.tril() & (document >= 0)[:, None, :]
    seen |= torch.eye(document.shape[1], dtype=torch.bool, device=document.device)
    lowest = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, lowest)[
        :, None
    ]


def hidden(model: HydraModel, packed: Packed, role: str | None = None) -> Tensor:
    """(N, L, D): ``model.hidden`` of the batch that was packed; any values where it is padding."""
    dtype = model.causal_lm.get_input_embeddings().weight.dtype
    if torch.is_autocast_enabled(packed.input_ids.device.type):
        dtype = torch.get_autocast_dtype(packed.input_ids.device.type)
    states = model.hidden(
        packed.input_ids,
        blocks(packed.document, dtype),
        role=role,
        positions=packed.positions,
    )
    return states.flatten(0, 1)[packed.place]


@torch.no_grad()
def check(model: HydraModel, longest: int) -> None:
    """Raises UserError where the model cannot keep the documents of a row apart.

    Args:
        model: Asked by running it: three documents packed and alone.
        longest: Tokens of the longest document to come.
    """
    config: Any = model.config.get_text_config()
    kind = getattr(config, "_attn_implementation", None)
    if kind not in DENSE:
        raise UserError(
            f"packing needs the attention implementation {' or '.join(DENSE)}; the model has {kind}"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and longest > window:
        raise UserError(
            f"packing would widen the sliding window of {window} tokens: the longest row has "
            f"{longest}; cut it with max_length, or train without packing"
        )
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (len(_PROBE), max(_PROBE)), generator=generator)
    mask = (torch.arange(max(_PROBE)) < torch.tensor(_PROBE)[:, None]).long()
    packed = pack(ids, mask)
    ids, mask, packed = ids.to(model.device), mask.to(model.device), packed.to(model.device)
    apart = model.hidden(ids, mask).float()
    together = hidden(model, packed).float()
    model.train(was_training)
    keep = mask.bool()
    worst = (apart - together)[keep].abs().max() / apart[keep].abs().max()
    if not worst <= 50 * torch.finfo(model.causal_lm.dtype).eps:
        raise UserError(
            f"packing: {type(model.causal_lm).__name__} does not keep the documents of a row "
            f"apart (their states differ by {100 * float(worst):.2g}%); train without packing"
        )
