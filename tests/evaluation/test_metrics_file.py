"""metrics.json holds what is true of one model's answers: entries of before stay or go, and no file is another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.data.example import Answer, Example, write_examples
from dora_vl.errors import UserError
from dora_vl.evaluation.predictions import file_sha256, refuse_anothers, write_metrics

ORIGIN: dict[str, Any] = {"answers_of": "run/adapter", "answers_sha256": {"adapter": "a", "base": "b"}, "limit": 4}


def entry(folder: Path, name: str, value: float) -> dict[str, Any]:
    file = folder / f"{name}.jsonl"
    file.touch()
    return {"file": str(file), "file_sha256": file_sha256(file), "metrics": {"accuracy": value}}


def add(folder: Path, name: str, value: float, origin: dict[str, Any] = ORIGIN) -> list[str]:
    asked_with = {name: {"batch_size": value}}
    return write_metrics(
        folder / "metrics.json", origin, {name: entry(folder, name, value)}, asked=[name], options=asked_with
    )


def there(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_a_later_command_adds_its_benchmarks(tmp_path: Path) -> None:
    assert add(tmp_path, "gqa", 1.0) == [f"{tmp_path / 'metrics.json'}: all numbers"]
    assert add(tmp_path, "pope", 2.0) == [f"{tmp_path / 'metrics.json'}: all numbers, those of gqa from before"]
    add(tmp_path, "gqa", 3.0)
    found = there(tmp_path)
    assert {name: one["metrics"]["accuracy"] for name, one in found["benchmarks"].items()} == {"gqa": 3.0, "pope": 2.0}
    assert found["asked_with"] == {"gqa": {"batch_size": 3.0}, "pope": {"batch_size": 2.0}}
    assert {name: found[name] for name in ORIGIN} == ORIGIN


@pytest.mark.parametrize(
    "other",
    [
        ORIGIN | {"answers_sha256": {"adapter": "c", "base": "b"}},
        ORIGIN | {"answers_of": "other/adapter"},
        ORIGIN | {"against": "other/adapter", "against_sha256": {"adapter": "c", "base": "b"}},
        ORIGIN | {"limit": None},
    ],
)
def test_numbers_of_other_answers_go_and_it_is_said(tmp_path: Path, other: dict[str, Any]) -> None:
    add(tmp_path, "gqa", 1.0)
    lines = add(tmp_path, "pope", 2.0, other)
    assert "no longer holds gqa" in lines[0]
    assert there(tmp_path)["benchmarks"].keys() == {"pope"}
    assert there(tmp_path)["asked_with"].keys() == {"pope"}


def test_numbers_of_a_file_that_changed_go(tmp_path: Path) -> None:
    add(tmp_path, "gqa", 1.0)
    (tmp_path / "gqa.jsonl").write_text("{}")
    add(tmp_path, "pope", 2.0)
    assert there(tmp_path)["benchmarks"].keys() == {"pope"}


@pytest.mark.parametrize("content", ["not JSON", "[]", "{}", '{"benchmarks": {"gqa": {}}, "answers_of": "x"}'])
def test_a_file_that_says_too_little_is_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.json").write_text(content)
    refuse_anothers(tmp_path / "metrics.json")
    add(tmp_path, "pope", 2.0)
    assert there(tmp_path)["benchmarks"].keys() == {"pope"}


def test_a_training_runs_own_metrics_are_not_replaced(tmp_path: Path) -> None:
    refuse_anothers(tmp_path / "metrics.json")
    (tmp_path / "metrics.json").write_text('{"accuracy": 0.5}')
    with pytest.raises(UserError, match="name another folder with --to"):
        refuse_anothers(tmp_path / "metrics.json")


def test_a_split_without_answers_leaves_no_number_of_the_split_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    people = {"human_answers": ["no"] * 10}
    write_examples(tmp_path / "validation.jsonl", [Example(id="1", answers=(Answer(text="no"),), extra=people)])
    write_examples(tmp_path / "test.jsonl", [Example(id="1", question="?")])
    (tmp_path / "answers.jsonl").write_text('{"id": "1", "answer": "no"}\n')
    for split in ("validation", "test"):
        benchmark = f"vqav2={tmp_path / split}.jsonl"
        main(
            ["evaluate", "--benchmarks", benchmark, "--predictions", f"{tmp_path}/answers.jsonl", "--to", f"{tmp_path}"]
        )
        assert (tmp_path / "metrics.json").exists() == (split == "validation")
        assert (tmp_path / "vqav2" / "scores.jsonl").exists() == (split == "validation")
    assert "no longer holds vqav2" in capsys.readouterr().out
