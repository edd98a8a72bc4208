"""Which choice is right: what a record may say of it, and that a file is refused before a model is asked."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from dora_vl.data.example import Example, ExampleFile, iterate_examples
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation import vlbart_tasks
from dora_vl.evaluation.benchmarks import read_set
from dora_vl.evaluation.scores.benchmark import check_choices, correct_index


def question(**changes: object) -> dict[str, object]:
    return {"id": "q7", "question": "which?", "choices": ["red", "blue", "green"], "extra": {"correct": 1}, **changes}


@pytest.mark.parametrize("correct", [3, -1, "blue", 1.0, True, None, [1]])
def test_a_right_choice_that_is_not_there_is_refused(tmp_path: Path, correct: object) -> None:
    path = tmp_path / "q.jsonl"
    lines = [question(id="q6"), question(extra={"correct": correct})]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for read in (iterate_examples, ExampleFile):
        with pytest.raises(UserError):
            list(read(path))
    with pytest.raises(UserError):
        read_set(f"tvqa={path}", tmp_path, mode=None, limit=None)


@pytest.mark.parametrize("task", ["tvqa", "video_words"])
def test_a_choice_task_refuses_to_train_on_what_is_no_choice(task: str) -> None:
    target = vlbart_tasks.video_subtasks()[task].target
    right = Example(id="1", choices=("red", "blue"), extra={"correct": 1})
    assert target(right, None, Random(0)).text == {"tvqa": "a1", "video_words": "blue"}[task]
    for wrong in (Example(id="2", extra={"correct": 0}), Example(id="2", choices=("red",), extra={"correct": -1})):
        with pytest.raises(BadSample) as caught:
            target(wrong, None, Random(0))
        assert caught.value.sample_id == "2"


@pytest.mark.parametrize("choices", [[], ["x"] * 27])
def test_a_file_that_cannot_be_scored_is_refused_before_anything_is_asked(tmp_path: Path, choices: list[str]) -> None:
    path = tmp_path / "seed.jsonl"
    path.write_text(json.dumps(question(id="q6")) + "\n" + json.dumps(question(choices=choices)) + "\n")
    with pytest.raises(UserError):
        read_set(f"seed={path}", tmp_path, mode=None, limit=None)


def test_a_file_whose_answers_the_publisher_keeps_is_no_mistake(tmp_path: Path) -> None:
    kept = [Example(id=name, choices=("red", "blue")) for name in "ab"]
    check_choices(kept, tmp_path / "test.jsonl")
    check_choices([Example(id="a", choices=("x",) * 30)], tmp_path / "test.jsonl", most=None)
    with pytest.raises(BadSample):
        correct_index(Example(id="a", choices=("red", "blue"), extra={"correct": True}))
