"""Samples of any format as Arrow columns (`arrow_cache` keeps them)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow as pa

from dora_vl.data.arrow_cache import cached_table
from dora_vl.data.clips import Clip, row_clips
from dora_vl.data.plain_lines import HELD_PICTURE, NAMED_VIDEO, NotPlainError, plain_batches
from dora_vl.data.readers.containers import DataFiles, find_files
from dora_vl.data.readers.row_formats import FORMATS, format_of, id_of, read_row, turns_of
from dora_vl.data.readers.row_pictures import row_pictures
from dora_vl.data.turns import SPEAKERS, raw_turns
from dora_vl.errors import BadSample, UserError

TABLE_VERSION = 3
"""Part of the cache's key: raise it when columns or their meaning change."""

ROWS_A_BATCH = 4096
CHARACTERS_A_BATCH = 1 << 25  # Arrow's string offsets are 32 bits; a batch stays far below

_TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.string())),
        ("video", pa.list_(NAMED_VIDEO)),
        ("conversations", pa.list_(_TURN)),
        ("length", pa.int32()),
        ("is_multimodal", pa.bool_()),
        ("problem", pa.string()),
        ("format", pa.string()),
        ("held_pictures", pa.list_(HELD_PICTURE)),
    ]
)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A sample in the columns' shape; `problem` says why it could not be brought into it."""

    id: str
    images: tuple[str, ...] = ()
    video: tuple[Clip, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    problem: str | None = None
    format: str | None = None
    held: Mapping[str, bytes] = field(default_factory=dict)

    def strings(self) -> Iterator[str]:
        names = (clip.path for clip in self.video)
        return chain((self.id,), self.images, names, chain.from_iterable(self.turns))

    def size(self) -> int:
        """Characters and bytes that it holds."""
        return sum(map(len, self.strings())) + sum(map(len, self.held.values()))


def load_table(path: Path, cache_folder: Path | None) -> datasets.Dataset:
    """See `records.load_llava`."""
    found = find_files(path)
    writer = _Writer(found)
    kind = f"samples {TABLE_VERSION}"
    return cached_table(path, kind=kind, write=writer.write, cache_folder=cache_folder, files=found.files)


class _Writer:
    """Converts the rows of some files; remembers what it has met among them."""

    def __init__(self, found: DataFiles) -> None:
        self._found = found
        self._first_of_format: dict[str, str] = {}
        self._held: set[str] = set()

    def write(self, path: Path, file: BinaryIO) -> int:
        """Writes an Arrow stream and returns the number of its rows."""
        if self._found.is_json:
            try:
                return _write_plain(path, file)
            except NotPlainError:
                file.seek(0)
                file.truncate()
        return self.write_any(path, file)

    def write_any(self, path: Path, file: BinaryIO) -> int:
        """As `write`, row by row."""
        rows = usable = 0
        first_problem = ""
        with pa.ipc.new_stream(file, _SCHEMA) as writer:
            for batch in _batches(self._row(record, number) for number, record in enumerate(self._found.rows())):
                writer.write_batch(_record_batch(batch))
                rows += len(batch)
                usable += sum(row.problem is None for row in batch)
                first_problem = first_problem or next((row.problem for row in batch if row.problem), "")
        if not rows:
            raise UserError(f"{path}: holds no records")
        if not usable:
            raise UserError(f"{path}: none of its {rows} records is a sample; the first one: {first_problem}")
        return rows

    def _row(self, record: Mapping[str, object], number: int) -> _Row:
        sample_id = id_of(record, number)
        form = format_of(record)
        if form is not None:
            self._check_format(form.name, f"row {number + 1} ({sample_id})")
        try:
            row = _llava_row(record, sample_id) if _is_llava(record) else _example_row(record, number)
        except BadSample as error:
            return _Row(id=sample_id, problem=error.reason, format=None if form is None else form.name)
        held = {name: content for name, content in row.held.items() if name not in self._held}
        self._held |= held.keys()
        return _Row(**{**vars(row), "held": held})

    def _check_format(self, name: str, row: str) -> None:
        self._first_of_format.setdefault(name, row)
        if len(self._first_of_format) > 1:
            firsts = "; ".join(f"{one}: {first}" for one, first in self._first_of_format.items())
            raise UserError(
                f"{self._found.name}: rows of mixed formats, first of each {firsts}; write one file a format"
            )


def _is_llava(record: Mapping[str, object]) -> bool:
    """Whether its turns are kept as they stand; `turns.read_llava` decides what they mean."""
    turns = record.get("conversations")
    if turns is None or record.get("system"):
        return False
    return not (
        isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and turns[0].get("role") is not None
    )


def _llava_row(record: Mapping[str, object], sample_id: str) -> _Row:
    pictures = row_pictures(record, sample_id)
    return _Row(
        id=sample_id,
        images=tuple(pictures.names),
        video=row_clips(record, sample_id),
        turns=tuple(raw_turns(record, sample_id)),
        format=FORMATS[0].name,
        held=pictures.held,
    )


def _example_row(record: Mapping[str, object], number: int) -> _Row:
    example, form = read_row(record, number=number), format_of(record)
    return _Row(
        id=example.id,
        images=example.images,
        video=example.clips,
        turns=tuple((SPEAKERS[turn.role], turn.text) for turn in turns_of(example)),
        format=None if form is None else form.name,
        held=example.image_bytes,
    )


def _write_plain(path: Path, file: BinaryIO) -> int:
    rows = 0
    with pa.ipc.new_stream(file, _SCHEMA) as writer:
        for batch in plain_batches(path, _SCHEMA):
            writer.write_batch(batch)
            rows += len(batch)
    if not rows:
        raise NotPlainError
    return rows


def _batches(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += row.size()
        if len(batch) == ROWS_A_BATCH or size >= CHARACTERS_A_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _record_batch(rows: list[_Row]) -> pa.RecordBatch:
    try:
        return _columns(rows)
    except UnicodeEncodeError:
        return _columns([_encodable(row) for row in rows])


def _encodable(row: _Row) -> _Row:
    """JSON can spell half of a surrogate pair (`\\ud83d`), which is no text and which Arrow cannot store."""
    try:
        "".join([*row.strings(), row.problem or ""]).encode()
    except UnicodeEncodeError:
        readable_id = row.id.encode("utf-8", "backslashreplace").decode()
        problem = "its text holds half of a surrogate pair, which is no character"
        return _Row(id=readable_id, problem=problem, format=row.format)
    return row


def _columns(rows: list[_Row]) -> pa.RecordBatch:
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + len(row.turns))
    turns = list(chain.from_iterable(row.turns for row in rows))
    speakers = pa.array([speaker for speaker, _ in turns], pa.string())
    texts = pa.array([text for _, text in turns], pa.string())
    turn_structs = pa.StructArray.from_arrays([speakers, texts], fields=list(_TURN))
    held = [[{"name": name, "content": content} for name, content in row.held.items()] for row in rows]
    columns = [
        pa.array([row.id for row in rows], pa.string()),
        pa.array([row.images for row in rows], pa.list_(pa.string())),
        pa.array([[vars(clip) for clip in row.video] for row in rows], pa.list_(NAMED_VIDEO)),
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), turn_structs),
        pa.array([sum(len(text.split()) for _, text in row.turns) for row in rows], pa.int32()),
        pa.array([bool(row.images or row.video) for row in rows], pa.bool_()),
        pa.array([row.problem for row in rows], pa.string()),
        pa.array([row.format for row in rows], pa.string()),
        pa.array(held, pa.list_(HELD_PICTURE)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)
