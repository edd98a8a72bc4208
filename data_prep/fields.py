"""Taking typed values out of a publisher's row: the one place that looks at what its JSON holds.

What is absent or of another kind makes the row a named bad sample. Sources never subscript a row themselves (a test
reads their code): a list where an id should be would end them with a traceback, or pass on to a scorer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from data_prep.published import Raw
from dora_vl.data.examples import JSON
from dora_vl.errors import BadSample, shown, shown_names

Value = TypeVar("Value")

UNKNOWN_ID = "(no id)"
LONGEST_ID = 500
"""Characters; an id stands in file names and messages, and the publishers' are shorter than 100."""
LARGEST_NUMBER = 2**63
"""Whole numbers are below it, as in every format that records go to."""

_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,19}\s*")


def text(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> str:
    """Text, possibly empty."""
    value = _present(row, column, sample_id)
    if not isinstance(value, str):
        raise BadSample(sample_id, f"column {shown(column)} must hold text, got {shown(value)}")
    return value


def filled(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> str:
    """Text that is more than white space."""
    value = text(row, column, sample_id)
    if not value.strip():
        raise BadSample(sample_id, f"column {shown(column)} is empty")
    return value


def identifier(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> str:
    """An id, which some publishers write as a number."""
    value = _present(row, column, sample_id)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise BadSample(sample_id, f"column {shown(column)} must hold an id, got {shown(value)}")
    found = value if isinstance(value, str) else str(_whole(value, column, sample_id))
    if len(found) > LONGEST_ID:
        raise BadSample(sample_id, f"column {shown(column)} holds an id of {len(found):,} characters: {shown(found)}")
    return found


def key(row: Raw, column: str) -> str | None:
    """The id that a row is joined by; None where it has none, which is for its conversion to say."""
    try:
        return identifier(row, column)
    except BadSample:
        return None


def if_text(row: Raw, column: str) -> str | None:
    """Text that a row is chosen or joined by; None where it has none, which is for its conversion to say."""
    value = row.get(column)
    return value if isinstance(value, str) else None


def integer(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> int:
    """A whole number, or text that spells one."""
    value = _present(row, column, sample_id)
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadSample(sample_id, f"column {shown(column)} must hold a whole number, got {shown(value)}")
    return _whole(value, column, sample_id)


def _whole(value: int, column: str, sample_id: str) -> int:
    if not -LARGEST_NUMBER <= value < LARGEST_NUMBER:
        raise BadSample(sample_id, f"column {shown(column)} holds a number of more than 64 bits")
    return value


def number(value: JSON, column: str, sample_id: str = UNKNOWN_ID) -> float:
    """A finite number, or text that spells one."""
    try:
        found = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise BadSample(sample_id, f"column {shown(column)} must hold a number, got {shown(value)}")
    return found


def seconds(value: JSON, column: str, sample_id: str = UNKNOWN_ID) -> tuple[float, float]:
    """Start and end: two numbers, the second not before the first."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise BadSample(sample_id, f"{shown(column)} must hold start and end, got {shown(value)}")
    start, end = (number(part, column, sample_id) for part in value)
    if end < start:
        raise BadSample(sample_id, f"its span {shown(value)} ends before it begins")
    return start, end


def scalar(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> str | int | float | bool:
    """Text, a finite number or a truth value."""
    value = _present(row, column, sample_id)
    if isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return _whole(value, column, sample_id)
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise BadSample(sample_id, f"column {shown(column)} must hold text or a number, got {shown(value)}")


def items(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> Sequence[JSON]:
    """A list, possibly empty."""
    value = _present(row, column, sample_id)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise BadSample(sample_id, f"column {shown(column)} must hold a list, got {shown(value)}")
    return value


def texts(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> tuple[str, ...]:
    """A list of text."""
    values = items(row, column, sample_id)
    for value in values:
        if not isinstance(value, str):
            raise BadSample(sample_id, f"column {shown(column)} must hold a list of text, got {shown(value)} in it")
    return tuple(values)


def rows(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> Sequence[Raw]:
    """A list of objects."""
    values = items(row, column, sample_id)
    for value in values:
        if not isinstance(value, Mapping):
            raise BadSample(sample_id, f"column {shown(column)} must hold a list of objects, got {shown(value)} in it")
    return values


def mapping(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> Mapping[str, JSON]:
    """An object, possibly empty."""
    value = _present(row, column, sample_id)
    if not isinstance(value, Mapping):
        raise BadSample(sample_id, f"column {shown(column)} must hold an object, got {shown(value)}")
    return value


def weights(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> dict[str, float]:
    """A map of answers to their weights; an empty answer is left out, as in VL-T5."""
    found = mapping(row, column, sample_id)
    return {answer: number(weight, column, sample_id) for answer, weight in found.items() if answer.strip()}


def index_of(value: int, choices: Sequence[object], column: str, sample_id: str) -> int:
    """The number of the right choice, which must be one of them."""
    if not 0 <= value < len(choices):
        raise BadSample(sample_id, f"{shown(column)} is {value}, but there are {len(choices)} choices")
    return value


def optional(row: Raw, column: str, take: Callable[[Raw, str, str], Value], sample_id: str) -> Value | None:
    """What `take` finds where the publisher gives it; None where the column is absent or null."""
    return None if row.get(column) is None else take(row, column, sample_id)


def kept(
    row: Raw, *columns: str, sample_id: str, take: Callable[[Raw, str, str], object] = scalar
) -> dict[str, object]:
    """Those of the columns that the row has, for `Example.extra`: text and numbers, or what `take` finds."""
    return {column: take(row, column, sample_id) for column in columns if row.get(column) is not None}


def given(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> JSON:
    """A value as it is, None where there is none: to be passed on to what checks it, never to be used itself."""
    return row.get(column)


def _present(row: Raw, column: str, sample_id: str) -> JSON:
    value = row.get(column)
    if value is None:
        raise BadSample(sample_id, f"no column {shown(column)}; the row has {shown_names(row)}")
    return value
