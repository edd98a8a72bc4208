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


BROKEN = ['{"id": 1,, }', "[1]", '{"id": "b"}', '{"answer": "b"}', '{"id": "b", "answer": 3}', "[" * 100_000]
BROKEN += ['{"id": true, "answer": "b"}', '{"id": ["b"], "answer": "b"}', '{"id": 1' + "0" * 5000 + ', "answer": "b"}']
BROKEN += ['{"id": "b", "answer": "cat", "pred": null}']


@pytest.mark.parametrize("line", BROKEN)
def test_broken_lines(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": "a", "answer": "one"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"p\.jsonl, line 2"):
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


@pytest.mark.parametrize("keys", [("prediction", "response"), ("pred", "output"), ("answer", "text")])
def test_two_keys_that_may_be_the_answer(tmp_path: Path, keys: tuple[str, str]) -> None:
    one, other = keys
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "a", other: "dog", one: "cat"}))
    with pytest.raises(UserError, match=f"line 1: {one} .* {other} "):
        read_answers(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "a", other: "cat", one: "cat"}))
    assert read_answers(tmp_path / "p.jsonl") == {"a": "cat"}


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("gone.jsonl", "empty.jsonl"):
        with pytest.raises(UserError, match=name):
            read_answers(tmp_path / name)


@given(answers=st.dictionaries(st.text(min_size=1), st.text(), min_size=1, max_size=5))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, answers: dict[str, str]) -> None:
    lines = [json.dumps({"id": name, "answer": answer}) + "\n" for name, answer in answers.items()]
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(lines))
    assert read_answers(path) == answers
