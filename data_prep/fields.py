"""Taking typed values out of a publisher's row; what is absent or of another kind makes the row a named bad sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from data_prep.published import Raw
from dora_vl.data.examples import JSON
from dora_vl.errors import BadSample

Value = TypeVar("Value")

UNKNOWN_ID = "(no id)"


def text(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> str:
    """Text, possibly empty."""
    value = _present(row, column, sample_id)
    if not isinstance(value, str):
        raise BadSample(sample_id, f"column {column!r} must hold text, got {short(value)}")
    return value


def filled(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> str:
    """Text that is more than white space."""
    value = text(row, column, sample_id)
    if not value.strip():
        raise BadSample(sample_id, f"column {column!r} is empty")
    return value


def identifier(row: Raw, column: str) -> str:
    """An id, which some publishers write as a number."""
    value = _present(row, column, UNKNOWN_ID)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise BadSample(UNKNOWN_ID, f"column {column!r} must hold an id, got {short(value)}")
    return str(value)


def integer(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> int:
    """A whole number, or text that spells one."""
    value = _present(row, column, sample_id)
    try:
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    raise BadSample(sample_id, f"column {column!r} must hold a whole number, got {short(value)}")


def number(value: JSON, column: str, sample_id: str = UNKNOWN_ID) -> float:
    """A finite number, or text that spells one."""
    try:
        found = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise BadSample(sample_id, f"column {column!r} must hold a number, got {short(value)}")
    return found


def items(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> Sequence[JSON]:
    """A list, possibly empty."""
    value = _present(row, column, sample_id)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadSample(sample_id, f"column {column!r} must hold a list, got {short(value)}")
    return value


def texts(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> tuple[str, ...]:
    """A list of text."""
    values = items(row, column, sample_id)
    for value in values:
        if not isinstance(value, str):
            raise BadSample(sample_id, f"column {column!r} must hold a list of text, got {short(value)} in it")
    return tuple(values)


def rows(row: Raw, column: str, sample_id: str = UNKNOWN_ID) -> Sequence[Raw]:
    """A list of objects."""
    values = items(row, column, sample_id)
    for value in values:
        if not isinstance(value, dict):
            raise BadSample(sample_id, f"column {column!r} must hold a list of objects, got {short(value)} in it")
    return values


def index_of(value: int, choices: Sequence[object], column: str, sample_id: str) -> int:
    """The number of the right choice, which must be one of them."""
    if not 0 <= value < len(choices):
        raise BadSample(sample_id, f"{column!r} is {value}, but there are {len(choices)} choices")
    return value


def optional(row: Raw, column: str, take: Callable[[Raw, str, str], Value], sample_id: str) -> Value | None:
    """What `take` finds where the publisher gives it; None where the column is absent or null."""
    return None if row.get(column) is None else take(row, column, sample_id)


def kept(row: Raw, *columns: str) -> dict[str, JSON]:
    """Those of the columns that the row has, as they are, for `Example.extra`."""
    return {column: row[column] for column in columns if row.get(column) is not None}


def short(value: object) -> str:
    """What a message shows of a value."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _present(row: Raw, column: str, sample_id: str) -> JSON:
    if row.get(column) is None:
        others = ", ".join(list(row)[:12]) or "nothing"
        raise BadSample(sample_id, f"no column {column!r}; the row has {others}")
    return row[column]
