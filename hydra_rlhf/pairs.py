"""Preference pairs as token ids, batched and padded.

A row is ``prompt + response + eos``, prompt and response tokenised apart so that a policy trained
on these rows meets, when it samples, the very prompt ids it was trained on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hydra_rlhf.data import Preference
from hydra_rlhf.errors import UserError
from hydra_rlhf.packing import Packed, pack

IGNORE = -100


@dataclass(frozen=True)
class EncodedPair:
    """A pair, or an answer to imitate alone, whose ``rejected`` is empty."""

    prompt: list[int]
    chosen: list[int]  # with eos, unless it was cut at max_length
    rejected: list[int]
    margin: float | None

    def __len__(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class PairBatch(NamedTuple):
    """First B rows with the chosen responses of the pairs, then rows with the answers to imitate
    alone, then B rows with the rejected responses, in the pairs' order.

    Where the objective has no use for the rejected (``sft``) their rows are absent. The predicted
    tokens are the chosen responses', or, for objectives on likelihoods, both responses'.
    """

    input_ids: Tensor  # (rows, L)
    attention_mask: Tensor  # (rows, L)
    positions: Tensor  # (M,) flat positions in (rows * L) that predict a response's token
    targets: Tensor  # (M,) the token each predicts
    owners: Tensor  # (M,) the row each is of
    start: Tensor  # (rows,) position of the response's first token
    last: Tensor  # (rows,) position of the response's last token
    diverge: Tensor  # (B,) first position where chosen and rejected differ
    margin: Tensor  # (B,)
    num_pairs: int  # B
    num_chosen: int  # B and the answers to imitate alone
    packed: Packed | None = None  # the rows laid end to end, for the decoder to run on instead

    def split(self, each: Tensor) -> tuple[Tensor, Tensor]:
        """(rows,) values of the pairs' chosen and rejected responses, (B,) both."""
        return each[: self.num_pairs], each[self.num_chosen :]

    def to(self, device: torch.device) -> PairBatch:
        moved = [part.to(device) if isinstance(part, (Tensor, Packed)) else part for part in self]
        return PairBatch(*moved)  # type: ignore[arg-type]


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, with whatever the tokenizer puts in front and nothing behind.

    A prompt that has BOS written out, as a chat template leaves it, gets no second one.
    """
    bos, eos = getattr(tokenizer, "bos_token_id", None), tokenizer.eos_token_id
    encoded = [
        ids[1:] if ids[:2] == [bos, bos] else ids for ids in tokenizer(list(prompts))["input_ids"]
    ]
    return [ids[:-1] if ids and ids[-1] == eos and len(ids) > 1 else ids for ids in encoded]


def encode_pairs(
    tokenizer: Any, pairs: Sequence[Preference], *, max_length: int, what: str = "pair"
) -> list[EncodedPair]:
    """Responses that do not fit ``max_length`` are cut; a prompt that fills it is refused.

    Raises:
        UserError: no pairs; a prompt as long as ``max_length`` or longer; no eos token.
    """
    if not pairs:
        raise UserError(f"the data set of {what}s is empty")
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no eos token, so that no response could end")
    prompts = encode_prompts(tokenizer, [pair.prompt for pair in pairs])
    chosen = _encode_responses(tokenizer, [pair.chosen for pair in pairs])
    rejected = _encode_responses(tokenizer, [pair.rejected for pair in pairs])
    encoded = []
    for index, pair in enumerate(pairs):
        room = max_length - len(prompts[index])
        if room < 1:
            raise UserError(
                f"the prompt of {what} {index + 1} has {len(prompts[index])} tokens, which leaves "
                f"no room for a response in a context of {max_length}"
            )
        encoded.append(
            EncodedPair(
                prompts[index],
                _ended(tokenizer, chosen[index], eos)[:room],
                _ended(tokenizer, rejected[index], eos)[:room],
                pair.margin,
            )
        )
    return encoded


def encode_alone(
    tokenizer: Any, demonstrations: Sequence[Any], *, max_length: int
) -> list[EncodedPair]:
    """As ``encode_pairs``, of ``hydra_rlhf.data.Demonstration``."""
    as_pairs = [Preference(one.prompt, one.completion, "") for one in demonstrations]
    encoded = encode_pairs(tokenizer, as_pairs, max_length=max_length, what="demonstration")
    return [EncodedPair(one.prompt, one.chosen, [], None) for one in encoded]


def collate(
    examples: Sequence[EncodedPair],
    *,
    pad: int,
    side: str = "right",
    both: bool = True,
    predict_both: bool = False,
    packed: bool = False,
) -> PairBatch:
    """Pad to the longest row.

    Args:
        examples: The batch, pairs and answers to imitate in any order.
        pad: Token to pad with; which one does not matter.
        side: The tokenizer's ``padding_side``.
        both: Have rows for the rejected responses.
        predict_both: Predict their tokens too.
        packed: Also lay the rows end to end; see ``packing``.
    """
    pairs = [one for one in examples if one.rejected]
    chosen = [*pairs, *(one for one in examples if not one.rejected)]
    rows = [(one.prompt, one.chosen) for one in chosen]
    if both:
        rows += [(pair.prompt, pair.rejected) for pair in pairs]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), length), pad, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
    start = torch.empty(len(rows), dtype=torch.long)
    last = torch.empty(len(rows), dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for row, (prompt, response) in enumerate(rows):
        ids = prompt + response
        offset = length - len(ids) if side == "left" else 0
        input_ids[row, offset : offset + len(ids)] = torch.tensor(ids)
        attention_mask[row, offset : offset + len(ids)] = 1
        first = offset + len(prompt)
        start[row], last[row] = first, offset + len(ids) - 1
        if row < len(chosen) or predict_both:
            # An empty prompt leaves its first token unpredicted.
            predicted = response if prompt else response[1:]
            begin = row * length + offset + len(ids) - len(predicted) - 1
            positions += range(begin, begin + len(predicted))
            targets += predicted
            owners += [row] * len(predicted)
    return PairBatch(
        input_ids,
        attention_mask,
        torch.tensor(positions, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        torch.tensor(owners, dtype=torch.long),
        start,
        last,
        torch.tensor([_divergence(pair) for pair in pairs], dtype=torch.long),
        torch.tensor([pair.margin or 0.0 for pair in pairs], dtype=torch.float32),
        len(pairs),
        len(chosen),
        pack(input_ids, attention_mask) if packed else None,
    )


def mix(
    pairs: Sequence[EncodedPair],
    alone: Sequence[EncodedPair],
    share: float | None,
    *,
    seed: int,
) -> list[EncodedPair]:
    """Pairs and answers to imitate alone as one set.

    Args:
        pairs, alone: The two sets.
        share: How much of the result is ``alone``, in [0, 1): it is drawn from or repeated as
            that takes; None takes each once.
        seed: Of the draw.
    """
    if share is None or not alone or not pairs:
        return [*pairs, *alone]
    count = round(len(pairs) * share / (1.0 - share))
    rng = random.Random(seed)
    drawn = list(alone) * (count // len(alone)) + rng.sample(list(alone), count % len(alone))
    return [*pairs, *drawn]


def batches(
    pairs: Sequence[EncodedPair], batch_size: int, *, seed: int, group_by_length: bool
) -> list[list[EncodedPair]]:
    """One epoch in a random order that ``seed`` fixes; the last batch may be smaller.

    With ``group_by_length`` the pairs of a batch have about the same length, which saves padding:
    the order is random within windows of 16 batches, sorted inside, and batches are shuffled.
    """
    rng = random.Random(seed)
    order = list(pairs)
    rng.shuffle(order)
    if not group_by_length:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    made: list[list[EncodedPair]] = []
    window = 16 * batch_size
    for i in range(0, len(order), window):
        inside = sorted(order[i : i + window], key=len)
        made += [inside[j : j + batch_size] for j in range(0, len(inside), batch_size)]
    rng.shuffle(made)
    return made


def _encode_responses(tokenizer: Any, responses: list[str]) -> list[list[int]]:
    return tokenizer(responses, add_special_tokens=False)["input_ids"]


def _ended(tokenizer: Any, response: list[int], eos: int) -> list[int]:
    """With eos once at its end, where the policy stops and the reward is read.

    A chat template may have written it already, and a line break behind it.
    """
    if eos in response:
        end = len(response) - response[::-1].index(eos)
        if not tokenizer.decode(response[end:]).strip():
            return response[:end]
    return [*response, eos]


def _divergence(pair: EncodedPair) -> int:
    """How many tokens of the response both have in common."""
    for index, (a, b) in enumerate(zip(pair.chosen, pair.rejected, strict=False)):
        if a != b:
            return index
    return min(len(pair.chosen), len(pair.rejected)) - (len(pair.chosen) == len(pair.rejected))
