"""Samples of any format as Arrow columns (`arrow_cache` keeps them)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow as pa

from dora_vl.data.arrow_cache import cached_table
from dora_vl.data.plain_lines import HELD_PICTURE, NAMED_VIDEO, NotPlainError, plain_batches
from dora_vl.data.readers.containers import DataFiles, find_files
from dora_vl.data.sample_rows import SampleRow, SampleRowReader, check_usable

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
        self._reader = SampleRowReader(found.name)
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
        first_problem: str | None = None
        with pa.ipc.new_stream(file, _SCHEMA) as writer:
            for batch in _batches(self._row(record, number) for number, record in enumerate(self._found.rows())):
                writer.write_batch(_record_batch(batch))
                rows += len(batch)
                usable += sum(row.problem is None for row in batch)
                first_problem = first_problem or next((row.problem for row in batch if row.problem), None)
        check_usable(str(path), rows, usable, first_problem)
        return rows

    def _row(self, record: Mapping[str, object], number: int) -> SampleRow:
        """The row with the pictures that no earlier one held."""
        row = self._reader.read(record, number)
        held = {name: content for name, content in row.held.items() if name not in self._held}
        self._held |= held.keys()
        return dataclasses.replace(row, held=held)


def _write_plain(path: Path, file: BinaryIO) -> int:
    rows = 0
    with pa.ipc.new_stream(file, _SCHEMA) as writer:
        for batch in plain_batches(path, _SCHEMA):
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


def _record_batch(rows: list[SampleRow]) -> pa.RecordBatch:
    try:
        return _columns(rows)
    except UnicodeEncodeError:
        return _columns([row.encodable() for row in rows])


def _columns(rows: list[SampleRow]) -> pa.RecordBatch:
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
