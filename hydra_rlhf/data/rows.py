"""Rows out of files, folders and Hub sets, one at a time, each with the place it came from.

JSON Lines, JSON arrays, CSV and Parquet are read in constant memory, and so is what ``datasets``
reads.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hydra_rlhf.data.json_array import elements
from hydra_rlhf.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
KNOWN = "known are .jsonl, .json, .csv, .tsv (each also with .gz) and .parquet"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
MAX_CELL = 1 << 30  # csv's own limit of 128 KB is below a long article

_BROKEN = (OSError, EOFError, zlib.error)  # what a damaged or unreadable file raises while read


@dataclass(frozen=True)
class Row:
    """One row. ``values`` is None where the row could not be read, and ``problem`` says why."""

    where: str  # "line 3" or "row 3", counted from 1
    values: dict[str, Any] | None
    problem: str = ""


class BadRow(ValueError):
    """A row that cannot be used; the message says what is wrong with it, not where it is."""


def read_rows(
    source: str | Path, *, split: str | None = None, streaming: bool = True
) -> Iterator[Row]:
    """The rows of a file, a folder or a set on the Hub.

    Args:
        source: a file (:data:`KNOWN`); a folder written by ``Dataset.save_to_disk``, or one that
            ``datasets.load_dataset`` reads; or the name of a set on the Hub, ``owner/name`` or
            ``owner/name:config``.
        split: which split of a folder or a Hub set, ``train`` by default. A file has none.
        streaming: read a Hub set as it arrives, without keeping it on disk.

    Raises:
        UserError: if the source is missing, is of no known type, or cannot be read at all. What is
            wrong with one row alone is in that row's ``problem``.
    """
    path = Path(source).expanduser()
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # a name too long, or with a NUL in it
        raise UserError(f"{str(source)[:200]!r} is no file name: {error}") from error
    if is_dir:
        return _folder(path, split)
    if is_file:
        if split not in (None, "train"):
            raise UserError(f"{path}: one file has no splits, so no split {split!r}")
        return _file(path)
    if path.exists():
        raise UserError(f"{path}: neither a file nor a folder")
    if _suffix(path) in SUFFIXES or not HUB_NAME.fullmatch(str(source)):
        raise UserError(f"{source}: no such file")
    return _hub(str(source), split, streaming)


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _file(path: Path) -> Iterator[Row]:
    suffix = _suffix(path)
    zipped = path.name.lower().endswith(".gz")
    if suffix not in SUFFIXES or (zipped and suffix == ".parquet"):
        raise UserError(f"{path}: unknown file type {path.suffix!r}; {KNOWN}")
    if suffix == ".parquet":
        return _parquet(path)
    reader = {".json": _json, ".csv": _csv, ".tsv": _csv}.get(suffix, _jsonl)
    return _opened(path, zipped, reader)


def _opened(path: Path, zipped: bool, reader: Any) -> Iterator[Row]:
    try:
        with gzip.open(path, "rb") if zipped else path.open("rb") as file:
            start = file.peek(4)[:4]  # type: ignore[union-attr]
            if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"{path}: is UTF-16; save it as UTF-8")
            if start == b"PAR1":
                raise UserError(f"{path}: is a Parquet file; name it .parquet")
            yield from reader(file, path)
    except _BROKEN as error:
        raise UserError(f"{path}: cannot be read: {_one_line(error)}") from error


# ---- JSON


def _jsonl(file: IO[bytes], path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield _json_row(line.rstrip(b"\r\n"), f"line {number}")


def _json_row(line: bytes, where: str) -> Row:
    try:
        value = json.loads(_decoded(line))
        return Row(where, _checked_row(value))
    except BadRow as error:
        return Row(where, None, str(error))
    except json.JSONDecodeError as error:
        return Row(where, None, f"not JSON: {_reason(error)}")
    except (ValueError, RecursionError) as error:  # a number of 5000 digits; brackets 5000 deep
        return Row(where, None, f"not JSON: {_one_line(error)}")


def _reason(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise BadRow(f"not UTF-8: byte 0x{byte:02x} at column {error.start + 1}") from error


def _checked_row(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRow(f"expected an object with named values, found {kind_of(value)}")
    return value


def _json(file: IO[bytes], path: Path) -> Iterator[Row]:
    """One array of objects; or JSON Lines under the other name, as many sets have it."""
    start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    file.seek(0)
    if not start.startswith(b"["):
        yield from _jsonl(file, path)
        return
    for number, value in enumerate(elements(file, path), 1):
        try:
            yield Row(f"row {number}", _checked_row(value))
        except BadRow as error:
            yield Row(f"row {number}", None, str(error))


# ---- CSV


def _csv(file: IO[bytes], path: Path) -> Iterator[Row]:
    """Cells stay text; an empty cell is a null, since CSV cannot tell the two apart."""
    csv.field_size_limit(MAX_CELL)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    tabs = path.name.lower().removesuffix(".gz").endswith(".tsv")
    lines = csv.reader(text, delimiter="\t" if tabs else ",", strict=True)
    try:
        header = next(lines, [])
        if len(set(header)) != len(header):
            raise UserError(f"{path}: a column name occurs twice in the header: {header}")
        while True:
            where = f"line {lines.line_num + 1}"
            cells = next(lines, None)
            if cells is None:
                return
            if not cells:
                continue
            if len(cells) != len(header):
                problem = f"expected {len(header)} columns as in the header, found {len(cells)}"
                yield Row(where, None, problem)
            elif any(re.search("[\udc80-\udcff]", cell) for cell in cells):
                yield Row(where, None, "not UTF-8")
            else:
                yield Row(where, {k: v or None for k, v in zip(header, cells, strict=True)})
    except csv.Error as error:
        raise UserError(f"{path}, line {lines.line_num}: not CSV: {error}") from error
    finally:
        text.detach()


# ---- Parquet and datasets


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", values)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {_one_line(error)}") from error


def _folder(path: Path, split: str | None) -> Iterator[Row]:
    import datasets

    def load() -> Any:
        if (path / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(path))
            name = split or "train"
            if name not in splits:
                raise UserError(f"{path}: no split {name!r}; it has {', '.join(splits)}")
            return splits[name]
        if (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path), split=split or "train", streaming=True)

    return _from_datasets(str(path), load)


def _hub(name: str, split: str | None, streaming: bool) -> Iterator[Row]:
    import datasets

    repo, _, config = name.partition(":")

    def load() -> Any:
        return datasets.load_dataset(
            repo, config or None, split=split or "train", streaming=streaming
        )

    return _from_datasets(f"{name} (no such file; read from the Hub)", load)


def _from_datasets(name: str, load: Any) -> Iterator[Row]:
    try:
        for number, values in enumerate(load(), 1):
            yield Row(f"row {number}", values)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # datasets raises whatever its readers and the network raise
        raise UserError(f"{name}: cannot be loaded: {_one_line(error)}") from error


def kind_of(value: Any) -> str:
    """What a value is called in a message to the user."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text[:300] + " ...") if len(text) > 300 else text or type(error).__name__
