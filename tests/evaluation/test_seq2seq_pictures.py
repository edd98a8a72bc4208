"""The contact sheet of an encoder-decoder's test says and colours what the task's own score says."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dora_vl.data.example import Answer, Example
from dora_vl.evaluation.pictures import RIGHT, WRONG
from dora_vl.evaluation.scores import caption, video, vqa
from dora_vl.evaluation.seq2seq_pictures import Shown, draw
from tests.evaluation.test_pictures import colors_in


def people(name: str, *said: str) -> Example:
    extra = {"human_answers": [text for text in said for _ in range(10 // len(said))]}
    return Example(id=name, images=("a.png",), question="what?", answers=(Answer(text=said[0]),), extra=extra)


def vqa_task(**answers: str) -> Shown:
    examples = [people(name, "cat", "kitten") for name in answers]
    return Shown("vqav2", examples, answers, vqa.vqa_score(examples, answers, version="before_2021"))


def test_the_title_and_the_marks_are_the_scores() -> None:
    task = vqa_task(first="cat", second="the kitten", third="dog", fourth="Kitten")  # one is the first answer's string
    assert task.title == "vqav2: 75.0% of 4 right"
    assert task.shares() == {"vqav2/first": 1, "vqav2/second": 1, "vqav2/third": 0, "vqav2/fourth": 1}
    assert [one.id for one in task.predictions()] == ["vqav2/first", "vqav2/second", "vqav2/third", "vqav2/fourth"]


def test_what_could_not_be_asked_counts_as_wrong_in_the_title_too() -> None:
    examples = [
        Example(id=f"dev-{n}-0-0", images=("a.png",), question="?", answers=(Answer(text="true"),)) for n in range(4)
    ]
    answers = {"dev-0-0-0": "True", "dev-1-0-0": "false"}
    task = Shown("nlvr2", examples, answers, vqa.nlvr2_score(examples, answers))
    assert task.title == "nlvr2: 25.0% of 4 right"
    assert len(task.predictions()) == 2


def test_a_label_stands_in_its_words_and_other_scores_are_no_share() -> None:
    choice = Example(id="1", images=("a.png",), choices=("red", "blue"), extra={"correct": 1})
    asked = Shown("tvqa", [choice], {"1": "a1"}, video.score([choice], {"1": "a1"}))
    assert [(one.prediction, one.truth) for one in asked.predictions()] == [("blue", "blue")]
    clips = [Example(id=n, images=("a.png",), answers=(Answer(text=f"a man {n} runs"),)) for n in ("one", "two")]
    said = {"one": "a man one runs", "two": "a dog"}
    described = Shown("coco_caption", clips, said, caption.score(clips, said))
    assert described.title.startswith("coco_caption: CIDEr ")
    assert described.shares() == {}
    assert Shown("coco_caption", clips, said, None).title == "coco_caption: 2 answers, not scored"


@pytest.mark.parametrize(
    ("answer", "color", "other"), [("the kitten", RIGHT, WRONG), ("dog", WRONG, RIGHT), ("kitten", RIGHT, WRONG)]
)
def test_the_sheet_is_green_where_the_score_says_so(tmp_path: Path, answer: str, color: str, other: str) -> None:
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.png")
    draw([vqa_task(one=answer)], run_folder=tmp_path, image_folder=str(tmp_path))
    assert color in colors_in(tmp_path / "contact_sheet.png")
    assert other not in colors_in(tmp_path / "contact_sheet.png")


def test_a_caption_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.png")
    clip = Example(id="1", images=("a.png",), answers=(Answer(text="a man runs"),))
    draw([Shown("tvc", [clip], {"1": "a man"}, None)], run_folder=tmp_path, image_folder=str(tmp_path))
    assert not {RIGHT, WRONG} & colors_in(tmp_path / "contact_sheet.png")
