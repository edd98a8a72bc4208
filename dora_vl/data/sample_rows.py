"""Which format a row is in, by its own keys, and the one way from any of them to what a sample is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from dora_vl.data.examples import FIELDS, Example, clip_fields, from_record
from dora_vl.data.media import PICTURE_KEYS, numbered_columns, row_pictures
from dora_vl.data.readers.left_out import refuse_marked_turns, refuse_media_left_out
from dora_vl.data.readers.messages import (
    ANSWERS,
    CAPTIONS,
    QUESTIONS,
    SYSTEMS,
    first_of,
    read_caption,
    read_columns,
    read_instructions,
    read_messages,
    read_prompt_completion,
    read_texts,
    with_system,
)
from dora_vl.data.turns import INPUT_CHARACTERS, SPEAKERS, VIDEO_KEYS, Clip, Turn, raw_turns, row_clips, spoken_turns
from dora_vl.errors import NO_ANSWER, BadSample, UserError, shown

Row = Mapping[str, object]
ID_KEYS = ("id", "question_id", "qid", "__key__")
_MEDIA_AND_IDS = frozenset((*ID_KEYS, *PICTURE_KEYS, *VIDEO_KEYS))


@dataclass(frozen=True)
class RowFormat:
    """One form that a row can have."""

    name: str
    keys: str
    """What makes a row one of this form, for messages."""
    fits: Callable[[Row], bool]
    read: Callable[[Row, str], Example]


def _holds(name: str, other: str | None = None) -> Callable[[Row], bool]:
    return lambda row: row.get(name) is not None and (other is None or row.get(other) is not None)


def _roles_in_conversations(row: Row) -> bool:
    turns = row.get("conversations")
    first = turns[0] if isinstance(turns, Sequence) and turns else None
    return isinstance(first, Mapping) and first.get("role") is not None


def _is_record(row: Row) -> bool:
    if not {name for name, value in row.items() if value is not None} <= FIELDS:
        return False
    answers = row.get("answers")
    first = answers[0] if isinstance(answers, Sequence) and not isinstance(answers, str) and answers else None
    return row.get("turns") is not None or (isinstance(first, Mapping) and "text" in first)


def _is_instruction(row: Row) -> bool:
    """An empty output is still one, and named."""
    return row.get("instruction") is not None and "output" in row


def _is_columns(row: Row) -> bool:
    return first_of(row, QUESTIONS) is not None and first_of(row, ANSWERS) is not None


def _is_caption(row: Row) -> bool:
    media = (*PICTURE_KEYS, *numbered_columns(row), *VIDEO_KEYS)
    return first_of(row, media) is not None and first_of(row, CAPTIONS) is not None


def _read_conversations(row: Row, sample_id: str) -> Example:
    """LLaVA's and ShareGPT's: `from` and `value`, the pictures in `image` or `images`, a `system` text beside them."""
    if _roles_in_conversations(row):
        return read_messages(row, sample_id, "conversations")
    turns = with_system(row, tuple(spoken_turns(row, sample_id)), sample_id)
    pictures = row_pictures(row, sample_id)
    return Example(
        id=sample_id,
        turns=turns,
        images=tuple(pictures.names),
        image_bytes=pictures.held,
        **clip_fields(row_clips(row, sample_id)),
    )


def _read_record(row: Row, sample_id: str) -> Example:
    example = from_record({**_without_nulls(row), "id": sample_id})
    if example.choices:
        raise BadSample(
            sample_id,
            "it has choices; `python -m data_prep.llava_conversations --benchmark seed` writes them with letters, "
            "and the right one's as the reply",
        )
    return example


def _without_nulls(value: Row) -> dict[str, object]:
    """Tables fill up with null what a row has not."""
    return {name: _inner(inner) for name, inner in value.items() if inner is not None}


def _inner(value: object) -> object:
    if isinstance(value, Mapping):
        return _without_nulls(value)
    return [_inner(entry) for entry in value] if isinstance(value, list) else value


FORMATS: tuple[RowFormat, ...] = (
    RowFormat("conversations", "conversations", _holds("conversations"), _read_conversations),
    RowFormat("messages", "messages", _holds("messages"), read_messages),
    RowFormat("texts", "texts", _holds("texts"), read_texts),
    RowFormat("prompt/completion", "prompt, completion", _holds("prompt", "completion"), read_prompt_completion),
    RowFormat("instructions", "instruction, output", _is_instruction, read_instructions),
    RowFormat("records", "answers or turns of `dora-vl prepare`", _is_record, _read_record),
    RowFormat(
        "question/answer", f"one of {', '.join(QUESTIONS)} and of {', '.join(ANSWERS)}", _is_columns, read_columns
    ),
    RowFormat("captions", f"a picture or video and one of {', '.join(CAPTIONS)}", _is_caption, read_caption),
)
"""Asked from the top: the first that fits is the row's."""


def format_of(row: Row) -> RowFormat | None:
    """The row's format by its own keys; None where none fits."""
    return next((form for form in FORMATS if form.fits(row)), None)


def id_of(row: Row, number: int = 0) -> str:
    """The row's own id, else its place, from 0."""
    own = next((value for key in ID_KEYS if (value := row.get(key)) is not None), None)
    if own is None:
        return f"record {number}"
    return own if isinstance(own, str) else shown(own)


def read_row(row: Row, *, number: int = 0) -> Example:
    """One row of any format as an example.

    Args:
        row: what a container gives: JSON's values, and bytes where a table or an archive holds pictures.
        number: its place in the file, which is the id of one that has none.

    Raises:
        BadSample: its keys fit no format, or it does not hold what its format asks for.
    """
    sample_id, form = id_of(row, number), format_of(row)
    if form is None:
        known = "; ".join(form.keys for form in FORMATS[:5])
        raise BadSample(
            sample_id, f"its keys {shown([*row], 120)} fit no format ({known}; question and answer; docs/data.md)"
        )
    return _read(form, row, sample_id)


def _read(form: RowFormat, row: Row, sample_id: str) -> Example:
    example = form.read(row, sample_id)
    _refuse_left_out(row, sample_id)
    return example


def _refuse_left_out(row: Row, sample_id: str) -> None:
    refuse_marked_turns(row, sample_id)
    refuse_media_left_out(row, sample_id, _MEDIA_AND_IDS)


def turns_of(example: Example) -> tuple[Turn, ...]:
    """The talk to train on: the turns, or the question with the answer of the largest weight (the first of equals).

    Raises:
        BadSample: there is neither.
    """
    if example.turns:
        return example.turns
    if not example.answers:
        raise BadSample(example.id, "it has no answer to train on", NO_ANSWER)
    answer = max(example.answers, key=lambda one: one.weight)
    return Turn("user", example.question), Turn("assistant", answer.text)


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """A sample with its turns as LLaVA's (from, value); `problem` says why the row could not be brought into this form.

    `held` are the pictures that the row itself holds, by their name in `images`; `input_characters` are the last
    question's (`turns.Turn`).
    """

    id: str
    images: tuple[str, ...] = ()
    video: tuple[Clip, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    input_characters: int = 0
    problem: str | None = None
    format: str | None = None
    held: Mapping[str, bytes] = field(default_factory=dict)

    def strings(self) -> Iterator[str]:
        """All of its text, the problem left out."""
        names = (clip.path for clip in self.video)
        return chain((self.id,), self.images, names, chain.from_iterable(self.turns))

    def size(self) -> int:
        """Characters and bytes that it holds."""
        return sum(map(len, self.strings())) + sum(map(len, self.held.values()))

    def record(self) -> dict[str, object]:
        """The row as `turns.read_conversation` takes it."""
        turns = [{"from": speaker, "value": text} for speaker, text in self.turns]
        media = {"images": list(self.images), "video": [vars(clip) for clip in self.video]}
        own = {"id": self.id, INPUT_CHARACTERS: self.input_characters, "problem": self.problem}
        return {**own, **media, "conversations": turns}

    def encodable(self) -> SampleRow:
        """Itself; a row without text where it holds half of a surrogate pair, which JSON can spell (`\\ud83d`)."""
        try:
            "".join([*self.strings(), self.problem or ""]).encode()
        except UnicodeEncodeError:
            readable_id = self.id.encode("utf-8", "backslashreplace").decode()
            problem = "its text holds half of a surrogate pair, which is no character"
            return SampleRow(id=readable_id, problem=problem, format=self.format)
        return self


class SampleRowReader:
    """Reads the rows of one file or folder, and remembers which formats it has met.

    Args:
        name: of the file, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._first_of_format: dict[str, str] = {}

    def read(self, record: Mapping[str, object], number: int) -> SampleRow:
        """The row `number`, from 0, of what the container gives.

        Raises:
            UserError: it is in another format than an earlier one.
        """
        sample_id, form = id_of(record, number), format_of(record)
        name = None if form is None else form.name
        if name is not None:
            self._check_format(name, f"row {number + 1} ({sample_id})")
        try:
            if form is FORMATS[0] and _is_llava(record):
                return _llava_row(record, sample_id)
            example = read_row(record, number=number) if form is None else _read(form, record, sample_id)
            return _example_row(example, name)
        except BadSample as error:
            return SampleRow(id=sample_id, problem=error.reason, format=name)

    def _check_format(self, name: str, row: str) -> None:
        self._first_of_format.setdefault(name, row)
        if len(self._first_of_format) > 1:
            firsts = "; ".join(f"{one}: {first}" for one, first in self._first_of_format.items())
            raise UserError(f"{self._name}: rows of mixed formats, first of each {firsts}; write one file a format")


def check_usable(name: str, rows: int, usable: int, first_problem: str | None) -> None:
    """Refuses a file of whose `rows`, as far as they were read, none can be a sample.

    Raises:
        UserError: with the reason of the first one.
    """
    if not rows:
        raise UserError(f"{name}: holds no records")
    if not usable:
        raise UserError(f"{name}: none of its {rows} records is a sample; the first one: {first_problem}")


def _is_llava(record: Row) -> bool:
    return not any(record.get(name) for name in SYSTEMS) and not _roles_in_conversations(record)


def _llava_row(record: Row, sample_id: str) -> SampleRow:
    """LLaVA's turns are kept as they stand; `turns.read_conversation` decides what they mean."""
    pictures, turns = row_pictures(record, sample_id), tuple(raw_turns(record, sample_id))
    _refuse_left_out(record, sample_id)
    return SampleRow(
        id=sample_id,
        images=tuple(pictures.names),
        video=row_clips(record, sample_id),
        turns=turns,
        format=FORMATS[0].name,
        held=pictures.held,
    )


def _example_row(example: Example, form: str | None) -> SampleRow:
    turns = turns_of(example)
    return SampleRow(
        id=example.id,
        images=example.images,
        video=example.clips,
        turns=tuple((SPEAKERS[turn.role], turn.text) for turn in turns),
        input_characters=turns[-2].input_characters if len(turns) > 1 else 0,
        format=form,
        held=example.image_bytes,
    )
