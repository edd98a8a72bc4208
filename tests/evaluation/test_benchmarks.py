"""A benchmark of one's own: ten lines of YAML and records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.data.example import Answer, Example, write_examples
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import find_benchmark, read_own, read_set
from dora_vl.evaluation.results import score_lines
from dora_vl.evaluation.scores import benchmark as prompts

RECEIPTS = "name: receipts\nscoring: anls\nfile: receipts.jsonl\nprompt: as_is\nmax_new_tokens: 24\nframes: 2\n"


def written(folder: Path, text: str = RECEIPTS) -> Path:
    (folder / "receipts.yaml").write_text(text)
    examples = [
        Example(id=name, question="Total?", answers=(Answer(text="12.50"), Answer(text="12.5 euro"))) for name in "ab"
    ]
    write_examples(folder / "receipts.jsonl", examples)
    return folder / "receipts.yaml"


def test_a_file_of_a_few_lines_is_a_benchmark(tmp_path: Path, capsys: Any) -> None:
    benchmark = written(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"id": "a", "answer": "12.51"}\n{"id": "b", "answer": "12.5  Euro"}\n')
    options = ["--predictions", str(tmp_path / "p.jsonl"), "--to", str(tmp_path / "to")]
    main(["evaluate", "--benchmarks", str(benchmark), *options])
    entry = json.loads((tmp_path / "to" / "metrics.json").read_text())["sets"]["receipts"]
    assert (entry["headline"], entry["metrics"]["anls"]["value"]) == ("anls", pytest.approx(90.0))
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["receipts", "anls", "90.00"]
    assert [line["set"] for line in score_lines(tmp_path / "to")] == ["receipts"] * 2
    own = read_own(benchmark)
    assert (own.benchmark.max_new_tokens, own.benchmark.frames) == (24, 2)
    assert own.benchmark.prompt is prompts.as_is
    other = write_examples(tmp_path / "other.jsonl", [Example(id="z", answers=(Answer(text="x"),))])
    assert other == 1
    test_set = read_set(f"{benchmark}={tmp_path / 'other.jsonl'}", tmp_path)
    assert [example.id for example in test_set.examples] == ["z"]


@pytest.mark.parametrize(
    "text",
    [
        "name: mine",
        "name: mine\nscoring: bleu",
        *(f"name: mine\nscoring: exact\n{more}" for more in ("prompt: long", "files: x", "frames: true", "frames: 0")),
        *(f"name: {name}\nscoring: exact" for name in ("pope", "../mine", "3", "2001-99-99")),
        *("- name", "name: [", "{? [a] : b}", "[" * 5000),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError):
        find_benchmark(str(written(tmp_path, text)))
