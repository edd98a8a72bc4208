"""Which choice is right: what a record may say of it, and that a file is refused before a model is asked."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from dora_vl.data.example import Example, ExampleFile, iterate_examples
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.questions import read_set
from dora_vl.evaluation.scores.benchmark import check_choices, correct_index
from dora_vl.training import vlbart_tasks


def question(**changes: object) -> dict[str, object]:
    return {"id": "q7", "question": "which?", "choices": ["red", "blue", "green"], "extra": {"correct": 1}, **changes}


@pytest.mark.parametrize(
    ("correct", "said"),
    [
        (3, "extra.correct is 3; its 3 choices are 0 to 2"),
        (-1, "extra.correct is -1; its 3 choices are 0 to 2"),
        ("blue", "extra.correct must be the right choice's index, from 0, got 'blue'"),
        (1.0, "index, from 0, got 1.0"),
        (True, "index, from 0, got True"),
        (None, "index, from 0, got None"),
        ([1], r"index, from 0, got \[1\]"),
    ],
)
def test_a_right_choice_that_is_not_there_names_file_line_and_numbers(
    tmp_path: Path, correct: object, said: str
) -> None:
    path = tmp_path / "q.jsonl"
    lines = [question(id="q6"), question(extra={"correct": correct})]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=rf"q\.jsonl, line 2: not an example: sample q7: .*{said}"):
        list(iterate_examples(path))
    with pytest.raises(BadSample, match=rf"sample q7: .*q\.jsonl, line 2: .*{said}"):
        list(ExampleFile(path))
    with pytest.raises(UserError, match=r"q\.jsonl, line 2: "):
        read_set(f"tvqa={path}", tmp_path, mode=None, limit=None)


@pytest.mark.parametrize("task", ["tvqa", "video_words"])
def test_a_choice_task_refuses_to_train_on_what_is_no_choice(task: str) -> None:
    target = vlbart_tasks.video_subtasks()[task].target
    right = Example(id="1", choices=("red", "blue"), extra={"correct": 1})
    assert target(right, None, Random(0)).text == {"tvqa": "a1", "video_words": "blue"}[task]
    with pytest.raises(BadSample, match=r"sample 2: extra\.correct is 0, but it has no choices"):
        target(Example(id="2", extra={"correct": 0}), None, Random(0))
    with pytest.raises(BadSample, match=r"sample 3: extra\.correct is -1; its 2 choices are 0 to 1"):
        target(Example(id="3", choices=("red", "blue"), extra={"correct": -1}), None, Random(0))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (question(choices=[]), "1 of 2 questions have no choices, first 'q7'"),
        (question(choices=["x"] * 27), "1 of 2 questions have more than 26 choices, first 'q7'"),
    ],
)
def test_a_file_that_cannot_be_scored_is_refused_before_anything_is_asked(
    tmp_path: Path, wrong: dict[str, object], said: str
) -> None:
    path = tmp_path / "seed.jsonl"
    path.write_text(json.dumps(question(id="q6")) + "\n" + json.dumps(wrong) + "\n")
    with pytest.raises(UserError, match=rf"seed\.jsonl: {said}"):
        read_set(f"seed={path}", tmp_path, mode=None, limit=None)


def test_a_file_whose_answers_the_publisher_keeps_is_no_mistake(tmp_path: Path) -> None:
    kept = [Example(id=name, choices=("red", "blue")) for name in "ab"]
    check_choices(kept, tmp_path / "test.jsonl")
    check_choices([Example(id="a", choices=("x",) * 30)], tmp_path / "test.jsonl", most=None)
    with pytest.raises(UserError, match=r"sample a: extra\.correct must be .* index, from 0, got True"):
        correct_index(Example(id="a", choices=("red", "blue"), extra={"correct": True}))
