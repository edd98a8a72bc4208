"""Predictions files of three forms are read, and broken ones refused with their line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_vl.errors import UserError
from dora_vl.evaluation.scores.benchmark import ANSWERS, MODEL_ANSWERS, read_answers


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
        ('{"id": "b"}', r"p\.jsonl, line 2: needs an id .*, and prediction or pred or .* or caption as .*; has id"),
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


@pytest.mark.parametrize("key", MODEL_ANSWERS)
@pytest.mark.parametrize("true", ANSWERS)
def test_what_the_model_said_goes_before_the_true_answer(tmp_path: Path, key: str, true: str) -> None:
    rows = [{"id": "a", "question": "?", true: "cat", key: "dog"}, {"id": "b", key: "owl", true: "owl"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "p.csv").write_text(f"id,{true},{key}\na,cat,dog\nb,owl,owl\n")
    (tmp_path / "only.csv").write_text(f"id,{key}\na,dog\nb,owl\n")
    for name in ("p.jsonl", "p.csv", "only.csv"):
        assert read_answers(tmp_path / name) == {"a": "dog", "b": "owl"}


def test_a_true_answer_does_not_stand_in_for_one_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": "a", "answer": "cat", "pred": null}')
    with pytest.raises(UserError, match="line 1: needs an id"):
        read_answers(tmp_path / "p.jsonl")


@pytest.mark.parametrize("keys", [("prediction", "response"), ("pred", "output"), ("answer", "text")])
def test_two_keys_that_may_be_the_answer(tmp_path: Path, keys: tuple[str, str]) -> None:
    one, other = keys
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "a", other: "dog", one: "cat"}))
    with pytest.raises(UserError, match=f"p.jsonl, line 1: {one} is 'cat' and {other} is 'dog', and either may be"):
        read_answers(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "a", other: "cat", one: "cat"}))
    assert read_answers(tmp_path / "p.jsonl") == {"a": "cat"}


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file of predictions"):
        read_answers(tmp_path / "gone.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no predictions"):
        read_answers(tmp_path / "empty.jsonl")


@given(answers=st.dictionaries(st.text(min_size=1), st.text(), min_size=1, max_size=5))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, answers: dict[str, str]) -> None:
    lines = [json.dumps({"id": name, "answer": answer}) + "\n" for name, answer in answers.items()]
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(lines))
    assert read_answers(path) == answers
