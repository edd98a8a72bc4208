"""Yields the rows of a data file or folder in any format; only the current rows are in memory.

JSON and JSON lines (the first character decides), CSV, TSV, Parquet, Arrow (files, and folders that `datasets` saved),
WebDataset archives, folders of pictures, and sets of the hub (see `hub_set`).

The name of a file says its split as `datasets` reads it: by words such as `train` or `val` in it, and by what comes
before `-00000-of-00002`. But different words are never one split here: `dev` and `validation` of MMMU are not.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dora_vl.data.column_names import ROLES, Cell, Row, plain_name, without_nulls
from dora_vl.data.pictures import PICTURE_ENDINGS, VIDEO_ENDINGS
from dora_vl.data.text_file import (
    LONGEST_REASON,
    encoding_of,
    json_of,
    likeliest_delimiter,
    opened,
    stream_records,
    table_rows,
    text_lines,
    text_of,
    whole_text,
)
from dora_vl.errors import UserError, log_once, one_line, short_names

if TYPE_CHECKING:
    import datasets

_log = logging.getLogger(__name__)

BESIDE_ARROW = ("dataset_info.json", "state.json", "dataset_dict.json")
"""`datasets` writes these beside the Arrow files of a folder; they hold no rows."""
LEFTOVERS = ("cache-", "tmp")
"""`map` and `filter` of `datasets` leave Arrow files with these names; they are not shards."""

WORDS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "evaluation", "eval"),
}
"""Each split may be named by one of these words."""
_WORD = "|".join(word for words in WORDS.values() for word in words)
_ANY_WORD = re.compile(rf"(?:^|[-._ 0-9])({_WORD})(?=[-._ 0-9]|$)")
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-[0-9]{5}-of-[0-9]{5}")


def saved_shards(folder: Path) -> tuple[Path, ...]:
    """Returns the Arrow files of a folder that `datasets` saved, as its `state.json` lists them."""
    import datasets  # a second and a half, which rows of files need not pay

    with _reading(folder, "a saved set"):
        saved: Any = datasets.load_from_disk(str(folder), keep_in_memory=False)
    files = tuple(Path(file["filename"]) for file in saved.cache_files)
    if strange := [file for file in files if file.resolve().parent != folder.resolve()]:
        raise UserError(f"{folder}: its state.json names {strange[0]}, outside of it; copy the folder again")
    return files


def refuse_several_splits(folder: Path, files: Sequence[Path]) -> None:
    """Refuses a folder of files whose names say several splits."""
    names = {file: _split_of(file.name.lower()) for file in files}
    if any(names.values()):
        for file, name in names.items():  # beside files that say splits in words `testdev-00000-of-00001` counts too
            shard = _SHARD.match(file.name)
            names[file] = name or (shard[1] if shard else "")
    splits: dict[str, list[Path]] = {}
    for file, name in names.items():
        splits.setdefault(name, []).append(file)
    if len([*filter(None, splits)]) > 1:
        trained_on = next((of_split for name, of_split in splits.items() if meaning(name) == "train"), files)
        counts = short_names(f"{name or 'others'} ({len(of_split)})" for name, of_split in splits.items())
        raise UserError(
            f"{folder}: files of several splits, {counts}; name the file that is meant, such as {trained_on[0].name}, "
            "in data.train also a list of files, or move each split to a folder of its own"
        )


def _split_of(name: str) -> str:
    shard = _SHARD.match(name)
    return shard[1] if shard and _ANY_WORD.match(name) else _word(name)  # `test_seen` and `test_unseen` are two


def _word(name: str) -> str:
    """Returns the word that a name begins with, else the last one in it."""
    first = _ANY_WORD.match(name)
    return first[1] if first else next(iter(reversed(_ANY_WORD.findall(name))), "")


def meaning(name: str) -> str | None:
    """Returns `train`, `validation` or `test` for a split's name that means it: `val`, `test_seen`."""
    word = _word(name.lower())
    return next((split for split, words in WORDS.items() if word in words), None)


SPLIT_COLUMNS = ("split", "data_split", "dataset_split", "set_name", "partition")


def split_of(row: Row) -> str | None:
    """Returns `train`, `validation` or `test` where a row's own column says it in one of `WORDS`."""
    texts = (str(value).strip().lower() for name, value in row.items() if plain_name(name) in SPLIT_COLUMNS)
    return next((split for text in texts for split, words in WORDS.items() if text in words), None)


def split_used(splits: Mapping[str | None, int], *wanted: str) -> str | None:
    """Returns the first of the wanted splits that rows of several name; None where all rows are used."""
    named = [split for split in splits if split is not None]
    return next((split for split in wanted if split in named), None) if len(named) > 1 else None


def counted_splits(splits: Mapping[str | None, int]) -> str:
    """Says how many rows are of each split."""
    return ", ".join(f"{name or 'without a word'} {count:,}" for name, count in splits.items())


def split_taken(path: object, splits: Mapping[str | None, int], *wanted: str, level: int = logging.INFO) -> str | None:
    """Returns what `split_used` does; the log says which rows those are."""
    if (split := split_used(splits, *wanted)) is not None:
        counts = counted_splits(splits)
        log_once(_log, level, f"{path}: its rows name splits ({counts}); those of {split} are used")
    return split


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
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
        _reading(path, "a tar archive"),
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
    with _reading(path, "Parquet"), pq.ParquetFile(path) as file:
        numbers = [field.name for field in file.schema_arrow if pa.types.is_floating(field.type)]
        whole = _whole_columns(file.iter_batches(columns=numbers) if numbers else ())
        # One group after another: an iterator over all of them holds what it has read, 422 MiB of a file of 400.
        for group in range(file.num_row_groups):
            group_metadata = file.metadata.row_group(group)
            size = _rows_at_once(group_metadata.num_rows, group_metadata.total_byte_size)
            yield from _rows(file.iter_batches(batch_size=size, row_groups=[group]), whole)


def arrow_rows(path: Path) -> Iterator[dict[str, object]]:
    """Yields the rows of an Arrow file, a stream (as `datasets` writes it) or a file with a footer."""
    with _reading(path, "Arrow"), pa.memory_map(str(path)) as source:
        whole = _whole_columns(_arrow_batches(source))
        source.seek(0)
        yield from _rows(_arrow_batches(source), whole)


def count_rows(path: Path) -> int | None:
    """Returns the number of rows of a Parquet or Arrow file, without reading them; None for any other file."""
    kind = path.suffix.lower()
    with _reading(path, kind.removeprefix(".").capitalize()):
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
NO_SAMPLES = {
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "save the sheet as CSV"),
    **dict.fromkeys((".zip", ".gz", ".7z", ".rar", ".zst"), "unpack it first"),
}
"""A file with one of these endings is refused with this advice."""
JSON_ENDINGS = (".json", ".jsonl")
ENDINGS = (*JSON_ENDINGS, *READERS)


def ending_of(path: Path) -> str:
    """Returns a data file's ending; for `a.jsonl.gz` the one inside, `.jsonl`."""
    inner = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else ""
    return inner if inner in (".csv", ".tsv", *JSON_ENDINGS) else path.suffix.lower()


def is_data_file(path: Path) -> bool:
    """Tells by a file's name whether it may hold rows."""
    is_left = path.suffix.lower() == ".arrow" and path.name.startswith(LEFTOVERS)
    return ending_of(path) in ENDINGS and path.name not in (*BESIDE_ARROW, "manifest.json") and not is_left


@dataclass(frozen=True)
class DataFiles:
    """The files that one entry of `data.train` names."""

    name: str
    files: tuple[Path, ...]

    @property
    def is_json(self) -> bool:
        """Tells whether it is a single file of JSON."""
        return type(self) is DataFiles and len(self.files) == 1 and ending_of(self.files[0]) not in READERS

    def rows(self) -> Iterator[dict[str, object]]:
        """Yields the rows of all files in order."""
        for file in self.files:
            yield from READERS.get(ending_of(file), stream_records)(file)


@dataclass(frozen=True)
class PictureFolder(DataFiles):
    """A folder of pictures or videos whose places, or a text file beside each, say what they show.

    Attributes:
        fields: of the row of each file: its path, as `id` too, its class's folder as `label`, its `split`.
        has_texts: a file's answer or caption is the text file of its name.
    """

    fields: Mapping[Path, dict[str, object]]
    has_texts: bool

    @property
    def says_what(self) -> bool:
        """Tells whether folders or text files say what the pictures show."""
        return self.has_texts or any("label" in row for row in self.fields.values())

    def rows(self) -> Iterator[dict[str, object]]:
        """Yields the row of each picture or video."""
        for file in self.files:
            if file in self.fields:
                text = file.with_suffix(".txt")
                caption = {"txt": whole_text(text, "text").strip() if text.is_file() else ""} if self.has_texts else {}
                yield self.fields[file] | caption


def picture_folder(folder: Path) -> PictureFolder | None:
    """Returns the pictures and videos below a folder; None where there are none.

    A folder a class is as torchvision's ImageFolder has it: the first folder below the root, or below a folder named
    as a split, is the class; a folder that all of them are in is none.
    """
    files = list(files_below(folder))
    media = [path for path in files if path.suffix.lower().removeprefix(".") in (*PICTURE_ENDINGS, *VIDEO_ENDINGS)]
    if not media:
        return None
    stems = {path.with_suffix("") for path in media}
    texts = [path for path in files if path.suffix == ".txt" and path.with_suffix("") in stems]
    folders = {path: path.relative_to(folder).parts[:-1] for path in media}
    fields: dict[Path, dict[str, object]] = {}
    for path in media:
        name = path.relative_to(folder).as_posix()
        fields[path] = {"id": name, "video" if path.suffix.lower()[1:] in VIDEO_ENDINGS else "image": name}
    if all(parts and any(parts[0].lower() in words for words in WORDS.values()) for parts in folders.values()):
        for path, parts in folders.items():
            fields[path]["split"], folders[path] = meaning(parts[0]), parts[1:]
    while len({parts[:1] for parts in folders.values()}) == 1 and all(folders.values()):
        folders = {path: parts[1:] for path, parts in folders.items()}
    has_classes = all(folders.values())
    has_texts = 2 * len(texts) >= len(media) or bool(texts and not has_classes)
    if has_classes and not has_texts:
        for path, parts in folders.items():
            fields[path]["label"] = parts[0]
    return PictureFolder(str(folder), (*media, *texts), fields, has_texts)


RUN_FILE = "run.yaml"  # `dora-vl init` writes it into the folder of a run
LINKED = "a link that is not followed"


def files_below(folder: Path) -> Iterator[Path]:
    """Yields files in order, those of hidden folders and of runs left out."""
    paths = sorted(folder.rglob("*"))
    runs = {path.parent for path in paths if path.name == RUN_FILE}
    for path in paths:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and runs.isdisjoint(path.parents):
            yield path


def overlooked(folder: Path, media: Iterable[Path]) -> str:
    """Says in a line which folders below one hold none of its pictures and videos, and why; empty where each does."""
    direct = {path.parent for path in media}
    read = {parent for path in direct for parent in (path, *path.parents)}
    reasons: dict[Path, str] = {}
    for at, names, _ in os.walk(folder):
        below = [Path(at, name) for name in sorted(names) if not name.startswith(".")]
        names.clear()
        for path in below:
            if path.is_symlink():
                reasons[path] = LINKED
            elif path not in read and (files := list(files_below(path))):
                reasons[path] = f"{short_names({file.suffix or file.name: None for file in files}, 4)} not read"
            elif path not in read and not any(next(os.walk(path), ("", [], []))[1:]):
                reasons[path] = "empty or locked"
            elif not (path / RUN_FILE).exists():
                names.append(path.name)
    if not reasons:
        return ""
    lines = (f"{path.relative_to(folder)} ({reason})" for path, reason in sorted(reasons.items()))
    remedy = "; data.follow_links follows only links to files: copy a linked folder" * (LINKED in reasons.values())
    return f"{folder}: no row of {short_names(lines, max_length=80)}{remedy}"


def find_files(path: Path) -> DataFiles:
    """Returns a path's files: itself, a folder's shards of one kind and split, its pictures, or a set of the hub."""
    if str(path).startswith(HUB):
        fetched = hub_set(str(path).removeprefix(HUB), streaming=False).cache_files
        return DataFiles(str(path), tuple(Path(file["filename"]) for file in fetched))
    if path.is_file():
        if (remedy := NO_SAMPLES.get(ending_of(path))) is not None:
            raise UserError(f"{path}: a {path.suffix} file is not read; {remedy}")
        return DataFiles(str(path), (path,))
    if not path.is_dir():
        raise UserError(f"{path}: no such file of samples, or folder of them; a set of the hub is {HUB}OWNER/NAME")
    if all((path / name).is_file() for name in BESIDE_ARROW[:2]):
        return DataFiles(str(path), saved_shards(path))
    files = [file for file in sorted(path.iterdir()) if is_data_file(file) and file.is_file()]
    kinds = sorted({ending_of(file) for file in files})
    if len(kinds) > 1:
        raise UserError(f"{path}: files of several kinds ({', '.join(kinds)}); give one file, or a folder of one kind")
    pictures = None if files else picture_folder(path)
    if pictures is not None and pictures.says_what:
        if len(names := {str(row.get("split")) for row in pictures.fields.values()}) > 1:
            raise UserError(f"{path}: pictures of several splits, {short_names(sorted(names))}; name the folder of one")
        log_once(_log, logging.WARNING, overlooked(path, pictures.fields))
        return pictures
    if not files:
        below = sorted(each.name for each in path.iterdir() if each.is_dir())[:5]
        hint = f"; give one of its folders ({', '.join(below)})" if below else ""
        raise UserError(f"{path}: no file of samples in it ({', '.join(ENDINGS)}){hint}")
    refuse_several_splits(path, files)
    return DataFiles(str(path), tuple(files))
