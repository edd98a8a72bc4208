"""Other tools' files of predictions: which answers they hold, and which questions those belong to.

A line of `joined_answers.jsonl` is a benchmark's questions and a file, and the answers by the questions' ids; null
where nothing says which question is meant.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dora_vl.data.example import from_record
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.predictions import ANSWERS, MODEL_ANSWERS, read_rows
from dora_vl.evaluation.scores.benchmark import join

JOINED: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("joined_answers.jsonl").read_text().splitlines()
]


def answers_in(path: Path, content: object) -> dict[str, str]:
    """By the rows' own ids, of a file that holds this."""
    if isinstance(content, list) and path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return {row.id: row.prediction for row in read_rows(path)}


def test_the_forms_of_rows_and_the_later_of_two_stands(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "answer": "one"},
        {"id": "b", "images": [], "question": "?", "truth": "2", "prediction": "two", "kind": None},
        {"question_id": 7, "prompt": "?", "text": "three", "answer_id": "x", "model_id": "m", "metadata": {}},
        {"id": "a", "answer": "four"},
    ]
    answers = {"a": "four", "b": "two", "7": "three"}
    assert answers_in(tmp_path / "p.jsonl", rows) == answers_in(tmp_path / "p.json", rows) == answers


@pytest.mark.parametrize("key", MODEL_ANSWERS)
@pytest.mark.parametrize("true", ANSWERS)
def test_what_the_model_said_goes_before_the_true_answer(tmp_path: Path, key: str, true: str) -> None:
    rows = [{"id": "a", "question": "?", true: "cat", key: "dog"}, {"id": "b", key: "owl", true: "owl"}]
    for name, content in (
        ("p.jsonl", rows),
        ("p.csv", f"id,{true},{key}\na,cat,dog\nb,owl,owl\n"),
        ("only.csv", f"id,{key}\na,dog\nb,owl\n"),
    ):
        assert answers_in(tmp_path / name, content) == {"a": "dog", "b": "owl"}


@pytest.mark.parametrize(("first", "other"), [("prediction", "response"), ("answer", "text")])
def test_two_keys_that_may_be_the_answer(tmp_path: Path, first: str, other: str) -> None:
    with pytest.raises(UserError):
        answers_in(tmp_path / "p.jsonl", [{"id": "a", other: "dog", first: "cat"}])
    assert answers_in(tmp_path / "p.jsonl", [{"id": "a", other: "cat", first: "cat"}]) == {"a": "cat"}


@pytest.mark.parametrize("line", ['{"id": "b"}', '{"answer": "b"}', '{"id": "b", "answer": 3}', "[" * 100_000])
def test_a_broken_line_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError):
        answers_in(tmp_path / "p.jsonl", f'{{"id": "a", "answer": "one"}}\n{line}\n')


@pytest.mark.parametrize(
    ("file", "content"), [("r.csv", "dev-1-0-0\n"), ("r.xlsx", "PK\x03\x04rest"), ("r.json", '{"1": true}')]
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, file: str, content: str) -> None:
    with pytest.raises(UserError):
        answers_in(tmp_path / file, content)
    with pytest.raises(UserError):
        read_rows(tmp_path / "gone.jsonl")


@pytest.mark.parametrize("row", JOINED, ids=lambda row: f"{row['benchmark']}-{row['about']}")
def test_answers_find_their_questions(row: dict[str, Any], tmp_path: Path) -> None:
    path, examples = tmp_path / row["file"], [from_record(record) for record in row["examples"]]
    answers_in(path, row["content"])
    find = partial(join, BENCHMARKS[row["benchmark"]], examples, read_rows(path), path=path, questions=Path("records"))
    if row["answers"] is None:
        with pytest.raises(UserError):
            find()
        return
    joined = find()
    assert joined.answers == row["answers"]
    assert joined.joined_by == row.get("joined_by", joined.joined_by)
    assert list(joined.strangers) == row.get("strangers", list(joined.strangers))
