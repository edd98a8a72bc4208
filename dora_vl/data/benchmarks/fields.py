"""Taking typed values out of a publisher's row: the one place that looks at what its JSON holds.

What is absent or of another kind makes the row a named bad sample. Sources never subscript a row themselves (a test
reads their code): a list where an id should be would end them with a traceback, or pass on to a scorer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from dora_vl.data.example import JSON, Answer, Example
from dora_vl.data.text_file import Progress, stream_records
from dora_vl.errors import BadSample, UserError, shown, shown_names
from dora_vl.evaluation.scores.vqa import PEOPLE

# What a source tells about one published split: its files, how its rows are read and what a row becomes.


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


# A split that several files make together: their rows are joined by an id, and a file that names none is refused.


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


# Karpathy's split of COCO's 2014 pictures (Karpathy and Fei-Fei, 2015), which captions and VL-BART's VQA share.
#
# File: `dataset_coco.json` from the archive `caption_datasets.zip` (cs.stanford.edu/people/karpathy/deepimagesent):
# 123,287 pictures, of which 82,783 train, 30,504 restval, 5,000 val and 5,000 test. Everybody trains on train +
# restval.


FILE = "dataset_coco.json"
SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
"""Karpathy's name of a part -> ours."""


def karpathy_rows(file: Path, split: str, progress: Progress) -> Iterator[Raw]:
    """The pictures of one of our splits; one of no known part counts as one of each, to be dropped with its reason."""
    for row in json_rows(file, progress, "images"):
        part = if_text(row, "split")
        if part is None or SPLITS.get(part, split) == split:
            yield row


def split_of_pictures(file: Path, progress: Progress) -> dict[str, str]:
    """COCO's numbers of the pictures, as text -> our split.

    Raises:
        UserError: a picture without a number or of no known part; it names the row.
    """
    found: dict[str, str] = {}
    for where, row in numbered(file, json_rows(file, progress, "images")):
        with refusing(where):
            picture, part = identifier(row, "cocoid"), filled(row, "split")
        if part not in SPLITS:
            raise UserError(f"{where}: its part is {shown(part)}, which is not one of {', '.join(SPLITS)}")
        found[picture] = SPLITS[part]
    return found
