"""One row of any format as what a sample is made of; tables keep these, streams pass them on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from dora_vl.data.clips import Clip, row_clips
from dora_vl.data.examples import Example
from dora_vl.data.readers.row_formats import FORMATS, format_of, id_of, read_row, turns_of
from dora_vl.data.readers.row_pictures import row_pictures
from dora_vl.data.turns import SPEAKERS, raw_turns
from dora_vl.errors import BadSample, UserError


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """A sample with its turns as LLaVA's (from, value); `problem` says why the row could not be brought into this form.

    `held` are the pictures that the row itself holds, by their name in `images`.
    """

    id: str
    images: tuple[str, ...] = ()
    video: tuple[Clip, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
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
        """The row as `turns.read_llava` takes it."""
        turns = [{"from": speaker, "value": text} for speaker, text in self.turns]
        media = {"images": list(self.images), "video": [vars(clip) for clip in self.video]}
        return {"id": self.id, **media, "conversations": turns, "problem": self.problem}

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
            if name == FORMATS[0].name and _is_llava(record):
                return _llava_row(record, sample_id)
            example = read_row(record, number=number) if form is None else form.read(record, sample_id)
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


def _is_llava(record: Mapping[str, object]) -> bool:
    """Whether its turns are kept as they stand; `turns.read_llava` decides what they mean."""
    turns = record.get("conversations")
    if record.get("system"):
        return False
    return not (
        isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and turns[0].get("role") is not None
    )


def _llava_row(record: Mapping[str, object], sample_id: str) -> SampleRow:
    pictures = row_pictures(record, sample_id)
    return SampleRow(
        id=sample_id,
        images=tuple(pictures.names),
        video=row_clips(record, sample_id),
        turns=tuple(raw_turns(record, sample_id)),
        format=FORMATS[0].name,
        held=pictures.held,
    )


def _example_row(example: Example, form: str | None) -> SampleRow:
    return SampleRow(
        id=example.id,
        images=example.images,
        video=example.clips,
        turns=tuple((SPEAKERS[turn.role], turn.text) for turn in turns_of(example)),
        format=form,
        held=example.image_bytes,
    )
