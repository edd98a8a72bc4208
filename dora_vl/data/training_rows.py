"""The rows that a run trains on and those held out of them: several files, their weights, the split by picture."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dora_vl.data.media import StoredPictures
from dora_vl.data.readers.columns import USUAL, Columns, column_lines
from dora_vl.data.record_table import load_table
from dora_vl.data.train_files import TrainFile
from dora_vl.data.turns import IMAGE_PLACEHOLDER, INPUT_CHARACTERS
from dora_vl.errors import UserError, one_line

REFERENCE_SPLIT_SEED = 42
SAMPLE_COLUMNS = ("id", "images", "video", "conversations", INPUT_CHARACTERS, "problem")


@dataclass(frozen=True)
class SampleRows:
    """Rows of `record_table.load_table`, and the pictures that their files hold themselves."""

    rows: datasets.Dataset
    stored: StoredPictures

    @property
    def samples(self) -> datasets.Dataset:
        """Only what a sample is made of: a quarter less time for each row than with all columns."""
        return self.rows.select_columns([*SAMPLE_COLUMNS])

    def ids(self) -> Iterator[str]:
        """Yields each row's id, in order."""
        for part in self.rows.select_columns(["id"]).with_format("arrow")[:]["id"].chunks:
            yield from map(str, part.to_pylist())

    @property
    def pictures(self) -> list[str]:
        """Each picture's name once, in order."""
        return list(dict.fromkeys(path for paths in self.rows["images"] for path in paths))

    @property
    def has_pictures(self) -> bool:
        """Whether any row has a picture."""
        return self._any("images")

    @property
    def has_videos(self) -> bool:
        """Whether any row names a video."""
        return self._any("video")

    def _any(self, name: str) -> bool:
        column = self.rows.select_columns([name]).with_format("arrow")[:][name]
        return any(len(chunk.flatten()) for chunk in column.chunks)


def load_rows(
    path: str, limit: int | None = None, *, cache_folder: Path | None = None, columns: Columns = USUAL
) -> SampleRows:
    """The samples of one path, the first `limit` of them.

    Raises:
        UserError: see `record_table.load_table`.
    """
    table = load_table(Path(path), cache_folder=cache_folder, columns=columns)
    rows = table.remove_columns("held_pictures")
    return SampleRows(rows if limit is None else rows.select(range(min(limit, len(rows)))), StoredPictures([table]))


def load_training_rows(
    files: Sequence[TrainFile],
    *,
    limit: int | None = None,
    share: float = 0.0,
    seed: int = 0,
    cache_folder: Path | None = None,
    columns: Columns = USUAL,
) -> tuple[SampleRows, SampleRows | None]:
    """The training samples of all files, and those held out for validation (None with a share of 0).

    Args:
        limit: only the first so many samples of each file.
        share: of all samples, held out before weights repeat or drop any; see `held_out_places`.
        seed: of the split, and of what a weight below 1 leaves out.
        columns: what the files' columns are.

    Raises:
        UserError: a file or a weight that cannot be used, or a split that leaves one side empty.
    """
    check_weights(files)
    found = [load_rows(file.path, limit, cache_folder=cache_folder, columns=columns) for file in files]
    rows = datasets.concatenate_datasets([one.rows for one in found]) if len(found) > 1 else found[0].rows
    stored = found[0].stored if len(found) == 1 else StoredPictures.joined([one.stored for one in found])
    media = (
        [*images, *(f"video/{clip['path']}" for clip in clips)]
        for images, clips in zip(rows["images"], rows["video"], strict=True)
    )
    held = held_out_places(rows["id"], media, share=share, seed=seed) if share else np.zeros(0, np.int64)
    kept = np.setdiff1d(np.arange(len(rows)), held)
    edges = np.cumsum([0, *(len(one.rows) for one in found)])
    places = [
        weighted(kept[(kept >= start) & (kept < end)], file, seed=seed)
        for file, start, end in zip(files, edges[:-1], edges[1:], strict=True)
    ]
    trained = np.concatenate(places)
    if not len(trained):
        raise UserError("data.train: its weights leave no sample")
    whole = len(trained) == len(rows) and len(files) == 1 and not share
    train = SampleRows(rows if whole else rows.select(trained), stored)
    return train, SampleRows(rows.select(held), stored) if share else None


def drawn_out(train: SampleRows, size: int) -> tuple[SampleRows, SampleRows]:
    """What is left of the samples, in a random order, and `size` of them for validation.

    As LLM-Adapters' and NVlabs' scripts part theirs: `train_test_split` with the seed 42.

    Raises:
        UserError: nothing would be left.
    """
    if size >= len(train.rows):
        raise UserError(f"data.validation_size {size} leaves none of {len(train.rows)} samples")
    parts = train.rows.train_test_split(test_size=size, shuffle=True, seed=REFERENCE_SPLIT_SEED)
    return SampleRows(parts["train"], train.stored), SampleRows(parts["test"], train.stored)


def check_weights(files: Sequence[TrainFile]) -> None:
    """Raises UserError where there is no file, or a weight that is not above 0."""
    if not files:
        raise UserError("data.train names no file")
    for file in files:
        if not (math.isfinite(file.weight) and file.weight > 0):
            raise UserError(f"data.train: {file.path} has the weight {file.weight}; it must be above 0")


def weighted(places: np.ndarray, file: TrainFile, *, seed: int) -> np.ndarray:
    """The places of one file as often as its weight says, in order; the fraction is chosen by (seed, path)."""
    times, fraction = divmod(file.weight, 1)
    digest = hashlib.sha256(f"{seed}/{file.path}".encode("utf-8", "surrogateescape")).digest()
    drawn = np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(places)
    return np.sort(np.concatenate([*[places] * int(times), drawn[: round(fraction * len(places))]]))


def held_out_places(ids: Iterable[str], images: Iterable[Sequence[str]], *, share: float, seed: int) -> np.ndarray:
    """Places of the samples held out: about `share` of all, and no picture or video on both sides.

    Samples that share a picture, directly or through others, stay together; those without pictures go by their id.
    Which groups are held out is decided by a hash of (seed, group), so another order of the file changes nothing.

    Raises:
        UserError: the share is not between 0 and 1, or no group is small enough, or nothing is left to train on.
    """
    if not 0 < share < 1:
        raise UserError(f"data.validation_share is {share}; it must be above 0 and below 1")
    groups = _groups(
        [tuple(f"picture/{name}" for name in names) or (f"id/{own}",) for own, names in zip(ids, images, strict=True)]
    )
    sizes = Counter(groups)
    wanted, taken, chosen = max(1, round(share * len(groups))), 0, set[str]()
    for group in sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest()):
        if taken + sizes[group] <= wanted:
            chosen.add(group)
            taken += sizes[group]
    if not chosen or taken == len(groups):
        smallest = min(sizes.values())
        raise UserError(
            f"data.validation_share {share} of {len(groups)} samples cannot be held out: samples of one picture stay "
            f"together, and the smallest group has {smallest}; set another share, or name a data.validation file"
        )
    return np.array([place for place, group in enumerate(groups) if group in chosen], np.int64)


def _groups(members: Sequence[tuple[str, ...]]) -> list[str]:
    """For each sample the name of its group, which is the least of all names in it."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    for names in members:
        for name in names[1:]:
            first, second = sorted((root(names[0]), root(name)))
            parent[second] = first
    return [root(names[0]) for names in members]


def described(file: TrainFile, rows: datasets.Dataset) -> list[str]:
    """Lines about a file: name, format, rows, how many cannot be used, what its columns are, and its pictures a row."""
    formats = [name for name in rows.unique("format") if name is not None]
    bad = sum(problem is not None for problem in rows["problem"])
    trouble = f", {bad:,} of them unusable" if bad else ""
    weight = "" if file.weight == 1 else f", weight {file.weight:g}"
    first = f"{Path(file.path).name}: {formats[0] if formats else 'no known format'}, {len(rows):,} rows"
    return [f"{first}{trouble}{weight}", *column_lines(uses_of(rows)), *_media_lines(rows)]


def uses_of(rows: datasets.Dataset) -> list[Mapping[str, str]]:
    """The roles of the columns of each kind of row; see `record_table.load_table`."""
    return [json.loads(uses) for uses in rows.unique("columns") if uses is not None]


def _media_lines(rows: datasets.Dataset) -> Iterator[str]:
    table = rows.select_columns(["images", "video"]).with_format("arrow")[:]
    for name, what in (("images", "pictures"), ("video", "videos")):
        counts = Counter(pc.call_function("list_value_length", [table[name]]).to_pylist())
        if name == "images" or set(counts) != {0}:
            yield f"  {what}: " + ", ".join(f"{count or 'none'} in {counts[count]:,} rows" for count in sorted(counts))


@runtime_checkable
class QuestionAboutPictures(Protocol):
    """What is read of a test's question."""

    @property
    def id(self) -> str: ...  # noqa: D102

    @property
    def images(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def text(self) -> str: ...  # noqa: D102


def overlap(rows: datasets.Dataset, questions: Iterable[QuestionAboutPictures]) -> list[tuple[str, str]]:
    """The ids of a training sample and of the test's question that it holds, for each such sample.

    Args:
        rows: of `record_table.load_table`; any of a talk's questions counts.
        questions: pictures named as in `rows`. Those without pictures are left out.
    """
    asked = {(tuple(one.images), _words(one.text)): one.id for one in questions if one.images}
    pictures = {name for names, _ in asked for name in names}
    found: list[tuple[str, str]] = []
    for own, images, turns in _rows_about(rows, pictures):
        keys = [(tuple(images), _words(turn["value"])) for turn in turns if turn["from"] != "gpt"]
        found += [(own, asked[key]) for key in dict.fromkeys(keys) if key in asked][:1]
    return found


def _rows_about(rows: datasets.Dataset, pictures: set[str]) -> Iterator[tuple[str, list[str], list[dict[str, str]]]]:
    """Those that have any of these pictures; the column is searched without making objects of it."""
    names = rows.select_columns(["images"]).with_format("arrow")[:]["images"].combine_chunks()
    known = pc.call_function("is_in", [names.flatten()], pc.SetLookupOptions(pa.array(sorted(pictures), pa.string())))
    places = np.repeat(np.arange(len(names)), np.array(names.value_lengths()))[np.array(known, bool)]
    about = rows.select(np.unique(places))
    yield from zip(about["id"], about["images"], about["conversations"], strict=True)


def _words(text: str) -> str:
    return " ".join(text.replace(IMAGE_PLACEHOLDER, " ").split())


def overlap_warning(found: Sequence[tuple[str, str]], train: str, test: str) -> str:
    """One line that counts and names them."""
    examples = "; ".join(f"{ours} is {theirs} there" for ours, theirs in found[:3])
    return one_line(f"{len(found):,} training samples of {train} are asked again in {test}: {examples}")
