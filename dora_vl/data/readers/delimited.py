"""CSV and TSV: one sample a row, the columns named in the first; lists as JSON in their cell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dora_vl.data.text_file import json_of, table_rows

LISTS = frozenset({"messages", "conversations", "texts", "turns", "images", "image", "answers", "choices", "subtitles"})
OBJECTS = frozenset({"extra", "video"})
"""Columns whose cells may hold JSON; any other cell is text as it stands."""


def delimited_rows(path: Path) -> Iterator[dict[str, object]]:
    """Yields the rows of a table; an empty cell is null where its column may hold JSON or an id.

    Raises:
        UserError: as `table_rows`, or JSON that cannot be read.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    for line, cells in table_rows(path, "samples", delimiter=delimiter):
        yield {name: _value(name, cell, f"{path}, line {line}, column {name}") for name, cell in cells.items()}


def _value(name: str, cell: str, where: str) -> object:
    if name in LISTS or name in OBJECTS:
        opening = "[" if name in LISTS else "{"
        if cell.lstrip().startswith(opening):
            return json_of(cell, where)
        return cell or None
    return None if name == "id" and not cell else cell
