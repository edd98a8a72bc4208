"""Text files that a person gives, read line by line or as a table: bounded, and with no other error than `UserError`.

UTF-8, a byte order mark at the beginning or none. Only the standard library. Publishers' files, records, predictions
and questions are all read through here; `records.stream_records` reads JSON whose values may be longer than a line.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

from dora_vl.errors import UserError, one_line, shown_names, shown_text

_log = logging.getLogger(__name__)

LONGEST_LINE_BYTES = 1 << 26
"""A line that still goes on after 64 MiB is no line of text; MMBench keeps pictures in its tables."""
LONGEST_REASON = 120

Progress = Callable[[int], object]
"""Told the number of bytes whenever some more are read."""


@contextlib.contextmanager
def opened(path: Path, wanted: str) -> Iterator[io.BufferedIOBase]:
    """The file's bytes, those inside of one that gzip packed.

    Args:
        wanted: what the file should be, such as "predictions; give JSON lines", for the message.

    Raises:
        UserError: no such file, or it cannot be opened or read.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file of {wanted}")
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


def json_of(text: str, where: str) -> object:
    """The value that a text holds.

    Raises:
        UserError: it is no JSON, nested too deeply, holds a number of thousands of digits, or half of a surrogate
            pair, which is no character and which no file can hold.
    """
    value = _parsed(text, where)
    if "\\ud" in text or "\\uD" in text:
        refuse_half_pairs(value, where)
    return value


def _parsed(text: str, where: str, members: Callable[[list[tuple[str, object]]], object] | None = None) -> object:
    try:
        return json.loads(text, object_pairs_hook=members)
    except RecursionError:
        raise UserError(f"{where}: not whole JSON (its values are nested too deeply)") from None
    except ValueError as error:  # also of numbers of too many digits
        raise UserError(f"{where}: not whole JSON ({one_line(str(error), LONGEST_REASON)})") from None


def refuse_half_pairs(value: object, where: str) -> None:
    """Refuses a value of JSON with half of a surrogate pair in it.

    Raises:
        UserError: it has one, or is nested more deeply than can be looked through.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: its text holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise UserError(f"{where}: not whole JSON (its values are nested too deeply)") from None


def json_object(path: Path, wanted: str) -> dict[str, object]:
    """A small file that is one JSON object, at once; half of a surrogate pair may be in it.

    Raises:
        UserError: no such file, not UTF-8, malformed, nested too deeply, a name twice in one object, or no object.
    """
    text = whole_text(path, wanted)
    found = _parsed(text, f"{path}", _unique_names)
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold one JSON object, found {type(found).__name__}")
    return found


def _unique_names(members: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(members)
    if len(found) < len(members):
        names: set[str] = set()
        twice = next(name for name, _ in members if name in names or names.add(name))
        raise ValueError(f"the name {shown_text(twice)!r} stands twice in one object")
    return found


def whole_text(path: Path, wanted: str) -> str:
    """A small file's text, line breaks as they are.

    Raises:
        UserError: no such file; `NotUtf8`, which is one, where it is not UTF-8.
    """
    with opened(path, wanted) as file:
        return text_of(file.read().removeprefix(codecs.BOM_UTF8), f"{path}")


UTF_8, WITHOUT_A_MARK = "utf-8", "cp1252"
MARKS = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def encoding_of(path: Path, wanted: str) -> str:
    """A table's encoding: what its byte order mark says, else UTF-8, else Windows-1252, which is logged.

    Raises:
        UserError: as `opened`.
    """
    with opened(path, wanted) as file:
        beginning = file.read(2)
        if beginning in MARKS:
            return MARKS[beginning]
        decoder, part = codecs.getincrementaldecoder(UTF_8)(), beginning
        try:
            while part:
                decoder.decode(part)
                part = file.read(1 << 20)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            _say_encoding(path)
            return WITHOUT_A_MARK
    return UTF_8


@lru_cache
def _say_encoding(path: Path) -> None:
    """Once for each file, however often it is read."""
    _log.warning("%s: not UTF-8, so it is read as Windows-1252", path)


def text_lines(path: Path, wanted: str, encoding: str = UTF_8) -> Iterator[tuple[int, str]]:
    """Yields each line with its number, from 1, without its line break.

    Raises:
        UserError: no such file, a line that is not UTF-8, or one of more than 64 MiB.
    """
    return ((number, line.rstrip("\r\n")) for number, line in _lines(path, wanted, lambda size: None, encoding))


def _lines(path: Path, wanted: str, progress: Progress, encoding: str) -> Iterator[tuple[int, str]]:
    """Yields each line as it is, with its number."""
    if encoding != UTF_8:
        yield from _recoded_lines(path, wanted, progress, encoding)
        return
    with opened(path, wanted) as file:
        number = 0
        while line := file.readline(LONGEST_LINE_BYTES + 1):
            number += 1
            if len(line) > LONGEST_LINE_BYTES:
                raise UserError(f"{path}, line {number}: longer than {LONGEST_LINE_BYTES:,} bytes; is it a text file?")
            progress(len(line))
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            yield number, text_of(line, f"{path}, line {number}")


def _recoded_lines(path: Path, wanted: str, progress: Progress, encoding: str) -> Iterator[tuple[int, str]]:
    try:
        with opened(path, wanted) as file:
            for number, line in enumerate(io.TextIOWrapper(cast(BinaryIO, file), encoding, newline=""), 1):
                if len(line) > LONGEST_LINE_BYTES:
                    raise UserError(f"{path}, line {number}: longer than {LONGEST_LINE_BYTES:,} characters")
                progress(len(line.encode(encoding)))
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not whole {encoding} ({error.reason}); write it as UTF-8") from None


def json_lines(path: Path, wanted: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields the object of each line that is not blank, with the line's number.

    Raises:
        UserError: as `text_lines` and `json_of`; or a line that is no object.
    """
    for number, line in text_lines(path, wanted):
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
    wanted: str,
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
        required: those of its line that must be there.

    Raises:
        UserError: as `text_lines`; or no such column, a row with more or fewer values than columns, a quotation mark
            that is never closed, or a cell of more than 64 Mi characters.
    """
    csv.field_size_limit(LONGEST_LINE_BYTES)
    reader = csv.reader(_with_end(path, wanted, progress, encoding), delimiter=delimiter)
    try:
        heads = list(columns) or next(reader)
        if heads == [_END]:
            return  # an empty file
        _check_columns(path, heads, required)
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


def _with_end(path: Path, wanted: str, progress: Progress, encoding: str) -> Iterator[str]:
    yield from (line.replace("\r\n", "\n") for _, line in _lines(path, wanted, progress, encoding))
    yield _END


def _check_columns(path: Path, heads: Sequence[str], required: Sequence[str]) -> None:
    for column in required:
        if column not in heads:
            raise UserError(f"{path}: no column {column!r}; it has {shown_names(heads)}")
    if len(set(heads)) < len(heads):
        twice = next(name for name in heads if heads.count(name) > 1)
        raise UserError(f"{path}: two columns are called {shown_text(twice)!r}; fetch or write the file again")
