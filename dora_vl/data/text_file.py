"""Text files that a person gives: lines, tables and JSON, in bounded memory and with no other error than `UserError`.

UTF-8, a byte order mark at the beginning or none. Only the standard library. Publishers' files, records, predictions
and questions are all read through here.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from dora_vl.errors import UserError, one_line, shown, shown_names, shown_text

_log = logging.getLogger(__name__)

LONGEST_LINE_BYTES = 1 << 26
"""A line that still goes on after 64 MiB is no line of text; MMBench keeps pictures in its tables."""
LONGEST_REASON = 120
CHUNK_BYTES = 1 << 20

Progress = Callable[[int], object]
"""Told the number of bytes whenever some more are read."""


@contextlib.contextmanager
def opened(path: Path, kind: str) -> Iterator[io.BufferedIOBase]:
    """The file's bytes, those inside of one that gzip packed.

    Args:
        kind: what the file should be, such as "predictions; give JSON lines", for the message.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file of {kind}")
        with gzip.GzipFile(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:  # of gzip: cut, or damaged
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


class NotUtf8(UserError):
    """Bytes that are no text in UTF-8."""


def text_of(line: bytes, where: str) -> str:
    """A line's text; `where`, file and line, begins the message.

    Raises:
        NotUtf8: it is not UTF-8.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotUtf8(f"{where}: not UTF-8 ({error.reason}); convert the file") from None


def json_of(text: str, where: str, *, members: Callable[[list[tuple[str, object]]], object] | None = None) -> object:
    """The value that a text holds; with `members`, which makes its objects, half of a surrogate pair may be in it."""
    try:
        value = json.loads(text, object_pairs_hook=members)
        if members is None and ("\\ud" in text or "\\uD" in text):
            refuse_half_pairs(value, where)
    except RecursionError:
        raise UserError(f"{where}: not whole JSON (its values are nested too deeply)") from None
    except ValueError as error:  # also of numbers of too many digits
        raise UserError(f"{where}: not whole JSON ({one_line(str(error), LONGEST_REASON)})") from None
    return value


def refuse_half_pairs(value: object, where: str) -> None:
    """Refuses a value of JSON with half of a surrogate pair in it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: its text holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise UserError(f"{where}: not whole JSON (its values are nested too deeply)") from None


def json_object(path: Path, kind: str) -> dict[str, object]:
    """A small file that is one JSON object, each name in it once; half of a surrogate pair may be in it."""

    def unique(members: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in members]
        if len({*names}) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise ValueError(f"the name {shown_text(twice)!r} stands twice in one object")
        return dict(members)

    value = json_of(whole_text(path, kind), f"{path}", members=unique)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold one JSON object, found {type(value).__name__}")
    return value


def whole_text(path: Path, kind: str) -> str:
    """A small file's text, line breaks as they are.

    Raises:
        UserError: no such file; `NotUtf8`, which is one, where it is not UTF-8.
    """
    with opened(path, kind) as file:
        return text_of(file.read().removeprefix(codecs.BOM_UTF8), f"{path}")


UTF_8, WITHOUT_A_MARK = "utf-8", "cp1252"
MARKS = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def encoding_of(path: Path, kind: str) -> str:
    """A table's encoding: what its byte order mark says, else UTF-8, else Windows-1252, which is logged."""
    with opened(path, kind) as file:
        beginning = file.read(2)
        if beginning in MARKS:
            return MARKS[beginning]
        decoder, part = codecs.getincrementaldecoder(UTF_8)(), beginning
        try:
            while part:
                decoder.decode(part)
                part = file.read(CHUNK_BYTES)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            _log_encoding(path)
            return WITHOUT_A_MARK
    return UTF_8


@lru_cache
def _log_encoding(path: Path) -> None:
    """Once for each file, however often it is read."""
    _log.warning("%s: not UTF-8, so it is read as Windows-1252", path)


def text_lines(path: Path, kind: str, encoding: str = UTF_8) -> Iterator[tuple[int, str]]:
    """Yields each line with its number, from 1, without its line break."""
    return ((number, line.rstrip("\r\n")) for number, line in _lines(path, kind, lambda size: None, encoding))


def _lines(path: Path, kind: str, progress: Progress, encoding: str) -> Iterator[tuple[int, str]]:
    """Yields each line as it is, with its number; of another encoding progress counts what it is in UTF-8."""
    try:
        with opened(path, kind) as file:
            lines = iter(lambda: file.readline(LONGEST_LINE_BYTES + 1), b"")
            if encoding != UTF_8:
                lines = (line.encode() for line in io.TextIOWrapper(cast(BinaryIO, file), encoding, newline=""))
            for number, line in enumerate(lines, 1):
                where = f"{path}, line {number}"
                if len(line) > LONGEST_LINE_BYTES:
                    raise UserError(f"{where}: longer than {LONGEST_LINE_BYTES:,} bytes; is it a text file?")
                progress(len(line))
                yield number, text_of(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, where)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not whole {encoding} ({error.reason}); write it as UTF-8") from None


def json_lines(path: Path, kind: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields the object of each line that is not blank, with the line's number."""
    for number, line in text_lines(path, kind):
        if line.strip():
            value = json_of(line, f"{path}, line {number}")
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number}: a line must hold an object, found {type(value).__name__}")
            yield number, value


_END = "\x1eend of the table\x1e"
"""Stands after the last line: inside an open quotation the table's reader would take the rest of the file for a cell
and end as if nothing were wrong (its strict form would refuse marks in the middle of a cell too)."""


def table_rows(
    path: Path,
    kind: str,
    *,
    delimiter: str,
    columns: Sequence[str] = (),
    required: Sequence[str] = (),
    progress: Progress = lambda size: None,
    encoding: str = UTF_8,
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the rows of a CSV or TSV file by column, with the number of each one's last line; all values are text.

    Args:
        columns: their names where the file has no line for them.
    """
    csv.field_size_limit(LONGEST_LINE_BYTES)
    lines = (line.replace("\r\n", "\n") for _, line in _lines(path, kind, progress, encoding))
    reader = csv.reader(chain(lines, [_END]), delimiter=delimiter)
    try:
        heads = list(columns) or next(reader)
        if heads == [_END]:
            return  # an empty file
        if missing := [column for column in required if column not in heads]:
            raise UserError(f"{path}: no column {missing[0]!r}; it has {shown_names(heads)}")
        if twice := [name for name in heads if heads.count(name) > 1]:
            raise UserError(f"{path}: two columns are called {shown_text(twice[0])!r}; fetch or write the file again")
        begins = reader.line_num + 1
        for values in filter(None, reader):
            if values == [_END]:
                return
            if values[-1].endswith(_END):
                break
            if len(values) != len(heads):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(values)} values for {len(heads)} columns; "
                    "the file is cut or damaged, fetch or write it again"
                )
            yield reader.line_num, dict(zip(heads, values, strict=True))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not the table expected: {error}") from None
    raise UserError(
        f"{path}, line {begins}: a quotation mark in it is never closed; the file is cut or damaged, fetch or write it "
        "again"
    )


MAX_RECORD_CHARACTERS = 1 << 26
"""A value that is still open after 64 Mi characters is a missing quote or bracket, not a sample."""
_ROWS_IN_AN_OBJECT = re.compile(r'\{\s*"(data|rows|samples|examples)"\s*:\s*\[\s*\{')
_WHITESPACE = " \t\r\n"


def stream_records(path: Path, progress: Progress | None = None, key: str | None = None) -> Iterator[dict[str, object]]:
    """Yields the objects of a JSON list, or of JSON lines, in order.

    Args:
        key: the file is one object, and the list is what it holds under this name.
    """
    with opened(path, "records") as file:
        stream = _JsonStream(path, file, progress)
        for _ in stream.values(key):
            yield stream.take_object()


def stream_values(path: Path, kind: str) -> Iterator[tuple[int, object]]:
    """Yields the entries of a JSON list, or the values of JSON lines or of one JSON text, with the line of each.

    A text with half of a surrogate pair is refused; `kind` is what the file should be, for the message.
    """
    with opened(path, kind) as file:
        stream = _JsonStream(path, file)
        for line in stream.values():
            value = stream.take()
            refuse_half_pairs(value, f"{path}, line {line}")
            yield line, value


def stream_members(path: Path, *, progress: Progress | None = None) -> Iterator[tuple[str, dict[str, object]]]:
    """Yields the members, name and object, of a file that is one JSON object of objects; see `stream_records`."""
    with opened(path, "records") as file:
        stream = _JsonStream(path, file, progress)
        for name in stream.names():
            yield name, stream.take_object()


class _JsonStream:
    """The unread part of a file: a buffer, a position in it, and the line the buffer starts at.

    `json`'s own scanner reads the values: as fast as `ijson` on yajl to within a fifth, without the dependency, and an
    error has its line. Who is given a line or a name takes the value that stands there before asking for the next.
    """

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

    def values(self, key: str | None = None) -> Iterator[int]:
        """Yields the line of each value: of the list under `key`, or under a usual name where nothing else stands."""
        beginning = self._next()
        rows = _ROWS_IN_AN_OBJECT.match(self._buffer, self._position)
        if key is None and rows is None:
            if beginning == "[":
                yield from self._entries("[", "]", "an entry of the list")
                self._end("list")
            while self._next():
                yield self._current_line()
            return
        name_of_rows, names = key or (rows[1] if rows else ""), list[str]()
        for name in self.names():
            names.append(name)
            if name == name_of_rows and self._next() != "[":
                self._fail(f"{name!r} must hold a list")
            elif name == name_of_rows:
                yield from self._entries("[", "]", "an entry of the list")
            elif (value := self.take()) and key is None and isinstance(value, list | dict):
                beside = f"beside {name_of_rows!r} stands {shown(name)}"
                self._fail(f"{beside}; write the rows that are meant as a list of their own")
        if name_of_rows not in names:
            self._fail(f"there is no {key!r}, only {', '.join(map(shown, names[:8])) or 'nothing'}")

    def names(self) -> Iterator[str]:
        """Yields each name of an object that is the whole file."""
        for _ in self._entries("{", "}", "a member of the object"):
            name = self.take()
            if not isinstance(name, str):
                self._fail("expected a name in quotes")
            self._expect(":", f"':' after {shown(name)}")
            yield name
        self._end("object")

    def _entries(self, opening: str, closing: str, what: str) -> Iterator[int]:
        self._expect(opening, f"{opening!r}")
        closed = self._next() == closing
        while not closed:
            self._next()
            yield self._current_line()
            closed = self._next() != ","
            self._position += not closed
        self._expect(closing, f"',' or {closing!r} after {what}")

    def take_object(self) -> dict[str, object]:
        """The next value, which must be an object."""
        value = self.take()
        if not isinstance(value, dict):
            where = f"{self._path}, line {self._current_line()}"
            raise UserError(f"{where}: a record must be an object, found {type(value).__name__}")
        return value

    def take(self) -> object:
        """The next value of any kind, the buffer growing until it holds all of it."""
        self._next()
        while True:
            try:
                value, end = self._json.raw_decode(self._buffer, self._position)
                if end < len(self._buffer) or self._ended:  # a number could go on
                    self._position = end
                    return value
            except RecursionError:
                self._fail("its values are nested too deeply")
            except json.JSONDecodeError as error:
                if self._ended or len(self._buffer) - self._position > MAX_RECORD_CHARACTERS:
                    self._position = error.pos
                    self._fail(error.msg)
            except ValueError as error:  # a number of too many digits
                self._fail(str(error))
            self._refill(max(CHUNK_BYTES, len(self._buffer) - self._position))

    def _next(self) -> str:
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

    def _expect(self, character: str, what: str) -> None:
        if self._next() != character:
            self._fail(f"expected {what}")
        self._position += 1

    def _end(self, what: str) -> None:
        if self._next():
            self._fail(f"there is text after the end of the {what}")

    def _current_line(self) -> int:
        self._line += self._buffer.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line

    def _fail(self, what: str) -> NoReturn:
        line = self._current_line()
        if self._ended and self._position >= len(self._buffer.rstrip(_WHITESPACE)):
            what = f"the file ends too early ({what}); it may be cut off, fetch or write it again"
        raise UserError(f"{self._path}, line {line}: not the JSON list or JSON lines expected: {what}")

    def _refill(self, size: int) -> None:
        self._current_line()
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
