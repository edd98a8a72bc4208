"""`dora-vl evaluate --predictions`: which answers a file holds and to what, their score, what metrics.json says."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.data.example import Answer, Example, from_record, write_examples
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.predictions import ANSWERS, MODEL_ANSWERS, Prediction, line_of, read_foreign_predictions
from dora_vl.evaluation.scores.benchmark import match_predictions
from dora_vl.evaluation.test_sets import score_lines
from tests.backbones.tiny_language import write_tiny_language

ROOT = Path(__file__).parents[2]
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
    return json.loads((folder / "metrics.json").read_text())["sets"]


def evaluated(
    name: str, examples: Sequence[Example], answers: Mapping[str, str], folder: Path, *more: object
) -> dict[str, Any]:
    write_examples(folder / "records.jsonl", examples)
    file = predictions_file(folder / "p.jsonl", answers)
    options = ["--benchmarks", f"{name}={folder / 'records.jsonl'}", "--predictions", file, "--to", folder, *more]
    main(["evaluate", *map(str, options)])
    return entries(folder).get(name, {})


def refused(words: Sequence[object]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", *map(str, words)])


@pytest.fixture
def pope(tmp_path: Path) -> Path:
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
    rows = [{"image": f"{answer}.png", "query": "What?", "answer": answer} for answer in ("red", "blue")]
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


PICTURED: dict[str, Any] = {"image": "0.png", "prompt": "What?"}
NAMES: list[dict[str, Any]] = [{"text": "red", "weight": 0.3}, {"text": "crimson"}]


@pytest.mark.parametrize(
    ("rows", "answer", "expected"),
    [
        ([{**PICTURED, "answers": ["red", "crimson", "red"]}], "Crimson", (1, 100.0, [])),
        ([{**PICTURED, "answers": ["red", "crimson", "red"]}], "blue", (1, 0.0, [])),
        ([{"image": "0.png", "captions": ["a dog", "two dogs"]}], "two dogs", (1, 100.0, [])),
        ([{"messages": [{"role": "user", "content": "What?"}], "answers": ["x", "y"]}], "y", (1, 100.0, [])),
        ([{**PICTURED, "options": ["x", "y"], "answers": ["A", "B", "A"]}], "B", (1, 0.0, [])),
        *(
            ([{"id": "row 1", "question": "What?", "answers": NAMES}], name, (1, 100.0, []))
            for name in ("red", "crimson")
        ),
        *(
            ([{**PICTURED, "completion": text, "label": text == "red"} for text in ("red", "bad")], answer, expected)
            for answer, expected in (("red", (1, 100.0, ["row 2"])), ("bad", (1, 0.0, ["row 2"])))
        ),
    ],
)
def test_any_right_answer_counts_and_a_bad_one_is_none(rows, answer, expected, tmp_path) -> None:
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answers = predictions_file(tmp_path / "p.jsonl", {f"row {number + 1}": answer for number in range(len(rows))})
    words = ["--benchmarks", f"exact_match={tmp_path}/test.jsonl", "--predictions", answers, "--to", tmp_path / "to"]
    main(["evaluate", *map(str, words)])
    entry = entries(tmp_path / "to")["exact_match"]
    assert (entry["n"], entry["metrics"]["accuracy"]["value"], [*entry.get("not_scored", ())]) == expected


@pytest.mark.parametrize("name", ["test.csv", "test.json", "outputs.json"])
def test_rows_with_an_empty_or_null_answer_are_in_no_score(name: str, tmp_path: Path) -> None:
    column, question = ("answer", "question") if name.startswith("test") else ("output", "instruction")
    texts = ["red", "" if name == "test.csv" else None, "", "blue"]
    rows = [{question: f"Q{n}?", column: text} for n, text in enumerate(texts)]
    rows.append({question: "<image> Q?", column: "red"})  # it has no picture, so that it counts as wrong
    table = "\n".join(",".join(map(str, row.values())) for row in rows)
    (tmp_path / name).write_text(f"{question},{column}\n{table}\n" if name == "test.csv" else json.dumps(rows))
    answers = predictions_file(tmp_path / "p.jsonl", {"row 1": "red", "row 3": "?", "row 4": "red"})
    words = ["--benchmarks", f"exact_match={tmp_path / name}", "--predictions", answers, "--to", tmp_path / "to"]
    main(["evaluate", *map(str, words)])
    entry = entries(tmp_path / "to")["exact_match"]
    assert (entry["n"], entry["metrics"]["accuracy"]["value"]) == (3, pytest.approx(100 / 3))
    assert [*entry["not_scored"]] == ["row 2", "row 3"]


def test_a_split_without_answers_gives_a_submission_and_takes_the_numbers_of_the_split_before(tmp_path: Path) -> None:
    examples = [right(str(n), images=[f"{n}.jpg"]) for n in range(3)]
    evaluated("vqav2", [right("0", images=["0.jpg"], human_answers=["no"] * 10)], {"0": "no"}, tmp_path)
    (score,) = score_lines(tmp_path)
    assert (score["set"], score["id"], score["unit"]) == ("vqav2", "0", "0.jpg")
    write_examples(tmp_path / "records" / "vqav2" / "test.jsonl", examples)
    answers = predictions_file(tmp_path / "answers.jsonl", {"0": "The  dogs", "2": "two"})
    options = ["--benchmarks", "vqav2", "--records", tmp_path / "records", "--predictions", answers, "--to", tmp_path]
    main(["evaluate", *map(str, options)])
    assert json.loads((tmp_path / "vqav2" / "vqav2.json").read_text()) == [
        {"question_id": 0, "answer": "dogs"},
        {"question_id": 1, "answer": ""},
        {"question_id": 2, "answer": "2"},
    ]
    assert entries(tmp_path)["vqav2"]["metrics"] == {}
    assert score_lines(tmp_path) == []


@pytest.mark.parametrize(
    "words",
    [
        *("popee --predictions x", "pope --predictions x", "pope=none.jsonl --predictions x", "pope"),
        *("pope,pope --predictions x", "pope --predictions x --mode gqa=llava", "pope={pope} --predictions {strange}"),
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


def test_our_own_file_of_several_sets_answers_the_one_of_its_name(tmp_path: Path) -> None:
    """An id may be in several sets, and stands again with the answer about an exchanged picture."""

    def row(of_set: str, text: str) -> Prediction:
        return Prediction(id="1", set=of_set, prediction=text)

    rows = [row("gqa", "y"), row("exact_match", "x"), row("exact_match/exchanged_pictures", "y")]
    write_examples(tmp_path / "records.jsonl", [right("1", "x")])
    file = tmp_path / "predictions.jsonl"
    words = ["--benchmarks", f"exact_match={tmp_path}/records.jsonl", "--predictions", file, "--to", tmp_path / "to"]
    for several, expected in ((rows, 100.0), (rows[1:], 100.0), ([rows[0], row("gqa/exchanged_pictures", "x")], 0.0)):
        file.write_text("".join(map(line_of, several)))
        main(["evaluate", *map(str, words)])
        assert entries(tmp_path / "to")["exact_match"]["metrics"]["accuracy"]["value"] == expected
    file.write_text(line_of(rows[0]) + line_of(row("pope", "x")))
    refused(words)


def test_answers_to_no_question_are_counted(tmp_path: Path, capsys: Any) -> None:
    examples, answers = [right("1", "x"), right("2", "x")], {"1": "x", "8": "x", "9": "x"}
    entry = evaluated("exact_match", examples, answers, tmp_path)
    assert "exact_match: 2 answers belong to none" in capsys.readouterr().out
    assert (entry["n"], entry["metrics"]["accuracy"]["value"]) == (2, 50.0)
    evaluated("exact_match", examples, answers | {"2": "y"}, tmp_path, "--limit", 1)
    assert "exact_match: 2 answers" in capsys.readouterr().out  # the answer to question 2 is no mistake


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['benchmark']}-{row['about']:.40}")
def test_what_a_file_of_answers_scores(row: dict[str, Any], tmp_path: Path) -> None:
    examples, options = [from_record(record) for record in row["examples"]], row.get("options", ())
    if "metric" not in row:
        with pytest.raises(SystemExit, match="2"):
            evaluated(row["benchmark"], examples, row["answers"], tmp_path, *options)
        assert {path.name for path in tmp_path.iterdir()} == {"records.jsonl", "p.jsonl"}
        return
    entry = evaluated(row["benchmark"], examples, row["answers"], tmp_path, *options)
    assert (entry["n"], entry["metrics"][row["metric"]]["value"]) == (row["n"], row["value"])
    assert sorted(entry.get("not_scored", ())) == row["not_scored"]
    assert entry["settings"] == row.get("settings", entry["settings"])


# metrics.json holds what is true of one model's answers: entries of before stay or go, and no file is another's.


def add(folder: Path, name: str, *more: object, answer: str = "yes") -> set[str]:
    """The sets that the files hold once a benchmark of one question was added."""
    records, file = folder / f"{name}.jsonl", predictions_file(folder / f"{answer}.jsonl", {"1": answer})
    if not records.is_file():
        write_examples(records, [right("1", "yes", images=["a"], category="random")])
    options = ["--benchmarks", f"{name}={records}", "--predictions", file, "--to", folder, *more]
    main(["evaluate", *map(str, options)])
    assert {line["set"] for line in score_lines(folder)} == entries(folder).keys()
    return set(entries(folder))


def test_a_later_command_adds_its_benchmarks(tmp_path: Path, capsys: Any) -> None:
    add(tmp_path, "gqa")
    assert add(tmp_path, "pope") == {"gqa", "pope"}
    assert "those of gqa from before" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # it asks two questions about a picture
        add(tmp_path, "mme")
    assert add(tmp_path, "gqa") == {"gqa", "pope"}
    assert len(score_lines(tmp_path)) == 2
    write_examples(tmp_path / "gqa.jsonl", [right("1", "no")])  # its numbers are of another file
    assert add(tmp_path, "pope") == {"pope"}
    assert "gqa removed" in capsys.readouterr().out
    assert add(tmp_path, "gqa", answer="no") == {"gqa"}  # and POPE's of other answers


@pytest.mark.parametrize("content", ["not JSON", '{"sets": {"gqa": {}}, "answers_of": "x"}'])
def test_a_file_that_says_too_little_is_replaced_and_a_training_run_s_is_not(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.json").write_text(content)
    assert add(tmp_path, "pope") == {"pope"}
    (tmp_path / "metrics.json").write_text('{"train_steps": 5}')
    with pytest.raises(SystemExit):
        add(tmp_path, "pope")
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"train_steps": 5}


# Other tools' files of predictions: which answers they hold, and which questions those belong to.


JOINED: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("joined_answers.jsonl").read_text().splitlines()
]


def answers_in(path: Path, content: object) -> dict[str, str]:
    if isinstance(content, list) and path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return {row.id: row.prediction for row in read_foreign_predictions(path)}


def test_the_forms_of_rows(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "answer": "one"},
        {"id": "b", "images": [], "question": "?", "truth": "2", "prediction": "two", "kind": None},
        {"question_id": 7, "prompt": "?", "text": "three", "answer_id": "x", "model_id": "m", "metadata": {}},
        {"id": "a", "answer": "four"},
    ]
    answers = {"a": "four", "b": "two", "7": "three"}
    assert answers_in(tmp_path / "p.jsonl", rows) == answers_in(tmp_path / "p.json", rows) == answers


@pytest.mark.parametrize("key", MODEL_ANSWERS)
@pytest.mark.parametrize("true", ANSWERS)
def test_what_the_model_said_goes_before_the_true_answer(tmp_path: Path, key: str, true: str) -> None:
    rows = [{"id": "a", "question": "?", true: "cat", key: "dog"}, {"id": "b", key: "owl", true: "owl"}]
    for name, content in (
        ("p.jsonl", rows),
        ("p.csv", f"id,{true},{key}\na,cat,dog\nb,owl,owl\n"),
        ("only.csv", f"id,{key}\na,dog\nb,owl\n"),
        ("spelled.csv", f"ID, Question ,{true.upper()},{key.title()}\na,?,cat,dog\nb,?,owl,owl\n"),
        ("semicolons.csv", f'"id";{true};{key}\na;cat, too;dog\nb;owl;owl\n'),
        ("stated.csv", f"sep=;\nid;{key};\na;dog;\nb;owl\n"),
    ):
        assert answers_in(tmp_path / name, content) == {"a": "dog", "b": "owl"}


@pytest.mark.parametrize(("first", "other"), [("prediction", "response"), ("answer", "text")])
def test_two_keys_that_may_be_the_answer(tmp_path: Path, first: str, other: str) -> None:
    with pytest.raises(UserError):
        answers_in(tmp_path / "p.jsonl", [{"id": "a", other: "dog", first: "cat"}])
    assert answers_in(tmp_path / "p.jsonl", [{"id": "a", other: "cat", first: "cat"}]) == {"a": "cat"}


WHOLE = '{"id": "a", "answer": "one"}\n'
BROKEN = ('{"id": "b"}', '{"answer": "b"}', '{"id": "b", "answer": 3}', "[" * 100_000)
OTHERS = (
    *(("r.csv", f"{head}\na,?,red\n") for head in ("id,question,my_prediction", "my_id,question,Prediction")),
    *(("r.csv", "dev-1-0-0\n"), ("r.xlsx", "PK\x03\x04rest"), ("r.json", '{"1": true}')),
)


@pytest.mark.parametrize(("file", "content"), [*(("r.jsonl", f"{WHOLE}{line}\n") for line in BROKEN), *OTHERS])
def test_what_is_no_such_file_is_refused(tmp_path: Path, file: str, content: str) -> None:
    with pytest.raises(UserError):
        answers_in(tmp_path / file, content)
    with pytest.raises(UserError):
        read_foreign_predictions(tmp_path / "gone.jsonl")


@pytest.mark.parametrize("row", JOINED, ids=lambda row: f"{row['benchmark']}-{row['about']}")
def test_answers_find_their_questions(row: dict[str, Any], tmp_path: Path) -> None:
    path, examples = tmp_path / row["file"], [from_record(record) for record in row["examples"]]
    answers_in(path, row["content"])
    find = partial(
        match_predictions,
        BENCHMARKS[row["benchmark"]],
        examples,
        read_foreign_predictions(path),
        path=path,
        questions=Path("records"),
    )
    if row["answers"] is None:
        with pytest.raises(UserError) as refused:
            find()
        assert str(path) in str(refused.value)
        assert row.get("names", "") in str(refused.value)
        return
    joined = find()
    assert joined.answers == row["answers"]
    assert joined.joined_by == row.get("joined_by", joined.joined_by)
    assert list(joined.strangers) == row.get("strangers", list(joined.strangers))
