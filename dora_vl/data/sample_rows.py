"""Which format a row is in, by its own keys, and the one way from any of them to what a sample is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from dora_vl.data.examples import Answer, Example, clip_fields, from_record
from dora_vl.data.media import row_pictures
from dora_vl.data.readers.columns import FORMATS, USUAL, Columns, ColumnsError, Resolved, Row, is_nothing
from dora_vl.data.readers.messages import (
    has_tags,
    read_caption,
    read_columns,
    read_instructions,
    read_messages,
    read_prompt_completion,
    read_texts,
    refuse_marked_turns,
    with_system,
    with_tagged_pictures,
    written_choices,
)
from dora_vl.data.turns import INPUT_CHARACTERS, SPEAKERS, Clip, Turn, raw_turns, row_clips, spoken_turns
from dora_vl.errors import NO_ANSWER, BadSample, UserError, shown

LLAVA = "conversations"
"""The format whose turns are LLaVA's."""


def _roles_in_conversations(row: Row) -> bool:
    turns = row.get("conversations")
    first = turns[0] if isinstance(turns, Sequence) and turns else None
    return isinstance(first, Mapping) and first.get("role") is not None


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
    record = {**_without_nulls(row), "id": sample_id}
    if isinstance(record.get("videos"), Mapping):
        record["video"] = record.pop("videos")
    example = from_record(record)
    if not example.choices:
        return example
    known = example.extra.get("correct", example.answers[0].text if example.answers else None)
    asked, said = written_choices(example.question, example.choices, known, sample_id)
    return replace(example, question=asked, answers=(Answer(text=said),))


def _without_nulls(value: Row) -> dict[str, object]:
    """Tables fill up with null what a row has not."""
    return {name: _inner(inner) for name, inner in value.items() if inner is not None}


def _inner(value: object) -> object:
    if isinstance(value, Mapping):
        return _without_nulls(value)
    return [_inner(entry) for entry in value] if isinstance(value, list) else value


READERS: Mapping[str, Callable[[Row, str], Example]] = {
    "conversations": _read_conversations,
    "messages": read_messages,
    "texts": read_texts,
    "prompt/completion": read_prompt_completion,
    "instructions": read_instructions,
    "records": _read_record,
    "question/answer": read_columns,
    "captions": read_caption,
}
"""What makes an example of a row's fields, by its format."""


def id_of(row: Row, number: int = 0, columns: Columns = USUAL) -> str:
    """The row's own id, else its place, from 0."""
    own = columns.id_of(row)
    if own is None:
        return f"record {number}"
    return own if isinstance(own, str) else shown(own)


def read_row(row: Row, *, number: int = 0, columns: Columns = USUAL) -> Example:
    """One row of any format as an example.

    Args:
        row: what a container gives: JSON's values, and bytes where a table or an archive holds pictures.
        number: its place in the file, which is the id of one that has none.
        columns: what its columns are.

    Raises:
        BadSample: its keys fit no format, or it does not hold what its format asks for.
        ColumnsError: it holds something that its format would leave out.
    """
    return _read(columns.resolve(row), id_of(row, number, columns))


def _read(resolved: Resolved, sample_id: str) -> Example:
    if resolved.format is None:
        known = "; ".join(" and ".join(form.needs) for form in FORMATS if form.needs)
        raise BadSample(
            sample_id,
            f"its keys {shown([*resolved.fields], 120)} fit no format ({known}); data.columns says what a column is, "
            "such as {headline: question}",
        )
    refuse_marked_turns(resolved.fields, sample_id)
    return with_tagged_pictures(READERS[resolved.format.name](resolved.fields, sample_id))


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
    columns: Mapping[str, str] = field(default_factory=dict)
    """The role of each of its row's columns, "" where it is left out."""

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
            return SampleRow(id=readable_id, problem=problem, format=self.format, columns=self.columns)
        return self


class SampleRowReader:
    """Reads the rows of one file or folder, and remembers which formats it has met.

    Args:
        name: of the file, for messages.
        columns: what its columns are.
    """

    def __init__(self, name: str, columns: Columns = USUAL) -> None:
        self._name = name
        self._columns = columns
        self._first_of_format: dict[str, str] = {}

    def read(self, record: Mapping[str, object], number: int) -> SampleRow:
        """The row `number`, from 0, of what the container gives.

        Raises:
            UserError: it is in another format than an earlier one, or a column that means something is left out.
        """
        sample_id = id_of(record, number, self._columns)
        row = f"row {number + 1} ({sample_id})"
        try:
            resolved = self._columns.resolve(record)
        except ColumnsError as error:
            raise UserError(f"{self._name}, {row}: {error}") from None
        name = None if resolved.format is None else resolved.format.name
        if name is not None:
            self._check_format(name, row)
        try:
            if name == LLAVA and _is_llava(resolved.fields):
                return _llava_row(resolved, sample_id)
            return _example_row(_read(resolved, sample_id), resolved)
        except BadSample as error:
            return SampleRow(id=sample_id, problem=error.reason, format=name, columns=resolved.uses)

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


def _is_llava(fields: Row) -> bool:
    return is_nothing(fields.get("system")) and not _roles_in_conversations(fields)


def _llava_row(resolved: Resolved, sample_id: str) -> SampleRow:
    """LLaVA's turns are kept as they stand; `turns.read_conversation` decides what they mean."""
    fields = resolved.fields
    pictures, turns = row_pictures(fields, sample_id), tuple(raw_turns(fields, sample_id))
    refuse_marked_turns(fields, sample_id)
    if has_tags([text for _, text in turns]):
        return _example_row(with_tagged_pictures(_read_conversations(fields, sample_id)), resolved)
    return SampleRow(
        id=sample_id,
        images=tuple(pictures.names),
        video=row_clips(fields, sample_id),
        turns=turns,
        format=LLAVA,
        held=pictures.held,
        columns=resolved.uses,
    )


def _example_row(example: Example, resolved: Resolved) -> SampleRow:
    turns = turns_of(example)
    return SampleRow(
        id=example.id,
        images=example.images,
        video=example.clips,
        turns=tuple((SPEAKERS[turn.role], turn.text) for turn in turns),
        input_characters=turns[-2].input_characters if len(turns) > 1 else 0,
        format=resolved.format and resolved.format.name,
        held=example.image_bytes,
        columns=resolved.uses,
    )
