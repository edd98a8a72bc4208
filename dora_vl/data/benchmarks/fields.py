"""Reads published rows column by column, joins files by an id, and describes the splits of a source.

Sources read rows only through `Row`: a value that is missing or of another kind makes a named `BadSample`, never
a traceback, and never passes on to a scorer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from dora_vl.data.example import JSON, Answer, Example
from dora_vl.data.text_file import stream_members
from dora_vl.errors import BadSample, UserError, short_names, short_repr

Raw = Mapping[str, JSON]
"""Holds a row as the publisher's file has it."""
Converted = Example | Iterable[Example] | Mapping[str, JSON]
"""A row becomes one example, several, or a record of LLaVA's JSON."""
Value = TypeVar("Value")

FILE_OWNER = "the publisher's"
"""Errors of `text_file` call these files by this text."""
UNKNOWN_ID = "(no id)"
LONGEST_ID = 500
PEOPLE = 10
"""VQA's soft accuracy needs ten answers, for it leaves each person out in turn."""
_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,19}\s*")


@dataclass(frozen=True)
class Split:
    """A file of records to be made, `<task>/<name>.jsonl`.

    Attributes:
        inputs: the files that it depends on; their sizes and hashes go into the manifest.
        rows: yields the raw rows in the publisher's order.
        convert: raises `BadSample` for a row that cannot be used.
        published_rows: how many rows the publisher states; another number is reported, not refused.
        repeated_ids: what to do with an id that came before: refuse the file, or number it ("x#2").
        ids_by_place: ids say where a row is, so repeated rows have two ids: they are counted.
        settings: what the user chose; another choice makes the file anew.
        notes: what else the manifest should say.
    """

    task: str
    name: str
    inputs: tuple[Path, ...]
    rows: Callable[[], Iterator[Raw]]
    convert: Callable[[Raw], Converted]
    published_rows: int | None = None
    repeated_ids: Literal["refuse", "number"] = "refuse"
    ids_by_place: bool = False
    settings: Mapping[str, JSON] = field(default_factory=dict)
    notes: Mapping[str, JSON] = field(default_factory=dict)


class Row:
    """A published row; messages name it by the id in `id_column`."""

    def __init__(self, raw: Raw, id_column: str = "", *, sample_id: str = UNKNOWN_ID) -> None:
        self.raw = raw
        self.id = sample_id
        if id_column:
            self.id = self.identifier(id_column)

    def error(self, reason: str) -> BadSample:
        """Returns the error to raise for this row."""
        return BadSample(self.id, reason)

    def get(self, column: str) -> JSON:
        """Returns the value as it is, None where there is none."""
        return self.raw.get(column)

    def value(self, column: str, kind: str, *types: type) -> JSON:
        """Returns the value, which must be of one of these types; `kind` is what the message calls them."""
        value = self.raw.get(column)
        if value is None:
            raise self.error(f"no column {short_repr(column)}; the row has {short_names(self.raw)}")
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise self._wrong(column, kind, value)
        return value

    def _wrong(self, column: str, kind: str, value: JSON) -> BadSample:
        return self.error(f"column {short_repr(column)} must hold {kind}, got {short_repr(value)}")

    def optional(self, take: Callable[[str], Value], column: str) -> Value | None:
        """Returns what `take` reads from a column; None if it is absent or null."""
        return None if self.get(column) is None else take(column)

    def extra_columns(self, *columns: str, take: Callable[[str], object] | None = None) -> dict[str, object]:
        """Returns the row's columns among these, for `Example.extra`; `take` reads them, by default `scalar`."""
        return {column: (take or self.scalar)(column) for column in columns if self.get(column) is not None}

    def text(self, column: str) -> str:
        """Returns text, possibly empty."""
        return self.value(column, "text", str)

    def non_empty(self, column: str) -> str:
        """Returns text that is more than white space."""
        if not (value := self.text(column)).strip():
            raise self.error(f"column {short_repr(column)} is empty")
        return value

    def one_of(self, column: str, allowed: Sequence[str]) -> str:
        """Returns one of the few texts that are allowed."""
        if (value := self.non_empty(column)) not in allowed:
            raise self.error(f"its {column} is {short_repr(value)}, which is not one of {', '.join(allowed)}")
        return value

    def identifier(self, column: str) -> str:
        """Returns an id, which some publishers write as a number."""
        value = self.value(column, "an id", str, int)
        name = value if isinstance(value, str) else str(self._whole(column, value))
        if not name:
            raise self._wrong(column, "an id", value)
        if len(name) > LONGEST_ID:
            raise self.error(f"column {short_repr(column)} holds an id of {len(name):,} characters: {short_repr(name)}")
        return name

    def integer(self, column: str) -> int:
        """Returns a whole number, or text that spells one."""
        value = self.value(column, "a whole number", str, int)
        if isinstance(value, str) and not _WHOLE.fullmatch(value):
            raise self._wrong(column, "a whole number", value)
        return self._whole(column, int(value))

    def _whole(self, column: str, value: int) -> int:
        if not -(2**63) <= value < 2**63:
            raise self.error(f"column {short_repr(column)} holds a number of more than 64 bits")
        return value

    def number(self, column: str, value: JSON) -> float:
        """Returns a finite number, or text that spells one, somewhere in a column."""
        try:
            result = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
        except (ValueError, OverflowError):
            result = math.nan
        if not math.isfinite(result):
            raise self._wrong(column, "a number", value)
        return result

    def span(self, column: str, value: JSON) -> tuple[float, float]:
        """Returns start and end in seconds: two numbers, the second not before the first."""
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            raise self.error(f"{short_repr(column)} must hold start and end, got {short_repr(value)}")
        start, end = (self.number(column, part) for part in value)
        if end < start:
            raise self.error(f"its span {short_repr(value)} ends before it begins")
        return start, end

    def scalar(self, column: str) -> str | int | float | bool:
        """Returns text, a finite number or a truth value."""
        value = self.value(column, "text or a number", str, bool, int, float)
        if isinstance(value, float) and not math.isfinite(value):
            raise self._wrong(column, "text or a number", value)
        return self._whole(column, value) if type(value) is int else value

    def texts(self, column: str) -> list[str]:
        """Returns a list of text."""
        values = self.value(column, "a list", list, tuple)
        if wrong := [value for value in values if not isinstance(value, str)]:
            raise self._wrong(column, "a list of text", wrong[0])
        return list(values)

    def rows(self, column: str) -> list[Row]:
        """Returns a list of objects."""
        values = self.value(column, "a list", list, tuple)
        if wrong := [value for value in values if not isinstance(value, Mapping)]:
            raise self._wrong(column, "a list of objects", wrong[0])
        return [Row(value, sample_id=self.id) for value in values]

    def mapping(self, column: str) -> Mapping[str, JSON]:
        """Returns an object, possibly empty."""
        return self.value(column, "an object", Mapping)

    def choice(self, column: str, choices: Sequence[object]) -> int:
        """Returns the number of the right choice, which must be one of them."""
        if not 0 <= (value := self.integer(column)) < len(choices):
            raise self.error(f"{short_repr(column)} is {value}, but there are {len(choices)} choices")
        return value

    def answers_of_people(self) -> list[str]:
        """Returns what each person answered, from a list of {"answer": text}; empty answers count for the metrics."""
        return self.check_ten([entry.text("answer") for entry in self.rows("answers")])

    def check_ten(self, answers: list[str]) -> list[str]:
        """Returns the answers, if they are as many as the metric needs and one holds text."""
        if len(answers) != PEOPLE:
            raise self.error(f"{len(answers)} people answered; the metric needs {PEOPLE}")
        if not any(answer.strip() for answer in answers):
            raise self.error(f"none of its {len(answers)} answers holds text")
        return answers


def soft_answers(answers: Sequence[str]) -> tuple[Answer, ...]:
    """Returns the distinct answers, most frequent first; empty ones are left out.

    LXMERT weighs an answer of one person 0.3, of two 0.6, of three 0.9, of more 1; the metric gives 1 from three on.
    """
    counted = Counter(answer for answer in answers if answer.strip())
    return tuple(Answer(text=text, weight=min(1.0, round(0.3 * n, 1))) for text, n in counted.most_common())


def join_key(raw: Raw, column: str) -> str:
    """Returns the id that a row is joined by; "" if it has none, which its conversion then reports."""
    try:
        return Row(raw).identifier(column)
    except BadSample:
        return ""


def existing_files(folder: Path, names: Iterable[str], *, inside: Sequence[str] = ()) -> dict[str, Path]:
    """Returns those of the files that `folder` has, or else the first folder `inside` it that has any."""
    names = list(names)
    for candidate in (*(folder / part for part in inside), folder):
        if files := files_in(candidate, names):
            return files
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --from takes the folder with {' or '.join(names[:4])}")
    raise UserError(f"{folder}: none of {', '.join(names)} is in it; --from takes the folder with the files")


def files_in(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Returns the files that exist, by name."""
    return {name: folder / name for name in names if (folder / name).is_file()}


def member_rows(paths: Sequence[Path], id_column: str) -> Iterator[Raw]:
    """Yields the members of files that are one object of objects; their names go into `id_column`."""
    for path in paths:
        for name, row in stream_members(path):
            yield {**row, id_column: name}


@contextmanager
def refuse_file(where: str | Path) -> Iterator[None]:
    """Refuses the whole file for a value that cannot be used: it belongs to no row that could be dropped."""
    try:
        yield
    except BadSample as error:
        raise UserError(f"{where}: {error.reason}; fetch the file again") from None


def numbered(file: Path, rows: Iterable[Raw]) -> Iterator[tuple[str, Raw]]:
    """Pairs each row with its name in messages, "<file>, row <number>"."""
    return ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))


def by_id(file: Path, rows: Iterable[Raw], id_column: str, *columns: str) -> dict[str, Raw]:
    """Returns columns of `file` by the rows' ids, to be joined to another file's rows; conversion checks the values."""
    rows_by_id: dict[str, Raw] = {}
    for where, row in numbered(file, rows):
        with refuse_file(where):
            name = Row(row).identifier(id_column)
        values = {column: row.get(column) for column in columns}
        if rows_by_id.setdefault(name, values) != values:
            other = f"is in an earlier row with another {' or '.join(columns)}"
            raise UserError(f"{where}: {id_column} {short_repr(name)} {other}; fetch the file again")
    return rows_by_id
