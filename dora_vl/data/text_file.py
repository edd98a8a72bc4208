"""Reads a user's text files, lines, tables and JSON, in bounded memory; raises no other error than `UserError`.

UTF-8, a byte order mark at the beginning or none. Publishers' files, records, predictions
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import ijson

from dora_vl.errors import UserError, log_once, one_line, short_names, short_repr, short_text

_log = logging.getLogger(__name__)

LONGEST_LINE_BYTES = 1 << 26
"""A line that still goes on after 64 MiB is not text; MMBench keeps pictures in its tables."""
MOST_COLUMNS = 1 << 14
"""A spreadsheet has at most so many; each one's name is compared with all that a column may be called."""
LONGEST_REASON = 120
CHUNK_BYTES = 1 << 20

Value = TypeVar("Value")


@contextlib.contextmanager
def opened(path: Path, kind: str) -> Iterator[io.BufferedIOBase]:
    """Opens the file's bytes, unpacked if gzipped; `kind` is what it should be, for the message."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file of {kind}")
        with gzip.GzipFile(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:  # of gzip: cut, or damaged
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


class NotUtf8(UserError):
    """Bytes are not text in UTF-8."""


def text_of(line: bytes, where: str) -> str:
    """Returns a line's text; `where`, file and line, begins the message of `NotUtf8`."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotUtf8(f"{where}: not UTF-8 ({error.reason}); convert the file") from None


def json_of(
    text: str,
    where: str,
    *,
    half_pairs: bool = False,
    members: Callable[[list[tuple[str, object]]], object] | None = None,
) -> object:
    """Parses a text; `half_pairs` admits half of a surrogate pair, `members` makes its objects."""
    try:
        value = json.loads(text, object_pairs_hook=members)
    except RecursionError:
        raise UserError(f"{where}: not whole JSON (its values are nested too deeply)") from None
    except ValueError as error:  # also of numbers of too many digits
        raise UserError(f"{where}: not whole JSON ({one_line(str(error), LONGEST_REASON)})") from None
    if not half_pairs and ("\\ud" in text or "\\uD" in text):
        refuse_half_pairs(value, where)
    return value


def refuse_half_pairs(value: object, where: str) -> None:
    """Refuses a value of JSON with half of a surrogate pair in it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: its text holds half of a surrogate pair, which is not a character") from None
    except RecursionError:
        raise UserError(f"{where}: not whole JSON (its values are nested too deeply)") from None


def json_object(path: Path, kind: str) -> dict[str, object]:
    """Returns a small file that is one JSON object, each name in it once; half of a surrogate pair may be in it."""

    def unique(members: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in members]
        if len({*names}) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise ValueError(f"the name {short_text(twice)!r} occurs twice in one object")
        return dict(members)

    value = json_of(whole_text(path, kind), f"{path}", half_pairs=True, members=unique)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold one JSON object, found {type(value).__name__}")
    return value


def whole_text(path: Path, kind: str) -> str:
    """Returns a small file's text, line breaks as they are; raises `NotUtf8` where it is none."""
    with opened(path, kind) as file:
        return text_of(file.read().removeprefix(codecs.BOM_UTF8), f"{path}")


UTF_8, WITHOUT_A_MARK = "utf-8", "cp1252"
MARKS = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def encoding_of(path: Path, kind: str) -> str:
    """Returns a table's encoding: what its byte order mark says, else UTF-8, else Windows-1252, which is logged."""
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
            log_once(_log, logging.WARNING, f"{path}: not UTF-8, so it is read as Windows-1252")
            return WITHOUT_A_MARK
    return UTF_8


def text_lines(path: Path, kind: str, encoding: str = UTF_8) -> Iterator[tuple[int, str]]:
    """Yields each line with its number, from 1, without its line break."""
    return ((number, line.rstrip("\r\n")) for number, line in _lines(path, kind, encoding))


def _lines(path: Path, kind: str, encoding: str = UTF_8) -> Iterator[tuple[int, str]]:
    """Yields each line as it is, with its number."""
    try:
        with opened(path, kind) as file:
            lines = iter(lambda: file.readline(LONGEST_LINE_BYTES + 1), b"")
            if encoding != UTF_8:
                lines = (line.encode() for line in io.TextIOWrapper(cast(BinaryIO, file), encoding, newline=""))
            for number, line in enumerate(lines, 1):
                where = f"{path}, line {number}"
                if len(line) > LONGEST_LINE_BYTES:
                    raise UserError(f"{where}: longer than {LONGEST_LINE_BYTES:,} bytes; is it a text file?")
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


_STATED = re.compile(r'"?sep=([^\w\s"]|\t)"?\n?', re.IGNORECASE)


def stated_delimiter(line: str) -> str | None:
    """Returns the delimiter that a first line states for Excel, such as `sep=;`; None for any other line."""
    match = _STATED.fullmatch(line)
    return match[1] if match else None


def likeliest_delimiter(line: str, ending: str) -> str:
    """Returns the delimiter that splits a table's first line into most columns; of equals the ending's usual one."""
    marks = "\t,;|" if ending == ".tsv" else ",;\t|"
    return max(marks, key=re.sub('"[^"]*"', "", line).count)


_END = "\x1eend of the table\x1e"
"""Comes after the last line: inside an open quotation the table's reader would take the rest of the file for a cell
and end as if nothing were wrong (its strict form would refuse marks in the middle of a cell too)."""


def table_rows(
    path: Path,
    kind: str,
    *,
    delimiter: str,
    columns: Sequence[str] = (),
    encoding: str = UTF_8,
    skip_spaces: bool = False,
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the rows of a CSV or TSV file by column, with the number of each one's last line; all values are text.

    `columns` has their names where the file has no line for them. A first line such as `sep=;` is followed and skipped.
    Empty columns without a name, as Excel writes them, are dropped; it also leaves such cells out at a row's end. The
    first column may lack a name: pandas and R number the rows there. `skip_spaces` drops those after a delimiter.
    """
    csv.field_size_limit(LONGEST_LINE_BYTES)
    lines = (line.replace("\r\n", "\n") for _, line in _lines(path, kind, encoding))
    first = next(lines, "")
    if not columns and (named := stated_delimiter(first)) is not None:
        delimiter, first = named, ""  # a blank line instead, so that the numbers of lines stay
    reader = csv.reader(chain([first], lines, [_END]), delimiter=delimiter, skipinitialspace=skip_spaces)
    try:
        heads = list(columns) or next(filter(None, reader))
        if heads == [_END]:
            return  # an empty file
        named = [index for index, name in enumerate(heads) if index == 0 or name.strip()]
        nameless = [index for index, name in enumerate(heads) if index and not name.strip()]
        names = [heads[index] for index in named]
        _check_names(path, names)
        begins = reader.line_num + 1
        for number, values in enumerate(filter(None, reader), 1):
            where = f"{path}, row {number} (line {reader.line_num})"  # samples are named by row, editors show lines
            if values == [_END]:
                return
            if values[-1].endswith(_END):
                break
            if not named[-1] < len(values) <= len(heads):
                counts = f"{len(values)} values for {len(heads)} columns"
                raise UserError(f"{where}: {counts}; fetch or write the file again")
            if cells := [values[index] for index in nameless if index < len(values) and values[index].strip()]:
                remedy = "name its column in the first line, or empty it"
                raise UserError(f"{where}: {short_repr(cells[0])} has no column name; {remedy}")
            yield reader.line_num, dict(zip(names, (values[index] for index in named), strict=True))
            begins = reader.line_num + 1
    except csv.Error as error:
        lone = "a carriage return inside a line; save the file with line feeds at the ends of its lines"
        reason = lone if "new-line character" in str(error) else error
        raise UserError(f"{path}, line {reader.line_num}: not the table expected: {reason}") from None
    raise UserError(f"{path}, line {begins}: a quotation mark in it is never closed; fetch or write the file again")


_ROWS_IN_AN_OBJECT = re.compile(rb'\{\s*"(data|rows|samples|examples)"\s*:\s*\[\s*\{')
_PUBLISHED = re.compile(
    rb'\{\s*"(?:info|licenses?|annotations|questions|data_type|task_type|images"\s*:\s*\[\s*\{[^{}\[\]]*"file_name)"'
)
"""A file of COCO's or VQAv2's form may begin so; its keys decide."""
_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_TO_THE_LAST_TEXT = re.compile(rb'(?:[^"]*"[^"\\]*(?:\\.[^"\\]*)*")*', re.DOTALL)


def _check_names(path: Path, names: Sequence[str]) -> None:
    if len(names) > MOST_COLUMNS:
        raise UserError(f"{path}: {len(names):,} columns, of which at most {MOST_COLUMNS:,} are read; write fewer")
    (name, times), *_ = Counter(names).most_common(1)
    if times > 1:
        raise UserError(f"{path}: two columns are called {short_text(name)!r}; fetch or write the file again")


DEEPEST = 10_000
"""More open brackets are refused: `ijson` keeps a path for each, which fills the memory."""


def stream_records(path: Path, key: str | None = None) -> Iterator[dict[str, object]]:
    """Yields the objects of a JSON list, of JSON lines, or of the list that one object holds under `key`, in order."""
    for number, value in _stream(path, "records", key):
        if not isinstance(value, dict):
            raise UserError(f"{path}, row {number}: a record must be an object, found {type(value).__name__}")
        yield value


def stream_values(path: Path, kind: str) -> Iterator[tuple[int, object]]:
    """Yields the entries of a JSON list, or the values of JSON lines or of one JSON text, each with its number, from 1.

    A text with half of a surrogate pair is refused; `kind` is what the file should be, for the message.
    """
    for number, value in _stream(path, kind):
        refuse_half_pairs(value, f"{path}, row {number}")
        yield number, value


def stream_members(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yields the members, name and object, of a file that is one JSON object of objects; see `stream_records`."""
    with opened(path, "records") as file:
        chunks = _Chunks(file)
        for name, value in _parsed(path, chunks, ijson.kvitems(chunks, "", use_float=True)):
            if not isinstance(value, dict):
                raise UserError(f"{path}: {short_repr(name)} must hold an object, found {type(value).__name__}")
            yield name, value


def _stream(path: Path, kind: str, key: str | None = None) -> Iterator[tuple[int, object]]:
    """Yields the numbered values of JSON lines, of a list, or of the list that an object holds, or its rows by id."""
    with opened(path, kind) as file:
        beginning = file.read(CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
        if not beginning and key is None:
            return
        if key is None and beginning.startswith(b"{"):
            rows, key = _in_an_object(path, file, beginning)
            if rows:
                yield from enumerate(rows, start=1)
                return
        if key is None and not beginning.startswith(b"[") and _is_json(beginning.partition(b"\n")[0]):
            texts = (numbered for numbered in _lines(path, kind) if numbered[1].strip())
            for number, (line_number, line) in enumerate(texts, start=1):
                yield number, json_of(line, f"{path}, row {number} (line {line_number})", half_pairs=True)
            return
        file.seek(0)
        chunks, number = _Chunks(file), 0
        prefix = f"{key}.item" if key else "item" if beginning.startswith(b"[") else ""
        values = ijson.items(chunks, prefix, use_float=True, multiple_values=not prefix)
        for number, value in enumerate(_parsed(path, chunks, values), start=1):
            yield number, value
        if key is not None and not number:
            members = _members(file)
            if (key, "start_array") not in members:
                raise UserError(f"{path}: there is no list {key!r} in it, only {short_names(_lists(members))}")


def _in_an_object(
    path: Path, file: io.BufferedIOBase, beginning: bytes
) -> tuple[Iterable[dict[str, object]], str | None]:
    """Returns the captions, or the rows by their ids, that an object holds, else the name of its list of rows."""
    members = _members(file)
    lists = _lists(members)
    if _PUBLISHED.match(beginning) and _are_captions(path, lists):
        return _coco_captions(path), None
    rows = _ROWS_IN_AN_OBJECT.match(beginning)
    key = rows[1].decode() if rows else None
    if rows and (beside := [other for other in lists if other != key]):
        remedy = "write the rows that are meant as a list of their own"
        raise UserError(f"{path}: beside {key!r} there is {short_repr(beside[0])}; {remedy}")
    if len(members) > 1 and {event for _, event in members} == {"start_map"}:
        return ({"id": name, **row} for name, row in stream_members(path)), None
    return (), key


def _lists(members: Iterable[tuple[str, str]]) -> list[str]:
    return [name for name, event in members if event in ("start_array", "start_map")]


def _members(file: io.BufferedIOBase) -> list[tuple[str, str]]:
    """Returns each name in the one object that a file is, with the event of `ijson` that begins its value."""
    file.seek(0)
    members: list[tuple[str, str]] = []
    name = None
    try:
        for prefix, event, value in ijson.parse(_Chunks(file), use_float=True):
            if name is not None:
                members.append((name, event))
            name = value if not prefix and event == "map_key" else None
    except (ijson.JSONError, UnicodeDecodeError):  # also of JSON lines
        return []
    return members


def _are_captions(path: Path, lists: Sequence[str]) -> bool:
    """Tells whether a file has COCO's lists; refuses VQAv2's, which are in two files."""
    if {"images", "annotations"} <= {*lists}:
        return True
    if "info" in lists and not {"questions", "annotations"}.isdisjoint(lists):
        remedy = f"`dora-vl prepare vqav2 --from {path.parent} --to records` joins them"
        raise UserError(f"{path}: VQAv2 has its questions and its answers in two files; {remedy}")
    return False


def _coco_captions(path: Path) -> Iterator[dict[str, object]]:
    names = {image.get("id"): image.get("file_name") for image in stream_records(path, "images")}
    for annotation in stream_records(path, "annotations"):
        if "caption" not in annotation:
            remedy = "write rows of image, question and answer about what it marks"
            raise UserError(f"{path}: an annotation of COCO without a caption, {short_repr(annotation)}; {remedy}")
        image = names.get(annotation.get("image_id"))
        yield {"id": annotation.get("id"), "image": image, "caption": annotation["caption"]}


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class _Chunks:
    """Gives `ijson` a file's bytes after its byte order mark."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self.open_brackets = 0
        self._begun = b""
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes."""
        chunk = self._file.read(size)
        plain = self._without_texts(chunk)
        self.open_brackets += sum(map(plain.count, (b"[", b"{"))) - sum(map(plain.count, (b"]", b"}")))
        if self.open_brackets > DEEPEST:
            raise ijson.JSONError("its values are nested too deeply")
        return chunk

    def _without_texts(self, chunk: bytes) -> bytes:
        """Cuts the strings out of a chunk, which may begin or end inside one: their brackets open nothing."""
        content = self._begun + chunk
        closed = _TO_THE_LAST_TEXT.match(content)
        assert closed is not None  # the pattern also matches an empty text
        rest, quote, text = content[closed.end() :].partition(b'"')
        self._begun = quote + b"\\" * ((len(text) - len(text.rstrip(b"\\"))) % 2)
        return _TEXT.sub(b"", closed[0]) + rest


def _parsed(path: Path, chunks: _Chunks, values: Iterable[Value]) -> Iterator[Value]:
    """Yields what `ijson` parses; an error says how many values came before it, and what is there."""
    parsed = 0
    try:
        for value in values:
            parsed += 1
            yield value
            chunks.open_brackets = 0  # brackets in texts need not be closed
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = one_line(str(error).partition("(right here)")[0], LONGEST_REASON)
        if "premature EOF" in reason:
            reason = "the file ends too early; it may be cut off, fetch or write it again"
        where = f"{path}, after value {parsed}"
        raise UserError(f"{where}: not the JSON list or JSON lines expected: {reason}") from None
