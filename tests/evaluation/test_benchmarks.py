"""A benchmark of one's own: ten lines of YAML and records, or an installed package's entry point."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.data.example import Answer, Example, write_examples
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import find_benchmark, read_own, read_set
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
    own = read_own(benchmark).benchmark
    assert (own.max_new_tokens, own.frames, own.prompt) == (24, 2, prompts.as_is)
    write_examples(tmp_path / "other.jsonl", [Example(id="z", answers=(Answer(text="x"),))])
    test_set = read_set(f"{benchmark}={tmp_path / 'other.jsonl'}", tmp_path)
    assert [example.id for example in test_set.examples] == ["z"]


@pytest.mark.parametrize(
    "text",
    [
        *("name: mine", "name: mine\nscoring: bleu", "- name", "name: [", "[" * 5000),
        *(f"name: mine\nscoring: exact\n{more}" for more in ("prompt: long", "files: x", "frames: 0")),
        *(f"name: {name}\nscoring: exact" for name in ("pope", "../mine", "3")),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError):
        find_benchmark(str(written(tmp_path, text)))


PACKAGE = """
from dora_vl.evaluation.scores.benchmark import Benchmark
from dora_vl.evaluation.scores.scored import ACCURACY, Tally

def score(examples, answers):
    tally = Tally()
    for example in examples:
        right = float(answers.get(example.id) == example.extra["wanted"])
        tally.add(example.id, right, {"right": right, "asked": 1.0})
    return tally.scored({"mine": ACCURACY})

MINE = Benchmark(modes={"": score}, splits=("dev",))
NOT_ONE = 3
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with benchmarks, one of them sound."""
    folder = tmp_path / "site"
    (folder / "mine-1.0.dist-info").mkdir(parents=True)
    (folder / "own_benchmarks.py").write_text(PACKAGE)
    (folder / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (folder / "mine-1.0.dist-info" / "entry_points.txt").write_text(
        "[dora_vl.benchmarks]\nmine = own_benchmarks:MINE\nbroken = own_benchmarks:GONE\nodd = own_benchmarks:NOT_ONE\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "own_benchmarks", raising=False)


@pytest.mark.usefixtures("installed")
def test_an_installed_package_adds_benchmarks(tmp_path: Path) -> None:
    examples = [Example(id=name, answers=(Answer(text="x"),), extra={"wanted": "x"}) for name in "ab"]
    write_examples(tmp_path / "records" / "mine" / "dev.jsonl", examples)
    (tmp_path / "p.jsonl").write_text('{"id": "a", "answer": "x"}\n{"id": "b", "answer": "y"}\n')
    options = ["--records", tmp_path / "records", "--predictions", tmp_path / "p.jsonl", "--to", tmp_path / "to"]
    main(["evaluate", "--benchmarks", "mine", *map(str, options)])
    entry = json.loads((tmp_path / "to" / "metrics.json").read_text())["sets"]["mine"]
    assert entry["metrics"]["mine"]["value"] == 50.0
    write_examples(tmp_path / "records" / "mine" / "dev.jsonl", [Example(id="a", answers=(Answer(text="x"),))])
    with pytest.raises(SystemExit) as status:  # its scorer trips over a record
        main(["evaluate", "--benchmarks", "mine", *map(str, options)])
    assert status.value.code == 2


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["broken", "odd", "min"])
def test_a_broken_package_is_refused(name: str) -> None:
    with pytest.raises(UserError):
        find_benchmark(name)
