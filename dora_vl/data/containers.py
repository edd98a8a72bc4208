"""Yields the rows of a data file in any container; only the current rows are in memory.

JSON and JSON lines (the first character decides), CSV, TSV, Parquet, Arrow, WebDataset archives, and sets of the hub.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dora_vl.data.column_names import ROLES, Cell, plain_name, without_nulls
from dora_vl.data.pictures import PICTURE_ENDINGS, VIDEO_ENDINGS
from dora_vl.data.text_file import (
    LONGEST_REASON,
    encoding_of,
    json_of,
    likeliest_delimiter,
    opened,
    table_rows,
    text_lines,
    text_of,
)
from dora_vl.errors import UserError, one_line

if TYPE_CHECKING:
    import datasets

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turns what libraries raise on files that are cut, damaged, or of another kind into one line."""
    errors = (pa.ArrowException, tarfile.TarError, OSError, EOFError, ValueError, TypeError, KeyError, OverflowError)
    try:
        yield
    except (*errors, MemoryError, zlib.error, lzma.LZMAError) as error:
        reason = one_line(str(error), LONGEST_REASON) or type(error).__name__
        raise UserError(f"{path}: cannot be read as {kind} ({reason}); fetch or write it again") from None


def webdataset_rows(path: Path) -> Iterator[dict[str, object]]:
    """Yields a row for each sample: the fields of its `.json`, its pictures as bytes, its `.txt` as a caption.

    Pictures that have numbers (`x.0.png`, `x.1.png`) come in the order of these, others in the archive's.

    The files of a sample have one name up to its first dot, which is `__key__`, and follow each other. Its videos
    are bytes too, which is told where the row is read, unless the fields name a video's file. Other files are fields by
    their ending, as bytes.
    """
    with (
        opened(path, "samples") as file,
        reading(path, "a tar archive"),
        tarfile.open(fileobj=file, mode="r|*") as archive,
    ):
        for key, members in groupby(_members(archive), key=lambda member: member[0]):
            yield _archive_row(key, [member[1:] for member in members], path)


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, bytes]]:
    for member in archive:
        member_path = PurePosixPath(member.name)
        if not member.isfile() or member_path.name.startswith("._"):  # macOS keeps a file's attributes beside it
            continue
        content = archive.extractfile(member)
        name, _, ending = member_path.name.partition(".")
        yield str(member_path.parent / name), ending.lower(), b"" if content is None else content.read()


def _archive_row(key: str, files: list[tuple[str, bytes]], path: Path) -> dict[str, object]:
    row: dict[str, object] = {"__key__": key}
    pictures: list[tuple[str, bytes]] = []
    videos: list[object] = []
    for ending, content in files:
        where = f"{path}, {one_line(key, 60)}.{one_line(ending, 20)}"
        kind = ending.rpartition(".")[2]
        if ending == "json":
            fields = json_of(text_of(content.removeprefix(codecs.BOM_UTF8), where), where)
            row |= fields if isinstance(fields, dict) else {"json": fields}
        elif kind in PICTURE_ENDINGS:
            pictures.append((ending.rpartition(".")[0], content))
        elif kind in VIDEO_ENDINGS:
            videos.append({"bytes": content})
        else:
            row[ending] = text_of(content.removeprefix(codecs.BOM_UTF8), where) if ending == "txt" else content
    if pictures:  # they replace the names that the text has for them
        row = {name: value for name, value in row.items() if plain_name(name) not in ROLES["images"]}
        if all(name.isdecimal() for name, _ in pictures if name):  # x.0.png, x.1.png, in whatever order they come
            pictures.sort(key=lambda picture: int(picture[0] or -1))
        row["images"] = [content for _, content in pictures]
    if videos and not any(row.get(name) for name in ROLES["videos"]):
        row["videos"] = videos
    return row


END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def _parquet_rows(path: Path) -> Iterator[dict[str, object]]:
    with reading(path, "Parquet"), pq.ParquetFile(path) as file:
        numbers = [field.name for field in file.schema_arrow if pa.types.is_floating(field.type)]
        whole = _whole_columns(file.iter_batches(columns=numbers) if numbers else ())
        # One group after another: an iterator over all of them holds what it has read, 422 MiB of a file of 400.
        for group in range(file.num_row_groups):
            group_metadata = file.metadata.row_group(group)
            size = _rows_at_once(group_metadata.num_rows, group_metadata.total_byte_size)
            yield from _rows(file.iter_batches(batch_size=size, row_groups=[group]), whole)


def arrow_rows(path: Path) -> Iterator[dict[str, object]]:
    """Yields the rows of an Arrow file, a stream (as `datasets` writes it) or a file with a footer."""
    with reading(path, "Arrow"), pa.memory_map(str(path)) as source:
        whole = _whole_columns(_arrow_batches(source))
        source.seek(0)
        yield from _rows(_arrow_batches(source), whole)


def count_rows(path: Path) -> int | None:
    """Returns the number of rows of a Parquet or Arrow file, without reading them; None for any other file."""
    kind = path.suffix.lower()
    with reading(path, kind.removeprefix(".").capitalize()):
        if kind == ".parquet":
            return pq.read_metadata(path).num_rows
        if kind == ".arrow":
            with pa.memory_map(str(path)) as source:
                return sum(map(len, _arrow_batches(source)))
    return None


def _arrow_batches(source: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    if source.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        source.seek(source.size() - min(source.size(), len(END_OF_STREAM)))
        if source.read() != END_OF_STREAM:  # a cut between two batches looks whole to a reader of streams
            raise ValueError("its end is missing")
        source.seek(0)
        yield from pa.ipc.open_stream(source)


def _classes(features: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of `datasets`' features, as it writes them in JSON, that are or hold a ClassLabel."""
    return {column: feature for column, feature in features.items() if "'ClassLabel'" in str(feature)}


def _with_names(value: object, feature: Any) -> object:
    """Returns a value with the class's name for each number that a ClassLabel is; lists and objects hold such too."""
    feature = feature[0] if isinstance(feature, list) and feature else feature  # as `datasets` wrote lists before
    if not isinstance(feature, Mapping):
        return value
    within = feature.get("feature", feature) if isinstance(feature.get("_type"), str) else feature
    if isinstance(value, list):
        return [_with_names(each, within) for each in value]
    if isinstance(value, dict):
        return {key: _with_names(each, within.get(key)) for key, each in value.items()}
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    if not isinstance(names, list) or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None  # -1: no label, as `datasets` has it


def _as_written(row: dict[str, object], classes: Mapping[str, Any]) -> dict[str, object]:
    """Returns the row with a class's name for its number, and without the nulls that fill its objects."""
    row |= {column: _with_names(row[column], feature) for column, feature in classes.items() if column in row}
    return {column: without_nulls(value) if isinstance(value, list | dict) else value for column, value in row.items()}


def _rows_at_once(rows: int, size: int) -> int:
    """Returns how many of `rows` rows, of `size` bytes in all, become Python objects at once: of 64 MiB together."""
    return max(1, min(64, (64 << 20) * rows // max(1, size)))


def _whole_columns(batches: Iterable[pa.RecordBatch]) -> list[str]:
    """Returns the float columns of whole numbers and empty cells: pandas stores integers so if some are missing."""
    has_empty: dict[str, bool] = {}
    others: set[str] = set()
    for batch in batches:
        for field, column in zip(batch.schema, batch.columns, strict=True):
            if not pa.types.is_floating(field.type):
                continue
            column.validate(full=True)
            held = column.drop_null().cast(pa.float64()).to_numpy()
            numbers = held[~np.isnan(held)]
            has_empty[field.name] = has_empty.get(field.name, False) or len(numbers) < len(column)
            if not (np.isfinite(numbers) & (numbers == np.floor(numbers))).all():
                others.add(field.name)
    return [name for name, empty in has_empty.items() if empty and name not in others]


def _rows(batches: Iterable[pa.RecordBatch], whole: Iterable[str]) -> Iterator[dict[str, object]]:
    for batch in batches:
        classes: dict[str, Any] = {}
        with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):  # another program's
            classes = _classes(json.loads((batch.schema.metadata or {})[b"huggingface"])["info"]["features"])
        batch.validate(full=True)  # offsets that lead out of a damaged file's memory would end the process
        step = _rows_at_once(len(batch), batch.nbytes)
        for start in range(0, len(batch), step):
            for row in batch.slice(start, step).to_pylist():
                for name in whole:
                    if row[name] is not None and row[name] == row[name]:
                        row[name] = int(row[name])
                yield _as_written(row, classes)


LISTS = frozenset({"messages", "conversations", "texts", "turns", "images", "image", "answers", "subtitles"})
"""A cell of these columns may hold a list as JSON; other cells are text."""


def delimited_rows(path: Path) -> Iterator[dict[str, object]]:
    """Yields the rows of a table; an empty cell is null where its column may hold JSON or an id.

    The delimiter is the one that parts the first line into most columns. The encoding is what a byte order mark says,
    else UTF-8, else Windows-1252, which the log mentions.
    """
    encoding = encoding_of(path, "samples")
    _, first = next(text_lines(path, "samples", encoding), (1, ""))
    delimiter = likeliest_delimiter(first, ending_of(path))
    rows = table_rows(path, "samples", delimiter=delimiter, encoding=encoding, skip_spaces=True)
    for number, (line, cells) in enumerate(rows, 1):
        row: dict[str, object] = {}
        for name, cell in cells.items():
            column = plain_name(name)
            opening = "[" if column in LISTS else "{" if column in ("extra", "video") else None
            if opening and cell.lstrip().startswith(opening):
                row[name] = json_of(cell, f"{path}, row {number} (line {line}), column {name}")
            else:
                row[name] = None if not cell and (opening or column == "id") else Cell(cell)
        yield row


def hub_set(name: str, *, streaming: bool) -> Any:
    """Returns a set's split, fetched, or a stream that decodes no picture: `OWNER/NAME[@REVISION][[:CONFIG]:SPLIT]`."""
    import datasets

    pinned, *parts = name.split(":")
    repository, _, revision = pinned.partition("@")
    chosen: Any = {"name": parts[0] if len(parts) > 1 else None, "revision": revision or None}
    with _reading_hub(name):
        rows = datasets.load_dataset(repository, split=(parts or ["train"])[-1], streaming=streaming, **chosen)
    return rows.decode(False) if isinstance(rows, datasets.IterableDataset) else rows


def hub_rows(name: str, stream: datasets.IterableDataset) -> Iterator[dict[str, object]]:
    """Yields the rows of a stream, with the names of its classes for their numbers."""
    features: Any = stream.features.to_dict() if stream.features else {}
    classes = _classes(features)
    with _reading_hub(name):
        yield from (_as_written(row, classes) for row in stream)


@contextlib.contextmanager
def _reading_hub(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # its loaders raise of every kind
        raise UserError(f"hub:{name}: cannot be read by `datasets`: {one_line(str(error), 300)}") from error


HUB = "hub:"
READERS: Mapping[str, Callable[[Path], Iterator[dict[str, object]]]] = {
    ".csv": delimited_rows,
    ".tsv": delimited_rows,
    ".parquet": _parquet_rows,
    ".arrow": arrow_rows,
    ".tar": webdataset_rows,
}
"""Maps a file's ending to its reader; any other file is JSON."""
JSON_ENDINGS = (".json", ".jsonl")
ENDINGS = (*JSON_ENDINGS, *READERS)


def ending_of(path: Path) -> str:
    """Returns a data file's ending; for `a.jsonl.gz` the one inside, `.jsonl`."""
    inner = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else ""
    return inner if inner in (".csv", ".tsv", *JSON_ENDINGS) else path.suffix.lower()
