"""The bundled task: short questions on eight themes, and kind, fitting, finished answers preferred.

The task comes with :func:`gold_reward`, from which its labels were drawn (with noise) and which
training never sees, so that what a policy has learned is measured and not assumed.

A response begins with its space: prompt ``"Tell me about the rain."``, response ``" The rain is
lovely ..."``. The text of a dialogue is ``prompt + response``, and since :func:`build_tokenizer`
starts words at their space, the tokens of the two, joined, are the tokens of the whole.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from importlib import resources
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hydra_rlhf.data.example import Preference, Prompt
from hydra_rlhf.data.gold import gold_reward

__all__ = ["build_tokenizer", "demo_pairs", "demo_prompts", "gold_reward"]

SPLITS = ("train", "test")


def demo_pairs(split: str = "train") -> list[Preference]:
    """The bundled preference pairs: 4000 to train on, or 400 held out (``split="test"``)."""
    return [
        Preference(record["prompt"], record["chosen"], record["rejected"])
        for record in _read(_checked(split))
    ]


def demo_prompts(split: str = "train") -> list[Prompt]:
    """The prompts of the training pairs, or 400 that are in no pair at all (``split="test"``)."""
    name = {"train": "train", "test": "prompts"}[_checked(split)]
    return [Prompt(record["prompt"]) for record in _read(name)]


def build_tokenizer(
    texts: Iterable[str], vocab_size: int = 1024, *, model_max_length: int = 256
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, which any text goes through and comes back unchanged.

    No special token is added by itself: a prompt's tokens followed by a response's are those of the
    joined text, wherever the response begins with a space. ``<pad>, <s>, </s>`` are 0, 1, 2.

    Args:
        texts: what to learn the merges from.
        vocab_size: at most so many tokens, the 256 bytes and three special tokens among them.
        model_max_length: the context that the tokenizer reports.

    Returns:
        A tokenizer with ``pad_token != eos_token`` that pads on the left; ``save_pretrained``
        makes a folder that ``AutoTokenizer.from_pretrained`` loads.

    Raises:
        ValueError: if ``vocab_size`` has no room for the bytes and the special tokens.
    """
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"build_tokenizer: expected vocab_size of at least {len(alphabet) + len(special)}, "
            f"got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def _checked(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"bundled task: expected split to be one of {SPLITS}, got {split!r}")
    return split


@functools.cache
def _read(name: str) -> list[dict[str, Any]]:
    file = resources.files("hydra_rlhf.data") / "bundled" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
