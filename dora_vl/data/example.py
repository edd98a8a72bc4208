"""The record shared by data preparation, training and scores: one published item, and files with one per line.

Files are `records/<task>/<split>.jsonl`; a field that an item has not is not written.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import IO, Any, TypeAlias

import numpy as np
from pydantic import TypeAdapter, ValidationError

from dora_vl.data.text_file import json_lines, json_of, text_of
from dora_vl.data.turns import Clip, Number, Turn
from dora_vl.errors import NO_ANSWER, BadSample, UserError, short_repr
from dora_vl.files import whole_file

JSON: TypeAlias = Any  # null, booleans, numbers, text, lists and objects; checked when written


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One right answer; `weight` is the set's soft score for it, 1 where it has none."""

    text: str
    weight: Number = 1.0


@dataclass(frozen=True)
class Subtitle:
    """Holds what is said between two times of the video; None where the publisher gives no times."""

    text: str
    start_seconds: Number | None = None
    end_seconds: Number | None = None


@dataclass(frozen=True)
class Example:
    """One item of a published set, or one sample of a user's file.

    Attributes:
        images: paths relative to one root, or names in `image_bytes`.
        turns: a conversation's, in place of question and answers (`conversation.read_conversation`).
        question: or a sentence to judge; empty for captions.
        answers: empty only where the publisher keeps them.
        rejected: answers that are worse than the last one of `turns`.
        rejected_images: the pictures that these are given about, where they are others than `images`.
        is_good: True for a last answer to learn, False for one to avoid; None where the file does not say.
        choices: what to choose from; `extra["correct"]` is then the right one's index, where it is known.
        extra: what the scorer or the submission needs, such as question_type, category, clip_id, image_size. `unit` is
            drawn as one where intervals are made, `group` is never split between training and validation.
        image_bytes: the pictures that the file itself holds, by their name in `images`; records hold none.
    """

    id: str
    images: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    videos: tuple[Clip, ...] = ()
    question: str = ""
    answers: tuple[Answer, ...] = ()
    choices: tuple[str, ...] = ()
    subtitles: tuple[Subtitle, ...] = ()
    rejected: tuple[str, ...] = ()
    rejected_images: tuple[str, ...] = ()
    is_good: bool | None = None
    extra: Mapping[str, JSON] = field(default_factory=dict)
    image_bytes: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def video(self) -> Clip | None:
        """Returns the only video of the example; None where it has none, or several."""
        return self.videos[0] if len(self.videos) == 1 else None


def turns_of(example: Example) -> tuple[Turn, ...]:
    """Returns the conversation to train on: the turns, or the question with its heaviest answer."""
    if example.turns:
        return example.turns
    if not example.answers:
        raise BadSample(example.id, "it has no answer to train on", NO_ANSWER)
    answer = max(example.answers, key=lambda answer: answer.weight)
    return Turn("user", example.question), Turn("assistant", answer.text)


def named_in(row: Mapping[str, JSON], name: str) -> str | None:
    """Returns a row's `kind`, `unit` or `group`, from a column of its own or from a record's `extra`."""
    extra = row.get("extra")
    value = row.get(name, extra.get(name) if isinstance(extra, Mapping) else None)
    return None if value is None else str(value)


MIDDLE_FRAME = "middle_frame"
"""An example's `extra` names so the picture that LLaVA-1.5 takes for its video."""
FIELDS = frozenset(Example.__dataclass_fields__) - {"image_bytes"} | {"video"}
"""A record may have these fields: `video` for one video, `videos` for several."""

_EXAMPLE = TypeAdapter(Example)


def to_record(example: Example) -> dict[str, JSON]:
    """Returns the example as a JSON object, without empty fields."""
    if example.image_bytes:
        raise UserError(f"example {short_repr(example.id)} holds its pictures as bytes; write them to files first")
    unlike = {"extra", "image_bytes"}  # anything may be in `extra`, which `json_line` judges
    record = _EXAMPLE.dump_python(example, mode="json", exclude=unlike, exclude_defaults=True)
    if example.video is not None:
        (record["video"],) = record.pop("videos")
    return record | ({"extra": dict(example.extra)} if example.extra else {})


def from_record(record: Mapping[str, JSON]) -> Example:
    """Returns the example of a JSON object that `to_record` made; raises `BadSample` where it is not one."""
    sample_id = record.get("id")
    if not isinstance(sample_id, str) or not sample_id:
        raise BadSample("(no id)", f"'id' must be text that is not empty, got {short_repr(sample_id)}")
    if unknown := sorted(set(record) - FIELDS):
        raise BadSample(sample_id, f"unknown field {unknown[0]!r}; an example has {', '.join(sorted(FIELDS))}")
    if record.get("video") and record.get("videos"):
        raise BadSample(sample_id, "it has 'video' and 'videos'; name all of them in one")
    fields = {name: value for name, value in record.items() if name != "video"}
    if record.get("video"):
        fields["videos"] = [record["video"]]
    try:
        example = _EXAMPLE.validate_python(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = " ".join(map(str, first["loc"]))
        raise BadSample(sample_id, f"{location!r}: {first['msg']}, got {short_repr(first['input'])}") from None
    if example.choices and "correct" in example.extra:
        right_choice(example)
    return example


def write_examples(path: Path, examples: Iterable[Example]) -> int:
    """Writes one example per line and returns how many; `path` appears only when all are in it."""
    lines: dict[str, int] = {}
    with whole_file(path) as file:
        for number, example in enumerate(examples, start=1):
            _check_unique(lines, example.id, number, path)
            file.write(json_line(to_record(example), f"{path}, line {number}, id {short_repr(example.id)}"))
    return len(lines)


def iterate_examples(path: Path) -> Iterator[Example]:
    """Yields the examples of a file in order, one line in memory at a time, and every id seen."""
    lines: dict[str, int] = {}
    for number, record in json_lines(path, "examples; `dora-vl prepare` writes them"):
        try:
            example = from_record(record)
        except BadSample as error:
            raise UserError(f"{path}, line {number}: not an example: {error}") from None
        _check_unique(lines, example.id, number, path)
        yield example


def _check_unique(lines: dict[str, int], sample_id: str, number: int, path: Path) -> None:
    if (first := lines.setdefault(sample_id, number)) != number:
        why = "ids must be unique, so that each answer belongs to one record"
        raise UserError(f"{path}: id {short_repr(sample_id)} in lines {first} and {number}; {why}")


def json_line(record: Mapping[str, JSON], where: str) -> str:
    """Returns the record as one line of JSON, with its newline."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise UserError(f"{where}: cannot be written as JSON in UTF-8: {error}") from None
    return text


class ExampleFile:
    """The examples of `records/<task>/<split>.jsonl`, or one for each of their answers, read one at a time by place.

    With `each_answer` an example with several answers counts as several, as captions are trained on. A line that is no
    record is an item as well; asked for, it is a `BadSample` that names file and line. Worker processes may have it.
    """

    def __init__(self, paths: Path | Sequence[Path], *, each_answer: bool = False, limit: int | None = None) -> None:
        self.paths = (paths,) if isinstance(paths, Path) else tuple(paths)
        if limit is not None and limit < 1:
            raise UserError(f"{self.paths[0]}: a limit of {limit} leaves no example; at least 1 is needed")
        self._each_answer = each_answer
        self._streams: dict[int, IO[bytes]] = {}
        items = array("q")  # file, offset and answer of each, flat: a set has millions of lines
        for number, path in enumerate(self.paths):
            if not path.is_file():
                raise UserError(f"{path} does not exist; `dora-vl prepare` writes records from a publisher's files")
            offset, before = 0, len(items)
            with path.open("rb") as stream:
                for line in stream:
                    for answer in range(_answers_in(line) if each_answer else bool(line.strip())):
                        items.extend((number, offset, answer))
                    offset += len(line)
            if len(items) == before:
                raise UserError(f"{path} holds no example")
        self._items = np.frombuffer(items, np.int64).reshape(-1, 3)[:limit]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Example:
        """Returns the example at this index; with `each_answer` see `answer_of` for which of its answers is meant."""
        try:
            return from_record(_json_object(self._line(index)))
        except BadSample as error:
            file, offset, _ = self._items[index].tolist()
            path = self.paths[file]
            with path.open("rb") as stream:  # all before it is read, which only a broken line is worth
                number = 1 + stream.read(offset).count(b"\n")
            raise BadSample(error.sample_id, f"{path}, line {number}: {error.reason}") from None

    def answer_of(self, index: int) -> int | None:
        """Returns the answer that this item is about; None where it is about all of them."""
        return int(self._items[index, 2]) if self._each_answer else None

    def ids(self) -> Iterator[str]:
        """Yields each item's id, in order; "" for a line that is not a record."""
        for index in range(len(self)):
            try:
                yield str(_json_object(self._line(index)).get("id"))
            except BadSample:
                yield ""

    def media_paths(self) -> Iterator[tuple[Path, str]]:
        """Yields each picture and video that a line names, with its file; no video that has a name of its own."""
        for index in range(len(self)):
            file, _, answer = self._items[index].tolist()
            record: Mapping[str, JSON] = {}
            if not answer:  # the line of a later answer was read with its first
                with contextlib.suppress(BadSample):
                    record = _json_object(self._line(index))
            images, video, extra = (record.get(name) for name in ("images", "video", "extra"))
            names = [*images] if isinstance(images, list) else []
            if isinstance(video, dict) and "vid_name" not in (extra if isinstance(extra, dict) else {}):
                names.append(video.get("path"))
            yield from ((self.paths[file], name) for name in names if isinstance(name, str))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_streams": {}}  # an open file does not travel; a worker opens its own

    def _line(self, index: int) -> bytes:
        file, offset, _ = self._items[index].tolist()
        if file not in self._streams:
            self._streams[file] = self.paths[file].open("rb")
        self._streams[file].seek(offset)
        return self._streams[file].readline()


def _answers_in(line: bytes) -> int:
    """Counts the items of a line where each answer is one; a line without any, and a broken one, counts as one."""
    if not line.strip():
        return 0
    try:
        answers = _json_object(line).get("answers")
    except BadSample:
        return 1
    return max(1, len(answers)) if isinstance(answers, list) else 1


def _json_object(line: bytes) -> Mapping[str, JSON]:
    where = "the line"
    try:
        record = json_of(text_of(line.removeprefix(codecs.BOM_UTF8), where), where)
    except UserError as error:
        raise BadSample("(no id)", f"{str(error).removeprefix(f'{where}: ')}; write the file again") from None
    if not isinstance(record, dict):
        raise BadSample("(no id)", f"a line must hold an object, found {type(record).__name__}")
    return record


LETTER = "Answer with the option's letter from the given choices directly."
"""LLaVA says this after the choices of MMBench and SEED."""


def with_letters(choices: Iterable[str]) -> list[str]:
    """Returns the line of each choice, from A."""
    return [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False)]


def right_choice(example: Example) -> int:
    """Returns the index, from 0, that `extra["correct"]` holds. Raises BadSample: the example does not say it."""
    correct, count = example.extra.get("correct"), len(example.choices)
    if isinstance(correct, bool) or not isinstance(correct, int) or not 0 <= correct < count:
        reason = f"extra.correct must be the index, from 0, of one of its {count} choices, got {short_repr(correct)}"
        raise BadSample(example.id, reason)
    return correct
