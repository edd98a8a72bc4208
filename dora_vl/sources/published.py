"""What a source tells about one published split: its files, how its rows are read and what a row becomes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Literal

from dora_vl.data.examples import JSON, Example
from dora_vl.data.records import stream_records
from dora_vl.errors import UserError
from dora_vl.sources.quoted import cut, names

Raw = Mapping[str, JSON]
"""One row as the publisher's file holds it; `fields` alone looks into it."""

Progress = Callable[[int], object]
"""Told the number of bytes of the split's files, whenever some more are read."""

Converted = Example | Iterable[Example] | Mapping[str, JSON]
"""What a row becomes: one example, several, or a record of LLaVA's JSON."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One file of records to be made, `<task>/<name>.jsonl`.

    Attributes:
        inputs: the files that it depends on; their sizes and hashes go into the manifest.
        rows: yields the raw rows in the publisher's order.
        convert: a function that can be pickled; raises `BadSample` for a row that cannot be used.
        published_rows: how many rows the publisher states; another number is reported, not refused.
        repeated_ids: what to do with an id that came before: refuse the file, or give it a number ("x#2").
        ids_by_place: ids say where a row stands, so one that stands twice has two ids: such rows are counted.
        settings: what the user chose; another choice makes the file anew.
        notes: what else the manifest should say.
    """

    task: str
    name: str
    inputs: tuple[Path, ...]
    rows: Callable[[Progress], Iterator[Raw]]
    convert: Callable[[Raw], Converted]
    published_rows: int | None = None
    repeated_ids: Literal["refuse", "number"] = "refuse"
    ids_by_place: bool = False
    settings: Mapping[str, JSON] = field(default_factory=dict)
    notes: Mapping[str, JSON] = field(default_factory=dict)


def present(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Those of the files that are in `folder`, by the name they were asked for; a name may lead into a subfolder."""
    return {name: folder / name for name in names if (folder / name).is_file()}


def some_present(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Like `present`, but there must be one.

    Raises:
        UserError: none is there; it names what was looked for.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --from takes the folder with {' or '.join(names[:4])}")
    found = present(folder, names)
    if not found:
        raise UserError(f"{folder}: none of {', '.join(names)} is in it; --from takes the folder with the files")
    return found


def only_test_split(
    file: Path,
    *,
    task: str,
    rows: Callable[[Path, Progress], Iterator[Raw]],
    convert: Callable[[Raw], Converted],
    published_rows: int,
) -> Split:
    """The split of a benchmark that is one file; `rows` reads it."""
    return Split(
        task=task,
        name="test",
        inputs=(file,),
        rows=partial(rows, file),
        convert=convert,
        published_rows=published_rows,
    )


def json_rows(path: Path, progress: Progress, key: str | None = None) -> Iterator[Raw]:
    """The objects of a JSON list or of JSON lines, or of the list under `key`."""
    return stream_records(path, key=key, progress=progress)


def open_text(path: Path) -> IO[str]:
    """A publisher's text file in UTF-8, line breaks as they are; a byte order mark at its beginning is no text."""
    return path.open(encoding="utf-8-sig", newline="")


def json_object(path: Path) -> dict[str, JSON]:
    """A small file that is one JSON object, at once.

    Raises:
        UserError: not UTF-8, malformed, nested too deeply, a name twice in one object, or no object.
    """
    try:
        with open_text(path) as file:
            found = json.load(file, object_pairs_hook=_unique_names)
    except RecursionError:
        raise UserError(f"{path}: its values are nested too deeply") from None
    except ValueError as error:  # also of UTF-8, and of numbers of too many digits
        raise UserError(f"{path}: not JSON in UTF-8 ({cut(str(error), 200)}); fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold one JSON object, found {type(found).__name__}")
    return found


def _unique_names(members: list[tuple[str, JSON]]) -> dict[str, JSON]:
    found = dict(members)
    if len(found) < len(members):
        listed = [name for name, _ in members]
        twice = next(name for name in listed if listed.count(name) > 1)
        raise ValueError(f"the name {cut(twice, 60)!r} stands twice in one object")
    return found


def table_rows(
    path: Path, progress: Progress, *, delimiter: str, columns: Sequence[str] = (), required: Sequence[str] = ()
) -> Iterator[Raw]:
    """The rows of a CSV or TSV file, by column; all values are text.

    Args:
        columns: their names where the file has no line for them.
        required: those of its line that must be there.

    Raises:
        UserError: not UTF-8, no such column, a row with more or fewer values than columns, a quotation mark that is
            never closed, or a cell of more than 64 MiB.
    """
    csv.field_size_limit(1 << 26)  # MMBench keeps a picture in a cell
    with open_text(path) as file:
        reader = csv.reader(_counted(file, progress), delimiter=delimiter)
        try:
            heads = list(columns) or next(reader)
            if heads == [_END]:
                return  # an empty file
            _check_columns(path, heads, required)
            for values in filter(None, reader):
                if values[-1].endswith(_END):
                    if values == [_END]:
                        return
                    break
                if len(values) != len(heads):
                    raise UserError(
                        f"{path}, line {reader.line_num}: {len(values)} values for {len(heads)} columns; "
                        "the file is cut or damaged, fetch it again"
                    )
                yield dict(zip(heads, values, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, line {reader.line_num + 1}: not the table expected: {error}") from None
    raise UserError(f"{path}: a quotation mark in it is never closed; the file is cut or damaged, fetch it again")


_END = "\x1eend of the table\x1e"
"""Stands after the last line: inside an open quotation the table's reader would take the rest of the file for a cell
and end as if nothing were wrong (its strict form would refuse marks in the middle of a cell too)."""


def _check_columns(path: Path, heads: Sequence[str], required: Sequence[str]) -> None:
    for column in required:
        if column not in heads:
            raise UserError(f"{path}: no column {column!r}; it has {names(heads)}")
    if len(set(heads)) < len(heads):
        twice = next(name for name in heads if heads.count(name) > 1)
        raise UserError(f"{path}: two columns are called {cut(twice, 60)!r}; fetch the file again")


def _counted(lines: Iterable[str], progress: Progress) -> Iterator[str]:
    for line in lines:
        progress(len(line))
        yield line
    yield _END
