"""Which format a row is in, by its own keys, and the one way from any of them to an `Example`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dora_vl.data.clips import VIDEO_KEYS, row_clips
from dora_vl.data.examples import FIELDS, Example, clip_fields, from_record
from dora_vl.data.readers.messages import read_messages
from dora_vl.data.readers.question_answer import (
    ANSWERS,
    CAPTIONS,
    QUESTIONS,
    first_of,
    read_caption,
    read_columns,
    read_instructions,
    read_prompt_completion,
    read_texts,
)
from dora_vl.data.readers.row_pictures import PICTURE_KEYS, row_pictures
from dora_vl.data.turns import Turn, raw_turns, speaker_role
from dora_vl.errors import BadSample, shown

Row = Mapping[str, object]
ID_KEYS = ("id", "question_id", "qid", "__key__")


@dataclass(frozen=True)
class RowFormat:
    """One form that a row can have."""

    name: str
    keys: str
    """What makes a row one of this form, for messages."""
    fits: Callable[[Row], bool]
    read: Callable[[Row, str], Example]


def _holds(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(row.get(name) is not None for name in names)


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


def _is_columns(row: Row) -> bool:
    return first_of(row, QUESTIONS) is not None and first_of(row, ANSWERS) is not None


def _is_caption(row: Row) -> bool:
    return first_of(row, (*PICTURE_KEYS, *VIDEO_KEYS)) is not None and first_of(row, CAPTIONS) is not None


def _read_conversations(row: Row, sample_id: str) -> Example:
    """LLaVA's and ShareGPT's: `from` and `value`, the pictures in `image` or `images`, a `system` text beside them."""
    if _roles_in_conversations(row):
        return read_messages(row, sample_id, "conversations")
    turns = tuple(
        Turn(speaker_role(speaker, number, sample_id), text)
        for number, (speaker, text) in enumerate(raw_turns(row, sample_id), 1)
    )
    if isinstance(system := row.get("system"), str) and system:
        turns = (Turn("system", system), *turns)
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
            sample_id, "it has choices; `python -m data_prep.llava_conversations` puts them in a benchmark's words"
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
    RowFormat("instructions", "instruction, output", _holds("instruction", "output"), read_instructions),
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
    return form.read(row, sample_id)


def turns_of(example: Example) -> tuple[Turn, ...]:
    """The talk to train on: the turns, or the question with the answer of the largest weight (the first of equals).

    Raises:
        BadSample: there is neither.
    """
    if example.turns:
        return example.turns
    if not example.answers:
        raise BadSample(example.id, "it has no answer to train on")
    answer = max(example.answers, key=lambda one: one.weight)
    return Turn("user", example.question), Turn("assistant", answer.text)
