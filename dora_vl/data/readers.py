"""Reads rows of any format as an `Example`, and a file's rows one by one, with the reason if one cannot be a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dora_vl.data.column_names import KNOWN, Cell, Row, is_empty, plain_name
from dora_vl.data.column_names import ROLES as COLUMNS
from dora_vl.data.columns import REPLIES, USUAL, Columns, ColumnsError, lists_replies
from dora_vl.data.conversation import UnreadKey, read_conversation
from dora_vl.data.example import Example
from dora_vl.data.formats.choices import CountedFromOne, written_in_python
from dora_vl.data.formats.grounded import is_swift
from dora_vl.data.formats.questions import distinct_texts
from dora_vl.data.formats.row_format import Resolved
from dora_vl.data.turns import Unusable
from dora_vl.errors import NO_ANSWER, NO_SAMPLE, BadSample, UserError, short_names, short_repr


def read_row(row: Row, *, columns: Columns = USUAL) -> Example:
    """Returns one row of any format as the conversation that is trained on.

    Raises:
        BadSample: its keys fit no format, or it does not hold what its format asks for.
        ColumnsError: it holds something that its format would leave out.
    """
    return read_fields(columns.resolve(row), columns.id_of(row, "row 1"))


def read_fields(resolved: Resolved, sample_id: str) -> Example:
    """Returns a row of known columns as the conversation that is trained on; raises as `read_row` does."""
    fields = resolved.fields
    if resolved.format is None:
        nulls = [name for name, value in fields.items() if value is None and plain_name(name) in KNOWN]
        if nulls:
            answering = {name for role in ("answer", "output", "completion", "caption") for name in COLUMNS[role]}
            kind = NO_SAMPLE if answering.isdisjoint(map(plain_name, nulls)) else NO_ANSWER
            raise BadSample(sample_id, f"its {short_names(nulls)} is null", kind)
        raise BadSample(sample_id, _no_format(fields))
    fields = {**fields, "id": sample_id}
    _refuse_other_objects(resolved)
    _refuse_parts_of_one_answer(resolved)
    try:
        _refuse_python_lists(fields)
        example = read_conversation(resolved.format.messages(fields), fields)
        return resolved.format.complete(example, replace(resolved, fields=fields))
    except Unusable as error:
        raise BadSample(sample_id, str(error), error.kind) from None
    except UnreadKey as unread:
        held = {role: value if isinstance(value, list) else [value] for role, value in fields.items()}
        by_role = (role for role, entries in held.items() if any(entry is unread.message for entry in entries))
        role = next(by_role, resolved.format.needs[0])
        path = f"{resolved.column_of(role)}.{unread.path}"
        raise ColumnsError(f"{path!r} would be left out ({unread.what});", Columns(ignored=(path,))) from None
    except RecursionError:
        raise BadSample(sample_id, "its values are nested too deeply") from None


def _no_format(fields: Row) -> str:
    """Says what a row of no format lacks, and how to name it."""
    if fields.keys() >= {"data", "annotations"}:
        return "it is Label Studio's JSON; export it as JSON-MIN or CSV"
    names = {*map(plain_name, fields)}
    if names <= {*COLUMNS["caption"]}:
        return "it is text alone, which is not trained on; a picture, a question or an answer goes with it"
    held = {role for role in ("images", "question", "answer") if not names.isdisjoint(COLUMNS[role])}
    lacks = [role for role in ("question", "answer") if role not in held]
    known = f"has {short_names(sorted(held))}, and no {' and no '.join(lacks)}" if held else "has no known column"
    free = [name for name in fields if plain_name(name) not in KNOWN]
    named = ", ".join(f"{name}: {role}" for name, role in zip(free or ["headline"], lacks, strict=False))
    remedy = f"data.columns says which column that is, such as {{{named}}}, data.ask the question of all rows"
    return f"of its columns {short_repr([*fields], 120)} none makes a question and its answer: it {known}; {remedy}"


SEVERAL = ("answers", "caption", "captions", "description")
"""A column called so may list several right answers; of other columns only a list of votes, or of objects, is one."""


def _refuse_other_objects(resolved: Resolved) -> None:
    objects = resolved.fields.get("objects")
    if not is_empty(objects) and not is_swift(objects):
        column = resolved.column_of("objects")
        problem = f"{column!r} would be left out: it is not ms-swift's object of 'ref' and 'bbox';"
        raise ColumnsError(problem, Columns(ignored=(column,)))


def _refuse_parts_of_one_answer(resolved: Resolved) -> None:
    """Refuses a list that may be one answer, such as a page's lines: its first entry alone would be trained."""
    for role in ("answer", "caption"):
        value = resolved.fields.get(role)
        if value is None or resolved.called.get(role) in SEVERAL or not is_empty(resolved.fields.get("choices")):
            continue
        if texts := distinct_texts(value):
            column = resolved.column_of(role)
            problem = f"{short_repr(column)} lists {len(texts)} texts; if they are one answer, write it as one text; if"
            raise ColumnsError(f"{problem} each is a right answer by itself,", Columns({column: f"{role}s"}))


def _refuse_python_lists(fields: Row) -> None:
    for role in REPLIES:
        text = fields.get(role)
        if isinstance(text, Cell) and lists_replies(written_in_python(text), role, in_cell=True):
            raise Unusable(f"{role!r} is a list as Python writes it, {short_repr(text)}; write it as JSON")


class RowReader:
    """Reads the rows of one file or folder as conversations, and remembers what it has met.

    Attributes:
        format: of its rows, once one of a known format has been read.
        uses: the role of each column, "" where it is left out, of each kind of row, in order.
    """

    def __init__(self, name: str, columns: Columns = USUAL) -> None:
        self.format: str | None = None
        self.uses: list[Mapping[str, str]] = []
        self._name = name
        self._columns = columns
        self._first = ""

    def read(self, row: Row, number: int) -> Example | BadSample:
        """Returns the row `number`, from 0, of what the container gives; or why it cannot be a sample."""
        where = f"row {number + 1}"
        sample_id = self._columns.id_of(row, where)
        where += "" if sample_id == where else f" ({sample_id})"
        try:
            resolved = self._columns.resolve(row)
        except ColumnsError as error:
            raise UserError(f"{self._name}, {where}: {error}") from None
        if resolved.uses not in self.uses:
            self.uses.append(resolved.uses)
        if resolved.format is not None:
            name = resolved.format.name
            if self.format is None:
                self.format, self._first = name, where
            if name != self.format:
                firsts = f"{self.format}: {self._first}; {name}: {where}"
                raise UserError(f"{self._name}: rows of mixed formats, first of each {firsts}; write one file a format")
        try:
            return read_fields(resolved, sample_id)
        except (ColumnsError, CountedFromOne) as error:
            raise UserError(f"{self._name}, {where}: {error}") from None
        except BadSample as error:  # anew, since a traceback keeps all that was read alive
            # Halves of surrogate pairs, which no file can hold, are spelled out.
            name, reason = (
                text.encode("utf-8", "backslashreplace").decode() for text in (error.sample_id, error.reason)
            )
            return BadSample(name, reason, error.kind)


def check_usable(name: str, rows: int, usable: int, first_problem: str | None) -> None:
    """Refuses a file if none of the `rows` read so far can be a sample."""
    if not rows:
        raise UserError(f"{name}: holds no records")
    if not usable:
        raise UserError(f"{name}: none of its {rows} records is a sample; the first one: {first_problem}")
