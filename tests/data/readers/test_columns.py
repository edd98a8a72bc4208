"""Every column that people's files have is used as what it is, or refused by its name, by all readers alike."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dora_vl.data.check import FileCheck
from dora_vl.data.columns import Columns, TrainFile
from dora_vl.data.example import Example
from dora_vl.data.stream import StreamSource
from dora_vl.data.table import described, load_rows
from dora_vl.errors import UserError
from dora_vl.evaluation.questions import read_questions

ASKED = {"question": "Which?", "answer": "two"}
TWO = ("a.png", "b.png")
LETTERS = "Which?\nA. one\nB. two\nAnswer with the option's letter from the given choices directly."
PLACE, PLACES = "<image>\n", "<image>\n<image>\n"


@dataclass(frozen=True)
class Case:
    """A row, and the pictures, question and answer that it is; `refused` is what the refusal names instead."""

    row: Mapping[str, object]
    images: tuple[str, ...] = ()
    asked: str = "Which?"
    said: str = "two"
    refused: str = ""
    columns: Columns = field(default_factory=Columns)


def said(text: str, **more: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "two", **more}]


VSR = {"image": "a.png", "caption": "The cat is left of the dog.", "label": 0, "relation": "left of"}
MEME = {"id": 7, "img": "a.png", "label": 1, "text": "look how many"}
JUDGED = {"caption": "question", "text": "question", "label": "answer"}
MATH = {"id": "5", "question": "<image2> or\n<image1>?", "options": ["<image1>", "<image2>"], "answer": "B"}
CASES: dict[str, Case] = {
    **{
        name: Case({name: "a.png", **ASKED}, TWO[:1], f"{PLACE}Which?")
        for name in ("file_name", "filename", "img_path", "image_file", "image_url", "photo", "Image", " image ")
    },
    **{
        name: Case({name: "a17", **ASKED}, refused=f"'{name}' (a picture or video)")
        for name in ("image_id", "imageId", "picture_key", "left_image_name", "video_link")
    },
    "image_id named": Case(
        {"image_id": "a17.png", **ASKED}, ("a17.png",), f"{PLACE}Which?", columns=Columns({"image_id": "image"})
    ),
    "image_id noted": Case({"image": "a.png", "image_id": 17, **ASKED}, TWO[:1], f"{PLACE}Which?"),
    "image1, image2": Case({"image2": "b.png", "image1": "a.png", **ASKED}, TWO, f"{PLACES}Which?"),
    "left, right": Case({"right_image": "b.png", "left_image": "a.png", **ASKED}, TWO, f"{PLACES}Which?"),
    "image, image2": Case({"image": "a.png", "image2": "b.png", **ASKED}, refused="'image2' (a picture or video)"),
    "image, image2 named": Case(
        {"image": "a.png", "image2": "b.png", **ASKED},
        TWO,
        f"{PLACES}Which?",
        columns=Columns({"image": "image", "image2": "image"}),
    ),
    "image, image2 ignored": Case(
        {"image": "a.png", "image2": "b.png", **ASKED}, TWO[:1], f"{PLACE}Which?", columns=Columns(ignored=("image2",))
    ),
    "VSR": Case(VSR, refused="'label' (a label)"),
    "VSR named": Case(VSR, TWO[:1], f"{PLACE}{VSR['caption']}", "0", columns=Columns(JUDGED)),
    "Hateful Memes": Case(MEME, refused="'label' (a label)"),
    "Hateful Memes named": Case(MEME, TWO[:1], f"{PLACE}{MEME['text']}", "1", columns=Columns(JUDGED)),
    "KTO": Case({"prompt": "Which?", "completion": "two", "label": False}, refused="'label' (a label)"),
    "ms-swift's KTO": Case({"messages": said("Which?"), "label": False}, refused="'label' (a label)"),
    "preferred": Case({"messages": said("Which?"), "rejected_response": "one"}, refused="'rejected_response' (a rat"),
    "rated": Case({**ASKED, "helpfulness_score": 3}, refused="'helpfulness_score' (a rating)"),
    "A, B": Case({**ASKED, "A": "one", "B": "two"}, asked=LETTERS, said="B"),
    "choice_a": Case({**ASKED, "choice_a": "one", "choice_b": "two"}, asked=LETTERS, said="B"),
    "option_a": Case({**ASKED, "option_a": "one", "option_b": "two", "answer": "B"}, asked=LETTERS, said="B"),
    "hint": Case({**ASKED, "hint": "Not one.", "A": "one", "B": "two"}, asked=f"Not one.\n{LETTERS}", said="B"),
    "options in talk": Case({"messages": said("Which?"), "options": "one or two"}, refused="'options' (choices)"),
    "A, B in talk": Case({"messages": said("Which?"), "A": "one", "B": "two"}, refused="'A' (choices), 'B' (choices)"),
    "MATH-V": Case(
        {**MATH, "image_1": "a.png", "image_2": "b.png", "solution": "", "level": 2},
        ("b.png", "a.png", "a.png", "b.png"),
        "<image> or\n<image>?\nA. <image>\nB. <image>\n" + LETTERS.rpartition("\n")[2],
        "B",
    ),
    "MATH-V, open": Case({**ASKED, "options": [], "image": "a.png"}, TWO[:1], f"{PLACE}Which?"),
    "Qwen's tags": Case({**ASKED, "question": "Is <img>a.png</img> it?"}, TWO[:1], f"{PLACE}Is  it?"),
    "boxes": Case({"messages": said("Is <bbox> it?")}, refused="its text has <bbox>"),
    "boxes beside": Case({"messages": said("Which?"), "objects": {"bbox": [[1, 2]]}}, refused="'objects' (nothing"),
    "sounds": Case({"messages": said("<audio>Which?")}, refused="its text has <audio>"),
    "sounds beside": Case({"messages": said("Which?"), "audios": ["a.wav"]}, refused="'audios' (nothing"),
    "reasons": Case({"messages": said("Which?", reasoning_content="So.")}, refused="turn 2 has 'reasoning_content'"),
    "tools": Case({"messages": said("Which?"), "tools": "[{}]"}, refused="'tools' (nothing"),
    "calls": Case({"messages": said("Which?", tool_calls=[{"id": "a"}])}, refused="turn 2 has 'tool_calls'"),
    "header": Case({"Image": "a.png", "QUESTION ": "Which?", "Answer": "two"}, TWO[:1], f"{PLACE}Which?"),
    "Windows": Case({"image": "one\\a.png", **ASKED}, ("one/a.png",), f"{PLACE}Which?"),
}


def as_csv(path: Path, rows: list[Mapping[str, object]]) -> None:
    cells = [
        {name: json.dumps(value) if isinstance(value, list | dict) else value for name, value in row.items()}
        for row in rows
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*rows[0]])
        table.writeheader()
        table.writerows(cells)


OF_TABLES = ("Image", " image ", "image1, image2", "VSR", "A, B", "MATH-V", "tools", "calls", "header")
"""Cases that a table's cells or types could change."""
WRITERS: Mapping[str, Callable[[Path, list[Mapping[str, object]]], object]] = {
    "csv": as_csv,
    "jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"),
    "parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path),
}


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "jsonl") for name in CASES), *((name, kind) for name in OF_TABLES for kind in WRITERS)]
)
def test_each_column_is_used_or_refused_by_every_reader(tmp_path: Path, name: str, kind: str) -> None:
    case, path = CASES[name], tmp_path / f"rows.{kind}"
    WRITERS[kind](path, [case.row])
    check = FileCheck(path, columns=case.columns).run(lambda _: None)
    told = "; ".join(finding.example for finding in check.findings.values())
    stream = StreamSource(TrainFile(path=str(path)), limit=None, seed=0, columns=case.columns)
    if case.refused:
        for read in (
            lambda: load_rows(str(path), cache_folder=tmp_path / "cache", columns=case.columns),
            lambda: stream.first_rows,
        ):
            with pytest.raises(UserError) as caught:
                read()
            assert case.refused in str(caught.value)
        assert case.refused in told
        return
    assert told == ""
    table = load_rows(str(path), cache_folder=tmp_path / "cache", columns=case.columns)
    (question,), _ = read_questions(path, columns=case.columns)
    for found in (table[0], stream.first_rows[0]):
        assert isinstance(found, Example)
        assert (found.images, *(turn.text for turn in found.turns)) == (case.images, case.asked, case.said)
    assert (question.images, question.turns[0].text, question.truth) == (case.images, case.asked, case.said)


def test_the_columns_are_told_before_the_first_step(tmp_path: Path) -> None:
    rows = [{"photo": "a.png", **ASKED, "source": "web"}, {"photo": None, **ASKED, "source": "web"}]
    rows.append({"image_1": "a.png", "image_2": "b.png", **ASKED, "source": "web"})
    path = tmp_path / "rows.jsonl"
    WRITERS["jsonl"](path, [*rows])
    lines = [
        "  photo: used as images",
        "  question: used as question",
        "  answer: used as answer",
        "  source: left out",
        "  image_1: used as images",
        "  image_2: used as images",
    ]
    found = described(TrainFile(path=str(path)), load_rows(str(path), cache_folder=tmp_path / "cache").rows)
    assert found == [
        "rows.jsonl: question/answer, 3 rows",
        *lines,
        "  pictures: none in 1 rows, 1 in 1 rows, 2 in 1 rows",
    ]
    assert StreamSource(TrainFile(path=str(path)), limit=None, seed=0).described()[1:] == lines
    plain = {"id": "a", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "model": "m"}
    WRITERS["jsonl"](path, [plain, {**plain, "image": "a.png"}])
    told = described(TrainFile(path=str(path)), load_rows(str(path), cache_folder=tmp_path / "cache").rows)
    assert {"  model: left out", "  image: used as images", "  pictures: none in 1 rows, 1 in 1 rows"} < set(told)
    WRITERS["jsonl"](path, [plain, {**plain, "label": False}])
    with pytest.raises(UserError):
        load_rows(str(path), cache_folder=tmp_path / "cache")


def test_numbers_of_a_class_are_its_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"question": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    made = datasets.Dataset.from_dict({"question": ["q", "r"], "label": [1, 0]}, features=features)
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        rows = load_rows(str(tmp_path / name), cache_folder=tmp_path / "cache").rows
        assert [talk[-1]["text"] for talk in rows["turns"]] == ["dog", "cat"]


def test_a_role_that_there_is_not_is_named() -> None:
    with pytest.raises(UserError):
        Columns({"a": "pictur"})


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.json"])
def test_a_folder_of_pictures_with_their_captions(tmp_path: Path, name: str) -> None:
    """As `datasets`' imagefolder has it: one file of JSON in a folder, which two could be but one could not."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"")
    WRITERS["csv" if name.endswith("csv") else "jsonl"](
        tmp_path / "set" / name, [{"file_name": "a.png", "text": "cat"}]
    )
    rows = load_rows(str(tmp_path / "set"), cache_folder=tmp_path / "cache").rows
    assert (rows["images"][:], rows["format"][:]) == ([["a.png"]], ["captions"])
    assert read_questions(tmp_path / "set")[0][0].truth == "cat"
