"""A split that several files make together: their rows are joined by an id, and a file that names none is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dora_vl.data.examples import JSON, Answer
from dora_vl.errors import BadSample, UserError, shown
from dora_vl.scores.human_answers import PEOPLE
from dora_vl.sources.fields import given, identifier, rows, text
from dora_vl.sources.published import Raw


@contextmanager
def refusing(where: str | Path) -> Iterator[None]:
    """A value that cannot be used refuses the whole file: what it belongs to is not a row that could be dropped.

    Raises:
        UserError: begins with `where`, names the field.
    """
    try:
        yield
    except BadSample as error:
        raise UserError(f"{where}: {error.reason}; fetch the file again") from None


def numbered(file: Path, rows: Iterable[Raw]) -> Iterator[tuple[str, Raw]]:
    """Each row with how messages call it, "<file>, row <number>"."""
    for number, row in enumerate(rows, start=1):
        yield f"{file}, row {number}", row


def column_by_id(file: Path, rows: Iterable[Raw], id_column: str, column: str) -> dict[str, JSON]:
    """A column of `file` by the rows' ids, for the rows of another file; the values are for `fields` to check.

    Raises:
        UserError: a row has no id, or two rows of one id differ; it names the file and the row.
    """
    found: dict[str, JSON] = {}
    for where, row in numbered(file, rows):
        with refusing(where):
            name = identifier(row, id_column)
        value = given(row, column)
        if name in found and not _same(found[name], value):
            raise UserError(
                f"{where}: {id_column} {shown(name)} stands in an earlier row with another {column!r}; "
                "which is right? fetch the file again"
            )
        found[name] = value
    return found


def _same(first: JSON, second: JSON) -> bool:
    try:
        return first == second
    except RecursionError:  # nested as deeply as Python reads
        return False


STEP = 0.3
"""LXMERT's ladder: one person 0.3, two 0.6, three 0.9, more 1; the metric itself gives 1 from three on."""


def people_answers(raw: Raw, column: str, sample_id: str) -> list[str]:
    """What each person answered, from a list of {"answer": text}; empty ones are kept, for the metrics count them.

    Raises:
        BadSample: they are not ten, or nobody answered.
    """
    return ten_answers([text(entry, "answer", sample_id) for entry in rows(raw, column, sample_id)], sample_id)


def ten_answers(answers: Sequence[str], sample_id: str) -> list[str]:
    """The answers, as many as the metric leaves out in turn, of which one must not be empty.

    Raises:
        BadSample: they are not ten, or nobody answered.
    """
    if len(answers) != PEOPLE:
        raise BadSample(sample_id, f"{len(answers)} people answered; the metric needs {PEOPLE}")
    if not any(answer.strip() for answer in answers):
        raise BadSample(sample_id, f"none of its {len(answers)} answers holds text")
    return list(answers)


def soft_answers(answers: Sequence[str]) -> tuple[Answer, ...]:
    """The distinct answers, most frequent first, in the order in which they came; empty ones are left out."""
    counted = Counter(answer for answer in answers if answer.strip())
    return tuple(Answer(text=text, weight=min(1.0, round(STEP * count, 1))) for text, count in counted.most_common())
