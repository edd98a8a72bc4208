"""LLaVA records as Arrow columns (`arrow_cache` keeps them)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow as pa

from dora_vl.data.arrow_cache import cached_table
from dora_vl.data.plain_lines import NotPlainError, plain_batches
from dora_vl.data.records import stream_records
from dora_vl.data.turns import raw_turns, read_paths
from dora_vl.errors import BadSample, UserError

TABLE_VERSION = 1
"""Part of the cache's key: raise it when columns or their meaning change."""

ROWS_A_BATCH = 4096
CHARACTERS_A_BATCH = 1 << 25  # Arrow's string offsets are 32 bits; a batch stays far below

_TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.string())),
        ("video", pa.list_(pa.string())),
        ("conversations", pa.list_(_TURN)),
        ("length", pa.int32()),
        ("is_multimodal", pa.bool_()),
        ("problem", pa.string()),
    ]
)


@dataclass(frozen=True)
class _Row:
    """A record in the columns' shape; `problem` says why it could not be brought into it."""

    id: str
    images: tuple[str, ...] = ()
    video: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    problem: str | None = None

    def strings(self) -> Iterator[str]:
        return chain((self.id,), self.images, self.video, chain.from_iterable(self.turns))


def load_table(path: Path, cache_folder: Path | None) -> datasets.Dataset:
    """See `records.load_llava`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the LLaVA JSON or JSONL file of the samples")
    return cached_table(path, kind=f"llava {TABLE_VERSION}", write=_write, cache_folder=cache_folder)


def _write(path: Path, file: BinaryIO) -> int:
    try:
        return _write_plain(path, file)
    except NotPlainError:
        file.seek(0)
        file.truncate()
    rows = 0
    usable = 0
    first_problem = ""
    with pa.ipc.new_stream(file, _SCHEMA) as writer:
        for batch in _batches(_row(record, number) for number, record in enumerate(stream_records(path))):
            writer.write_batch(_record_batch(batch))
            rows += len(batch)
            usable += sum(row.problem is None for row in batch)
            first_problem = first_problem or next((row.problem for row in batch if row.problem), "")
    if not rows:
        raise UserError(f"{path}: holds no records")
    if not usable:
        raise UserError(f"{path}: none of its {rows} records is a LLaVA sample; the first one: {first_problem}")
    return rows


def _write_plain(path: Path, file: BinaryIO) -> int:
    rows = 0
    with pa.ipc.new_stream(file, _SCHEMA) as writer:
        for batch in plain_batches(path, _SCHEMA):
            writer.write_batch(batch)
            rows += len(batch)
    if not rows:
        raise NotPlainError
    return rows


def _row(record: Mapping[str, object], number: int) -> _Row:
    sample_id = str(record["id"]) if record.get("id") is not None else f"record {number}"
    try:
        row = _Row(
            sample_id,
            images=read_paths(record, ("images", "image"), sample_id),
            video=read_paths(record, ("video",), sample_id),
            turns=tuple(raw_turns(record, sample_id)),
        )
    except BadSample as error:
        return _Row(sample_id, problem=error.reason)
    return row


def _batches(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(map(len, row.strings()))
        if len(batch) == ROWS_A_BATCH or characters >= CHARACTERS_A_BATCH:
            yield batch
            batch, characters = [], 0
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
        "".join(row.strings()).encode()
    except UnicodeEncodeError:
        readable_id = row.id.encode("utf-8", "backslashreplace").decode()
        return _Row(readable_id, problem="its text holds half of a surrogate pair, which is no character")
    return row


def _columns(rows: list[_Row]) -> pa.RecordBatch:
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + len(row.turns))
    turns = list(chain.from_iterable(row.turns for row in rows))
    speakers = pa.array([speaker for speaker, _ in turns], pa.string())
    texts = pa.array([text for _, text in turns], pa.string())
    turn_structs = pa.StructArray.from_arrays([speakers, texts], fields=list(_TURN))
    columns = [
        pa.array([row.id for row in rows], pa.string()),
        pa.array([row.images for row in rows], pa.list_(pa.string())),
        pa.array([row.video for row in rows], pa.list_(pa.string())),
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), turn_structs),
        pa.array([sum(len(text.split()) for _, text in row.turns) for row in rows], pa.int32()),
        pa.array([bool(row.images or row.video) for row in rows], pa.bool_()),
        pa.array([row.problem for row in rows], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)
