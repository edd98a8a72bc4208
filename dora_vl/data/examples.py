"""The record between data preparation, tasks and scores: one published item, and a file of them, one a line.

Only the standard library. Files are `records/<task>/<split>.jsonl`; a field that an item has not is not written.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar
from uuid import uuid4

from dora_vl.data.right_choice import right_choice
from dora_vl.data.text_file import json_lines
from dora_vl.data.turns import Clip, Turn
from dora_vl.errors import BadSample, UserError, shown

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
