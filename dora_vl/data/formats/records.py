"""Records of `dora-vl prepare` (`data.example`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dora_vl.data.column_names import Row, is_empty, without_nulls
from dora_vl.data.example import FIELDS, Example, from_record, turns_of
from dora_vl.data.formats.answers import with_answers
from dora_vl.data.formats.choices import written_choices
from dora_vl.data.formats.conversations import round_of
from dora_vl.data.formats.row_format import Resolved, RowFormat


def _is_record(row: Row, *_: object) -> bool:
    if not {name for name, value in row.items() if value is not None} <= FIELDS:
        return False
    answers = row.get("answers")
    first = answers[0] if isinstance(answers, Sequence) and not isinstance(answers, str) and answers else None
    return row.get("turns") is not None or (isinstance(first, dict) and {"text"} <= first.keys() <= {"text", "weight"})


def read_record(row: Row) -> Example:
    """Returns a row as the record that it is, its `id` included."""
    record = without_nulls(row)
    if isinstance(record.get("videos"), Mapping):
        record["video"] = record.pop("videos")
    return from_record(record)


def _messages(row: Row) -> Sequence[object]:
    """Returns the record's turns, or its question with the answer of the largest weight."""
    example = read_record(row)
    if example.turns or not example.choices:
        return turns_of(example)
    correct = example.extra.get("correct", example.answers[0].text if example.answers else "")
    return round_of(*written_choices(example.question, example.choices, correct))


def _with_several(example: Example, resolved: Resolved) -> Example:
    """Adds the right answers of a question that has several, the heaviest first; of choices one is right."""
    row = resolved.fields
    if row.get("turns") or not is_empty(row.get("choices")):
        return example
    heaviest_first = sorted(read_record({**row, "id": "-"}).answers, key=lambda answer: -answer.weight)
    return with_answers(example, (answer.text for answer in heaviest_first if answer.text.strip()))


RECORDS = (
    RowFormat(
        "records",
        (),
        _messages,
        ("question", "turns", "answers", "choices", "subtitles", "extra"),
        fits=_is_record,
        complete=_with_several,
    ),
)
