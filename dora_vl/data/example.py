"""The record between data preparation, tasks and scores: one published item, and a file of them, one a line.

Only the standard library. Files are `records/<task>/<split>.jsonl`; a field that an item has not is not written.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import IO, Any, Literal, TypeAlias, TypeVar
from uuid import uuid4

import numpy as np

from dora_vl.data.text_file import json_lines, json_of, text_of
from dora_vl.data.turns import Clip, Turn
from dora_vl.errors import BadSample, UserError, shown

# Multiple choice: which one is right, as records say it and as columns do, and how choices stand in a question.
#
# The right choice of a column is said by its number from 0 (AI2D also as text, "1"), by its letter (MMMU, "B", also
# "(B)" or "B."), or by its text. A row where the text of one choice reads as the letter or number of another, such as
# "2"
# among
# "1", "2" and "3", could mean either: it is taken only where the columns that were named say which way to read it.


LETTER = "Answer with the option's letter from the given choices directly."
"""What LLaVA says behind the choices of MMBench and SEED."""


def with_letters(choices: Iterable[str]) -> list[str]:
    """The line of each choice, from A."""
    return [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices, strict=False)]


def right_choice(correct: object, choices: Sequence[str], sample_id: str) -> int:
    """The index, from 0, that `extra["correct"]` holds.

    Raises:
        BadSample: it is no whole number, or no choice has it.
    """
    if isinstance(correct, bool) or not isinstance(correct, int):
        raise BadSample(sample_id, f"extra.correct must be the right choice's index, from 0, got {shown(correct)}")
    if not choices:
        raise BadSample(sample_id, f"extra.correct is {shown(correct)}, but it has no choices")
    if not 0 <= correct < len(choices):
        last = len(choices) - 1
        raise BadSample(sample_id, f"extra.correct is {shown(correct)}; its {len(choices)} choices are 0 to {last}")
    return correct


Reading = Literal["place", "text", "either", "only text"]
"""What text that says the right choice is first: its letter or number, or its words; `either` refuses what is both."""

LONGEST_LIST = 100_000
"""Characters of a list written as text; Python's reader takes a hundred times that as memory."""
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_NUMBER = re.compile(r"[0-9]{1,4}")


def listed_choices(text: str, sample_id: str) -> tuple[str, ...]:
    """The choices of a column that holds a list as text, in JSON or as Python writes it.

    Raises:
        BadSample: it is anything else than a list of text, or one choice, which numpy's lists without commas look like.
    """
    value = _literal(text) if text.lstrip().startswith("[") and len(text) <= LONGEST_LIST else None
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value) or len(value) == 1:
        raise BadSample(sample_id, f"its choices must be a list of text, got the text {shown(text)}")
    return tuple(value)


def _literal(text: str) -> object:
    try:
        return json_of(text, "choices")
    except UserError:
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes that Python keeps as they are
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def correct_choice(said: object, choices: Sequence[str], sample_id: str, reading: Reading) -> int | None:
    """The index of the right choice; None where nothing is said, as in splits whose answers the publisher keeps.

    Raises:
        BadSample: it is no choice's letter, number or text, or those of several.
    """
    if said is None or (isinstance(said, str) and not said.strip()):
        return None
    if isinstance(said, int) and not isinstance(said, bool):
        if not 0 <= said < len(choices):
            raise BadSample(sample_id, f"its answer is {said}, but there are {len(choices)} choices")
        return said
    if not isinstance(said, str):
        raise BadSample(sample_id, f"its answer must be text or a whole number, got {shown(said)}")
    by_text, by_place = _of_text(said, choices, sample_id), _of_place(said.strip(), len(choices))
    found = {
        "only text": (by_text,),
        "text": (by_text, by_place),
        "place": (by_place, by_text),
        "either": (by_text, by_place),
    }[reading]
    known = [index for index in found if index is not None]
    if not known:
        ways = "text" if reading == "only text" else "letter, number from 0 or text"
        raise BadSample(sample_id, f"its answer {shown(said)} is no {ways} of its {len(choices)} choices")
    if reading == "either" and len(set(known)) > 1:
        raise BadSample(
            sample_id,
            f"its answer {shown(said)} is the text of one choice and the letter or number of another; with "
            "columns=correct:COLUMN it is the latter, with columns=answers:COLUMN the text",
        )
    return known[0]


def _of_text(said: str, choices: Sequence[str], sample_id: str) -> int | None:
    same = [index for index, choice in enumerate(choices) if choice.strip() == said.strip()]
    if len(same) > 1:
        raise BadSample(sample_id, f"its answer {shown(said)} is the text of {len(same)} of its choices")
    return same[0] if same else None


def _of_place(said: str, count: int) -> int | None:
    letter = _LETTER.fullmatch(said)
    place = ascii_uppercase.index(letter[1].upper()) if letter else int(said) if _NUMBER.fullmatch(said) else count
    return place if place < count else None


JSON: TypeAlias = Any
"""What JSON can hold: null, booleans, numbers, text, lists and objects; checked when it is written."""

Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One right answer; `weight` is the set's soft score for it, 1 where it has none."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Subtitle:
    """What is said between two times of the video; None where the publisher gives no times."""

    text: str
    start_seconds: float | None = None
    end_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """One item of a published set.

    Attributes:
        id: unique in its file.
        images: paths relative to one root.
        video: the one that it is about.
        videos: instead of `video`, several; `clips` are either.
        question: or a sentence to judge; empty for captions.
        turns: instead of question and answers, for conversations.
        answers: empty only where the publisher keeps them.
        choices: what to choose from; `extra["correct"]` is then the right one's index, where it is known.
        extra: what the scorer or the submission needs, such as question_type, category, clip_id, image_size.
        image_bytes: the pictures that the file itself holds, by their name in `images`; records hold none.
    """

    id: str
    images: tuple[str, ...] = ()
    video: Clip | None = None
    videos: tuple[Clip, ...] = ()
    question: str = ""
    turns: tuple[Turn, ...] = ()
    answers: tuple[Answer, ...] = ()
    choices: tuple[str, ...] = ()
    subtitles: tuple[Subtitle, ...] = ()
    extra: Mapping[str, JSON] = field(default_factory=dict)
    image_bytes: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def clips(self) -> tuple[Clip, ...]:
        """Its videos in order."""
        return self.videos or (() if self.video is None else (self.video,))


def clip_fields(clips: Sequence[Clip]) -> dict[str, Any]:
    """An example's fields for the videos of a row: `video` for one, `videos` for several."""
    return {"video": clips[0]} if len(clips) == 1 else {"videos": tuple(clips)}


MIDDLE_FRAME = "middle_frame"
"""In an example's `extra`: the picture that LLaVA-1.5 takes for its video."""
FIELDS = frozenset(Example.__dataclass_fields__) - {"image_bytes"}
"""The fields of a record."""


def to_record(example: Example) -> dict[str, JSON]:
    """The example as a JSON object, without the fields it has not.

    Raises:
        UserError: it holds pictures as bytes, which JSON cannot.
    """
    if example.image_bytes:
        raise UserError(f"example {shown(example.id)} holds its pictures as bytes; write them to files first")
    record: dict[str, JSON] = {
        "id": example.id,
        "images": list(example.images),
        "video": example.video and _clip_record(example.video),
        "videos": [_clip_record(clip) for clip in example.videos],
        "question": example.question,
        "turns": [{"role": turn.role, "text": turn.text} for turn in example.turns],
        "answers": [_answer_record(answer) for answer in example.answers],
        "choices": list(example.choices),
        "subtitles": [_subtitle_record(subtitle) for subtitle in example.subtitles],
        "extra": dict(example.extra),
    }
    return {name: value for name, value in record.items() if value}


def from_record(record: Mapping[str, JSON]) -> Example:
    """The example of a JSON object that `to_record` made.

    Raises:
        BadSample: a field is unknown or holds something else than it should, or `extra["correct"]` is no choice.
    """
    sample_id = record.get("id")
    if not isinstance(sample_id, str) or not sample_id:
        raise BadSample("(no id)", f"'id' must be text that is not empty, got {shown(sample_id)}")
    unknown = sorted(set(record) - FIELDS)
    if unknown:
        raise BadSample(sample_id, f"unknown field {unknown[0]!r}; an example has {', '.join(sorted(FIELDS))}")
    fields = _Fields(record, sample_id)
    choices = fields.parts("choices", _text)
    extra = _object(record.get("extra", {}), "extra", sample_id)
    if record.get("video") and record.get("videos"):
        raise BadSample(sample_id, "it has 'video' and 'videos'; name all of them in one")
    if choices and "correct" in extra:
        right_choice(extra["correct"], choices, sample_id)
    return Example(
        id=sample_id,
        images=fields.parts("images", _text),
        video=_clip(record["video"], "video", sample_id) if record.get("video") else None,
        videos=fields.parts("videos", _clip),
        question=_text(record.get("question", ""), "question", sample_id),
        turns=fields.parts("turns", _turn),
        answers=fields.parts("answers", _answer),
        choices=choices,
        subtitles=fields.parts("subtitles", _subtitle),
        extra=extra,
    )


def write_examples(path: Path, examples: Iterable[Example]) -> int:
    """Writes one example a line and returns how many; `path` appears only when all are in it.

    Raises:
        UserError: two have one id (it names both lines), one holds what JSON cannot, or the file cannot be written.
    """
    lines: dict[str, int] = {}
    with whole_file(path) as file:
        for number, example in enumerate(examples, start=1):
            first = lines.setdefault(example.id, number)
            if first != number:
                raise UserError(f"{path}: id {shown(example.id)} in lines {first} and {number}; ids must be unique")
            file.write(json_line(to_record(example), f"{path}, line {number}, id {shown(example.id)}"))
    return len(lines)


def iterate_examples(path: Path) -> Iterator[Example]:
    """Yields the examples of a file in order, one line in memory at a time, and every id seen.

    Raises:
        UserError: no such file, a line that is no example, or two with one id; it names file and line.
    """
    lines: dict[str, int] = {}
    for number, record in json_lines(path, "examples; `dora-vl prepare` writes them"):
        try:
            example = from_record(record)
        except BadSample as error:
            raise UserError(f"{path}, line {number}: not an example: {error}") from None
        first = lines.setdefault(example.id, number)
        if first != number:
            raise UserError(
                f"{path}: id {shown(example.id)} in lines {first} and {number}; ids must be unique, so that each "
                "answer belongs to one record"
            )
        yield example


def json_line(record: Mapping[str, JSON], where: str) -> str:
    """The record as one line of JSON, with its newline.

    Raises:
        UserError: it holds something that JSON or UTF-8 cannot; `where` begins the message.
    """
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise UserError(f"{where}: cannot be written as JSON in UTF-8: {error}") from None
    return text


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """A file for text that gets its name only when all of it is on disk; nothing is left of one that failed.

    Several processes may write one file at a time: each has a scratch file of its own, and the last one's stays.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex[:12]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise UserError(f"{path}: cannot be written ({reason}); nothing half-written was left") from error
        raise


@dataclass(frozen=True)
class _Fields:
    """The lists of a record, read part by part."""

    record: Mapping[str, JSON]
    sample_id: str

    def parts(self, name: str, read: Callable[[JSON, str, str], Part]) -> tuple[Part, ...]:
        entries = self.record.get(name, [])
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise BadSample(self.sample_id, f"{name!r} must be a list, got {shown(entries)}")
        return tuple(read(entry, name, self.sample_id) for entry in entries)


def _text(value: JSON, name: str, sample_id: str) -> str:
    if not isinstance(value, str):
        raise BadSample(sample_id, f"{name!r} must hold text, got {shown(value)}")
    return value


def _object(value: JSON, name: str, sample_id: str) -> Mapping[str, JSON]:
    if not isinstance(value, Mapping):
        raise BadSample(sample_id, f"{name!r} must hold an object, got {shown(value)}")
    return value


def _number(value: JSON, name: str, sample_id: str) -> float:
    try:
        finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        finite = False
    if not finite:
        raise BadSample(sample_id, f"{name!r} must hold a finite number, got {shown(value)}")
    return float(value)


def _seconds(value: JSON, name: str, sample_id: str) -> float | None:
    return None if value is None else _number(value, name, sample_id)


def _turn(value: JSON, name: str, sample_id: str) -> Turn:
    entry = _object(value, name, sample_id)
    role = entry.get("role")
    if role not in ("system", "user", "assistant"):
        raise BadSample(sample_id, f"a turn's role must be 'system', 'user' or 'assistant', got {shown(role)}")
    return Turn(role, _text(entry.get("text"), f"{name} text", sample_id))


def _answer(value: JSON, name: str, sample_id: str) -> Answer:
    entry = _object(value, name, sample_id)
    weight = _number(entry.get("weight", 1.0), f"{name} weight", sample_id)
    return Answer(text=_text(entry.get("text"), f"{name} text", sample_id), weight=weight)


def _answer_record(answer: Answer) -> dict[str, JSON]:
    return {"text": answer.text} if answer.weight == 1.0 else {"text": answer.text, "weight": answer.weight}


def _times(entry: Mapping[str, JSON], name: str, sample_id: str) -> tuple[float | None, float | None]:
    start = _seconds(entry.get("start_seconds"), f"{name} start_seconds", sample_id)
    return start, _seconds(entry.get("end_seconds"), f"{name} end_seconds", sample_id)


def _times_record(part: Clip | Subtitle) -> dict[str, JSON]:
    times = {"start_seconds": part.start_seconds, "end_seconds": part.end_seconds}
    return {name: seconds for name, seconds in times.items() if seconds is not None}


def _clip(value: JSON, name: str, sample_id: str) -> Clip:
    entry = _object(value, name, sample_id)
    start, end = _times(entry, name, sample_id)
    return Clip(path=_text(entry.get("path"), f"{name} path", sample_id), start_seconds=start, end_seconds=end)


def _clip_record(clip: Clip) -> dict[str, JSON]:
    return {"path": clip.path, **_times_record(clip)}


def _subtitle(value: JSON, name: str, sample_id: str) -> Subtitle:
    entry = _object(value, name, sample_id)
    start, end = _times(entry, name, sample_id)
    return Subtitle(_text(entry.get("text"), f"{name} text", sample_id), start, end)


def _subtitle_record(subtitle: Subtitle) -> dict[str, JSON]:
    return {"text": subtitle.text, **_times_record(subtitle)}


# A records file read one example at a time, by place; only the lines' places are kept in memory.


THE_LINE = "the line"


class ExampleFile:
    """The examples of `records/<task>/<split>.jsonl`, or one for each of their answers. Worker processes may have it.

    Args:
        paths: the file, or several that are read as one.
        each_answer: an example with several answers counts as several, as captions are trained on.
        limit: only the first so many.

    A line that is no record is an item as well; asked for, it is a `BadSample` that names file and line.

    Raises:
        UserError: the file is missing or empty, or the limit leaves nothing.
    """

    def __init__(self, paths: Path | Sequence[Path], *, each_answer: bool = False, limit: int | None = None) -> None:
        self.paths = (paths,) if isinstance(paths, Path) else tuple(paths)
        if limit is not None and limit < 1:
            raise UserError(f"{self.paths[0]}: a limit of {limit} leaves no example; at least 1 is needed")
        found: list[tuple[int, int, int]] = []
        for number, path in enumerate(self.paths):
            found += _items(path, number, each_answer=each_answer)
        items = np.array(found[:limit], dtype=np.int64)
        self._file, self._places = items[:, 0].astype(np.int16), items[:, 1]
        self._answer = items[:, 2].astype(np.int32) if each_answer else None
        self._streams: dict[int, IO[bytes]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        """The example at this place; with `each_answer` see `answer_of` for which of its answers is meant.

        Raises:
            BadSample: the line is no JSON object, or its fields are wrong; the reason begins with file and line.
        """
        number, place = int(self._file[index]), int(self._places[index])
        if number not in self._streams:
            self._streams[number] = self.paths[number].open("rb")
        stream = self._streams[number]
        stream.seek(place)
        try:
            return from_record(_json_object(stream.readline()))
        except BadSample as error:
            where = f"{self.paths[number]}, line {_line_number(stream, place)}"
            raise BadSample(error.sample_id, f"{where}: {error.reason}") from None

    def answer_of(self, index: int) -> int | None:
        """The answer that this item is about; None where it is about all of them."""
        return None if self._answer is None else int(self._answer[index])

    def ids(self) -> Iterator[str]:
        """Yields each item's id, in order; that of a line which is no record is nothing."""
        for number, path in enumerate(self.paths):
            places, times = np.unique(self._places[self._file == number], return_counts=True)
            with path.open("rb") as stream:
                for place, items in zip(places.tolist(), times.tolist(), strict=True):
                    stream.seek(place)
                    yield from [_id_of(stream.readline())] * items

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_streams": {}}  # an open file does not travel; a worker opens its own


def _items(path: Path, number: int, *, each_answer: bool) -> Iterator[tuple[int, int, int]]:
    """File, place and answer of each item."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; `dora-vl prepare` writes records from a publisher's files")
    empty = True
    with path.open("rb") as stream:
        for place, line in _lines(stream):
            empty = False
            for answer in range(_answers(line) if each_answer else 1):
                yield number, place, answer
    if empty:
        raise UserError(f"{path} holds no example")


def _answers(line: bytes) -> int:
    """How many items the line is; a broken one is a single item, whose reading says what is wrong."""
    try:
        answers = _json_object(line).get("answers", ())
    except BadSample:
        return 1
    return max(1, len(answers)) if isinstance(answers, list) else 1


def _id_of(line: bytes) -> str:
    try:
        return str(_json_object(line).get("id"))
    except BadSample:
        return ""


def _json_object(line: bytes) -> Mapping[str, JSON]:
    try:
        text = text_of(line.removeprefix(codecs.BOM_UTF8), THE_LINE)
        record = json_of(text, THE_LINE)
    except UserError as error:
        raise BadSample("(no id)", f"{str(error).removeprefix(f'{THE_LINE}: ')}; write the file again") from None
    if not isinstance(record, dict):
        raise BadSample("(no id)", f"a line must hold an object, found {type(record).__name__}")
    return record


def _line_number(stream: IO[bytes], place: int) -> int:
    """The line that begins at this place, from 1; reads all before it, which only a broken line is worth."""
    stream.seek(0)
    return 1 + sum(part.count(b"\n") for part in _parts(stream, place))


def _parts(stream: IO[bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (part := stream.read(min(size, 1 << 20))):
        size -= len(part)
        yield part


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    place = 0
    for line in stream:
        if line.strip():
            yield place, line
        place += len(line)
