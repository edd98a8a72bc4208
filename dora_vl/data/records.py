"""Reading a file of records, JSON list or JSON lines, without ever holding it in memory.

Only the standard library at import, so that data preparation can use it alone.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from dora_vl.data.text_file import NotUtf8, Progress, opened, refuse_half_pairs
from dora_vl.errors import UserError, shown

CHUNK_BYTES = 1 << 20
MAX_RECORD_CHARACTERS = 1 << 26
"""A value that is still open after 64 Mi characters is a missing quote or bracket, not a sample."""

_ROWS_IN_AN_OBJECT = re.compile(r'\{\s*"(data|rows|samples|examples)"\s*:\s*\[\s*\{')

_WHITESPACE = " \t\r\n"


def stream_records(
    path: Path, *, key: str | None = None, progress: Progress | None = None
) -> Iterator[dict[str, object]]:
    """Yields the objects of a JSON list, or of JSON lines, in order.

    `json`'s own scanner over a growing buffer: as fast as `ijson` on yajl to within a fifth (144,000 against 175,000
    rows of 1.1 kB a second), without the dependency, and an error has its line.

    Args:
        path: the file.
        key: the file is one object, and the list is what it holds under this name.
        progress: called with the number of bytes at each piece that is read.

    Raises:
        UserError: not UTF-8, malformed or cut off, an entry that is no object, or nothing under `key`.
    """
    with opened(path, "records") as file:
        source = _Source(path, file, progress)
        if key is not None:
            yield from _list_under(source, key)
        elif source.next_character() == "[":
            yield from _list_entries(source)
            source.expect_end("list")
        elif (name := source.name_of_list()) is not None:
            yield from _list_under(source, name, alone=True)
        else:
            while source.next_character():
                yield source.take_object()


def stream_values(path: Path, wanted: str) -> Iterator[tuple[int, object]]:
    """Yields the entries of a JSON list, or the values of JSON lines or of one JSON text, with the line of each.

    Args:
        wanted: what the file should be, for the message.

    Raises:
        UserError: no such file, not UTF-8, malformed or cut off, or half of a surrogate pair in a text.
    """
    with opened(path, wanted) as file:
        source = _Source(path, file)
        if source.next_character() == "[":
            yield from _numbered_entries(source)
            source.expect_end("list")
        elif (name := source.name_of_list()) is not None:
            yield from ((source.line(), row) for row in _list_under(source, name, alone=True))
        else:
            while source.next_character():
                yield source.line(), source.take_text_value()


def stream_members(path: Path, *, progress: Progress | None = None) -> Iterator[tuple[str, dict[str, object]]]:
    """Yields the members, name and object, of a file that is one JSON object of objects; see `stream_records`.

    Raises:
        UserError: not UTF-8, malformed or cut off, or a member that is no object.
    """
    with opened(path, "records") as file:
        source = _Source(path, file, progress)
        for name in _member_names(source):
            yield name, source.take_object()


def _list_under(source: _Source, key: str, *, alone: bool = False) -> Iterator[dict[str, object]]:
    """Yields what the list holds; where it must stand `alone`, other lists and objects are not passed over."""
    names: list[str] = []
    for name in _member_names(source):
        names.append(name)
        if name != key:
            value = source.take_value()
            if alone and value and isinstance(value, list | dict):
                source.fail(
                    f"beside {key!r} stands {shown(name)}; write the rows that are meant as a list of their own"
                )
        elif source.next_character() != "[":
            source.fail(f"{key!r} must hold a list")
        else:
            yield from _list_entries(source)
    if key not in names:
        source.fail(f"there is no {key!r}, only {', '.join(map(shown, names[:8])) or 'nothing'}")


def _member_names(source: _Source) -> Iterator[str]:
    """Yields each name of an object that is the whole file; who asks takes the value before the next one."""
    source.expect("{", "an object")
    closed = source.next_character() == "}"
    while not closed:
        name = source.take_value()
        if not isinstance(name, str):
            source.fail("expected a name in quotes")
        source.expect(":", f"':' after {shown(name)}")
        yield name
        closed = source.next_character() != ","
        if not closed:
            source.take_character()
    source.expect("}", "',' or '}' after a member of the object")
    source.expect_end("object")


def _list_entries(source: _Source) -> Iterator[dict[str, object]]:
    source.take_character()
    if source.next_character() != "]":
        yield source.take_object()
        while source.next_character() == ",":
            source.take_character()
            yield source.take_object()
    source.expect("]", "',' or ']' after an entry of the list")


def _numbered_entries(source: _Source) -> Iterator[tuple[int, object]]:
    source.take_character()
    if source.next_character() != "]":
        yield source.line(), source.take_text_value()
        while source.next_character() == ",":
            source.take_character()
            source.next_character()
            yield source.line(), source.take_text_value()
    source.expect("]", "',' or ']' after an entry of the list")


class _Source:
    """The unread part of a file: a buffer, a position in it, and the line the buffer starts at."""

    def __init__(self, path: Path, file: io.BufferedIOBase, progress: Progress | None = None) -> None:
        self._path = path
        self._progress = progress
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._buffer = ""
        self._position = 0
        self._line, self._counted = 1, 0
        self._ended = False
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)

    def next_character(self) -> str:
        """The next character that is not whitespace, left unread; empty at the end of the file."""
        while True:
            while self._position < len(self._buffer):
                character = self._buffer[self._position]
                if character not in _WHITESPACE:
                    return character
                self._position += 1
            if self._ended:
                return ""
            self._refill(CHUNK_BYTES)

    def name_of_list(self) -> str | None:
        """The name of the rows' list, where the file is one object that begins with it."""
        found = _ROWS_IN_AN_OBJECT.match(self._buffer, self._position)
        return found and found[1]

    def line(self) -> int:
        """The line of the current position, from 1."""
        self._line += self._buffer.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line

    def take_character(self) -> None:
        self._position += 1

    def expect(self, character: str, what: str) -> None:
        """Takes the next character, which must be this one."""
        if self.next_character() != character:
            self.fail(f"expected {what}")
        self._position += 1

    def expect_end(self, what: str) -> None:
        """Nothing but whitespace may be left."""
        if self.next_character():
            self.fail(f"there is text after the end of the {what}")

    def take_object(self) -> dict[str, object]:
        """Reads one object."""
        value, end = self._decoded()
        if not isinstance(value, dict):
            self.fail(f"a record must be an object, found {type(value).__name__}")
        self._position = end
        return value

    def take_value(self) -> object:
        """Reads one value of any kind."""
        value, self._position = self._decoded()
        return value

    def take_text_value(self) -> object:
        """Reads one value of any kind whose text can be printed and written.

        Raises:
            UserError: it holds half of a surrogate pair.
        """
        value, end = self._decoded()
        if any(self._buffer.find(half, self._position, end) >= 0 for half in ("\\ud", "\\uD")):
            refuse_half_pairs(value, f"{self._path}, line {self.line()}")
        self._position = end
        return value

    def _decoded(self) -> tuple[object, int]:
        """The next value and where it ends, growing the buffer until it holds all of it."""
        self.next_character()
        while True:
            try:
                value, end = self._json.raw_decode(self._buffer, self._position)
                if end < len(self._buffer) or self._ended:  # a number could go on
                    return value, end
            except RecursionError:
                self.fail("its values are nested too deeply")
            except json.JSONDecodeError as error:
                if self._ended or len(self._buffer) - self._position > MAX_RECORD_CHARACTERS:
                    self._position = error.pos
                    self.fail(error.msg)
            except ValueError as error:  # a number of too many digits
                self.fail(str(error))
            self._refill(max(CHUNK_BYTES, len(self._buffer) - self._position))

    def fail(self, what: str) -> NoReturn:
        """Raises with the line of the current position."""
        line = self.line()
        if self._ended and self._position >= len(self._buffer.rstrip(_WHITESPACE)):
            what = f"the file ends too early ({what}); it may be cut off, fetch or write it again"
        raise UserError(f"{self._path}, line {line}: not the JSON list or JSON lines expected: {what}")

    def _refill(self, size: int) -> None:
        self.line()
        chunk = self._file.read(size)
        self._ended = not chunk
        if self._progress is not None:
            self._progress(len(chunk))
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            offset = self._file.tell() - len(chunk) - pending + error.start
            raise NotUtf8(f"{self._path}, byte {offset}: not UTF-8 ({error.reason}); convert the file") from None
        self._buffer = self._buffer[self._position :] + text
        self._position = self._counted = 0
