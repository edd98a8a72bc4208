"""What one benchmark lacks takes no other one with it, and a failed one leaves no file."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.data.example import Answer, Clip, Example, write_examples
from dora_vl.errors import UserError
from dora_vl.evaluation.finish import finish
from dora_vl.evaluation.predictions import Prediction, Predictions
from dora_vl.evaluation.questions import EvaluationSet, read_set

CHOICES = ("red", "blue")


def predictions(path: Path, answers: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps({"id": name, "answer": said}) + "\n" for name, said in answers.items()))
    return path


def how2qa(tmp_path: Path) -> Path:
    write_examples(tmp_path / "how2qa.jsonl", [Example(id="1", choices=CHOICES, extra={"correct": 0})])
    return tmp_path / "how2qa.jsonl"


def test_a_failed_score_leaves_no_upload_file(tmp_path: Path, capsys: Any) -> None:
    answers = predictions(tmp_path / "p.jsonl", {"1": "a0", "2": "a1"})
    options = ["--benchmarks", f"how2qa={how2qa(tmp_path)}", "--predictions", answers, "--to", tmp_path / "to"]
    with pytest.raises(SystemExit) as status:
        main(["evaluate", *map(str, options)])
    assert status.value.code == 2
    assert "rejects extra answers: 1 here, first '2'" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def several(tmp_path: Path) -> list[EvaluationSet]:
    """MME with a picture of one question, which cannot be scored, between two that can."""
    write_examples(tmp_path / "first.jsonl", [Example(id="1", answers=(Answer(text="x"),))])
    odd = Example(id="1", images=("a.jpg",), answers=(Answer(text="Yes"),), extra={"category": "count"})
    write_examples(tmp_path / "mme.jsonl", [odd])
    requests = [
        f"exact_match={tmp_path / 'first.jsonl'}",
        f"mme={tmp_path / 'mme.jsonl'}",
        f"how2qa={how2qa(tmp_path)}",
    ]
    return [read_set(request, tmp_path, mode=None, limit=None) for request in requests]


OPTIONS = argparse.Namespace(
    adapter=Path("adapter"), predictions=None, against=None, limit=None, answer_after=None, all_metrics=False
)


def test_the_other_benchmarks_keep_their_scores(tmp_path: Path) -> None:
    sets = several(tmp_path)
    said = {"exact_match": "x", "mme": "Yes", "how2qa": "a0"}
    answered = {name: Predictions(rows=[Prediction(id="1", prediction=one)]) for name, one in said.items()}
    lines: list[str] = []
    with pytest.raises(UserError, match=r"1 of 3 benchmarks not scored: mme; mme: MME picture a\.jpg of count has 1"):
        lines.extend(finish(sets, answered, None, OPTIONS, tmp_path / "to"))
    entries = json.loads((tmp_path / "to" / "metrics.json").read_text())["benchmarks"]
    assert {name: entry["n"] for name, entry in entries.items()} == {"exact_match": 1, "how2qa": 1}
    assert (tmp_path / "to/how2qa/how2qa_test_public_predictions.json").is_file()
    assert not (tmp_path / "to/mme").exists()


def test_what_was_true_of_a_failed_benchmark_stays(tmp_path: Path) -> None:
    sets = several(tmp_path)
    answered = {one.name: Predictions(rows=[Prediction(id="1", prediction="x")]) for one in sets}
    list(finish(sets[:1], answered, None, OPTIONS, tmp_path))
    before = json.loads((tmp_path / "metrics.json").read_text())["benchmarks"]["exact_match"]
    broken = read_set(f"exact_match={tmp_path / 'first.jsonl'}", tmp_path, mode=None, limit=None)
    object.__setattr__(broken, "examples", [Example(id="1", extra={"correct": 0})])  # its scorer reads answers
    with pytest.raises(UserError, match="2 of 3 benchmarks not scored: exact_match, mme"):
        list(finish([broken, *sets[1:]], answered, None, OPTIONS, tmp_path))
    entries = json.loads((tmp_path / "metrics.json").read_text())["benchmarks"]
    assert entries.keys() == {"exact_match", "how2qa"}
    assert entries["exact_match"] == before


def test_answers_to_no_question_are_counted(tmp_path: Path, capsys: Any) -> None:
    write_examples(tmp_path / "q.jsonl", [Example(id=name, answers=(Answer(text="x"),)) for name in ("1", "2")])
    answers = predictions(tmp_path / "p.jsonl", {"1": "x", "8": "x", "9": "x"})
    options = ["--benchmarks", f"exact_match={tmp_path / 'q.jsonl'}", "--predictions", answers, "--to", tmp_path]
    main(["evaluate", *map(str, options)])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "exact_match: 2 answers belong to none of its questions and are left out, first '8'"
    entry = json.loads((tmp_path / "metrics.json").read_text())["benchmarks"]["exact_match"]
    assert (entry["n"], entry["metrics"]["accuracy"]["value"]) == (2, 50.0)
    assert entry["settings"]["answers found by"] == "id"
    main(["evaluate", *map(str, options), "--limit", "1"])
    assert "2 answers belong to none" in capsys.readouterr().out  # the answer to question 2 is no mistake


@pytest.mark.parametrize("name", ["vqav2", "gqa", "vizwiz", "mmbench", "nlvr2", "coco_caption", "tvqa", "mmvet"])
@pytest.mark.parametrize(
    "extra", [{"types": [1]}, {"entailed": 3}, {"index": "x", "ts": {}}, {"human_answers": 5}, {"clip_id": [1]}]
)
def test_odd_extras_are_scored_or_one_line(
    name: str, extra: dict[str, Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # without Java, which takes eight seconds for each score of a caption
    example = Example(
        id="dev-1-0-0",
        videos=(Clip(path="v.mp4"),),
        question="?",
        choices=CHOICES,
        answers=(Answer(text="true"),),
        extra={"correct": 0, **extra},
    )
    write_examples(tmp_path / "q.jsonl", [example])
    answers = predictions(tmp_path / "p.jsonl", {"dev-1-0-0": "true"})
    options = ["--benchmarks", f"{name}={tmp_path / 'q.jsonl'}", "--predictions", answers, "--to", tmp_path]
    with contextlib.suppress(SystemExit):  # any other exception is a traceback
        main(["evaluate", *map(str, options)])
    assert len(capsys.readouterr().err.splitlines()) <= 1
