"""`dora-vl evaluate --predictions`: answers of a file, scored without a model; mistakes are one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.data.example import Answer, Example, write_examples
from tests.backbones.tiny_language import write_tiny_language

ROOT = Path(__file__).parents[2]


def predictions_file(path: Path, answers: dict[str, str], key: str = "answer") -> Path:
    path.write_text("".join(json.dumps({"id": name, key: text}) + "\n" for name, text in answers.items()))
    return path


def evaluate(capsys: Any, *words: object) -> list[str]:
    capsys.readouterr()
    main(["evaluate", *map(str, words)])
    return capsys.readouterr().out.splitlines()


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())["benchmarks"]


@pytest.fixture
def pope(tmp_path: Path) -> Path:
    """POPE records of 23 pictures: yes and no in turn, number 5 left out."""
    path = tmp_path / "records" / "pope" / "test.jsonl"
    random = {"category": "random"}
    write_examples(
        path,
        (
            Example(id=f"random-{n}", images=(f"{n}.jpg",), answers=(Answer(text=("yes", "no")[n % 2]),), extra=random)
            for n in range(24)
            if n != 5
        ),
    )
    return path


def test_a_file_of_predictions_is_scored_without_a_model(pope: Path, tmp_path: Path, capsys: Any) -> None:
    yes = predictions_file(tmp_path / "yes.jsonl", {f"random-{n}": "Yes" for n in range(24) if n != 5})
    right = predictions_file(
        tmp_path / "right.jsonl", {f"random-{n}": ("Yes", "No")[n % 2] for n in range(24) if n != 5}
    )
    options = ["--benchmarks", "pope", "--records", pope.parents[1], "--to", tmp_path / "scores"]
    lines = evaluate(capsys, *options, "--predictions", right, "--against", yes, "--all-metrics")
    entry = metrics_of(tmp_path / "scores")["pope"]
    assert entry["metrics"]["f1"]["value"] == 100.0
    assert entry["difference"]["random/accuracy"]["value"] == pytest.approx(100 * 11 / 23)
    assert sum("random/" in line for line in lines) == 5
    script = (
        "import sys; [sys.modules.__setitem__(name, None) for name in ('torch', 'transformers')]; "
        "from dora_vl.cli import main; main(sys.argv[1:])"
    )
    words = ["evaluate", *map(str, options), "--predictions", str(yes)]
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("benchmark")


def test_a_split_without_answers_gives_a_submission_and_no_score(tmp_path: Path, capsys: Any) -> None:
    examples = [Example(id=str(n), images=(f"{n}.jpg",), question="?") for n in range(3)]
    write_examples(tmp_path / "records" / "vqav2" / "test.jsonl", examples)
    answers = predictions_file(tmp_path / "answers.jsonl", {"0": "The  dogs", "2": "two"})
    options = ["--benchmarks", "vqav2", "--records", tmp_path / "records", "--predictions", answers, "--to", tmp_path]
    lines = evaluate(capsys, *options)
    assert "no score here" in lines[-1]
    assert json.loads((tmp_path / "vqav2" / "vqav2.json").read_text()) == [
        {"question_id": 0, "answer": "dogs"},
        {"question_id": 1, "answer": ""},
        {"question_id": 2, "answer": "2"},
    ]
    assert not (tmp_path / "metrics.json").exists()


def test_an_answer_to_a_record_that_cannot_be_read_is_wrong(tmp_path: Path, capsys: Any) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat"}]
    rows = [{"id": "good", "conversations": turns}, {"id": "bad", "conversations": turns[:1]}]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    answers = predictions_file(tmp_path / "answers.jsonl", {"good": "a cat", "bad": ""})
    options = ["--benchmarks", f"exact_match={tmp_path / 'test.json'}", "--to", tmp_path, "--against", answers]
    evaluate(capsys, *options, "--predictions", answers)
    entry = metrics_of(tmp_path)["exact_match"]
    assert (entry["n"], entry["metrics"]["accuracy"]["value"], entry["without_answer"]) == (2, 50.0, 1)
    assert entry["failed"].keys() == {"bad"}
    assert "predictions hold no answer" not in entry["failed"]["bad"]
    assert entry["difference"]["accuracy"]["value"] == 0.0


def test_a_version_can_be_chosen_and_is_written_down(tmp_path: Path, capsys: Any) -> None:
    people = {"human_answers": ["No"] * 10}
    write_examples(tmp_path / "vqa.jsonl", [Example(id="1", answers=(Answer(text="No"),), extra=people)])
    answers = predictions_file(tmp_path / "answers.jsonl", {"1": "No"})
    options = ["--benchmarks", f"vqav2={tmp_path / 'vqa.jsonl'}", "--predictions", answers, "--to", tmp_path]
    for mode, score in (("after_2021", 100.0), ("before_2021", 0.0)):
        evaluate(capsys, *options, "--mode", f"vqav2={mode}")
        entry = metrics_of(tmp_path)["vqav2"]
        assert entry["metrics"]["accuracy"]["value"] == score
        assert entry["settings"]["vqa_version"] == mode


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--benchmarks", "popee", "--predictions", "x"], "no benchmark 'popee'; did you mean 'pope'?"),
        (
            ["--benchmarks", "pope", "--predictions", "x"],
            "no test or validation split of pope in records/pope: there is none",
        ),
        (["--benchmarks", "tvqa", "--predictions", "x"], "no validation or test split of tvqa in records/tvqa"),
        (["--benchmarks", "textvqa", "--predictions", "x"], "no validation split of textvqa in records/textvqa"),
        (["--benchmarks", "pope:dev", "--predictions", "x"], "no dev split of pope in records/pope"),
        (["--benchmarks", "pope=none.jsonl", "--predictions", "x"], "none.jsonl: no such file"),
        (["--benchmarks", "pope"], "give --adapter DIR or --model FOLDER to ask a model, or --predictions FILE"),
        (["--benchmarks", "pope,gqa", "--predictions", "x"], "--predictions holds one benchmark's answers"),
        (["--benchmarks", "pope,pope", "--predictions", "x"], "each once"),
        (["--benchmarks", "pope", "--predictions", "x", "--mode", "gqa=llava"], "--mode names gqa"),
        (["--benchmarks", "pope", "--predictions", "x", "--mode", "gqa"], "write it as NAME=VERSION"),
        (["--benchmarks", "pope", "--predictions", "x", "--against", "gone"], "--against gone: no such"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as status:
        main(["evaluate", *words])
    error = capsys.readouterr().err
    assert status.value.code == 2
    assert error.count("\n") == 1
    assert message in error


def test_a_language_model_is_not_asked_about_pictures(pope: Path, tmp_path: Path, capsys: Any) -> None:
    model = write_tiny_language(tmp_path / "model")
    (tmp_path / "0.jpg").touch()
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        main(
            [
                "evaluate",
                "--benchmarks",
                f"pope={pope}",
                "--model",
                str(model),
                "--images",
                str(tmp_path),
                "--to",
                str(tmp_path / "out"),
            ]
        )
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert f"pope shows pictures or videos, and {model} is a language model, which takes none" in error
    assert error.count("\n") == 1


def test_other_questions_predictions_are_refused(pope: Path, tmp_path: Path, capsys: Any) -> None:
    strange = predictions_file(tmp_path / "strange.jsonl", {"a": "yes"})
    with pytest.raises(SystemExit):
        main(["evaluate", "--benchmarks", f"pope={pope}", "--predictions", str(strange)])
    assert "have no id in common" in capsys.readouterr().err
