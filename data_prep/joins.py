"""A split that several files make together: their rows are joined by an id, and a file that names none is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.fields import given, identifier
from data_prep.published import Raw
from dora_vl.data.examples import JSON
from dora_vl.errors import BadSample, UserError, shown


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
