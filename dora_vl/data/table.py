"""Training files as tables: examples as Arrow columns on disk, converted once, memory-mapped by every process."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from posixpath import normpath
from typing import Any, BinaryIO

import datasets
import datasets.config
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dora_vl.data.check import (
    CONTRADICTION,
    DOUBTS,
    NO_PICTURE,
    SEVERAL_ANSWERS,
    Finding,
    find_doubts,
    question_and_answer,
)
from dora_vl.data.columns import USUAL, Columns, TrainFile, column_lines
from dora_vl.data.data_files import DataFiles, find_files, split_of, split_taken
from dora_vl.data.example import Answer, Example, named_in
from dora_vl.data.pictures import StoredPictures
from dora_vl.data.readers import RowReader, check_usable
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Clip, Turn
from dora_vl.errors import BadSample, UserError
from dora_vl.files import locked, unfinished

_log = logging.getLogger(__name__)

TABLE_VERSION = 21  # part of the cache's key: raise it when columns or their meaning change
ROWS_A_BATCH = 4096
SHARES = "data.validation_share (of init: --test-share)"
DRAWS = 100
"""The number of rows drawn for another picture; all have the same one where nearly all rows of a file do."""
CHARACTERS_A_BATCH = 1 << 25  # Arrow's string offsets are 32 bits; a batch stays far below

_CLIP = pa.struct([("path", pa.string()), ("start_seconds", pa.float64()), ("end_seconds", pa.float64())])
_TURN = pa.struct(
    [
        *(("role", pa.string()), ("text", pa.string()), ("input_characters", pa.int32())),
        *(("more", pa.string()), ("is_trained", pa.bool_())),
    ]
)
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.string())),
        ("videos", pa.list_(_CLIP)),
        ("turns", pa.list_(_TURN)),
        ("rejected", pa.list_(pa.string())),
        ("rejected_images", pa.list_(pa.string())),
        ("is_good", pa.bool_()),
        ("answers", pa.list_(pa.string())),
        ("problem", pa.string()),
        ("length", pa.int32()),
        ("format", pa.string()),
        ("held_pictures", pa.list_(pa.struct([("name", pa.string()), ("content", pa.large_binary())]))),
        ("columns", pa.string()),
        ("doubts", pa.list_(pa.string())),
        ("asked", pa.uint64()),
        ("told", pa.uint64()),
        ("group", pa.string()),
        ("split", pa.string()),
    ]
)
_EXAMPLE_COLUMNS = ["id", "images", "videos", "turns", "rejected", "rejected_images", "is_good", "answers", "problem"]


def load_table(path: Path, *, columns: Columns = USUAL) -> datasets.Dataset:
    """Returns a data file of any format and container as memory-mapped rows, converted once and kept in a cache.

    Columns: the fields of an `Example` as it was read, `problem` (why the row cannot be a sample, else null), `length`
    (words in all turns and rejected answers), `format` (of the row), `held_pictures` (name and content of the pictures
    that the file holds, each in the first row that has it), `columns` (the role of each of the file's columns, as JSON,
    in the first row that has these), `doubts` (what is probably not meant, see `doubts_of`), `asked` and `told` (hashes
    of its questions with their media and of its answers; null where nothing is asked), `group` (what must not be
    split). The cache, `dora_vl` in that of `datasets`, is keyed by the files' paths, sizes and modification
    times, so a changed file is converted again; a content hash would read a gigabyte at each start.
    """
    data = find_files(path)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "dora_vl"
    table = folder / f"{path.stem}-{_fingerprint(data.files, columns)}.arrow"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(table.with_suffix(".arrow.lock")):  # the ranks of a machine: one converts, the others wait for it
            if not table.exists():
                _convert(path, data, table, columns)
    except OSError as error:
        raise UserError(f"{folder}: cannot keep the converted {path.name} ({error}); set HF_DATASETS_CACHE") from error
    return datasets.Dataset.from_file(str(table))


def _fingerprint(files: Sequence[Path], columns: Columns) -> str:
    key = f"samples {TABLE_VERSION} {json.dumps([dict(columns.roles), columns.ignored, columns.ask])}"
    for file in files:
        stat = file.stat()
        key += f"\0{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _convert(path: Path, data: DataFiles, table: Path, columns: Columns) -> None:
    """Writes the table atomically: what a killed process leaves is never taken for one."""
    before, started = _fingerprint(data.files, columns), time.perf_counter()
    with unfinished(table, Path.touch) as partial:
        with partial.open("wb") as file:
            rows = _write(path, file, _batches(data, columns))
            file.flush()
            os.fsync(file.fileno())
        if _fingerprint(data.files, columns) != before:
            raise UserError(f"{path}: changed while it was read; start again when it is complete")
        partial.replace(table)
    seconds = time.perf_counter() - started
    _log.info("%s: %d records converted in %.1f s (%.0f/s), kept as %s", path, rows, seconds, rows / seconds, table)


def _write(path: Path, file: BinaryIO, batches: Iterable[list[dict[str, Any]]]) -> int:
    """Writes an Arrow stream and returns the number of its rows."""
    rows = bad = 0
    first_problem: str | None = None
    with pa.ipc.new_stream(file, _SCHEMA) as writer:
        for batch in batches:
            writer.write(pa.RecordBatch.from_pylist(batch, _SCHEMA))
            problems = [row["problem"] for row in batch if "problem" in row]
            first_problem = first_problem or next(iter(problems), None)
            rows, bad = rows + len(batch), bad + len(problems)
    check_usable(str(path), rows, rows - bad, first_problem)
    return rows


def _batches(data: DataFiles, columns: Columns) -> Iterator[list[dict[str, Any]]]:
    """Yields rows in batches of bounded size; pictures and column roles are only in the first row that has them."""
    reader, pictures, kinds = RowReader(data.name, columns), set[str](), 0
    batch, size = [], 0
    for number, row in enumerate(data.rows()):
        example = reader.read(row, number)
        cells: dict[str, Any] = {"format": reader.format, "split": split_of(row)}
        if len(reader.uses) > kinds:
            kinds, cells["columns"] = len(reader.uses), json.dumps(reader.uses[-1])
        if isinstance(example, BadSample):
            cells |= {"id": example.sample_id, "problem": example.reason, "length": 0}
            cells |= {"images": (), "videos": (), "turns": ()}
        else:
            words, media, answer = question_and_answer(example)
            new = {name: content for name, content in example.image_bytes.items() if name not in pictures}
            pictures |= new.keys()
            cells |= {
                "id": example.id,
                "images": example.images,
                "videos": [asdict(clip) for clip in example.videos],
                "turns": [vars(turn) for turn in example.turns],
                "rejected": example.rejected,
                "rejected_images": example.rejected_images,
                "is_good": example.is_good,
                "answers": [right.text for right in example.answers],
                "length": sum(
                    len(text.split())
                    for text in (*(f"{turn.text} {turn.more}" for turn in example.turns), *example.rejected)
                ),
                "held_pictures": [{"name": name, "content": content} for name, content in new.items()],
                "doubts": find_doubts(row, example, reader.format, columns),
                "asked": _hash(f"{words}\0{media}") if words else None,
                "told": _hash(answer) if words else None,
                "group": named_in(row, "group"),
            }
        batch.append(cells)
        size += characters_of(example)
        if len(batch) == ROWS_A_BATCH or size >= CHARACTERS_A_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def characters_of(example: Example | BadSample) -> int:
    """Counts the characters and bytes that an example holds."""
    if isinstance(example, BadSample):
        return len(example.reason)
    texts = [example.id, *example.images, *(clip.path for clip in example.videos)]
    texts += [*(turn.text + turn.more for turn in example.turns), *(answer.text for answer in example.answers)]
    return sum(map(len, texts)) + sum(map(len, example.image_bytes.values()))


@dataclass(frozen=True)
class ExampleTable:
    """Rows of `load_table` as examples, and the pictures that their files hold themselves."""

    rows: datasets.Dataset
    stored: StoredPictures

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example | BadSample:
        return _example(self._samples[index])

    def __iter__(self) -> Iterator[Example | BadSample]:
        for start in range(0, len(self), 1_000):
            columns = self._samples[start : start + 1_000]
            yield from (_example(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))

    @cached_property
    def _samples(self) -> datasets.Dataset:
        """Reads only the columns that make an example: a quarter less time for each row than with all."""
        return self.rows.select_columns(_EXAMPLE_COLUMNS)

    def select(self, indices: Iterable[int]) -> ExampleTable:
        """Returns the rows at these indices."""
        return ExampleTable(self.rows.select(indices), self.stored)

    def ids(self) -> Iterator[str]:
        """Yields each row's id, in order."""
        yield from map(str, _column(self.rows, "id").to_pylist())

    @property
    def pictures(self) -> list[str]:
        """Lists each picture's name once, in order."""
        return list(dict.fromkeys(path for paths in self.rows["images"] for path in paths))

    def has_any(self, column: str) -> bool:
        """Tells whether any row's list of `images`, `videos` or `rejected_images` has an entry."""
        return any(_counts(self.rows, column))

    @property
    def most_rejected(self) -> int:
        """Returns how many rejected answers a row has at most beside the chosen one."""
        return max((count or 0 for count in _counts(self.rows, "rejected")), default=0)

    def other_pictures(self, example: Example, seed: int) -> tuple[str, ...]:
        """Returns as many other pictures, those of another row, drawn by seed and id; none where no row has such."""
        indices, rng = self._by_pictures.get(len(example.images), ()), random.Random(f"{seed}/{example.id}")
        for _ in range(DRAWS if len(indices) else 0):
            images = tuple(self.rows[int(rng.choice(indices))]["images"])
            if {*images} != {*example.images}:
                return images
        return ()

    @cached_property
    def _by_pictures(self) -> dict[int, np.ndarray]:
        """Groups the indices of rows by how many pictures they have."""
        counts = _column(self.rows, "images").value_lengths().to_numpy()
        return {int(count): np.flatnonzero(counts == count) for count in np.unique(counts) if count}

    @property
    def is_judged(self) -> bool:
        """Tells whether any row says that its answer is good or bad."""
        answers = _column(self.rows, "is_good")
        return answers.null_count < len(answers)


def _column(rows: datasets.Dataset, name: str) -> pa.Array:
    return rows.select_columns([name]).with_format("arrow")[:][name].combine_chunks()


def _counts(rows: datasets.Dataset, name: str) -> Counter[int]:
    """Counts the rows by how many `images` or `videos` they have."""
    return Counter(_column(rows, name).value_lengths().to_pylist())


def _example(row: Mapping[str, Any]) -> Example | BadSample:
    if row["problem"] is not None:
        return BadSample(row["id"], row["problem"])
    turns, videos = (Turn(**turn) for turn in row["turns"]), (Clip(**clip) for clip in row["videos"])
    about: dict[str, Any] = {name: tuple(row[name] or ()) for name in ("rejected", "rejected_images")}
    about |= {"is_good": row["is_good"], "answers": tuple(Answer(text=text) for text in row["answers"] or ())}
    return Example(row["id"], tuple(row["images"]), tuple(turns), tuple(videos), **about)


VALIDATED = ("validation", "test")
"""The loss is measured on rows of the first of these splits that a file's rows name."""


def load_rows(
    path: str, limit: int | None = None, *, columns: Columns = USUAL, splits: Sequence[str] = ("train",)
) -> ExampleTable:
    """Returns the samples of one path, the first `limit` of them; of a file of several splits those of the first here.

    Rows that name no split are trained on.
    """
    table = load_table(Path(path), columns=columns)
    rows = table.remove_columns("held_pictures")
    if (split := split_taken(path, Counter(rows["split"]), *splits)) is not None:
        kept = (split, None) if split == "train" else (split,)
        rows = rows.select([index for index, name in enumerate(rows["split"]) if name in kept])
    return ExampleTable(rows if limit is None else rows.take(min(limit, len(rows))), StoredPictures([table]))


def load_training_rows(
    files: Sequence[TrainFile], *, limit: int | None = None, share: float = 0.0, seed: int = 0, columns: Columns = USUAL
) -> tuple[ExampleTable, ExampleTable | None]:
    """Returns the training samples of all files, and those held out for validation (None with a share of 0).

    `held_out_indices` draws the share of all samples, before weights repeat or drop any.
    """
    check_weights(files)
    tables = [load_rows(file.path, limit, columns=columns) for file in files]
    rows = datasets.concatenate_datasets([table.rows for table in tables]) if len(tables) > 1 else tables[0].rows
    stored = StoredPictures.joined([table.stored for table in tables])
    held_out = np.zeros(0, np.int64)
    if share:
        held_out = held_out_indices(rows["id"], _grouping_keys(rows), share=share, seed=seed)
    trainable = np.setdiff1d(np.arange(len(rows)), held_out)
    edges = np.cumsum([0, *map(len, tables)])
    parts: list[np.ndarray] = []
    for file, start, end in zip(files, edges[:-1], edges[1:], strict=True):
        of_file = trainable[(trainable >= start) & (trainable < end)]
        times, fraction = divmod(file.weight, 1)
        # Which rows the fraction takes is a function of (seed, path); drawn of all, it changes with no other file.
        digest = hashlib.sha256(f"{seed}/{file.path}".encode("utf-8", "surrogateescape")).digest()
        drawn = np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(of_file)
        parts.append(np.sort(np.concatenate([*[of_file] * int(times), drawn[: round(fraction * len(of_file))]])))
    trained = np.concatenate(parts)
    if not len(trained):
        raise UserError("data.train: its weights leave no sample")
    is_all = len(trained) == len(rows) and len(files) == 1 and not share
    train = ExampleTable(rows if is_all else rows.select(trained), stored)
    return train, ExampleTable(rows.select(held_out), stored) if share else None


def _grouping_keys(rows: datasets.Dataset) -> Iterator[list[str]]:
    """Yields each row's pictures, videos and group: rows that have one in common are held out together."""
    for images, clips, group in zip(rows["images"], rows["videos"], rows["group"], strict=True):
        videos = (f"video/{normpath(clip['path'])}" for clip in clips)
        yield [*map(normpath, images), *videos, *([] if group is None else [f"group/{group}"])]


def split_validation(train: ExampleTable, size: int) -> tuple[ExampleTable, ExampleTable]:
    """Returns what is left of the samples, in a random order, and `size` of them for validation.

    As LLM-Adapters' and NVlabs' scripts split theirs: `train_test_split` with the seed 42.
    """
    if size >= len(train):
        raise UserError(f"data.validation_size {size} leaves none of {len(train)} samples")
    parts = train.rows.train_test_split(test_size=size, shuffle=True, seed=42)
    return ExampleTable(parts["train"], train.stored), ExampleTable(parts["test"], train.stored)


def check_weights(files: Sequence[TrainFile]) -> None:
    """Raises UserError where there is no file, or a weight that is not above 0."""
    if not files:
        raise UserError("data.train names no file")
    for file in files:
        if not (math.isfinite(file.weight) and file.weight > 0):
            raise UserError(f"data.train: {file.path} has the weight {file.weight}; it must be above 0")


def held_out_indices(
    ids: Iterable[str],
    images: Iterable[Sequence[str]],
    *,
    share: float,
    seed: int,
    classes: Sequence[str] | None = None,
) -> np.ndarray:
    """Returns the indices held out: about `share` of all, or of each class, no picture or video on both sides.

    Samples that share a picture or a `group`, directly or through others, stay together; those without go by their id.
    Which groups are held out is decided by a hash of (seed, group), so another order of the file changes nothing.
    """
    if not 0 < share < 1:
        raise UserError(f"{SHARES} is {share}; it must be above 0 and below 1")
    parent: dict[str, str] = {}

    def group_of(name: str) -> str:
        """Returns the least of all names that are grouped with this one, directly or through others."""
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    firsts: list[str] = []
    for sample_id, names in zip(ids, images, strict=True):
        first, *others = [f"picture/{name}" for name in names] or [f"id/{sample_id}"]
        firsts.append(first)
        for other in others:
            least, greatest = sorted((group_of(first), group_of(other)))
            parent[greatest] = least
    groups = [group_of(first) for first in firsts]
    sizes, chosen = Counter(groups), set[str]()
    class_of = dict(zip(groups, classes or [""] * len(groups), strict=True))
    left = {name: max(1, round(share * count)) for name, count in Counter(class_of[group] for group in groups).items()}
    for group in sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest()):
        if sizes[group] <= left[class_of[group]]:
            chosen.add(group)
            left[class_of[group]] -= sizes[group]
    if not chosen or len(chosen) == len(sizes):
        why = "samples of one picture, or of one question without any, stay together; give another share, or more"
        raise UserError(f"{SHARES} {share:g} of {len(groups)} samples cannot be held out: {why}")
    return np.array([index for index, group in enumerate(groups) if group in chosen], np.int64)


def described(file: TrainFile, rows: datasets.Dataset) -> list[str]:
    """Describes a file in lines: name, format, rows, how many cannot be used, its columns, and its pictures a row."""
    formats = [name for name in rows.unique("format") if name is not None]
    bad = sum(problem is not None for problem in rows["problem"])
    trouble = f", {bad:,} of them unusable" if bad else ""
    weight = "" if file.weight == 1 else f", weight {file.weight:g}"
    first = f"{Path(file.path).name}: {formats[0] if formats else 'no known format'}, {len(rows):,} rows"
    unusable: dict[str, Finding] = {}
    for sample_id, problem in zip(rows["id"], rows["problem"], strict=True) if bad else ():
        if problem is not None:
            unusable.setdefault(problem, Finding(problem=problem)).add(sample_id)
    lines = [f"{first}{trouble}{weight}", *(f"  unusable, {finding}" for finding in [*unusable.values()][:5])]
    lines += column_lines(uses_of(rows))
    if several := sum(count for answers, count in _counts(rows, "answers").items() if answers):
        lines.append(f"  {SEVERAL_ANSWERS.format(several)}")
    for name, kind in (("images", "pictures"), ("videos", "videos")):
        counts = _counts(rows, name)
        if name == "images" or any(counts):
            numbers = [f"{count or 'none'} in {counts[count]:,} rows" for count in sorted(counts)]
            lines.append(f"  {kind}: {', '.join(numbers)}")
    return lines


def uses_of(rows: datasets.Dataset) -> list[Mapping[str, str]]:
    """Returns the role of each column, of each kind of row that a file has."""
    return [json.loads(text) for text in rows.unique("columns") if text]


def doubtful_samples(rows: datasets.Dataset) -> list[Finding]:
    """Returns what is probably a mistake in the samples of a file, by kind: `DOUBTS`."""
    findings = {kind: Finding(problem=kind) for kind in DOUBTS}
    has_media = any(_counts(rows, "images")) or any(_counts(rows, "videos"))
    marked = rows.select(np.flatnonzero(_column(rows, "doubts").value_lengths().fill_null(0).to_numpy()))
    for sample_id, doubts in zip(marked["id"], marked["doubts"], strict=True):
        for doubt in doubts:
            if doubt != NO_PICTURE or has_media:
                findings[doubt].add(sample_id)
    questions = _column(rows, "asked")
    indices = np.flatnonzero(questions.is_valid().to_numpy(zero_copy_only=False))
    keys, answers = questions.drop_null().to_numpy(), _column(rows, "told").drop_null().to_numpy()
    order = np.lexsort((answers, keys))
    keys, answers = keys[order], answers[order]
    contradicted = keys[1:][(keys[1:] == keys[:-1]) & (answers[1:] != answers[:-1])]
    for sample_id in rows.select(np.sort(indices[order][np.isin(keys, contradicted)]))["id"]:
        findings[CONTRADICTION].add(sample_id)
    return [finding for finding in findings.values() if finding.count]


def samples_in_test(
    rows: datasets.Dataset, questions: Iterable[tuple[str, tuple[str, ...], str]]
) -> list[tuple[str, str]]:
    """Returns the ids of a training sample and of the test's question that it holds, for each such sample.

    Questions are id, pictures below the folder of those in `rows`, and text; without pictures, all text asked so far.
    """

    def words(text: str) -> str:
        return " ".join(text.replace(IMAGE_PLACEHOLDER, " ").split())

    question_ids = {(tuple(map(normpath, images)), words(text)): question for question, images, text in questions}
    paths = {name for names, _ in question_ids for name in names}
    names = _column(rows, "images")
    spellings = [name for name in names.flatten().unique().to_pylist() if normpath(name) in paths]
    lookup = pc.SetLookupOptions(pa.array(spellings, pa.string()))
    is_asked = pc.call_function("is_in", [names.flatten()], lookup)  # still in Arrow
    counts = np.array(names.value_lengths())
    indices = np.unique(np.repeat(np.arange(len(names)), counts)[np.array(is_asked, bool)])
    if any(not images for images, _ in question_ids):
        has_videos = np.array(_column(rows, "videos").value_lengths()) > 0
        indices = np.union1d(indices, np.flatnonzero((counts == 0) & ~has_videos))
    about = rows.select(indices)
    pairs: list[tuple[str, str]] = []
    for sample, images, turns in zip(about["id"], about["images"], about["turns"], strict=True):
        texts = [words(turn["text"]) for turn in turns if turn["role"] != "assistant"]
        pictures = tuple(map(normpath, images))
        keys = [(pictures, text) for text in (texts if pictures else accumulate(texts, "{} {}".format))]
        pairs += [(sample, question_ids[key]) for key in keys if key in question_ids][:1]
    return pairs
