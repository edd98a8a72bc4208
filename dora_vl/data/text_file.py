"""Text files that a person gives, read line by line or as a table: bounded, and with no other error than `UserError`.

UTF-8, a byte order mark at the beginning or none. Only the standard library. `records.stream_records` reads JSON whose
values may be longer than a line.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dora_vl.errors import UserError, one_line, shown

LONGEST_LINE_BYTES = 1 << 26
"""A line that still goes on after 64 MiB is no line of text."""
LONGEST_REASON = 120


@contextlib.contextmanager
def opened(path: Path, wanted: str) -> Iterator[BinaryIO]:
    """The file's bytes.

    Args:
        wanted: what the file should be, such as "predictions; give JSON lines", for the message.

    Raises:
        UserError: no such file, or it cannot be opened or read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of {wanted}")
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def text_of(line: bytes, where: str) -> str:
    """A line's text; `where`, file and line, begins the message.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason}); convert the file") from None


def json_of(text: str, where: str) -> object:
    """The value that a text holds.

    Raises:
        UserError: it is no JSON, nested too deeply, holds a number of thousands of digits, or half of a surrogate
            pair, which is no character and which no file can hold.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise UserError(f"{where}: not whole JSON (its values are nested too deeply)") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: its text holds half of a surrogate pair, which is no character") from None
    except ValueError as error:
        raise UserError(f"{where}: not whole JSON ({one_line(str(error), LONGEST_REASON)})") from None
    return value


def text_lines(path: Path, wanted: str) -> Iterator[tuple[int, str]]:
    """Yields each line with its number, from 1, without its line break.

    Raises:
        UserError: no such file, a line that is not UTF-8, or one of more than 64 MiB.
    """
    with opened(path, wanted) as file:
        number = 0
        while line := file.readline(LONGEST_LINE_BYTES + 1):
            number += 1
            if len(line) > LONGEST_LINE_BYTES:
                raise UserError(f"{path}, line {number}: longer than {LONGEST_LINE_BYTES:,} bytes; is it a text file?")
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            yield number, text_of(line, f"{path}, line {number}").rstrip("\r\n")


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


def table_rows(path: Path, wanted: str, *, delimiter: str, whole: bool = False) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields each row of a table whose first row names the columns, with the number of its last line.

    Cells that a row lacks are not in it; those beyond the columns are left out.

    Args:
        whole: each row must have as many cells as there are columns, and each column a name of its own.

    Raises:
        UserError: as `text_lines`; or quotes that are not closed, a cell of more than 128 KiB, or a row that is not
            `whole`.
    """
    lines = (f"{line}\n" for _, line in text_lines(path, wanted))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    try:
        for cells in reader:
            if columns is None:
                columns = cells
                if whole and len(set(columns)) < len(columns):
                    raise UserError(f"{path}: two of its columns have one name: {shown(columns)}")
            elif cells:
                if whole and len(cells) != len(columns):
                    place = f"{path}, line {reader.line_num}"
                    raise UserError(f"{place}: {len(cells)} cells, but {len(columns)} columns; quote what holds commas")
                yield reader.line_num, dict(zip(columns, cells, strict=False))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not a table ({error})") from None
