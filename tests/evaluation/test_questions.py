"""Questions from LLaVA's format: the last round is asked, the rest is context, what cannot be read is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dora_vl.data.turns import Turn
from dora_vl.errors import UserError
from dora_vl.evaluation.questions import Question, read_questions


def record(name: object, *texts: str, **more: object) -> dict[str, object]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": name, "image": "a.png", "conversations": turns, **more}


def write(folder: Path, *records: dict[str, object]) -> Path:
    path = folder / "test.json"
    path.write_text(json.dumps(records))
    return path


def test_the_last_round_is_the_question_and_the_rounds_before_it_are_its_context(tmp_path: Path) -> None:
    path = write(tmp_path, record(7, "<image>\nwhat?", "a cat", "which colour?", "grey", kind="color"))
    questions, unreadable = read_questions(path)
    assert unreadable == {}
    assert questions == [
        Question(
            id="7",
            images=("a.png",),
            turns=(Turn("user", "<image>\nwhat?"), Turn("assistant", "a cat"), Turn("user", "which colour?")),
            truth="grey",
            kind="color",
        )
    ]
    assert questions[0].text == "which colour?"


def test_a_first_question_is_shown_without_its_placeholder(tmp_path: Path) -> None:
    questions, _ = read_questions(write(tmp_path, record("a", "<image>\nwhat?", "a cat")))
    assert (questions[0].text, questions[0].kind) == ("what?", None)


def test_unreadable_records_are_named_and_the_limit_counts_them(tmp_path: Path) -> None:
    path = write(
        tmp_path, record("a", "<image><image> two", "x"), record("b", "<image> q", "x"), record("c", "<image>", "x")
    )
    questions, unreadable = read_questions(path, limit=2)
    assert [question.id for question in questions] == ["b"]
    assert list(unreadable) == ["a"]
    assert "2 <image> placeholders" in unreadable["a"]


def test_other_formats_and_containers_are_questions_too(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "red"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"id": "a", "messages": messages}))
    (asked,), _ = read_questions(path)
    assert (asked.images, asked.text, asked.truth) == (("a.png",), "Which?", "red")
    assert [turn.role for turn in asked.turns] == ["system", "user"]
    (tmp_path / "q.csv").write_text("id,image,question,answer\na,a.png,Which?,red\nb,b.png,Why?,\n")
    (asked,), unreadable = read_questions(tmp_path / "q.csv")
    assert (asked.images, asked.text, asked.truth) == (("a.png",), "Which?", "red")
    assert unreadable == {"b": "answer 1 of 1 is empty"}


def test_pictures_as_bytes_in_a_question_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"id": "a", "image": "data:image/png;base64,aGk=", "question": "q", "answer": "a"}))
    assert "holds its pictures itself" in read_questions(path)[1]["a"]


def test_what_is_no_question_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_questions(tmp_path / "none.json")
    with pytest.raises(UserError, match="two questions have the id 'a', in lines 1 and "):
        read_questions(write(tmp_path, record("a", "<image>", "x"), record("a", "<image>", "y")))
    with pytest.raises(UserError, match="holds no questions"):
        read_questions(write(tmp_path))
