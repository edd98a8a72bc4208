"""Rows of records as samples a backbone can batch; what cannot be used comes back named, not raised."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Int
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.data.columns import USUAL, Columns, column_lines
from dora_vl.data.order import TrainFile
from dora_vl.data.pictures import HeldPictures, MediaFolder, StoredPictures, path_inside
from dora_vl.data.table import load_table
from dora_vl.data.turns import IMAGE_PLACEHOLDER, INPUT_CHARACTERS, Conversation, read_conversation
from dora_vl.errors import BadSample, UserError, one_line, shown_text

BOOKKEEPING = ("samples", "sample_ids", "padding_tokens", "skipped", "cut", "shrunk")
"""Names in a batch of what is counted and told; all else goes to the model."""
IGNORED_LABEL = -100
"""Label of a position that is not trained; what `torch.nn.functional.cross_entropy` ignores by default."""


class TrainedAnswer(NamedTuple):
    """What labels say of one answer: its text, what opens it and is trained too, and what closes it."""

    opening: str
    text: str
    closing: str


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens. `labels[t]` is the token at `t` where it is trained, else -100.

    `cut_tokens` counts what the length limit removed at the end, `lost_pixels` what the pixel budget took of its
    pictures; `inputs` are a processor's further tensors.
    """

    input_ids: Int[Tensor, " seq"]
    labels: Int[Tensor, " seq"]
    cut_tokens: int = 0
    inputs: Mapping[str, Any] = field(default_factory=dict)
    lost_pixels: int = 0


@dataclass(frozen=True)
class Sample:
    """One usable sample. Its pictures are pixels or a frozen tower's features, never both.

    `pictures` holds `[3, height, width]` each, `features` `[tokens, width]`; both are empty for text only. `images`
    says which pictures they are. `inputs` holds instead what a processor gives beside the ids, by its own names, each
    with this sample as its only row (or its pictures as rows).
    """

    index: int
    id: str
    input_ids: Int[Tensor, " seq"]
    labels: Int[Tensor, " seq"]
    pictures: tuple[Tensor, ...] = ()
    features: tuple[Tensor, ...] = ()
    cut_tokens: int = 0
    images: tuple[str, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)
    lost_pixels: int = 0


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used, and why."""

    index: int
    id: str
    reason: str


@runtime_checkable
class Rows(Protocol):
    """What the data set reads from: a `datasets.Dataset`, or a list of records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, object]: ...


def sample_random(seed: int, epoch: int, index: int) -> random.Random:
    """The generator of one sample in one epoch: the same on any rank, in any worker, after any resume."""
    return random.Random(f"{seed}/{epoch}/{index}")


class ConversationDataset(torch.utils.data.Dataset["Sample | Skipped"]):
    """Reads and encodes one row at a time, with its images.

    Args:
        rows: the records, as `record_table.load_table` gives them.
        encode: the backbone's tokens and labels of a conversation.
        picture: pixels of a picture by its relative path. Raises `BadSample` for a broken one.
        features: a frozen tower's features of a picture by its relative path; give this or `picture`.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        encode: Callable[[Conversation], Encoded],
        picture: Callable[[str], Tensor] | None = None,
        features: Callable[[str], Tensor] | None = None,
    ) -> None:
        if picture is not None and features is not None:
            raise ValueError("give 'picture' or 'features', not both")
        self._rows = rows
        self._encode = encode
        self._picture = picture
        self._features = features

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample | Skipped:
        conversation_id = str(index)
        try:
            row = self._rows[index]
            conversation_id = str(row.get("id", index))
            conversation = read_conversation(row)
            return self._sample(index, conversation)
        except BadSample as error:
            return Skipped(index, conversation_id, error.reason)

    def _sample(self, index: int, conversation: Conversation) -> Sample:
        encoded = self._encode(conversation)
        # The first position has nothing before it to be predicted from, so its label cannot train.
        if not bool((encoded.labels[1:] != IGNORED_LABEL).any()):
            reason = f"nothing is left to train on in its {len(encoded.labels)} tokens"
            raise BadSample(conversation.id, f"{reason} after {encoded.cut_tokens} were cut; raise data.max_tokens")
        return Sample(
            index=index,
            id=conversation.id,
            input_ids=encoded.input_ids,
            labels=encoded.labels,
            pictures=tuple(self._picture(path) for path in conversation.images) if self._picture else (),
            features=tuple(self._features(path) for path in conversation.images) if self._features else (),
            cut_tokens=encoded.cut_tokens,
            images=conversation.images,
            inputs=encoded.inputs,
            lost_pixels=encoded.lost_pixels,
        )


# Keeps account of unusable samples: each is named once, and too many of them end the run.


BAD_BEFORE_EARLY_END = 10
TIMES_THE_SHARE = 10
LONGEST_ID = 120
"""Characters of an id in a line of the log."""

_log = logging.getLogger(__name__)


class BadSampleCounts(NamedTuple):
    """Occurrences on one rank or, added field by field, on all: two numbers that an all-reduce can sum."""

    seen: int = 0
    bad: int = 0


class BadSampleLedger:
    """The account of one rank; knows nothing of the others except through the counts given to `judge`.

    Two rules end a run. (1) More bad samples than `max_bad_share` of the whole set, for each pass begun over it: the
    verdict is then certain, wherever they stood. (2) At least ten bad samples that are more than ten times that
    share of what was seen (or, for a large share, more than halfway from it to all): the set is clearly
    broken, a wrong picture folder for example, and the end of the pass need not be waited for. One bad sample of
    a big set ends nothing; with a share of 0 the first one does.
    """

    def __init__(
        self, *, max_bad_share: float, total_samples: int, source: str, read_in_a_pass: int | None = None
    ) -> None:
        """Starts empty.

        Args:
            max_bad_share: in 0..1, `data.max_bad_share`.
            total_samples: in the whole set, over all ranks.
            source: what the messages call the set: its file.
            read_in_a_pass: samples that all ranks together read before the next pass begins, where they repeat some to
                have equally many; None: `total_samples`.
        """
        if not 0 <= max_bad_share <= 1:
            raise UserError(f"data.max_bad_share must be between 0 and 1, got {max_bad_share}")
        self._max_bad_share = max_bad_share
        self._total_samples = total_samples
        self._read_in_a_pass = max(1, read_in_a_pass or total_samples)
        self._source = source
        self._counts = BadSampleCounts()
        self._reasons: dict[str, str] = {}

    @property
    def counts(self) -> BadSampleCounts:
        """This rank's counts since the start of the process."""
        return self._counts

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why each bad sample this rank met cannot be used, by id."""
        return self._reasons

    def carry_over(self, reasons: Mapping[str, str]) -> None:
        """Bad samples that the run named before it was resumed."""
        self._reasons = {**reasons, **self._reasons}

    def record(self, *, samples: int, skipped: Iterable[tuple[str, str]]) -> None:
        """Takes note of one batch: how many samples were usable, and (id, reason) of the others."""
        bad = list(skipped)
        self._counts = BadSampleCounts(self._counts.seen + samples + len(bad), self._counts.bad + len(bad))
        for sample_id, reason in bad:
            if sample_id not in self._reasons:
                self._reasons[sample_id] = reason
                _log.warning("skipped sample %s: %s", shown_text(sample_id, LONGEST_ID), one_line(reason))

    def judge(self, counts: BadSampleCounts | None = None) -> None:
        """Ends the run if too many samples are bad; give all ranks' sum, so that all end at the same step.

        Raises:
            UserError: one of the two rules is broken.
        """
        seen, bad = counts or self._counts
        if bad and (bad > self._allowed(seen) or self._clearly_broken(seen, bad)):
            raise UserError(self._message(seen, bad))

    def _allowed(self, seen: int) -> float:
        passes = math.ceil(seen / self._read_in_a_pass)
        return self._max_bad_share * self._total_samples * passes

    def _clearly_broken(self, seen: int, bad: int) -> bool:
        limit = min(TIMES_THE_SHARE * self._max_bad_share, (1 + self._max_bad_share) / 2)
        return bad >= BAD_BEFORE_EARLY_END and bad > limit * seen

    def _message(self, seen: int, bad: int) -> str:
        example = next((f"; for example {shown_text(key)}: {reason}" for key, reason in self._reasons.items()), "")
        return (
            f"{self._source}: {bad:,} of the {seen:,} samples read so far ({bad / seen:.2%}) cannot be used, and of all"
            f" {self._total_samples:,} at most {self._max_bad_share:.2%} may be bad{example}."
            " Repair them or raise data.max_bad_share"
        )


def write_skipped(path: Path, reasons: Mapping[str, str], *, validation: Mapping[str, str] | None = None) -> None:
    """One JSON line with id and reason for each bad sample; whole or not at all. Validation's say so (`of`)."""
    lines = [{"id": key, "reason": reason} for key, reason in reasons.items()]
    lines += [{"id": key, "reason": reason, "of": "validation"} for key, reason in (validation or {}).items()]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
    partial.replace(path)


# What is wrong with a run's samples, before any weight is read: their turns, their labels, and whether their files are
# there.


MOST = 20_000
"""Rows that are looked at, a few seconds' worth; of more, so many at even distances."""
AT_ONCE = 1_000
FIRST = 8
"""Samples whose labels are read before the first step, and of those with pictures so many more."""
SHOWN, BEFORE = 120, 20
"""Characters of a text in a message, and of them those before where it differs from another."""


def look_ahead(
    rows: datasets.Dataset,
    stored: HeldPictures,
    *,
    pictures: MediaFolder | None,
    videos: MediaFolder | None,
    max_bad_share: float,
    source: str,
) -> None:
    """Refuses a set of which so many samples cannot be used that a run over it would end for that.

    Args:
        rows: of `record_table.load_table`.
        stored: pictures that the file holds itself.
        pictures: root of the pictures' paths; None where samples have none, or their files are not looked for.
        videos: likewise of videos.
        source: the set's name.

    Raises:
        UserError: as `BadSampleLedger.judge`, with the first sample's reason.
    """
    bad: dict[str, str] = {}
    places = np.linspace(0, len(rows) - 1, min(len(rows), MOST)).astype(np.int64)
    for row in _rows(rows if len(places) == len(rows) else rows.select(places)):
        try:
            _check(row, stored, pictures, videos)
        except BadSample as error:
            bad[str(row["id"])] = error.reason
    ledger = BadSampleLedger(max_bad_share=max_bad_share, total_samples=len(rows), source=source)
    ledger.carry_over(bad)
    ledger.judge(BadSampleCounts(seen=len(places), bad=len(bad)))


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A sample's labels as training takes them, and what they must say.

    Attributes:
        cut: whether its end may have been cut.
    """

    id: str
    labels: Int[Tensor, " seq"]
    answers: Sequence[TrainedAnswer]
    tokenizer: PreTrainedTokenizerBase
    cut: bool = False


def check_labels(samples: Iterable[Labelled]) -> None:
    """Refuses a run whose labels are not the answers and what closes them.

    They are read back as text. White space is not compared: tokenizers put some before a text and take some off it.

    Raises:
        UserError: with the sample's id and both texts.
    """
    for sample in samples:
        labels = sample.labels[sample.labels != IGNORED_LABEL]
        trained = _read(sample.tokenizer, labels.tolist())
        if _says(trained, sample):
            continue
        meant = "".join("".join(answer) for answer in sample.answers)
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(trained, meant, strict=False)))
        start = max(0, alike - BEFORE) if max(len(trained), len(meant)) > SHOWN else 0
        raise UserError(
            f"sample {shown_text(sample.id)}: its labels would train {shown_text(trained[start:], SHOWN)!r}, and its "
            f"answers with what closes them are {shown_text(meant[start:], SHOWN)!r}; the base's tokenizer or chat "
            "template does not fit: set another model.template, or take another base"
        )


def _says(trained: str, sample: Labelled) -> bool:
    """Whether a text is the sample's answers, one after another, each closed; of a cut sample their beginning."""
    rest, closing = _squashed(trained), ""
    for answer in sample.answers:
        forms = [form for text in ("".join(answer), answer.text + answer.closing) for form in _forms(text, sample)]
        closing = answer.closing
        form = next((form for form in forms if rest.startswith(form)), None)
        if form is None:
            kept = rest.removesuffix(_squashed(closing)).rstrip("\ufffd")  # of a character cut in two
            return sample.cut and any(form.startswith(kept) for form in forms)
        rest = rest[len(form) :]
    return not rest and (sample.cut or not closing.isspace() or trained[-1:].isspace())


def _forms(text: str, sample: Labelled) -> tuple[str, str]:
    """A text as it stands, and as the tokenizer gives it back, which may spell it otherwise or not know it."""
    ids = sample.tokenizer(text, add_special_tokens=False)["input_ids"]
    return _squashed(text), _squashed(_read(sample.tokenizer, ids))


def _read(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _squashed(text: str) -> str:
    return "".join(text.split())


def _rows(rows: datasets.Dataset) -> Iterator[Mapping[str, object]]:
    for start in range(0, len(rows), AT_ONCE):
        columns = rows[start : start + AT_ONCE]
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _check(
    row: Mapping[str, object], stored: HeldPictures, pictures: MediaFolder | None, videos: MediaFolder | None
) -> None:
    conversation = read_conversation(row)
    if pictures is not None:
        for name in conversation.images:
            if name not in stored:
                _find(pictures, name, "picture")
    if videos is not None:
        for clip in conversation.videos:
            _find(videos, clip.path, "video")


def _find(root: MediaFolder, name: str, kind: str) -> None:
    try:
        there = path_inside(root, name, kind=kind).exists()
    except OSError:  # a name that no file system takes
        there = False
    if not there:
        raise BadSample(name, f"{kind} {name} is missing in {root}")


# The rows that a run trains on and those held out of them: several files, their weights, the split by picture.


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
