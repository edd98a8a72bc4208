"""Shards of each kind become examples as a stream, pictures are written once, and columns are found or named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from dora_vl.data.benchmarks.hugging_face import convert
from dora_vl.data.example import Answer, Example, from_record, iterate_examples, to_record
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.scores.benchmark import correct_index
from tests.sources.published import prepared


def prepare(folder: Path, to: Path, **options: str) -> list[Example]:
    words = [word for name, value in {"task": "own", **options}.items() for word in ("--set", f"{name}={value}")]
    prepared("hugging-face", folder, to, *words)
    return list(iterate_examples(next((to / "own").glob("*.jsonl"))))


def png(grey: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), grey, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


FEATURES = datasets.Features(
    {
        "question_id": datasets.Value("string"),
        "image": datasets.Image(),
        "query": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
        "level": datasets.Value("int64"),
    }
)


@pytest.fixture
def rows() -> datasets.Dataset:
    columns: dict[str, list[Any]] = {
        "question_id": [f"q{number}" for number in range(10)],
        "image": [{"bytes": png(number // 2), "path": None} for number in range(10)],
        "query": [f"What is {number}?" for number in range(10)],
        "answers": [["cat"] * 9 + ["dog"] for _ in range(10)],
        "level": list(range(10)),
    }
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def check(examples: list[Example], root: Path) -> None:
    assert [example.id for example in examples] == [f"q{number}" for number in range(10)]
    assert examples[3].question == "What is 3?"
    assert examples[3].answers == (Answer(text="cat"), Answer(text="dog", weight=0.3))
    assert examples[3].extra == {"level": 3}
    assert (root / examples[3].images[0]).read_bytes() == png(1)
    assert len(list((root / "media").iterdir())) == 5


def test_parquet(tmp_path: Path, rows: datasets.Dataset) -> None:
    rows.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    examples = prepare(tmp_path / "data", tmp_path / "records", columns="question:query,extra:level")
    check(examples, tmp_path / "records" / "own")


def test_arrow(tmp_path: Path, rows: datasets.Dataset) -> None:
    rows.save_to_disk(tmp_path / "data")
    examples = prepare(tmp_path / "data", tmp_path / "records", columns="question:query,extra:level")
    check(examples, tmp_path / "records" / "own")


def test_a_set_of_the_hub_is_streamed(tmp_path: Path, rows: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(**options: Any) -> Any:
        asked.update(options)
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    columns = "question:query,extra:level"
    examples = prepare(tmp_path, tmp_path / "records", hub="owner/name", split="test", revision="v1", columns=columns)
    check(examples, tmp_path / "records" / "own")
    assert asked == {"path": "owner/name", "name": None, "revision": "v1", "split": "test", "streaming": True}


def test_a_set_that_cannot_be_fetched_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(**_: Any) -> Any:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"owner/name.*Couldn't reach the hub"):
        prepare(tmp_path, tmp_path / "records", hub="owner/name")


def test_webdataset(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "0.tar", "w") as tar:
        for number in range(10):
            record = json.dumps({"question": f"What is {number}?", "answer": str(number)}).encode()
            for ending, content in (("png", png(number)), ("json", record)):
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    examples = prepare(tmp_path / "data", tmp_path / "records")
    assert [(example.id, example.question, example.answers) for example in examples] == [
        (f"{number:04d}", f"What is {number}?", (Answer(text=str(number)),)) for number in range(10)
    ]
    assert (tmp_path / "records" / "own" / examples[7].images[0]).read_bytes() == png(7)


def test_a_shard_that_was_cut_is_one_line(tmp_path: Path, rows: datasets.Dataset) -> None:
    path = tmp_path / "data" / "train.parquet"
    rows.to_parquet(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=str(path.parent)):
        prepare(tmp_path / "data", tmp_path / "records")


SPLITS = ("dev", "test", "train", "validation")


def in_splits(folder: Path, layout: str) -> Path:
    """A set as the hub has it, with a row a split that says which."""
    both: dict[str | datasets.NamedSplit, datasets.Dataset] = {
        split: datasets.Dataset.from_dict({"question": [f"Of {split}?"], "answer": ["a"]}) for split in SPLITS
    }
    if layout == "saved":
        datasets.DatasetDict(both).save_to_disk(str(folder))
    else:
        for split, part in both.items():
            part.to_parquet(folder / layout.format(split))
    return folder


LAYOUTS = (
    "{}-00000-of-00001.parquet",
    "data/{}-00000-of-00001-ab12.parquet",
    "{}/0.parquet",
    "set_{}.parquet",
    "saved",
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_split_that_was_asked_for_is_taken(tmp_path: Path, layout: str) -> None:
    folder = in_splits(tmp_path / "data", layout)
    for split in ("test", "dev", "validation"):
        (example,) = prepare(folder, tmp_path / split, split=split)
        assert example.question == f"Of {split}?"
    (example,) = prepare(folder, tmp_path / "default")
    assert example.question == "Of train?"
    (example,) = prepare(folder, tmp_path / "means", split="training")
    assert example.question == "Of train?"


@pytest.mark.parametrize("asked", ["testdev", "val", "other"])
def test_a_split_that_is_not_there_or_could_be_two(tmp_path: Path, asked: str) -> None:
    folder = in_splits(tmp_path / "data", LAYOUTS[0])
    with pytest.raises(UserError, match=rf"{asked}.*dev \(1\), test \(1\), train \(1\), validation \(1\)"):
        prepare(folder, tmp_path / "records", split=asked)


def test_shards_of_one_split_may_be_called_something_else_but_not_another_split(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"question": ["q"], "answer": ["a"]}).to_parquet(tmp_path / "data" / "train-0.parquet")
    for split in ("training", "mine"):
        assert len(prepare(tmp_path / "data", tmp_path / split, split=split)) == 1
    with pytest.raises(UserError, match=r"test.*train \(1\)"):
        prepare(tmp_path / "data", tmp_path / "records", split="test")


def test_what_map_keeps_beside_saved_shards_is_left_out(tmp_path: Path, rows: datasets.Dataset) -> None:
    rows.save_to_disk(tmp_path / "data")
    datasets.load_from_disk(tmp_path / "data").map(lambda row: {"level": row["level"] + 1})
    assert list((tmp_path / "data").glob("cache-*.arrow"))
    examples = prepare(tmp_path / "data", tmp_path / "records", columns="question:query,extra:level")
    check(examples, tmp_path / "records" / "own")


def test_choices_and_conversations(tmp_path: Path) -> None:
    choice = {"row number": 1, "question": "Which?", "choices": ["a", "b"], "answer": 1}
    assert convert(choice, columns={}, task_folder=tmp_path) == Example(
        id="1", question="Which?", answers=(Answer(text="b"),), choices=("a", "b"), extra={"correct": 1}
    )
    talk = {"row number": 2, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert convert(talk, columns={}, task_folder=tmp_path).turns == (Turn("user", "Hi"), Turn("assistant", "Hello"))
    voted = {"row number": 3, "question": "What?", "answers": [{"answer": "cat"}, {"answer": "cat"}]}
    assert convert(voted, columns={}, task_folder=tmp_path).answers == (Answer(text="cat", weight=0.6),)


@pytest.mark.parametrize(
    ("raw", "columns", "said"),
    [
        ({"question": "Which?", "choices": ["a"], "answer": 4}, {}, "4"),
        ({"question": "Which?"}, {"answers": "label"}, "'label'"),
        ({"other": 1}, {}, "other"),
        ({"question": "What?", "image": {"bytes": b"<html>", "path": None}}, {}, "begins with b'<html>'"),
        ({"question": "What?", "image": {"bytes": None, "path": None}}, {}, "picture"),
        ({"question": 5, "answer": "x"}, {}, "question"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, raw: dict[str, Any], columns: dict[str, str], said: str) -> None:
    with pytest.raises(BadSample, match=said):
        convert({"row number": 1, **raw}, columns=columns, task_folder=tmp_path)


@pytest.mark.parametrize("columns", ["question", "what:x", "question:"])
def test_columns_that_make_no_sense(tmp_path: Path, columns: str) -> None:
    with pytest.raises(UserError, match="--set columns"):
        prepare(tmp_path, tmp_path / "records", columns=columns)


def test_a_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        prepare(tmp_path, tmp_path / "records")


MMMU = {"id": "v1", "question": "Which?", "options": "['Yes', 'No']", "answer": "B"}
AI2D = {"question": "Which?", "options": ["Yes", "No"], "answer": "1"}


def made(raw: dict[str, Any], **columns: str) -> Example:
    return convert({"row number": 1, **raw}, columns=columns, task_folder=Path())


@pytest.mark.parametrize("raw", [MMMU, AI2D])
def test_rows_as_two_sets_write_them_can_be_scored(raw: dict[str, Any]) -> None:
    example = from_record(to_record(made(raw)))
    assert example.choices == ("Yes", "No")
    assert example.answers == (Answer(text="No"),)
    assert correct_index(example) == 1


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ('["Yes", "No"]', ("Yes", "No")),
        (r"""['It\'s', "isn't", '$\\frac{1}{2}$']""", ("It's", "isn't", r"$\frac{1}{2}$")),
        (r"['\d', 'b']", (r"\d", "b")),
        ([1, "two"], ("1", "two")),
    ],
)
def test_choices_in_every_form(choices: object, expected: tuple[str, ...]) -> None:
    assert made({"question": "Which?", "choices": choices, "answer": 1}).choices == expected


def test_an_empty_list_of_choices_is_an_open_question() -> None:
    example = made({"question": "How many?", "options": "[]", "answer": "5"})
    assert (example.choices, example.answers, dict(example.extra)) == ((), (Answer(text="5"),), {})


@pytest.mark.parametrize(
    "choices",
    [
        "Yes",
        "['Yes' 'No']",
        "['Yes', 2]",
        "['Yes', __import__('os')]",
        "['Yes'",
        "[" * 5_000,
        "{'A': 'Yes'}",
        "['a\0']",
    ],
)
def test_text_that_is_no_list_of_choices_is_refused(choices: str) -> None:
    with pytest.raises(BadSample):
        made({"question": "Which?", "options": choices, "answer": "A"})


@pytest.mark.parametrize(
    ("answer", "correct"),
    [(0, 0), (2, 2), ("0", 0), ("C", 2), ("c", 2), ("(B)", 1), ("B.", 1), ("a dog", 1), (" a cat ", 0), (["A"], 0)],
)
def test_the_right_choice_in_every_form(answer: object, correct: int) -> None:
    example = made({"question": "Which?", "choices": ["a cat", "a dog", "a cow"], "answer": answer})
    assert example.extra == {"correct": correct}
    assert [one.text for one in example.answers] == [example.choices[correct]]


@pytest.mark.parametrize("answer", [None, "", " ", [], [None, ""]])
def test_an_answer_that_the_publisher_keeps(answer: object) -> None:
    example = made({"question": "Which?", "choices": ["a", "b"], "answer": answer})
    assert (example.answers, dict(example.extra)) == ((), {})


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (["Yes", "No"], "C"),
        (["Yes", "No"], "2"),
        (["Yes", "No"], "maybe"),
        (["Yes", "Yes"], "Yes"),
        (["Yes", "No"], True),
        (["Yes", "No"], ["Yes", "No"]),
        (["1", "2", "3"], "2"),  # the text of one choice and the number of another
    ],
)
def test_an_answer_that_is_no_choice_drops_the_row(choices: list[str], answer: object) -> None:
    with pytest.raises(BadSample):
        made({"question": "Which?", "choices": choices, "answer": answer})


def test_which_reading_of_a_choice_counts_can_be_said() -> None:
    raw = {"question": "How many?", "choices": ["1", "2", "B"], "answer": "1"}
    assert made(raw, answers="answer").extra == {"correct": 0}
    assert made(raw, correct="answer").extra == {"correct": 1}
    assert made({**raw, "answer": "B"}, answers="answer").extra == {"correct": 2}
    assert made({**raw, "answer": "B"}, correct="answer").extra == {"correct": 1}
    assert made({**raw, "choices": ["0", "1", "2"]}).extra == {"correct": 1}  # both readings are one choice
