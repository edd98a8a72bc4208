"""Which files a path of samples names: a file, a folder of shards, of pictures, one that `datasets` saved, a hub's set.

The name of a file says its split as `datasets` reads it: by words such as `train` or `val` in it, and by what comes
before `-00000-of-00002`. But different words are never one split here: `dev` and `validation` of MMMU are not.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_vl.data.column_names import Row, plain_name
from dora_vl.data.containers import ENDINGS, HUB, READERS, ending_of, hub_set, reading
from dora_vl.data.pictures import PICTURE_ENDINGS, VIDEO_ENDINGS
from dora_vl.data.text_file import stream_records, whole_text
from dora_vl.errors import UserError, log_once, short_names

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

    with reading(folder, "a saved set"):
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


NO_SAMPLES = {
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "save the sheet as CSV"),
    **dict.fromkeys((".zip", ".gz", ".7z", ".rar", ".zst"), "unpack it first"),
}
"""A file with one of these endings is refused with this advice."""


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
