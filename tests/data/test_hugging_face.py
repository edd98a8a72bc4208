"""Shards of each kind become examples as a stream, pictures are written once, and columns are found or named."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from dora_vl.data.benchmarks.hugging_face import convert
from dora_vl.data.example import Answer, Example, from_record, iterate_examples, to_record
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.scores.benchmark import correct_index
from tests.data.published import prepared


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


def parquet(rows: datasets.Dataset, folder: Path) -> None:
    rows.to_parquet(folder / "train-00000-of-00001.parquet")


def arrow(rows: datasets.Dataset, folder: Path) -> None:
    rows.save_to_disk(folder)


@pytest.mark.parametrize("write", [parquet, arrow])
def test_shards(tmp_path: Path, rows: datasets.Dataset, write: Callable[[datasets.Dataset, Path], None]) -> None:
    write(rows, tmp_path / "data")
    examples = prepare(tmp_path / "data", tmp_path / "records", columns="question:query,extra:level")
    check(examples, tmp_path / "records" / "own")


def test_a_set_of_the_hub_is_streamed(tmp_path: Path, rows: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    request: dict[str, Any] = {}

    def load_dataset(**options: Any) -> Any:
        request.update(options)
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    columns = "question:query,extra:level"
    examples = prepare(tmp_path, tmp_path / "records", hub="owner/name", split="test", revision="v1", columns=columns)
    check(examples, tmp_path / "records" / "own")
    assert request == {"path": "owner/name", "name": None, "revision": "v1", "split": "test", "streaming": True}


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


def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, rows: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "data" / "train.parquet"
    rows.to_parquet(path)
    path.write_bytes(path.read_bytes()[:-100])
    for folder in (tmp_path / "data", tmp_path / "none"):
        with pytest.raises(UserError):
            prepare(folder, tmp_path / "records")

    def load_dataset(**_: Any) -> Any:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError):
        prepare(tmp_path, tmp_path / "records", hub="owner/name")


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


LAYOUTS = ("{}-00000-of-00001.parquet", "{}/0.parquet", "saved")


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


@pytest.mark.parametrize("split", ["testdev", "val", "other"])
def test_a_split_that_is_not_there_or_could_be_two(tmp_path: Path, split: str) -> None:
    folder = in_splits(tmp_path / "data", LAYOUTS[0])
    with pytest.raises(UserError):
        prepare(folder, tmp_path / "records", split=split)


def test_shards_of_one_split_may_be_called_something_else_but_not_another_split(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"question": ["q"], "answer": ["a"]}).to_parquet(tmp_path / "data" / "train-0.parquet")
    for split in ("training", "mine"):
        assert len(prepare(tmp_path / "data", tmp_path / split, split=split)) == 1
    with pytest.raises(UserError):
        prepare(tmp_path / "data", tmp_path / "records", split="test")


@pytest.mark.parametrize("columns", ["question", "what:x", "question:"])
def test_columns_that_make_no_sense(tmp_path: Path, columns: str) -> None:
    with pytest.raises(UserError):
        prepare(tmp_path, tmp_path / "records", columns=columns)


ROWS = [json.loads(line) for line in Path(__file__).with_name("hugging_face_rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", ROWS)
def test_a_row_is_the_written_record_or_a_bad_sample(case: dict[str, Any]) -> None:
    """Choices and the right one in every form that sets have; what could be read in two ways is bad, unless named."""
    raw, columns = {"row number": 1, **case["raw"]}, case.get("columns", {})
    if "bad" in case:
        with pytest.raises(BadSample) as bad:
            convert(raw, columns=columns, task_folder=Path())
        assert bad.value.sample_id == case["bad"]
        return
    example = convert(raw, columns=columns, task_folder=Path())
    assert to_record(example) == case["record"]
    assert from_record(case["record"]) == example
    if "correct" in example.extra:
        assert example.choices[correct_index(example)] == example.answers[0].text


def test_a_picture_that_is_none_is_a_bad_sample() -> None:
    with pytest.raises(BadSample):
        convert({"row number": 1, "question": "?", "image": {"bytes": b"<html>"}}, columns={}, task_folder=Path())
