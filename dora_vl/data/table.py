"""Samples of any format as Arrow columns on disk: converted once, memory-mapped by every process."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import datasets
import datasets.config
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj
from filelock import FileLock

from dora_vl.data.columns import MEDIA_ENDINGS, USUAL, Columns, named_like
from dora_vl.data.containers import DataFiles, find_files
from dora_vl.data.pictures import AS_URL, BARE_BASE64, IN_PLACE, WEB
from dora_vl.data.readers import MARKS, SampleRow, SampleRowReader, check_usable
from dora_vl.data.turns import INPUT_CHARACTERS
from dora_vl.errors import UserError

# LLaVA records in their plainest form, JSON lines without a surprise, read by Arrow's own parser: six times as fast.
#
# Plain is what `dora-vl prepare` writes and most published files hold: each id is text, each record has at most one
# picture by its path, no video, and turns that hold text. A file with anything else is read by `record_table` record by
# record, so what a row means is decided there alone, and this module must give the same columns (a test holds it to
# that).


BLOCK_BYTES = 8 << 20
"""Read at once; a record longer than that makes a file not plain."""

PLAIN_FORMAT = "conversations"
NAMED_VIDEO = pa.struct([("path", pa.string()), ("start_seconds", pa.float64()), ("end_seconds", pa.float64())])
HELD_PICTURE = pa.struct([("name", pa.string()), ("content", pa.large_binary())])
_PLAIN_LINES_TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
_NO_PATH = pc.MatchSubstringOptions("^(" + "|".join((IN_PLACE, AS_URL, *BARE_BASE64, *WEB)) + r")|\\")
_MEDIA = pc.MatchSubstringOptions(rf"\.({'|'.join(MEDIA_ENDINGS)})$", ignore_case=True)
_TAGS = pc.MatchSubstringOptions("<(img|bbox|ref-object|audio)>")
_USED = {"id": "id", "image": "images", "conversations": "conversations"}
_FORM = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.string()),
        ("conversations", pa.list_(pa.struct([*_PLAIN_LINES_TURN, *((mark, pa.float64()) for mark in MARKS)]))),
    ]
)


class NotPlainError(Exception):
    """The file holds something that has to be looked at record by record."""


def plain_batches(path: Path, schema: pa.Schema, columns: Columns = USUAL) -> Iterator[pa.RecordBatch]:
    """Yields a plain file's rows in the columns of `record_table`.

    Raises:
        NotPlainError: at the first block that is not plain; what was yielded before must be thrown away.
    """
    with path.open("rb") as file:
        if not file.read(3).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            raise NotPlainError
    reading = pj.ReadOptions(block_size=BLOCK_BYTES)
    parsing = pj.ParseOptions(explicit_schema=_FORM, unexpected_field_behavior="infer")
    try:
        for block in pj.open_json(path, read_options=reading, parse_options=parsing):
            yield _plain_columns(block, schema, _uses(block, columns))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError) as error:
        raise NotPlainError from error


def written_uses(uses: Mapping[str, str]) -> str:
    """The role of each column as a table holds it."""
    return json.dumps(uses, ensure_ascii=False)


def _uses(block: pa.RecordBatch, columns: Columns) -> dict[str, str]:
    """The role of each column that is not empty, where those left out are notes in any row."""
    named = {
        name: True for name, column in zip(block.schema.names, block, strict=True) if column.null_count < len(column)
    }
    shape = columns.shape_of(named)
    if shape is None or shape.format.name != PLAIN_FORMAT:
        raise NotPlainError
    uses, left = shape.uses((0,) * len(shape.candidates))
    if {name: role for name, role in uses.items() if role} != {name: _USED[name] for name in _USED if name in uses}:
        raise NotPlainError
    for name in left:
        column = block.column(name)
        if (
            named_like(name)
            or pa.types.is_nested(column.type)
            or (pa.types.is_string(column.type) and _any(column, _MEDIA))
        ):
            raise NotPlainError
    return dict(uses)


def _any(texts: pa.Array, matching: pc.MatchSubstringOptions) -> bool:
    return bool(pc.call_function("any", [pc.call_function("match_substring_regex", [texts], matching)]).as_py())


def _plain_columns(block: pa.RecordBatch, schema: pa.Schema, uses: Mapping[str, str]) -> pa.RecordBatch:
    ids, images, conversations = (block.column(name) for name in ("id", "image", "conversations"))
    turns = conversations.flatten()
    texts, speakers = turns.field("value"), turns.field("from")
    offsets = _offsets(conversations)
    others = (turns.field(part.name) for part in turns.type if part.name not in ("from", "value"))
    marked = any(field.null_count != len(turns) for field in others)
    if (
        marked
        or _any(images, _NO_PATH)
        or _any(texts, _TAGS)
        or ids.null_count
        or conversations.null_count
        or turns.null_count
        or texts.null_count
        or speakers.null_count
        or (np.diff(offsets) == 0).any()
    ):
        raise NotPlainError
    given = np.array(pc.call_function("binary_length", [images]).fill_null(0)) > 0
    listed = pa.ListArray.from_arrays(_lengths_to_offsets(given), images.filter(pa.array(given)))
    none = pa.ListArray.from_arrays(_lengths_to_offsets(np.zeros(len(block), bool)), pa.array([], NAMED_VIDEO))
    columns = [
        ids,
        listed,
        none,
        pa.ListArray.from_arrays(
            pa.array(offsets), pa.StructArray.from_arrays([speakers, texts], fields=list(_PLAIN_LINES_TURN))
        ),
        pa.array(np.zeros(len(block), np.int32)),
        pa.array(np.add.reduceat(word_counts(texts), offsets[:-1]), pa.int32()),
        pa.array(given),
        pa.nulls(len(block), pa.string()),
        pa.repeat(PLAIN_FORMAT, len(block)),
        pa.ListArray.from_arrays(_lengths_to_offsets(np.zeros(len(block), bool)), pa.array([], HELD_PICTURE)),
        pa.array([written_uses(uses), *[None] * (len(block) - 1)], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _offsets(lists: pa.ListArray) -> np.ndarray:
    found = np.array(lists.offsets)
    return found - found[0]


def _lengths_to_offsets(lengths: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())


def word_counts(texts: pa.StringArray) -> np.ndarray:
    """How many words `str.split` finds in each text, counted in the bytes where they are ASCII."""
    _, ends_buffer, data_buffer = texts.buffers()
    if not len(texts) or data_buffer is None:
        return np.zeros(len(texts), np.int64)
    ends = np.frombuffer(ends_buffer, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(data_buffer, np.uint8)[ends[0] : ends[-1]]
    ends = ends - ends[0]
    space = _is_space(data)
    begins_word = ~space
    begins_word[1:] &= space[:-1]
    first = ends[:-1][ends[:-1] < len(data)]
    begins_word[first] = ~space[first]  # a text's first byte has nothing before it
    counts = _inside(begins_word, ends)
    for place in np.flatnonzero(_inside(data >= 128, ends)):
        counts[place] = len(texts[place].as_py().split())
    return counts


def _is_space(data: np.ndarray) -> np.ndarray:
    """The ASCII characters that `str.split` parts words at, 9 to 13 and 28 to 32, in three passes over the bytes."""
    return ((data - np.uint8(9)) < 5) | ((data - np.uint8(28)) < 5)  # what is below wraps round


def _inside(marked: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Marked bytes of each text; by their places, since running sums over all bytes took seven times as long."""
    return np.diff(np.searchsorted(np.flatnonzero(marked), ends))


_log = logging.getLogger(__name__)


TABLE_VERSION = 6
"""Part of the cache's key: raise it when columns or their meaning change."""

ROWS_A_BATCH = 4096
CHARACTERS_A_BATCH = 1 << 25  # Arrow's string offsets are 32 bits; a batch stays far below

_RECORD_TABLE_TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.string())),
        ("video", pa.list_(NAMED_VIDEO)),
        ("conversations", pa.list_(_RECORD_TABLE_TURN)),
        (INPUT_CHARACTERS, pa.int32()),
        ("length", pa.int32()),
        ("is_multimodal", pa.bool_()),
        ("problem", pa.string()),
        ("format", pa.string()),
        ("held_pictures", pa.list_(HELD_PICTURE)),
        ("columns", pa.string()),
    ]
)


def load_table(path: Path, *, cache_folder: Path | None = None, columns: Columns = USUAL) -> datasets.Dataset:
    """A data file of any format and container as memory-mapped rows, converted once and kept in a cache.

    Columns: `id`, `images` (paths), `video` (the fields of a `turns.Clip` each), `conversations` (list of {from,
    value}, as LLaVA's), `input_characters` (of the last question; `turns.Turn`), `length` (words in all turns),
    `is_multimodal`, `problem` (why the record is unusable as it stands, else null), `format` (`sample_rows`),
    `held_pictures` (name and content of the pictures that the file holds, each in the first row that has it), `columns`
    (the role of each of the file's columns, as JSON, likewise in the first row that has these). Every row goes into
    `turns.read_conversation`. The cache is keyed by the files' paths, sizes and modification times, so a changed file
    is converted again; a content hash would read a gigabyte at each start.

    Args:
        path: what `readers.containers.find_files` takes; of JSON the first character decides between list and lines.
        columns: what the file's columns are.
        cache_folder: where converted files stay; default `dora_vl` in the cache folder of `datasets`.

    Raises:
        UserError: no such file, one that cannot be read to its end (with the place), no record in it, none of a known
            format, or records of several.
    """
    found = find_files(path)
    folder = cache_folder or Path(datasets.config.HF_DATASETS_CACHE) / "dora_vl"
    table = folder / f"{path.stem}-{_fingerprint(found.files, columns)}.arrow"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{table}.lock"):  # the ranks of a machine: one converts, the others wait for it
            if not table.exists():
                _convert(path, found, table, columns)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot keep the converted {path.name} there ({error}); set HF_DATASETS_CACHE"
        ) from error
    return datasets.Dataset.from_file(str(table))


def _fingerprint(files: Sequence[Path], columns: Columns) -> str:
    key = f"samples {TABLE_VERSION} {json.dumps([dict(columns.roles), columns.ignored])}"
    for file in files:
        stat = file.stat()
        key += f"\0{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _convert(path: Path, found: DataFiles, table: Path, columns: Columns) -> None:
    """Writes under another name first: what a killed process leaves is never taken for whole."""
    before, started = _fingerprint(found.files, columns), time.perf_counter()
    partial = table.with_suffix(".partial")  # the lock is held: a leftover of this name is nobody's, overwrite it
    try:
        with partial.open("wb") as file:
            rows = _Writer(found, columns).write(path, file)
            file.flush()
            os.fsync(file.fileno())
        if _fingerprint(found.files, columns) != before:
            raise UserError(f"{path}: changed while it was read; start again when it is complete")
        partial.replace(table)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    seconds = time.perf_counter() - started
    _log.info(
        "%s: %d records converted in %.1f s (%.0f a second), kept as %s", path, rows, seconds, rows / seconds, table
    )


class _Writer:
    """Converts the rows of some files; remembers what it has met among them."""

    def __init__(self, found: DataFiles, columns: Columns) -> None:
        self._found = found
        self._columns = columns
        self._reader = SampleRowReader(found.name, columns)
        self._uses: set[str] = set()
        self._held: set[str] = set()

    def write(self, path: Path, file: BinaryIO) -> int:
        """Writes an Arrow stream and returns the number of its rows."""
        if self._found.is_json:
            try:
                return _write_plain(self._found.files[0], file, self._columns)
            except NotPlainError:
                file.seek(0)
                file.truncate()
        return self.write_any(path, file)

    def write_any(self, path: Path, file: BinaryIO) -> int:
        """As `write`, row by row."""
        rows = usable = 0
        first_problem: str | None = None
        with pa.ipc.new_stream(file, _SCHEMA) as writer:
            for batch in _batches(self._row(record, number) for number, record in enumerate(self._found.rows())):
                writer.write_batch(_record_batch(batch, list(map(self._new_uses, batch))))
                rows += len(batch)
                usable += sum(row.problem is None for row in batch)
                first_problem = first_problem or next((row.problem for row in batch if row.problem), None)
        check_usable(str(path), rows, usable, first_problem)
        return rows

    def _new_uses(self, row: SampleRow) -> str | None:
        """What the row's columns are, where no earlier row had these."""
        uses = written_uses(row.columns)
        if uses in self._uses:
            return None
        self._uses.add(uses)
        return uses

    def _row(self, record: Mapping[str, object], number: int) -> SampleRow:
        """The row with the pictures that no earlier one held."""
        row = self._reader.read(record, number)
        if not row.held:
            return row
        held = {name: content for name, content in row.held.items() if name not in self._held}
        self._held |= held.keys()
        return dataclasses.replace(row, held=held)


def _write_plain(path: Path, file: BinaryIO, columns: Columns) -> int:
    rows = 0
    with pa.ipc.new_stream(file, _SCHEMA) as writer:
        for batch in plain_batches(path, _SCHEMA, columns):
            writer.write_batch(batch)
            rows += len(batch)
    if not rows:
        raise NotPlainError
    return rows


def _batches(rows: Iterable[SampleRow]) -> Iterator[list[SampleRow]]:
    batch: list[SampleRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += row.size()
        if len(batch) == ROWS_A_BATCH or size >= CHARACTERS_A_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _record_batch(rows: list[SampleRow], uses: list[str | None]) -> pa.RecordBatch:
    try:
        return _table_columns(rows, uses)
    except UnicodeEncodeError:
        return _table_columns([row.encodable() for row in rows], uses)


def _table_columns(rows: list[SampleRow], uses: list[str | None]) -> pa.RecordBatch:
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + len(row.turns))
    turns = list(chain.from_iterable(row.turns for row in rows))
    speakers = pa.array([speaker for speaker, _ in turns], pa.string())
    texts = pa.array([text for _, text in turns], pa.string())
    turn_structs = pa.StructArray.from_arrays([speakers, texts], fields=list(_RECORD_TABLE_TURN))
    held = [[{"name": name, "content": content} for name, content in row.held.items()] for row in rows]
    columns = [
        pa.array([row.id for row in rows], pa.string()),
        pa.array([row.images for row in rows], pa.list_(pa.string())),
        pa.array([[vars(clip) for clip in row.video] for row in rows], pa.list_(NAMED_VIDEO)),
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), turn_structs),
        pa.array([row.input_characters for row in rows], pa.int32()),
        pa.array([sum(len(text.split()) for _, text in row.turns) for row in rows], pa.int32()),
        pa.array([bool(row.images or row.video) for row in rows], pa.bool_()),
        pa.array([row.problem for row in rows], pa.string()),
        pa.array([row.format for row in rows], pa.string()),
        pa.array(held, pa.list_(HELD_PICTURE)),
        pa.array(uses, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)
