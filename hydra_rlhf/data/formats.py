"""The formats of data that are known: TRL's, and those of the sets that RLHF papers use.

A format is found by a row's columns and turns a row into examples: preferences, demonstrations or
bare prompts. A response begins with the space that separates it from its prompt, as in TRL's own
examples, and ends before the end-of-sequence token, which the trainer adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from hydra_rlhf.data import converters
from hydra_rlhf.data.cells import extra_of, number, text
from hydra_rlhf.data.dialogue import (
    Dialogue,
    Messages,
    messages_of,
    shared_messages,
    shared_text,
)
from hydra_rlhf.data.example import Demonstration, Preference, Prompt
from hydra_rlhf.data.rows import BadRow, kind_of
from hydra_rlhf.errors import UserError

Values = dict[str, Any]
Example = Prompt | Demonstration | Preference


@dataclass(frozen=True)
class Format:
    """One shape of rows."""

    name: str
    columns: tuple[str, ...]  # those that a row must have
    kind: type  # the most that a row gives: Preference, Demonstration or Prompt
    convert: Callable[[Values, Dialogue], Iterator[Example]]
    matches: Callable[[Values], bool] = lambda values: True  # asked where the columns are there


def _preference(values: Values, dialogue: Dialogue) -> Iterator[Preference]:
    chosen, rejected, prompt = values["chosen"], values["rejected"], values["prompt"]
    extra = extra_of(values, *_MARGIN, "prompt", "chosen", "rejected")
    if isinstance(prompt, list):
        messages = messages_of(prompt, "prompt")
        answers = [messages_of(chosen, "chosen"), messages_of(rejected, "rejected")]
        asked, (better, worse) = dialogue.render(messages, answers)
        extra = dialogue.columns(extra, messages)
    elif isinstance(chosen, list) or isinstance(rejected, list):
        # As in ultrafeedback_binarized: the messages hold the prompt, and its column repeats it.
        yield from _implicit_prompt(values, dialogue)
        return
    else:
        asked, better, worse = (text(values, key) for key in ("prompt", "chosen", "rejected"))
    yield Preference(asked, better, worse, _margin(values), extra)


def _implicit_prompt(values: Values, dialogue: Dialogue) -> Iterator[Preference]:
    chosen, rejected = values["chosen"], values["rejected"]
    extra = extra_of(values, *_MARGIN, "prompt", "chosen", "rejected")
    if chosen == rejected:
        raise BadRow("'chosen' and 'rejected' are the same, so the prompt cannot be told from them")
    if isinstance(chosen, list) or isinstance(rejected, list):
        first, second = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
        shared = shared_messages(first, second)
        if shared == 0:
            raise BadRow("'chosen' and 'rejected' begin with different messages: no prompt")
        answers: list[Messages] = [first[shared:], second[shared:]]
        prompt, (better, worse) = dialogue.render(first[:shared], answers)
        extra = dialogue.columns(extra, first[:shared])
    else:
        better, worse = text(values, "chosen"), text(values, "rejected")
        prompt = shared_text(better, worse)
        better, worse = better[len(prompt) :], worse[len(prompt) :]
    yield Preference(prompt, better, worse, _margin(values), extra)


def _prompt_completion(values: Values, dialogue: Dialogue) -> Iterator[Demonstration]:
    extra = extra_of(values, "prompt", "completion")
    if isinstance(values["prompt"], list):
        messages = messages_of(values["prompt"], "prompt")
        answer = messages_of(values["completion"], "completion")
        prompt, (completion,) = dialogue.render(messages, [answer])
        yield Demonstration(prompt, completion, dialogue.columns(extra, messages))
    else:
        yield Demonstration(text(values, "prompt"), text(values, "completion"), extra)


def _prompt_only(values: Values, dialogue: Dialogue) -> Iterator[Prompt]:
    extra = extra_of(values, "prompt")
    if isinstance(values["prompt"], list):
        messages = messages_of(values["prompt"], "prompt")
        prompt, _ = dialogue.render(messages, [])
        yield Prompt(prompt, dialogue.columns(extra, messages))
    else:
        yield Prompt(text(values, "prompt"), extra)


def _messages(values: Values, dialogue: Dialogue) -> Iterator[Demonstration]:
    messages = messages_of(values["messages"], "messages")
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise BadRow("column 'messages': expected an assistant's answer as the last message")
    prompt, (completion,) = dialogue.render(messages[:-1], [messages[-1:]])
    extra = dialogue.columns(extra_of(values, "messages"), messages[:-1])
    yield Demonstration(prompt, completion, extra)


def _text(values: Values, dialogue: Dialogue) -> Iterator[Demonstration]:
    yield Demonstration("", text(values, "text"), extra_of(values, "text"))


_MARGIN = ("margin", "score_chosen", "score_rejected")


def _margin(values: Values) -> float | None:
    """How much better the chosen answer is, where the row says so."""
    if values.get("margin") is not None:
        margin = number(values, "margin")
    elif all(values.get(key) is not None for key in _MARGIN[1:]):
        margin = number(values, "score_chosen") - number(values, "score_rejected")
    else:
        return None
    if not math.isfinite(margin):
        raise BadRow(f"the margin is {margin}")
    return margin


# In order: the first whose columns are there and whose `matches` agrees is taken.
FORMATS = (
    Format("preference", ("prompt", "chosen", "rejected"), Preference, _preference),
    # Before those that have fewer columns, which would take these rows and leave out the prompt.
    Format(
        "instruction-pairs",
        ("instruction", "chosen", "rejected"),
        Preference,
        converters.instruction_pairs,
    ),
    Format(
        "sharegpt-pairs",
        ("conversations", "chosen", "rejected"),
        Preference,
        converters.sharegpt_pairs,
    ),
    Format(
        "hh-rlhf", ("chosen", "rejected"), Preference, converters.hh_rlhf, converters.is_hh_rlhf
    ),
    Format("implicit-prompt", ("chosen", "rejected"), Preference, _implicit_prompt),
    Format("prompt-completion", ("prompt", "completion"), Demonstration, _prompt_completion),
    Format(
        "stack-exchange-paired",
        ("question", "response_j", "response_k"),
        Preference,
        converters.stack_exchange_paired,
    ),
    Format(
        "summarize-from-feedback",
        ("info", "summaries", "choice"),
        Preference,
        converters.summarize_from_feedback,
    ),
    Format(
        "gpt-4-comparisons",
        ("user_input", "responses_and_scores"),
        Preference,
        converters.gpt4_comparisons,
    ),
    Format(
        "oasst-trees",
        ("prompt",),
        Preference,
        converters.oasst_tree,
        lambda values: isinstance(values["prompt"], dict),
    ),
    Format("instruction", ("instruction", "output"), Demonstration, converters.instruction),
    Format("messages", ("messages",), Demonstration, _messages),
    Format("sharegpt", ("conversations",), Demonstration, converters.sharegpt),
    Format("prompt-only", ("prompt",), Prompt, _prompt_only),
    Format("text", ("text",), Demonstration, _text),
)
BY_NAME = {format.name: format for format in FORMATS}


def known_formats(formats: Collection[Format] = FORMATS) -> str:
    """The formats and their columns, for a message."""
    return "; ".join(f"{format.name} ({', '.join(format.columns)})" for format in formats)


def detect(values: Values) -> Format | None:
    """The format of a row, or None."""
    for format in FORMATS:
        if all(column in values for column in format.columns) and format.matches(values):
            return format
    return None


def format_named(name: str) -> Format:
    if name not in BY_NAME:
        raise UserError(f"unknown data format {name!r}; known formats: {', '.join(BY_NAME)}")
    return BY_NAME[name]


def convert(format: Format, values: Values, dialogue: Dialogue) -> list[Example]:
    """A row's examples.

    Raises:
        BadRow: if the row does not fit the format.
        UserError: if messages need a chat template and there is none.
    """
    missing = [column for column in format.columns if column not in values]
    if missing:
        found = ", ".join(map(repr, values)) or "none"
        raise BadRow(f"no column {missing[0]!r} (found: {found[:200]})")
    for column in format.columns:
        if values[column] is None:
            raise BadRow(f"column {column!r} is {kind_of(None)}")
    return list(format.convert(values, dialogue))
