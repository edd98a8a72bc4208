"""check-data finds each planted problem, names its ids, and says nothing of files that are fine."""

import argparse
import dataclasses
import io
import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from dora_vl.data import check as check_command
from dora_vl.data.check import MediaCheck
from dora_vl.data.example import Answer, Clip, Example, write_examples
from dora_vl.errors import UserError
from tests.data.video_files import write_video
from tests.training.own_data import HOLD_PICTURES, WRITERS, items, write_pictures


def check(*words: str) -> tuple[list[str], int]:
    parser = argparse.ArgumentParser()
    check_command.add_arguments(parser)
    lines: list[str] = []
    try:
        lines.extend(check_command.run(parser.parse_args(list(words))))
    except SystemExit as left:
        return lines, int(left.code or 0)
    return lines, 0


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        (folder / f"whole.{kind.lower()}").write_bytes(encoded(kind))
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        (folder / f"cut.{kind.lower()}").write_bytes(encoded(kind)[:-40])
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>404</html>")
    damaged = bytearray(encoded("PNG"))
    damaged[100:400] = bytes(300)
    (folder / "damaged.png").write_bytes(bytes(damaged))
    whole = write_video(folder / "whole.mp4", options={"movflags": "faststart"}).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "no_index.mp4").write_bytes(struct.pack(">I4s", 16, b"ftyp") + bytes(400))
    return folder


KINDS_OF_MEDIA: dict[str | None, tuple[str, ...]] = {
    None: ("whole.png", "whole.jpeg", "whole.gif", "whole.webp", "whole.bmp", "whole.tiff", "whole.mp4"),
    "truncated media": ("cut.png", "cut.jpeg", "cut.gif", "cut.webp", "cut.mp4"),
    "zero-byte media": ("empty.png",),
    "broken media": ("page.jpg", "no_index.mp4"),
    "missing media": ("none.png",),
    "path leaves the folder": ("../media/whole.png", "/whole.png"),
}
EXPECTED = {name: kind for kind, names in KINDS_OF_MEDIA.items() for name in names}


@pytest.mark.parametrize("decode", [False, True])
def test_decoding_adds_to_the_quick_look(media: Path, decode: bool) -> None:
    (media / "no_end.png").write_bytes(encoded("PNG")[:-12])  # training reads it, as all its pixels are there
    (media / "whole.ppm").write_bytes(encoded("PPM"))  # training reads no PPM either
    os.mkfifo(media / "pipe.png")
    expected = {**EXPECTED, "no_end.png": None, "whole.ppm": "broken media", "pipe.png": "no file"}
    expected |= {"damaged.png": "broken media" if decode else None}
    check = MediaCheck(media, decode=decode)
    assert {name: trouble and trouble.kind for name in expected if [trouble := check.trouble(name)]} == expected


def llava(sample_id: str, question: str, answer: str, image: str | None = None) -> dict[str, object]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": sample_id, "conversations": turns} | ({"image": image} if image else {})


def test_every_kind_of_problem_of_a_llava_file_is_named(tmp_path: Path, media: Path) -> None:
    rows = [
        llava("fine", "<image>\nWhat?", "A cat.", "whole.png"),
        llava("same", "What?", "One."),
        llava("same", "What else?", "Two."),
        llava("silent", "What?", " "),
        llava("three", "<image><image>\nWhat?", "A cat.", "whole.png"),
        llava("gone", "<image>\nWhat?", "A cat.", "none.png"),
        llava("cut", "<image>\nWhat?", "A cat.", "cut.png"),
        llava("long", "What? " * 50, "A cat."),
        {"id": "odd", "conversations": [{"from": "cat", "value": "Meow"}]},
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows))
    lines, status = check(str(path), "--media", str(media), "--longest", "40")
    assert status == 1
    problems = {re.split("  +", line)[1]: line for line in lines[1:-1]}
    kinds = {"duplicate id": "same", "empty answer": "silent", "placeholders differ from pictures": "three"}
    kinds |= {"missing media": "gone", "truncated media": "cut", "longer than 40 words": "long", "not a sample": "odd"}
    assert {kind: kinds[kind] in line for kind, line in problems.items()} == dict.fromkeys(kinds, True)
    assert lines[-1] == "1 files, 9 samples, 3 media files: 7 problems"


def test_overlap_of_train_and_test_is_by_question_media_and_span(tmp_path: Path) -> None:
    def example(sample_id: str, question: str, image: str = "", start: float | None = None) -> Example:
        videos = (Clip(path="v.mp4", start_seconds=start),) if start is not None else ()
        images = (image,) if image else ()
        return Example(id=sample_id, question=question, images=images, videos=videos, answers=(Answer(text="yes"),))

    train = [example("a", "Is it?", "1.png"), example("b", "Is it?", "./2.png"), example("v", "What?", start=0.0)]
    test = [example("c", "Is it?", "2.png"), example("d", "Was it?", "2.png"), example("w", "What?", start=5.0)]
    write_examples(tmp_path / "train.jsonl", train)
    write_examples(tmp_path / "test.jsonl", test)
    lines, status = check(str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl"))
    assert (status, lines[-1].endswith("1 problems")) == (1, True)
    assert "also in test.jsonl" in lines[1]
    assert "b is c there" in lines[1]


def test_answers_may_be_kept_back_in_test_files_only(tmp_path: Path) -> None:
    for name in ("test_public", "train"):
        write_examples(tmp_path / f"{name}.jsonl", [Example(id=name, question=f"Q of {name}?")])
    lines, status = check(str(tmp_path))
    assert status == 1
    assert len(lines) == 3
    assert "train.jsonl" in lines[1]
    assert "no answer" in lines[1]


def test_lengths_are_tokens_where_a_tokenizer_is_given(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(llava("a", "abcdef", "gh")))
    assert check(str(path), "--tokenizer", str(tmp_path), "--longest", "100")[1] == 0
    lines, status = check(str(path), "--tokenizer", str(tmp_path), "--longest", "3")
    assert status == 1
    assert "longer than 3 tokens" in lines[1]


@pytest.mark.parametrize(
    "words", [["none.json"], ["rows.jsonl", "--media", "nowhere"], ["rows.jsonl", "--tokenizer", "nowhere"]]
)
def test_wrong_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps(llava("a", "b", "c")))
    with pytest.raises(UserError):
        check(*words)


def test_every_format_and_container_is_checked_alike(tmp_path: Path) -> None:
    whole = items(4)
    broken = [dataclasses.replace(whole[0], content=whole[0].content[:-30]), dataclasses.replace(whole[1], answer=" ")]
    for name, write in WRITERS.items():
        folder = tmp_path / name
        folder.mkdir()
        if name not in HOLD_PICTURES:
            write_pictures(folder, [*broken, *whole[2:]])
        lines, status = check(str(write(folder, [*broken, *whole[2:]])), "--media", str(folder), "--decode")
        assert status == 1, name
        assert any("truncated media" in line and "n0" in line for line in lines), (name, lines)
        assert any("empty answer" in line and "n1" in line for line in lines), (name, lines)
        assert lines[-1].endswith(": 2 problems"), (name, lines)


def test_videos_are_looked_for_in_their_own_folder(tmp_path: Path, media: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("whole.mp4", "cut.mp4"):
        (media / name).rename(tmp_path / "videos" / name)
    (media / "whole.png").rename(media / "odd.mp4")  # a picture by its content
    (tmp_path / "videos" / "no_ending").write_bytes((tmp_path / "videos" / "whole.mp4").read_bytes())
    named: dict[str, dict[str, object]] = {
        "fine": {"videos": ["whole.mp4", "no_ending"]},
        "cut": {"video": "cut.mp4"},
        "gone": {"video": {"path": "none.mp4", "start_seconds": 3}, "image": "whole.jpeg"},
        "out": {"video": "../media/no_index.mp4"},
        "fewer": {"videos": ["whole.mp4", "cut.mp4"]},
    }
    rows = [{**llava(sample_id, f"Q of {sample_id}?", "A cat."), **videos} for sample_id, videos in named.items()]
    rows[-1]["conversations"] = [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "A cat."}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    words = [str(tmp_path / "train.json"), "--media", str(media), "--videos", str(tmp_path / "videos")]
    lines, status = check(*words)
    problems = {re.split("  +", line)[1]: line for line in lines[1:-1]}
    kinds = {"truncated media": "cut", "missing media": "gone", "path leaves the folder": "out"}
    kinds["placeholders differ from videos"] = "fewer"
    assert {kind: kinds[kind] in line for kind, line in problems.items()} == dict.fromkeys(kinds, True)
    assert lines[-1] == "1 files, 5 samples, 6 media files: 4 problems"
    assert status == 1


def test_a_column_that_is_left_out_is_settled_by_the_options_that_are_named(tmp_path: Path) -> None:
    path = tmp_path / "questions.csv"
    path.write_text("image,question,answer,explanation\na.png,which?,red,It is red.\nb.png,which?,blue,It is blue.\n")
    lines, status = check(str(path))
    (settled,) = (line for line in lines if "--ignore" in line)
    assert (settled, status) == ("questions.csv: pass --ignore explanation", 1)
    assert check(str(path), "--ignore", "explanation")[1] == 0
    with pytest.raises(UserError):
        check(str(path), "--ignore", "explanation", "--columns", "Bild=image")
