"""`dora-vl evaluate --predictions`: answers of a file, scored without a model; what is true of metrics.json."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.data.example import Answer, Example, from_record, write_examples
from dora_vl.errors import UserError
from dora_vl.evaluation import commands
from dora_vl.evaluation.benchmarks import EvaluationSet, read_set
from dora_vl.evaluation.commands import finish
from dora_vl.evaluation.predictions import Prediction, Predictions, refuse_anothers, write_metrics
from dora_vl.files import file_sha256
from tests.backbones.tiny_language import write_tiny_language

ROOT = Path(__file__).parents[2]
CHOICES = ("red", "blue")
ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("evaluated_rows.jsonl").read_text().splitlines()
]
"""A benchmark's records and answers, and its score; without a metric the command refuses them, and writes nothing."""


def right(name: str, *answers: str, images: Sequence[str] = (), **extra: Any) -> Example:
    return Example(id=name, images=tuple(images), answers=tuple(Answer(text=text) for text in answers), extra=extra)


def predictions_file(path: Path, answers: Mapping[str, str]) -> Path:
    path.write_text("".join(json.dumps({"id": name, "answer": text}) + "\n" for name, text in answers.items()))
    return path


def entries(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())["benchmarks"]


def evaluated(
    name: str, examples: Sequence[Example], answers: Mapping[str, str], folder: Path, *more: object
) -> dict[str, Any]:
    """A benchmark's entry of metrics.json."""
    write_examples(folder / "records.jsonl", examples)
    file = predictions_file(folder / "p.jsonl", answers)
    options = ["--benchmarks", f"{name}={folder / 'records.jsonl'}", "--predictions", file, "--to", folder, *more]
    main(["evaluate", *map(str, options)])
    return entries(folder).get(name, {})


def refused(words: Sequence[object]) -> None:
    """By the command with status 2, which is a `UserError` of the function behind it."""
    parser = argparse.ArgumentParser()
    commands.add_arguments(parser)
    with pytest.raises(UserError):
        list(commands.run(parser.parse_args([str(word) for word in words])))
    with pytest.raises(SystemExit) as status:
        main(["evaluate", *map(str, words)])
    assert status.value.code == 2


@pytest.fixture
def pope(tmp_path: Path) -> Path:
    """POPE records of 23 pictures: yes and no in turn, number 5 left out."""
    path = tmp_path / "records" / "pope" / "test.jsonl"
    numbers = [n for n in range(24) if n != 5]
    write_examples(
        path, (right(f"random-{n}", ("yes", "no")[n % 2], images=[f"{n}.jpg"], category="random") for n in numbers)
    )
    return path


def test_a_file_of_predictions_is_scored_without_a_model(pope: Path, tmp_path: Path, capsys: Any) -> None:
    names = [f"random-{n}" for n in range(24) if n != 5]
    yes = predictions_file(tmp_path / "yes.jsonl", dict.fromkeys(names, "Yes"))
    true = {name: ("Yes", "No")[int(name.removeprefix("random-")) % 2] for name in names}
    options = ["--benchmarks", "pope", "--records", pope.parents[1], "--to", tmp_path / "scores"]
    more = ["--predictions", predictions_file(tmp_path / "right.jsonl", true), "--against", yes, "--all-metrics"]
    main(["evaluate", *map(str, [*options, *more])])
    entry = entries(tmp_path / "scores")["pope"]
    assert entry["metrics"]["f1"]["value"] == 100.0
    assert entry["difference"]["random/accuracy"]["value"] == pytest.approx(100 * 11 / 23)
    assert sum("random/" in line for line in capsys.readouterr().out.splitlines()) == 5
    script = (
        "import sys; [sys.modules.__setitem__(name, None) for name in ('torch', 'transformers')]; "
        "from dora_vl.cli import main; main(sys.argv[1:])"
    )
    words = ["evaluate", *map(str, options), "--predictions", str(yes)]
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("benchmark")


@pytest.mark.parametrize("name", ["test.jsonl", "test.json", "test.csv"])
def test_rows_that_train_takes_are_scored_as_they_are(name: str, tmp_path: Path) -> None:
    rows = [
        {"image": f"{number}.png", "query": "What?", "answer": answer} for number, answer in enumerate(("red", "blue"))
    ]
    path = tmp_path / name
    if path.suffix == ".csv":
        path.write_text("\n".join(["image,query,answer", *(",".join(row.values()) for row in rows)]))
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    answers = predictions_file(tmp_path / "p.jsonl", {"row 1": "red", "row 2": "red"})
    main(["evaluate", "--benchmarks", f"exact_match={path}", "--predictions", str(answers), "--to", str(tmp_path)])
    assert entries(tmp_path)["exact_match"]["metrics"]["accuracy"]["value"] == 50.0
    renamed = tmp_path / f"renamed{path.suffix}"
    renamed.write_text(path.read_text().replace("answer", "reply"))
    options = ["--benchmarks", f"exact_match={renamed}", "--predictions", answers, "--to", tmp_path]
    refused(options)  # not one row can be read
    main(["evaluate", *map(str, options), "--columns", "reply=answer"])
    assert entries(tmp_path)["exact_match"]["metrics"]["accuracy"]["value"] == 50.0


def test_files_are_read_before_a_model_s_libraries(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"image": "0.png", "reply": "red"}')
    code = f"""
import sys
from dora_vl.cli import main
try:
    options = ["--benchmarks", "exact_match={tmp_path}/test.jsonl", "--to", "{tmp_path}/to"]
    main(["evaluate", "--model", "{tmp_path}", *options])
except SystemExit as left:
    assert left.code == 2
assert "torch" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_split_without_answers_gives_a_submission_and_takes_the_numbers_of_the_split_before(tmp_path: Path) -> None:
    examples = [right(str(n), images=[f"{n}.jpg"]) for n in range(3)]
    evaluated("vqav2", [right("0", images=["0.jpg"], human_answers=["no"] * 10)], {"0": "no"}, tmp_path)
    score = json.loads((tmp_path / "vqav2" / "scores.jsonl").read_text())
    assert (score["id"], score["unit"]) == ("0", "0.jpg")
    write_examples(tmp_path / "records" / "vqav2" / "test.jsonl", examples)
    answers = predictions_file(tmp_path / "answers.jsonl", {"0": "The  dogs", "2": "two"})
    options = ["--benchmarks", "vqav2", "--records", tmp_path / "records", "--predictions", answers, "--to", tmp_path]
    main(["evaluate", *map(str, options)])
    assert json.loads((tmp_path / "vqav2" / "vqav2.json").read_text()) == [
        {"question_id": 0, "answer": "dogs"},
        {"question_id": 1, "answer": ""},
        {"question_id": 2, "answer": "2"},
    ]
    assert not (tmp_path / "metrics.json").exists()
    assert not (tmp_path / "vqav2" / "scores.jsonl").exists()


def test_an_answer_to_a_record_that_cannot_be_read_is_wrong(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat"}]
    rows = [{"id": "good", "conversations": turns}, {"id": "bad", "conversations": turns[:1]}]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    answers = predictions_file(tmp_path / "answers.jsonl", {"good": "a cat", "bad": ""})
    options = ["--benchmarks", f"exact_match={tmp_path / 'test.json'}", "--to", tmp_path, "--against", answers]
    main(["evaluate", *map(str, options), "--predictions", str(answers)])
    entry = entries(tmp_path)["exact_match"]
    assert (entry["n"], entry["metrics"]["accuracy"]["value"], entry["without_answer"]) == (2, 50.0, 1)
    assert entry["failed"].keys() == {"bad"}
    assert entry["difference"]["accuracy"]["value"] == 0.0


@pytest.mark.parametrize(
    "words",
    [
        *("popee --predictions x", "pope --predictions x", "tvqa --predictions x", "pope:dev --predictions x"),
        *("pope=none.jsonl --predictions x", "pope", "pope,gqa --predictions x", "pope,pope --predictions x"),
        *("pope --predictions x --mode gqa=llava", "pope --predictions x --mode gqa"),
        *("pope --predictions x --against gone", "pope={pope} --predictions {strange}"),
        "pope={pope} --model {model} --images {folder} --to {folder}/out",  # a language model, and pictures
    ],
)
def test_mistakes_are_refused(words: str, pope: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "records")
    strange = predictions_file(tmp_path / "strange.jsonl", {"a": "yes"})
    (tmp_path / "0.jpg").touch()
    model = write_tiny_language(tmp_path / "model") if "{model}" in words else ""
    paths = {"pope": pope, "strange": strange, "model": model, "folder": tmp_path}
    refused(["--benchmarks", *words.format(**paths).split()])
    assert not (tmp_path / "out").exists()


OPTIONS = argparse.Namespace(
    adapter=Path("adapter"), predictions=None, against=None, limit=None, answer_after=None, all_metrics=False
)


@pytest.fixture
def sets(tmp_path: Path) -> list[EvaluationSet]:
    """MME with a picture of one question, which cannot be scored, between two that can."""
    for name, example in {
        "exact_match": right("1", "x"),
        "mme": right("1", "Yes", images=["a.jpg"], category="count"),
        "how2qa": Example(id="1", choices=CHOICES, extra={"correct": 0}),
    }.items():
        write_examples(tmp_path / f"{name}.jsonl", [example])
    requests = [f"{name}={tmp_path / name}.jsonl" for name in ("exact_match", "mme", "how2qa")]
    return [read_set(request, tmp_path, mode=None, limit=None) for request in requests]


def test_what_cannot_be_scored_takes_no_other_score_with_it(sets: list[EvaluationSet], tmp_path: Path) -> None:
    texts = {"exact_match": "x", "mme": "Yes", "how2qa": "a0"}
    answered = {name: Predictions(rows=[Prediction(id="1", prediction=text)]) for name, text in texts.items()}
    with pytest.raises(UserError):
        list(finish(sets, answered, None, OPTIONS, tmp_path / "to"))
    assert {name: entry["n"] for name, entry in entries(tmp_path / "to").items()} == {"exact_match": 1, "how2qa": 1}
    assert (tmp_path / "to/how2qa/how2qa_test_public_predictions.json").is_file()
    assert not (tmp_path / "to/mme").exists()
    before = entries(tmp_path / "to")["exact_match"]
    object.__setattr__(sets[0], "examples", [Example(id="1", extra={"correct": 0})])  # its scorer reads answers
    with pytest.raises(UserError):
        list(finish(sets, answered, None, OPTIONS, tmp_path / "to"))
    assert entries(tmp_path / "to")["exact_match"] == before  # what was true of it stays


def test_answers_to_no_question_are_counted(tmp_path: Path, capsys: Any) -> None:
    examples, answers = [right("1", "x"), right("2", "x")], {"1": "x", "8": "x", "9": "x"}
    entry = evaluated("exact_match", examples, answers, tmp_path)
    line = "exact_match: 2 answers belong to none of its questions and are left out, first '8'"
    assert line in capsys.readouterr().out.splitlines()
    assert (entry["n"], entry["metrics"]["accuracy"]["value"]) == (2, 50.0)
    assert entry["settings"]["answers found by"] == "id"
    evaluated("exact_match", examples, answers | {"2": "y"}, tmp_path, "--limit", 1)
    assert line in capsys.readouterr().out.splitlines()  # the answer to question 2 is no mistake


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['benchmark']}-{row['about']:.40}")
def test_what_a_file_of_answers_scores(row: dict[str, Any], tmp_path: Path) -> None:
    examples, options = [from_record(record) for record in row["examples"]], row.get("options", ())
    if "metric" not in row:
        with pytest.raises(SystemExit) as status:
            evaluated(row["benchmark"], examples, row["answers"], tmp_path, *options)
        assert status.value.code == 2
        assert {path.name for path in tmp_path.iterdir()} == {"records.jsonl", "p.jsonl"}
        return
    entry = evaluated(row["benchmark"], examples, row["answers"], tmp_path, *options)
    assert (entry["n"], entry["metrics"][row["metric"]]["value"]) == (row["n"], row["value"])
    assert sorted(entry.get("not_scored", ())) == row["not_scored"]
    assert entry["settings"] == row.get("settings", entry["settings"])


def test_one_caption_serves_all_records_of_its_clip_and_without_any_answer_there_is_no_score(tmp_path: Path) -> None:
    examples = [right("1", clip_id=5), right("2", "a dog", clip_id=5), right("3", clip_id=6)]
    write_examples(tmp_path / "tvc.jsonl", examples)
    test_set = read_set(f"tvc={tmp_path / 'tvc.jsonl'}", tmp_path, mode=None, limit=None)
    assert (list(test_set.not_scored), [example.id for example in test_set.scored]) == (["3"], ["1", "2"])
    write_examples(tmp_path / "kept.jsonl", [Example(id="1", choices=CHOICES)])
    assert read_set(f"seed={tmp_path / 'kept.jsonl'}", tmp_path, mode=None, limit=None).scorer is None


# metrics.json holds what is true of one model's answers: entries of before stay or go, and no file is another's.


ORIGIN: dict[str, Any] = {"answers_of": "run/adapter", "answers_sha256": {"adapter": "a", "base": "b"}, "limit": 4}


def add(folder: Path, name: str, value: float, origin: dict[str, Any] = ORIGIN) -> dict[str, Any]:
    """What the file holds, once a benchmark of this value was added."""
    file = folder / f"{name}.jsonl"
    file.touch()
    entry = {"file": str(file), "file_sha256": file_sha256(file), "metrics": {"accuracy": value}}
    options = {name: {"batch_size": value}}
    write_metrics(folder / "metrics.json", origin, {name: entry}, evaluated=[name], options=options)
    return json.loads((folder / "metrics.json").read_text())


def test_a_later_command_adds_its_benchmarks(tmp_path: Path) -> None:
    add(tmp_path, "gqa", 1.0)
    add(tmp_path, "pope", 2.0)
    content = add(tmp_path, "gqa", 3.0)
    assert {name: row["metrics"]["accuracy"] for name, row in content["benchmarks"].items()} == {"gqa": 3, "pope": 2}
    assert content["asked_with"] == {"gqa": {"batch_size": 3.0}, "pope": {"batch_size": 2.0}}
    assert {name: content[name] for name in ORIGIN} == ORIGIN
    (tmp_path / "gqa.jsonl").write_text("{}")  # its numbers are of another file
    assert add(tmp_path, "pope", 2.0)["benchmarks"].keys() == {"pope"}


@pytest.mark.parametrize(
    "changes",
    [
        {"answers_sha256": {"adapter": "c", "base": "b"}},
        {"answers_of": "other/adapter"},
        {"against": "other/adapter", "against_sha256": {"adapter": "c", "base": "b"}},
        {"limit": None},
    ],
)
def test_numbers_of_other_answers_go(tmp_path: Path, changes: dict[str, Any]) -> None:
    add(tmp_path, "gqa", 1.0)
    content = add(tmp_path, "pope", 2.0, ORIGIN | changes)
    assert content["benchmarks"].keys() == content["asked_with"].keys() == {"pope"}


@pytest.mark.parametrize("content", ["not JSON", "[]", "{}", '{"benchmarks": {"gqa": {}}, "answers_of": "x"}'])
def test_a_file_that_says_too_little_is_replaced_and_a_training_run_s_is_not(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.json"
    refuse_anothers(path)
    path.write_text(content)
    refuse_anothers(path)
    assert add(tmp_path, "pope", 2.0)["benchmarks"].keys() == {"pope"}
    path.write_text('{"accuracy": 0.5}')
    with pytest.raises(UserError):
        refuse_anothers(path)
