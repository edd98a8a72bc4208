"""Parquet and Arrow files as rows; pictures stay as they are stored, as bytes or paths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dora_vl.data.text_file import LONGEST_REASON
from dora_vl.errors import UserError, one_line

ROWS_AT_ONCE = 64
"""Rows in memory as Python objects; with pictures each may be megabytes."""
READING_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError)
"""What pyarrow raises on files that are cut, damaged, or of another kind."""


def parquet_rows(path: Path) -> Iterator[dict[str, object]]:
    """Yields the rows of a Parquet file.

    Raises:
        UserError: it cannot be read to its end.
    """
    try:
        with pq.ParquetFile(path) as file:
            # One group after another: an iterator over all of them holds what it has read, 422 MiB of a file of 400.
            for group in range(file.num_row_groups):
                yield from _rows(file.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group]))
    except READING_ERRORS as error:
        raise _unreadable(path, "Parquet", error) from None


def arrow_rows(path: Path) -> Iterator[dict[str, object]]:
    """Yields the rows of an Arrow file, a stream (as `datasets` writes it) or a file with a footer.

    Raises:
        UserError: it cannot be read to its end.
    """
    try:
        with pa.memory_map(str(path)) as source:
            yield from _rows(_arrow_batches(source))
    except READING_ERRORS as error:
        raise _unreadable(path, "Arrow", error) from None


def count_rows(path: Path) -> int | None:
    """How many rows a Parquet or Arrow file has, without reading them; None for any other file.

    Raises:
        UserError: it cannot be read.
    """
    kind = {".parquet": "Parquet", ".arrow": "Arrow"}.get(path.suffix.lower())
    if kind is None:
        return None
    try:
        if kind == "Parquet":
            return pq.read_metadata(path).num_rows
        with pa.memory_map(str(path)) as source:
            return sum(map(len, _arrow_batches(source)))
    except READING_ERRORS as error:
        raise _unreadable(path, kind, error) from None


def _arrow_batches(source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    if source.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        source.seek(0)
        yield from pa.ipc.open_stream(source)


def _rows(batches: Iterable[pa.RecordBatch]) -> Iterator[dict[str, object]]:
    for batch in batches:
        batch.validate(full=True)  # offsets that lead out of a damaged file's memory would end the process
        for start in range(0, len(batch), ROWS_AT_ONCE):
            yield from batch.slice(start, ROWS_AT_ONCE).to_pylist()


def _unreadable(path: Path, kind: str, error: BaseException) -> UserError:
    reason = one_line(str(error), LONGEST_REASON) or type(error).__name__
    return UserError(f"{path}: cannot be read as {kind} ({reason}); fetch or write it again")
