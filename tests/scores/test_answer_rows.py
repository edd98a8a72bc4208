"""Predictions files of three forms are read, and broken ones refused with their line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_vl.errors import UserError
from dora_vl.scores.answer_rows import read_answers


def test_three_forms(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "answer": "one"},
        {"id": "b", "images": [], "question": "?", "truth": "2", "prediction": "two", "kind": None},
        {"question_id": 7, "prompt": "?", "text": "three", "answer_id": "x", "model_id": "m", "metadata": {}},
        {"id": "a", "answer": "four"},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_answers(tmp_path / "p.jsonl") == {"a": "four", "b": "two", "7": "three"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 1,, }', r"p\.jsonl, line 2: not the JSON list or JSON lines expected: Expecting property name"),
        ("[1]", r"p\.jsonl, line 2: a list, not an object"),
        ('{"id": "b"}', r"p\.jsonl, line 2: needs an id .*, and prediction or answer or text or caption as .*; has id"),
        ('{"answer": "b"}', r"p\.jsonl, line 2: needs an id"),
        ('{"id": "b", "answer": 3}', r"p\.jsonl, line 2: needs an id"),
        ('{"id": true, "answer": "b"}', r"p\.jsonl, line 2: needs an id"),
        ('{"id": ["b"], "answer": "b"}', r"p\.jsonl, line 2: needs an id"),
        ('{"id": 1' + "0" * 5000 + ', "answer": "b"}', r"p\.jsonl, line 2: .*digits"),
        ("[" * 100_000, r"p\.jsonl, line 2: .*nested too deeply"),
    ],
)
def test_broken_lines(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": "a", "answer": "one"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_answers(tmp_path / "p.jsonl")


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file of predictions"):
        read_answers(tmp_path / "gone.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no predictions"):
        read_answers(tmp_path / "empty.jsonl")


@given(answers=st.dictionaries(st.text(min_size=1), st.text(), min_size=1, max_size=5))
def test_any_text_comes_back(tmp_path: Path, answers: dict[str, str]) -> None:
    lines = [json.dumps({"id": name, "answer": answer}) + "\n" for name, answer in answers.items()]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    assert read_answers(tmp_path / "p.jsonl") == answers
