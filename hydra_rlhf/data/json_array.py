"""The elements of one JSON array, one at a time: a file may be larger than memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from hydra_rlhf.errors import UserError

CHUNK = 1 << 16  # bytes read at a time; more where an element is larger
_SPACE = re.compile(r"[ \t\n\r]*")
# A mistake this far before the end of what was read is one, whatever comes after: longer than any
# literal or escape, which may have been cut. A string that does not end is told by its message.
_MARGIN = 16


def elements(file: IO[bytes], path: Path) -> Iterator[Any]:
    """The elements of the array that ``file`` holds, in order, decoded by ``json``.

    Raises:
        UserError: it is not one array in UTF-8, with the line; after the elements before the fault.
    """
    text = _Text(file, path)
    text.skip_space()
    text.take("[")
    text.skip_space()
    if not text.starts("]"):
        while True:
            yield text.element()
            text.skip_space()
            if text.starts("]"):
                break
            text.take(",")
            text.skip_space()
    text.take("]")
    text.skip_space()
    if text.rest():
        text.fail("Extra data")


class _Text:
    """A window on a file: what was read and not yet taken, and where in the file that is."""

    def __init__(self, file: IO[bytes], path: Path):
        self.file, self.path = file, path
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.parser = json.JSONDecoder()
        self.buffer, self.at = "", 0
        self.line, self.column = 1, 1  # of the buffer's start
        self.bytes_read = 0
        self.ended = False

    def rest(self) -> str:
        return self.buffer[self.at :]

    def read(self) -> bool:
        """Drops what was taken and reads on, twice as much as is waiting; False at the end."""
        if self.ended:
            return False
        self._move(self.at)
        data = self.file.read(max(CHUNK, len(self.buffer)))
        self.ended = not data
        try:
            self.buffer += self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            before = self.bytes_read - (len(error.object) - len(data))
            byte = error.object[error.start]
            raise UserError(
                f"{self.path}: not JSON: not UTF-8: byte 0x{byte:02x}, "
                f"number {before + error.start + 1} of the file"
            ) from error
        self.bytes_read += len(data)
        return True

    def skip_space(self) -> None:
        while True:
            found = _SPACE.match(self.buffer, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.buffer) or not self.read():
                return

    def starts(self, character: str) -> bool:
        return self.buffer[self.at : self.at + 1] == character

    def take(self, character: str) -> None:
        if not self.starts(character):
            self.fail(f"Expecting '{character}'")
        self.at += 1

    def element(self) -> Any:
        while True:
            try:
                value, end = self.parser.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.buffer) - _MARGIN or "Unterminated" in error.msg
                if not cut or not self.read():
                    self.at = error.pos
                    self.fail(error.msg.removesuffix(" at"))
            except (ValueError, RecursionError) as error:  # 5000 digits; brackets 5000 deep
                self.fail(" ".join(str(error).split())[:300])
            else:
                # A number may go on in what was not read yet: 12|3, 1|.5, 1.5|e3, 1e|+3.
                next_ = self.buffer[end : end + 1]
                whole = next_ and (next_ not in ".eE" or end < len(self.buffer) - 2)
                if whole or not self.read():
                    self.at = end
                    return value

    def fail(self, message: str) -> NoReturn:
        self._move(self.at)
        raise UserError(
            f"{self.path}, line {self.line}: not JSON: {message} at column {self.column}"
        )

    def _move(self, count: int) -> None:
        """Forgets the first ``count`` characters."""
        lines = self.buffer.count("\n", 0, count)
        self.line += lines
        last = self.buffer.rfind("\n", 0, count)
        self.column = count - last if lines else self.column + count
        self.buffer, self.at = self.buffer[count:], 0
