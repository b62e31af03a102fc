"""Preferences, demonstrations and prompts from a file, a folder or the Hub, in any known format.

``load_*`` gives a list, ``iter_*`` the same one by one in constant memory. Both stop at the first
row that cannot be used, with one line that says which and why; :mod:`hydra_rlhf.data.check` lists
them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from hydra_rlhf.data.dialogue import Dialogue
from hydra_rlhf.data.example import Demonstration, Preference, Prompt
from hydra_rlhf.data.formats import (
    FORMATS,
    Example,
    Format,
    convert,
    detect,
    format_named,
    known_formats,
)
from hydra_rlhf.data.lengths import fit
from hydra_rlhf.data.rows import BadRow, Row, read_rows
from hydra_rlhf.data.trees import grown
from hydra_rlhf.errors import UserError

Source = str | Path
E_ = TypeVar("E_", Prompt, Demonstration, Preference)


def load_preferences(source: Source, **options: Any) -> list[Preference]:
    """All pairs of a set; see :func:`iter_preferences` for the arguments and errors."""
    return list(iter_preferences(source, **_kept_on_disk(options)))


def load_sft(source: Source, **options: Any) -> list[Demonstration]:
    """All demonstrations of a set; see :func:`iter_sft`."""
    return list(iter_sft(source, **_kept_on_disk(options)))


def load_prompts(source: Source, **options: Any) -> list[Prompt]:
    """All prompts of a set; see :func:`iter_prompts`."""
    return list(iter_prompts(source, **_kept_on_disk(options)))


def iter_preferences(source: Source, **options: Any) -> Iterator[Preference]:
    """The pairs of a set, one by one.

    Args:
        source: a file, a folder, or the name of a set on the Hub; see
            :func:`hydra_rlhf.data.rows.read_rows`.
        split: which split of a folder or Hub set, ``train`` by default.
        tokenizer: its chat template makes the text of conversational data; ``max_length`` counts
            its tokens.
        format: a format's name (:data:`hydra_rlhf.data.formats.FORMATS`); by default it is told
            from the first row's columns.
        max_length: the context in tokens, end-of-sequence token included.
        overlong: what to do with a longer example: ``error``, ``drop`` it, or ``truncate`` it. A
            prompt that leaves no room for an answer loses its beginning, an answer its end.
        limit: take at most so many examples.

    Raises:
        UserError: in one line, for a missing or unreadable source, unknown columns, a row that
            cannot be used, an example that does not fit, or a set without any pair.
    """
    return _checked(Preference, source, **options)


def iter_sft(source: Source, **options: Any) -> Iterator[Demonstration]:
    """The demonstrations of a set, one by one; of pairs, the best answer to each prompt.

    Arguments and errors are those of :func:`iter_preferences`.
    """
    return _checked(Demonstration, source, **options)


def iter_prompts(source: Source, **options: Any) -> Iterator[Prompt]:
    """The prompts of a set, one by one; one that a row answers several times comes once.

    Arguments and errors are those of :func:`iter_preferences`; ``max_length`` is the prompt's.
    """
    return _checked(Prompt, source, **options)


def _kept_on_disk(options: dict[str, Any]) -> dict[str, Any]:
    return {"streaming": False, **options}


def _checked(
    kind: type[E_],
    source: Source,
    *,
    split: str | None = None,
    tokenizer: Any = None,
    format: str | None = None,
    max_length: int | None = None,
    overlong: str = "error",
    limit: int | None = None,
    streaming: bool = True,
) -> Iterator[E_]:
    """Checks the arguments at once, not when the first example is asked for."""
    if max_length is not None and tokenizer is None:
        raise ValueError("max_length needs a tokenizer")
    if overlong not in ("error", "drop", "truncate"):
        raise UserError(f"overlong: expected error, drop or truncate, got {overlong!r}")
    named = format_named(format) if format is not None else None
    rows = grown(read_rows(source, split=split, streaming=streaming))
    dialogue = Dialogue(tokenizer, keep_messages=kind is Prompt)
    found = _examples(kind, str(source), rows, named, dialogue)
    if max_length is not None:
        found = fit(found, tokenizer, max_length, overlong=overlong)
    return _some(found, str(source), kind, limit)


def _examples(
    kind: type[E_], source: str, rows: Iterable[Row], format: Format | None, dialogue: Dialogue
) -> Iterator[tuple[str, E_]]:
    """Each example with the place that messages name: the source and the row."""
    checked = False
    for row in rows:
        where = f"{source}, {row.where}"
        if row.values is None:
            raise UserError(f"{where}: {row.problem}")
        if format is None:
            format = detect(row.values)
            if format is None:
                raise UserError(f"{where}: {unknown_columns(row.values)}")
        if not checked:
            _check_kind(kind, format, source)
            checked = True
        try:
            examples = convert(format, row.values, dialogue)
        except (BadRow, UserError) as error:
            raise UserError(f"{where}: {error}") from error
        for example in examples_as(kind, examples):
            if kind is Prompt and not example.prompt.strip():
                raise UserError(f"{where}: the prompt is empty")
            yield where, example


def unknown_columns(values: dict[str, Any]) -> str:
    found = ", ".join(repr(column)[:60] for column in list(values)[:20]) or "none"
    return f"unknown columns: found {found}; known formats: {known_formats()}"


def _check_kind(kind: type, format: Format, source: str) -> None:
    if kind is Preference and format.kind is not Preference:
        pairs = known_formats([f for f in FORMATS if f.kind is Preference])
        raise UserError(f"{source}: format {format.name} has no pairs; formats with pairs: {pairs}")
    if kind is Demonstration and format.kind is Prompt:
        answers = known_formats([f for f in FORMATS if f.kind is not Prompt])
        raise UserError(
            f"{source}: format {format.name} has no answers; formats with answers: {answers}"
        )
    if kind is Prompt and format.name == "text":
        prompts = known_formats([f for f in FORMATS if f.name != "text"])
        raise UserError(f"{source}: format text has no prompts; formats with prompts: {prompts}")


def _answers(example: Example) -> dict[str, Any]:
    """The answers as columns, for rewards that compare with them."""
    if isinstance(example, Preference):
        return {"chosen": example.chosen, "rejected": example.rejected}
    return {"completion": example.completion} if isinstance(example, Demonstration) else {}


def examples_as(kind: type[E_], examples: Iterable[Example]) -> Iterator[E_]:
    """One row's examples as the kind that is asked for."""
    seen = set()
    for example in examples:
        if kind is Preference:
            if isinstance(example, Preference):
                yield example  # type: ignore[misc]
            continue
        if example.prompt in seen:
            continue  # the first pair of a prompt has its best answer
        seen.add(example.prompt)
        if kind is Prompt:
            yield Prompt(example.prompt, _answers(example) | example.extra)  # type: ignore[misc]
        elif isinstance(example, Preference):
            yield Demonstration(example.prompt, example.chosen, example.extra)  # type: ignore[misc]
        elif isinstance(example, Demonstration):
            yield example  # type: ignore[misc]


def _some(
    found: Iterator[tuple[str, E_]], source: str, kind: type, limit: int | None
) -> Iterator[E_]:
    count = 0
    for _, example in found:
        if limit is not None and count >= limit:
            return
        yield example
        count += 1
    if count == 0:
        raise UserError(f"{source}: no {kind.__name__.lower()}s in it")
