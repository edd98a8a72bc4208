"""A folder of pictures is a file of rows, to train on as it is: by a table and by a stream, without another reader."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from dora_vl.data.check import FileCheck
from dora_vl.data.columns import Columns, TrainFile
from dora_vl.data.containers import find_files
from dora_vl.data.example import Example
from dora_vl.data.stream import StreamSource
from dora_vl.data.table import load_rows
from dora_vl.evaluation.questions import read_questions
from tests.data.readers.test_containers import write_tar

ASKED = Columns(ask="What is it?")


def pictures(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name)
    return folder


def answers(rows: object) -> list[tuple[str, str]]:
    return [(row.id, row.turns[-1].text) for row in rows if isinstance(row, Example)]  # type: ignore[attr-defined]


def test_a_folder_a_class_is_read_alike_by_a_table_a_stream_and_a_test(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "my", "a cat/1.png", "a cat/old/2.jpg", "dog/1.png", ".trash/dog/1.png")
    expected = [("a cat/1.png", "a cat"), ("a cat/old/2.jpg", "a cat"), ("dog/1.png", "dog")]
    assert answers(load_rows(str(folder), cache_folder=tmp_path / "cache", columns=ASKED)) == expected
    stream = StreamSource(TrainFile(path=str(folder)), limit=None, seed=0, columns=ASKED)
    assert answers(stream.first_rows) == expected
    questions, _ = read_questions(folder, columns=ASKED)
    assert [(question.id, question.question, question.answers[0].text) for question in questions] == [
        (name, "What is it?", answer) for name, answer in expected
    ]
    assert not FileCheck(folder, columns=ASKED).run(lambda _: None).findings


def test_a_picture_that_is_alone_is_not_taken_for_json(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "my", "1.png")
    (folder / "1.txt").write_text("a cat")
    questions, _ = read_questions(folder)
    assert [question.answers[0].text for question in questions] == ["a cat"]


def test_a_changed_text_is_read_again(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "my", "1.png", "2.png")
    for name in ("1", "2"):
        (folder / f"{name}.txt").write_text(f"picture {name}")
    assert answers(load_rows(str(folder), cache_folder=tmp_path / "cache"))[1] == ("2.png", "picture 2")
    (folder / "2.txt").write_text("another text")
    assert answers(load_rows(str(folder), cache_folder=tmp_path / "cache"))[1] == ("2.png", "another text")


@pytest.mark.parametrize(
    ("members", "order"),
    [(("x.2.png", "x.10.png", "x.0.png"), (2, 0, 1)), (("x.1.png", "x.png"), (1, 0)), (("x.b.png", "x.a.png"), (0, 1))],
)
def test_numbered_pictures_of_an_archive_come_by_their_numbers(
    tmp_path: Path, members: tuple[str, ...], order: tuple[int, ...]
) -> None:
    contents: list[bytes] = []
    for number in range(len(members)):
        stream = io.BytesIO()
        Image.new("RGB", (4, 4), (number, 0, 0)).save(stream, "PNG")
        contents.append(stream.getvalue())
    path = write_tar(tmp_path / "a.tar", {**dict(zip(members, contents, strict=True)), "x.txt": b"a cat"})
    (row,) = find_files(path).rows()
    assert row["images"] == [contents[index] for index in order]
