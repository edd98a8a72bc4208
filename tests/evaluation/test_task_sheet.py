"""The contact sheet of an encoder-decoder's test says and colours what the task's own score says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from PIL import Image

from dora_vl.data.example import Answer, Clip, Example
from dora_vl.evaluation import test
from dora_vl.evaluation.ask import MediaReader, media_reader
from dora_vl.evaluation.pictures import RIGHT, WRONG
from dora_vl.evaluation.predictions import Prediction, Predictions
from dora_vl.evaluation.questions import Question
from dora_vl.evaluation.scores import caption, exact, vqa
from dora_vl.evaluation.scores.scored import Scored
from tests.evaluation.test_pictures import colors_in


def people(name: str, *said: str) -> Example:
    extra = {"human_answers": [text for text in said for _ in range(10 // len(said))]}
    return Example(id=name, images=("a.png",), question="what?", answers=(Answer(text=said[0]),), extra=extra)


def task(name: str, examples: Sequence[Example], answers: Mapping[str, str], scored: Scored | None) -> test.Answered:
    predictions = Predictions(rows=[Prediction(id=one, prediction=text) for one, text in answers.items()])
    asked: Any = {"model": None, "questions": [], "decoding": None, "score": None, "path": Path()}
    return test.Answered(
        test=test.TestSet(name=name, examples=examples, **asked), predictions=predictions, scored=scored
    )


def draw(folder: Path, *tasks: test.Answered) -> None:
    test.draw(tasks, run_folder=folder, media=media_reader(folder, frames=1))


def drawn(folder: Path, *tasks: test.Answered) -> tuple[Any, ...]:
    """What the sheet is drawn of: predictions, title and shares."""
    with mock.patch.object(test, "write_contact_sheet") as sheet:
        draw(folder, *tasks)
    return sheet.call_args.args[0], sheet.call_args.kwargs["title"], sheet.call_args.kwargs["shares"]


def test_the_title_and_the_marks_are_the_scores(tmp_path: Path) -> None:
    said = {"first": "cat", "second": "the kitten", "third": "dog", "fourth": "Kitten"}
    examples = [people(name, "cat", "kitten") for name in said]
    scored = vqa.vqa_score(examples, said, version="before_2021")
    rows, title, shares = drawn(tmp_path, task("vqav2", examples, said, scored))
    assert title.startswith("vqav2: 75.0% of 4 right")
    assert shares == {"vqav2/first": 1, "vqav2/second": 1, "vqav2/third": 0, "vqav2/fourth": 1}
    assert [row.id for row in rows] == list(shares)


def test_a_label_stands_in_its_words_and_other_scores_are_no_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # without Java, which takes eight seconds for each score of a caption
    choice = Example(id="1", images=("a.png",), choices=("red", "blue"), extra={"correct": 1})
    clips = [Example(id=n, images=("a.png",), answers=(Answer(text=f"a man {n} runs"),)) for n in ("one", "two")]
    said = {"one": "a man one runs", "two": "a dog"}
    rows, title, shares = drawn(
        tmp_path,
        task("tvqa", [choice], {"1": "a1"}, exact.video_score([choice], {"1": "a1"})),
        task("coco_caption", clips, said, caption.score(clips, said)),
    )
    assert (rows[0].prediction, rows[0].truth) == ("blue", "blue")
    assert "coco_caption: CIDEr " in title
    assert shares == {"tvqa/1": 1.0}
    assert drawn(tmp_path, task("tvc", clips, said, None))[1] == "tvc: 2 answers, not scored"


@pytest.mark.parametrize("answer", ["the kitten", "dog", ""])
def test_the_sheet_is_green_where_the_score_says_so(tmp_path: Path, answer: str) -> None:
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.png")
    examples = [people("one", "cat", "kitten")]
    scored = vqa.vqa_score(examples, {"one": answer}, version="before_2021") if answer else None
    draw(tmp_path, task("x", examples, {"one": answer}, scored))
    expected = {"the kitten": {RIGHT}, "dog": {WRONG}, "": set[str]()}[answer]
    assert {RIGHT, WRONG} & colors_in(tmp_path / "contact_sheet.png") == expected


def test_each_question_shows_its_own_part_of_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (("a.mp4", 0), ("a.mp4", 2), ("a.mp4", 4), ("b.mp4", 0))
    clips = [Clip(path=path, start_seconds=start, end_seconds=start + 2) for path, start in parts]
    examples = [Example(id=str(number), videos=(clip,), question="?") for number, clip in enumerate(clips)]
    shown: list[Clip] = []

    def picture(_: MediaReader, question: Question) -> Image.Image:
        shown.extend(question.videos)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(MediaReader, "picture", picture)
    answers = dict.fromkeys([example.id for example in examples], "red")
    draw(tmp_path, task("x", examples, answers, None))
    assert sorted(shown, key=clips.index) == clips
