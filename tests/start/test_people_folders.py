"""`dora-vl init` on folders as people have them: what it says of each, which rows it writes, what it asks for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from dora_vl.cli import main
from dora_vl.start import init
from tests.start.people import write_table

BASE = "OWNER/NAME-1B"
"""Nothing is fetched of a base of the hub."""
ASK = ("--ask", "what is it?")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(init, "_on_gpu", lambda: False)
    monkeypatch.setattr(init, "_program", str)


def draw(path: Path, shape: str, number: int) -> None:
    """A grey picture with a shape in it, like no other."""
    image = Image.new("RGB", (24, 24), (200, 200, 100 + number))
    box = (number % 5, number % 7, 15, 15)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=(20, 20, number))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def classes(folder: Path, sizes: dict[str, int], ending: str = "png") -> None:
    for start, (name, size) in enumerate(sizes.items()):
        for number in range(size):
            draw(folder / name / f"{number}.{ending}", name, 40 * start + number)


def printed_by(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    capsys.readouterr()
    main(["init", *words, "--model", BASE])
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["init", *words, "--model", BASE])
    assert caught.value.code == 2
    assert not Path("runs").exists()
    return capsys.readouterr().err


def written(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def answers(name: str) -> Counter[str]:
    return Counter(row["conversations"][-1]["value"] for row in written(name))


def test_a_folder_a_class_is_its_answers_and_each_is_in_the_test(capsys: pytest.CaptureFixture[str]) -> None:
    classes(Path("my"), {"circle": 20, "red_square": 10, "star": 5, "once": 1})
    assert printed_by(capsys, "my", *ASK) == [
        "my: question/answer, 36 rows, 36 usable",
        "  id: used as id",
        "  image: used as images",
        "  label: used as answer",
        "pictures: 36 in my, PNG 36",
        "sizes: 24x24 to 24x24 pixels, in the middle 24x24",
        "questions: 1 a row, 3 words",
        "answers: 1 word, 4 different, most often circle (56%)",
        "answers as they are named: circle 20, red_square 10, star 5, once 1",
        "held out by seed 0: 8 rows about 8 pictures; to train on: 28 rows about 28",
        "runs/my: train.jsonl, test.jsonl and run.yaml written, base OWNER/NAME-1B (1,000 million parameters)",
        "",
        "next:  dora-vl train runs/my/run.yaml",
    ]
    assert answers("runs/my/test.jsonl") == {"circle": 4, "red_square": 2, "star": 1, "once": 1}
    row = written("runs/my/train.jsonl")[0]
    assert (row["id"], row["image"]) == ("circle/0.png", "circle/0.png") or row["image"].startswith("circle/")
    assert row["conversations"][0]["value"] == "<image>\nwhat is it?"


def test_folders_named_as_splits_stay_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    for split, size in {"train": 6, "val": 2, "test": 3}.items():
        classes(Path("my") / split, {"circle": size, "square": size})
    (Path("my/val/circle/0.png")).write_bytes(Path("my/train/circle/0.png").read_bytes())
    Path("my/test/circle/0.png").write_bytes(Path("my/train/circle/1.png").read_bytes())
    lines = printed_by(capsys, "my", *ASK)
    assert "  split: left out" in lines
    assert any(line.startswith("held out by their folders: 6 rows about 6 pictures; to train on: 12") for line in lines)
    assert any("both" in line or "alike" in line for line in lines)  # a test picture is one of those to train on
    assert [len(written(f"runs/my/{name}.jsonl")) for name in ("train", "test", "validation")] == [12, 6, 4]
    assert "validation: runs/my/validation.jsonl" in Path("runs/my/run.yaml").read_text(encoding="utf-8")


METADATA = [("metadata.csv", "file_name"), ("metadata.jsonl", "file_name")]
WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], object]] = {
    ".csv": lambda path, rows: write_table(path, [list(row.values()) for row in rows], ",".join(rows[0])),
    ".json": lambda path, rows: path.write_text(json.dumps(rows)),
    ".jsonl": lambda path, rows: path.write_text("".join(f"{json.dumps(row)}\n" for row in rows)),
}


@pytest.mark.parametrize(("name", "column"), [("labels.csv", "image"), ("labels.json", "image"), *METADATA])
def test_a_table_of_pictures_and_labels_is_asked(name: str, column: str, capsys: pytest.CaptureFixture[str]) -> None:
    classes(Path("my/photos"), {"circle": 10, "square": 10}, "JPG")
    rows = [
        {column: f"photos/{shape}/{number}.jpg", "label": shape}  # their endings are in capitals on the disk
        for shape in ("circle", "square")
        for number in range(10)
    ]
    WRITERS[Path(name).suffix](Path("my", name), rows)
    assert 'dora-vl init my --ask "what is it?"' in refused(capsys, "my")
    lines = printed_by(capsys, "my", *ASK)
    assert lines[0] == f"my/{name}: question/answer, 20 rows, 20 usable"
    assert "pictures: 20 in my, JPEG 20" in lines
    assert answers("runs/my/test.jsonl") == {"circle": 2, "square": 2}


def test_a_text_beside_each_picture_is_its_caption_or_its_answer(capsys: pytest.CaptureFixture[str]) -> None:
    classes(Path("my"), {"photos": 10})
    for number in range(10):
        Path(f"my/photos/{number}.txt").write_text(f"a circle, number {number}\n")
    Path("my/photos/4.txt").unlink()
    Path("my/notes.json").write_text("[]")
    lines = printed_by(capsys, "my")
    assert lines[0] == "no questions in notes.json: left out"
    assert "my: captions, 10 rows, 9 usable" in lines
    assert any("empty answer" in line and "photos/4.png" in line for line in lines)
    first = written("runs/my/train.jsonl")[0]["conversations"]
    assert (first[0]["value"], first[1]["value"][:8]) == ("<image>", "a circle")
    printed_by(capsys, "my", *ASK, "--to", "runs/asked")
    assert written("runs/asked/train.jsonl")[0]["conversations"][0]["value"] == "<image>\nwhat is it?"


def test_what_says_nothing_is_one_line_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    classes(Path("alone"), {"photos": 3})
    for words in (("alone",), ("alone", *ASK)):
        line = refused(capsys, *words)
        assert line.count("\n") == 1
        assert "3 pictures" in line
        assert "image,question,answer" in line
    classes(Path("my shapes"), {"circle": 3, "square": 3})
    assert "dora-vl init 'my shapes' --ask" in refused(capsys, "my shapes")


def test_what_is_probably_not_meant_is_named_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    classes(Path("my/photos"), {"circle": 12})
    rows = [[f"circle/{number}.png", "Which colour?", "red"] for number in range(12)]
    rows += [["circle/0.png", "Which colour?", "red"], ["circle/0.png", "Which  colour?", "blue"]]
    rows += [["circle/0.png", "Which colour?", "blue"], ["", "Which colour?", "red"], ["circle/1.png", "", "red"]]
    write_table(Path("my/answers.csv"), rows)
    lines = printed_by(capsys, "my")
    doubts = [
        line for line in lines[lines.index("trained on as they are, though probably not meant:") :] if "row " in line
    ]
    for kind, row in (("empty question", "row 17"), ("no picture", "row 16"), ("another answer", "row 15")):
        assert sum(kind in line and row in line for line in doubts) == 1, kind
    assert len(written("runs/my/train.jsonl")) + len(written("runs/my/test.jsonl")) == len(rows)
