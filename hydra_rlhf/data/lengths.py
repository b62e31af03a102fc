"""Examples that fit a model's context: the rest refused, dropped or cut."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from hydra_rlhf.data.example import Demonstration, Preference, Prompt
from hydra_rlhf.errors import UserError

_log = logging.getLogger("hydra_rlhf")

E_ = TypeVar("E_", Prompt, Demonstration, Preference)


def tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, nothing added: how every length here is counted."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def limit_length(
    examples: Iterable[E_], tokenizer: Any, max_length: int, *, overlong: str = "error"
) -> list[E_]:
    """The examples that fit into ``max_length`` tokens, an end-of-sequence token included.

    Args:
        examples: prompts, demonstrations or preferences.
        tokenizer: counts the tokens.
        max_length: the context; for bare prompts, the most that a prompt may have.
        overlong: ``error``, ``drop`` or ``truncate``. A prompt that leaves no room for an answer
            loses its beginning, an answer its end.

    Raises:
        UserError: if one does not fit (``error`` names its row, from 1), or if none is left.
    """
    placed = ((f"row {number}", example) for number, example in enumerate(examples, 1))
    kept = [example for _, example in fit(placed, tokenizer, max_length, overlong=overlong)]
    if not kept:
        raise UserError(f"no example fits into {max_length} tokens")
    return kept


def fit(
    placed: Iterable[tuple[str, E_]], tokenizer: Any, max_length: int, *, overlong: str
) -> Iterator[tuple[str, E_]]:
    """:func:`limit_length` one by one, on examples that come with their place.

    A warning at the end says how many were dropped or truncated.
    """
    if max_length < 3:
        raise UserError(f"max_length: expected at least 3 tokens, got {max_length}")
    changed = count = 0
    for where, example in placed:
        count += 1
        problem = overlong_by(example, tokenizer, max_length)
        if not problem:
            yield where, example
        elif overlong == "error":
            raise UserError(f"{where}: {problem} (or choose to drop or truncate what is too long)")
        else:
            changed += 1
            if overlong == "truncate":
                yield where, _cut(example, tokenizer, max_length)
    if changed:
        done = "dropped" if overlong == "drop" else "truncated"
        _log.warning("%d of %d examples did not fit and were %s", changed, count, done)


def overlong_by(example: Prompt | Demonstration | Preference, tokenizer: Any, context: int) -> str:
    """What about an example does not fit, with its length; empty if all of it fits."""
    prompt = len(tokens(tokenizer, example.prompt))
    room = context if isinstance(example, Prompt) else context - 2  # one token and the end
    if prompt > room:
        return f"the prompt has {prompt} tokens, longer than the context of {context} allows"
    for name in ("completion", "chosen", "rejected"):
        answer = getattr(example, name, None)
        if answer is not None:
            length = prompt + len(tokens(tokenizer, answer)) + 1
            if length > context:
                return (
                    f"the prompt and {name!r} have {length} tokens, the end included; "
                    f"the context has {context}"
                )
    return ""


def _cut(example: E_, tokenizer: Any, context: int) -> E_:
    if isinstance(example, Prompt):
        return replace(example, prompt=_last(tokenizer, example.prompt, context))
    # An answer keeps at least a quarter of the context, or all of itself where that is less.
    names = [name for name in ("completion", "chosen", "rejected") if hasattr(example, name)]
    longest = max(len(tokens(tokenizer, getattr(example, name))) for name in names)
    answer = max(1, min(longest, (context - 1) // 4))
    prompt = _last(tokenizer, example.prompt, context - 1 - answer)
    room = context - 1 - len(tokens(tokenizer, prompt))
    cut = {name: _first(tokenizer, getattr(example, name), room) for name in names}
    return replace(example, prompt=prompt, **cut)  # type: ignore[arg-type]


def _first(tokenizer: Any, text: str, count: int) -> str:
    """The beginning of a text, at most ``count`` tokens long."""
    return _shortened(tokenizer, text, count, lambda ids, n: ids[:n])


def _last(tokenizer: Any, text: str, count: int) -> str:
    """The end of a text, at most ``count`` tokens long."""
    return _shortened(tokenizer, text, count, lambda ids, n: ids[len(ids) - n :])


def _shortened(tokenizer: Any, text: str, count: int, part: Any) -> str:
    ids = tokens(tokenizer, text)
    if len(ids) <= count:
        return text
    # Cut inside a character or a word, the text may come back as more tokens than it was cut to.
    for keep in range(count, 0, -1):
        short = tokenizer.decode(part(ids, keep), clean_up_tokenization_spaces=False)
        if len(tokens(tokenizer, short)) <= count:
            return str(short)
    return ""
