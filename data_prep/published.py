"""What a source tells about one published split: its files, how its rows are read and what a row becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from dora_vl.data.examples import JSON, Example
from dora_vl.data.records import stream_records
from dora_vl.data.text_file import Progress
from dora_vl.errors import UserError

Raw = Mapping[str, JSON]
"""One row as the publisher's file holds it; `fields` alone looks into it."""

WANTED = "the publisher's"
"""What `text_file` says that a file should be."""

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
