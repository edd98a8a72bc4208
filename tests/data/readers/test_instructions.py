"""Instruction files, read as any other: what a row becomes, what is named as unusable, and what ends a run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dora_vl.data.example import Example
from dora_vl.data.samples import ConversationDataset, Skipped
from dora_vl.data.table import load_rows
from dora_vl.data.turns import Turn
from dora_vl.errors import UserError
from dora_vl.evaluation.questions import read_questions

ROW = {"instruction": "Is it so?", "input": "", "output": "the correct answer is true", "answer": "true"}
WITH_INPUT = {"instruction": "Say it.", "input": " it\n\u00e9 ", "output": "it"}


def write(path: Path, rows: list[Any], *, lines: bool = False) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows, indent=4))
    return path


def read(path: Path) -> list[Example]:
    return [row for row in load_rows(str(path), cache_folder=path.parent / "cache") if isinstance(row, Example)]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_rows_as_published_and_in_other_containers(tmp_path: Path, kind: str) -> None:
    rows = [ROW, {**ROW, "id": "own"}, WITH_INPUT]
    filled = [{"id": None, "input": None, "answer": None, **row} for row in rows]
    path = tmp_path / f"train.{kind}"
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, [*ROW, "id"])
            table.writeheader()
            table.writerows(filled)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(filled), path)
    else:
        write(path, rows, lines=kind == "jsonl")
    found = read(path)
    assert [one.id for one in found] == ["record 0", "own", "record 2"]
    assert found[0].turns == (Turn("user", "Is it so?"), Turn("assistant", "the correct answer is true"))
    asked = found[2].turns[0]
    assert (asked.instruction, asked.input) == ("Say it.", " it\n\u00e9 ")
    assert asked.text == "Say it.\n it\n\u00e9 "  # what every other prompt takes
    questions, _ = read_questions(path)
    assert [(one.id, one.answer, one.truth) for one in questions][:2] == [
        ("record 0", "true", "the correct answer is true"),
        ("own", "true", "the correct answer is true"),
    ]
    assert (questions[2].turns, questions[2].answer) == (found[2].turns[:1], "")
    assert [one.id for one in read_questions(path, limit=1)[0]] == ["record 0"]


@pytest.mark.parametrize(
    "change",
    [
        {"output": ""},
        {"output": None},
        {"output": "\n "},
        {"output": {"text": 3}},
        {"instruction": ["x"]},
        {"instruction": "half \ud83d"},
        {"input": "half \ud83d"},
        {"history": [["a", "b"]]},
    ],
)
def test_an_unusable_row_is_named_and_the_others_stay(tmp_path: Path, change: dict[str, Any]) -> None:
    path = write(tmp_path / "train.json", [ROW, {**ROW, **change}])
    rows = load_rows(str(path), cache_folder=tmp_path)
    skipped = ConversationDataset(rows, encode=lambda _: pytest.fail("an unusable row is not encoded"))[1]
    assert isinstance(skipped, Skipped)
    assert skipped.id == "record 1"
    (kept,) = read(path)
    assert kept.turns[0].text == "Is it so?"
    if "half" in str(change):
        with pytest.raises(UserError):
            read_questions(path)
    else:
        assert read_questions(path)[1] == {"record 1": skipped.reason}


@pytest.mark.parametrize("text", ['[{"id": "1", "output": "x"}]', '[{"instruction": "x", '])
def test_what_ends_a_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError):
        load_rows(str(tmp_path / "a.json"), cache_folder=tmp_path)
    with pytest.raises(UserError):  # two questions of one id
        read_questions(write(tmp_path / "twice.json", [{**ROW, "id": "a"}, {**ROW, "id": "a"}]))
