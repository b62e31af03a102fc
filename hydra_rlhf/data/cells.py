"""Single values of a row, checked: text that is text, numbers that are numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra_rlhf.data.dialogue import check_unicode
from hydra_rlhf.data.rows import BadRow, kind_of


def text(values: Mapping[str, Any], column: str) -> str:
    """The text in a column.

    Raises:
        BadRow: if there is none, or something else, or text that is not Unicode.
    """
    if column not in values:
        raise BadRow(f"no {column!r}")
    value = values[column]
    if not isinstance(value, str):
        raise BadRow(f"column {column!r}: expected text, found {kind_of(value)}")
    check_unicode(value, column)
    return value


def number(values: Mapping[str, Any], column: str) -> float:
    """The number in a column, which CSV holds as text.

    Raises:
        BadRow: if there is none.
    """
    value = values.get(column)
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        found = repr(value[:40]) if isinstance(value, str) else kind_of(value)
        raise BadRow(f"column {column!r}: expected a number, found {found}") from None


def extra_of(values: Mapping[str, Any], *used: str) -> dict[str, Any]:
    """The columns that are not ``used``, and not null."""
    return {key: value for key, value in values.items() if key not in used and value is not None}
