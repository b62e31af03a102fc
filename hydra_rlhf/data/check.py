"""What is in a data file, and whether it can be trained on: ``hydra-rlhf data check FILE``."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra_rlhf.data.dialogue import Dialogue
from hydra_rlhf.data.example import Demonstration, Preference, Prompt
from hydra_rlhf.data.formats import Example, Format, convert, detect, format_named
from hydra_rlhf.data.lengths import overlong_by, tokens
from hydra_rlhf.data.loading import unknown_columns
from hydra_rlhf.data.rows import BadRow, Row, read_rows
from hydra_rlhf.data.trees import grown

MAX_BAD_ROWS = 20  # so many are listed; all are counted
LONG_PROBLEM = 100  # characters: the list of known formats is not said for every row
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
PARTS = ("prompt", "completion", "chosen", "rejected")
_TURNS = (*PARTS, "messages", "conversations")  # columns that may hold a dialogue


@dataclass
class Report:
    """What :func:`check` found. ``usable`` is whether training would accept it as it is."""

    source: str
    format: str | None = None
    rows: int = 0  # those that could be read and those that could not
    examples: dict[str, int] = field(default_factory=dict)  # preferences, demonstrations, prompts
    bad_rows: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)  # the first bad rows: where, why
    repeated_examples: int = 0  # examples that an earlier one equals
    repeated_prompts: int = 0  # examples whose prompt an earlier one has
    identical_pairs: int = 0  # chosen equals rejected
    empty_answers: int = 0
    empty_prompts: int = 0  # of pairs and bare prompts: demonstrations may do without
    characters: dict[str, list[int]] = field(default_factory=dict)  # by part, at QUANTILES
    tokens: dict[str, list[int]] = field(default_factory=dict)  # the same, with a tokenizer
    max_length: int | None = None
    overlong: int = 0  # examples that do not fit into max_length
    has_transcripts: bool = False  # lengths are of plain transcripts for want of a chat template

    @property
    def usable(self) -> bool:
        return not self.why_not

    @property
    def why_not(self) -> str:
        """What keeps it from being usable, or nothing."""
        if self.bad_rows:
            return f"{self.bad_rows} of {self.rows} rows are bad"
        if self.rows == 0:
            return "it is empty"
        return "" if self.examples else "its rows hold no examples"


def check(
    source: str | Path,
    *,
    split: str | None = None,
    format: str | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
) -> Report:
    """Reads a whole set and reports on it, bad rows included.

    Args:
        source: as :func:`hydra_rlhf.data.iter_preferences`, like ``split`` and ``format``.
        tokenizer: to count lengths in tokens too, and to lay out conversations.
        max_length: to count the examples that do not fit into such a context; needs a tokenizer.

    Raises:
        UserError: if the source is missing, or cannot be read at all.
    """
    if max_length is not None and tokenizer is None:
        raise ValueError("max_length needs a tokenizer")
    named = format_named(format) if format is not None else None
    report = Report(str(source), named.name if named else None, max_length=max_length)
    dialogue = Dialogue(tokenizer, plain=True)
    tally = _Tally(report, tokenizer)
    said: dict[str, str] = {}  # a problem -> the row where it was first met
    for row in grown(read_rows(source, split=split)):
        report.rows += 1
        try:
            if row.values is None:
                raise BadRow(row.problem)
            if named is None:
                named = _detected(row, report)
            report.has_transcripts |= _is_conversational(row.values)
            for example in convert(named, row.values, dialogue):
                tally.add(example)
        except BadRow as error:
            report.bad_rows += 1
            if len(report.problems) < MAX_BAD_ROWS:
                why = str(error)
                first = said.setdefault(why, row.where)
                if first != row.where and len(why) > LONG_PROBLEM:
                    why = f"as {first}"
                report.problems.append((row.where, why))
    tally.finish()
    report.has_transcripts &= not getattr(tokenizer, "chat_template", None)
    return report


def _detected(row: Row, report: Report) -> Format:
    values = row.values or {}
    format = detect(values)
    if format is None:
        raise BadRow(unknown_columns(values))
    report.format = format.name
    return format


def _is_conversational(values: dict[str, Any]) -> bool:
    return any(isinstance(values.get(key), list) for key in _TURNS) or isinstance(
        values.get("prompt"), dict
    )


class _Tally:
    """Counts examples as they pass. Of a text it keeps a hash and its lengths, not the text."""

    def __init__(self, report: Report, tokenizer: Any):
        self.report, self.tokenizer = report, tokenizer
        self.seen: set[int] = set()
        self.prompts: set[int] = set()
        self.characters: dict[str, array[int]] = {}
        self.tokens: dict[str, array[int]] = {}

    def add(self, example: Example) -> None:
        report = self.report
        kind = _KINDS[type(example)]
        report.examples[kind] = report.examples.get(kind, 0) + 1
        parts = {part: getattr(example, part) for part in PARTS if hasattr(example, part)}
        key, prompt = hash(tuple(parts.items())), hash(example.prompt)
        report.repeated_examples += key in self.seen
        report.repeated_prompts += prompt in self.prompts
        self.seen.add(key)
        self.prompts.add(prompt)
        if isinstance(example, Preference):
            report.identical_pairs += example.chosen == example.rejected
        if not isinstance(example, Demonstration):
            report.empty_prompts += not example.prompt.strip()
        report.empty_answers += any(
            not text.strip() for part, text in parts.items() if part != "prompt"
        )
        for part, text in parts.items():
            self.characters.setdefault(part, array("L")).append(len(text))
            if self.tokenizer is not None:
                self.tokens.setdefault(part, array("L")).append(len(tokens(self.tokenizer, text)))
        if report.max_length is not None:
            report.overlong += bool(overlong_by(example, self.tokenizer, report.max_length))

    def finish(self) -> None:
        for counted, into in (
            (self.characters, self.report.characters),
            (self.tokens, self.report.tokens),
        ):
            for part, lengths in counted.items():
                ordered = sorted(lengths)
                into[part] = [ordered[round(q * (len(ordered) - 1))] for q in QUANTILES]


_KINDS = {Preference: "preferences", Demonstration: "demonstrations", Prompt: "prompts"}


def render(report: Report) -> str:
    """A report as the command line shows it."""
    lines = [report.source]
    lines.append(f"  format     {report.format or 'not known'}")
    counts = [f"{count} {kind}" for kind, count in report.examples.items()]
    lines.append(f"  rows       {report.rows}" + (f": {', '.join(counts)}" if counts else ""))
    for unit, lengths in (("characters", report.characters), ("tokens", report.tokens)):
        lines += _table(unit, lengths)
    if report.has_transcripts:
        lines.append("  lengths are of plain transcripts: training needs a chat template here")
    for count, what in (
        (report.repeated_examples, "examples repeat an earlier one"),
        (report.repeated_prompts, "examples repeat an earlier one's prompt"),
        (report.identical_pairs, "pairs have the same text chosen and rejected"),
        (report.empty_answers, "examples have an empty answer"),
        (report.empty_prompts, "examples have an empty prompt"),
        (report.overlong, f"examples do not fit into {report.max_length} tokens"),
    ):
        if count:
            lines.append(f"  {count} {what}")
    if report.bad_rows:
        lines.append(f"  {report.bad_rows} bad rows:")
        lines += [f"    {where}: {why}" for where, why in report.problems]
        if report.bad_rows > len(report.problems):
            lines.append(f"    ... and {report.bad_rows - len(report.problems)} more")
    lines.append("usable" if report.usable else f"not usable: {report.why_not}")
    return "\n".join(lines)


def _table(unit: str, lengths: dict[str, list[int]]) -> list[str]:
    if not lengths:
        return []
    heads: Sequence[str] = ("min", "25%", "median", "75%", "95%", "max")
    lines = [f"  {unit:<12}" + "".join(f"{head:>8}" for head in heads)]
    lines += [
        f"    {part:<10}" + "".join(f"{length:>8}" for length in quantiles)
        for part, quantiles in lengths.items()
    ]
    return lines
