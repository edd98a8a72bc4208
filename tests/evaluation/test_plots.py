"""The run's pictures are whole PNG files that show what they should, coloured as the score says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from dora_vl.data.example import Answer, Example
from dora_vl.errors import BadSample
from dora_vl.evaluation import test
from dora_vl.evaluation.plots import (
    COLUMNS,
    RIGHT,
    SHEET_CELLS,
    TRAIN,
    VALIDATION,
    WRONG,
    chosen_for_sheet,
    loss_unit,
    series,
    smoothed,
    write_contact_sheet,
    write_loss_curve,
)
from dora_vl.evaluation.predictions import Prediction, Predictions
from dora_vl.evaluation.predictor import media_reader
from dora_vl.evaluation.scores import caption, exact, vqa
from dora_vl.evaluation.scores.scored import Scored
from dora_vl.evaluation.test_sets import Tested, TestSet


def prediction(number: int, answer: str = "red") -> Prediction:
    return Prediction(id=str(number), images=[f"{number}.png"], question="what color?", truth="red", prediction=answer)


def colors_in(path: Path) -> set[str]:
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in np.unique(pixels, axis=0)}


def test_the_loss_curve_shows_training_and_validation(tmp_path: Path) -> None:
    entries = [{"step": step, "loss": 3.0 / step, "learning_rate": 1e-3} for step in range(1, 30)]
    write_loss_curve(
        [*entries, {"step": 10, "eval_loss": 1.0}, {"step": 20, "eval_loss": 0.5}], tmp_path / "a.png", unit="dpo"
    )
    assert {TRAIN, VALIDATION} <= colors_in(tmp_path / "a.png")
    write_loss_curve(entries, tmp_path / "b.png", unit="dpo")
    assert VALIDATION not in colors_in(tmp_path / "b.png")
    assert series([{"step": 1, "loss": "nan"}, {"step": 2}], "loss") == ([], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("objective", "unit"),
    [
        ({}, "nats per answer token"),
        ({"loss": "sft"}, "nats per answer token"),
        ({"loss": "dpo"}, "dpo"),
        ({"loss": {"dpo": 1.0, "sft": 0.2}}, "dpo + 0.2 sft"),
    ],
)
def test_a_loss_is_named_as_what_it_is(objective: dict[str, Any], unit: str) -> None:
    assert loss_unit(objective) == unit


def test_margin_and_accuracy_have_axes_of_their_own(tmp_path: Path) -> None:
    entries = [{"step": n, "loss": 0.5 - 0.1 * n, "rewards/margin": n - 5.0, "rewards/accuracy": 0.5} for n in range(9)]
    with mock.patch("dora_vl.evaluation.plots.save_png") as saved:
        write_loss_curve(entries, tmp_path / "a.png", unit="dpo")
    figure = saved.call_args[0][0]
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss (dpo)", "margin", "accuracy"]
    assert figure.axes[0].get_yscale() == "linear"  # a loss may be below 0


def test_values_below_0_are_averaged_as_they_are() -> None:
    assert smoothed([-16.0, -16.0, -16.0]) == pytest.approx([-16.0] * 3)
    assert smoothed([-1.0, 1.0]) == pytest.approx([-1.0, (-0.16 + 0.2) / 0.36])
    assert smoothed([4.0, 1.0]) == pytest.approx([4.0, 4.0 ** (0.16 / 0.36)])


def test_the_sheet_is_a_fair_sample_with_a_row_of_mistakes() -> None:
    rows = [prediction(number) for number in range(1000)]
    shares = {row.id: float(int(row.id) < 900) for row in rows}
    fair, mistakes = chosen_for_sheet(rows, shares)
    assert (len(fair), len(mistakes)) == (SHEET_CELLS - COLUMNS, COLUMNS)
    assert all(int(row.id) >= 900 for row in mistakes)
    assert len({row.id for row in fair + mistakes}) == SHEET_CELLS
    assert chosen_for_sheet(rows[:2], {})[1] == []


def test_the_sheet_survives_broken_pictures_and_long_or_empty_text(tmp_path: Path) -> None:
    def picture(row: Prediction) -> Image.Image:
        if row.id.startswith("0"):
            raise BadSample(row.id, "picture 0.png is missing in a folder with a long name somewhere")
        return Image.new("RGB", (64, 64 if row.id.startswith("1") else 500), "white")

    rows = [prediction(number, ("red", "", "a very long answer " * 20)[number % 3]) for number in range(7)]
    write_contact_sheet(rows, picture, tmp_path / "sheet.png", title="one", shares={})
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > sheet.height / 3
    sheets = []
    # Mathematics would draw the first three alike.
    for question, heard in (("$a$", ""), ("$a $", ""), (r"\$a\$", ""), ("$a$", "Look.")):
        rows = [replace(prediction(1), question=question)]
        write_contact_sheet(rows, picture, tmp_path / "sheet.png", title="one", shares={}, subtitles={"1": heard})
        sheets.append((tmp_path / "sheet.png").read_bytes())
    assert len(set(sheets)) == 4


def people(name: str, *answers: str) -> Example:
    extra = {"human_answers": [text for text in answers for _ in range(10 // len(answers))]}
    return Example(id=name, images=("a.png",), question="what?", answers=(Answer(text=answers[0]),), extra=extra)


def task(name: str, examples: Sequence[Example], answers: Mapping[str, str], scored: Scored | None) -> Tested:
    predictions = Predictions(rows=[Prediction(id=sample_id, prediction=text) for sample_id, text in answers.items()])
    return Tested(test=TestSet(name=name, examples=examples, score=None), predictions=predictions, scored=scored)


def draw(folder: Path, *tasks: Tested) -> None:
    test.draw(tasks, run_folder=folder, media=media_reader(folder, frames=1))


def test_a_label_stands_in_its_words_and_other_scores_are_no_share(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", "")  # without Java, which takes eight seconds for each score of a caption
    choice = Example(id="1", images=("a.png",), choices=("red", "blue"), extra={"correct": 1})
    clips = [Example(id=n, images=("a.png",), answers=(Answer(text=f"a man {n} runs"),)) for n in ("one", "two")]
    predictions = {"one": "a man one runs", "two": "a dog"}
    choices = task("tvqa", [choice], {"1": "a1"}, exact.video_score([choice], {"1": "a1"}))
    captions = task("coco_caption", clips, predictions, caption.score(clips, predictions))
    with mock.patch.object(test, "write_contact_sheet") as sheet:
        draw(tmp_path, choices, captions, task("tvc", clips, predictions, None))
    (rows, *_), named = sheet.call_args
    assert (rows[0].prediction, rows[0].truth) == ("blue", "blue")
    assert "coco_caption: CIDEr " in named["title"]
    assert "tvc: 2 answers, not scored" in " ".join(named["title"].split())
    assert named["shares"] == {"tvqa/1": 1.0}


@pytest.mark.parametrize("answer", ["the kitten", "dog", ""])
def test_the_sheet_is_green_where_the_score_says_so(tmp_path: Path, answer: str) -> None:
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.png")
    examples = [people("one", "cat", "kitten")]
    scored = vqa.vqa_score(examples, {"one": answer}, version="before_2021") if answer else None
    draw(tmp_path, task("x", examples, {"one": answer}, scored))
    expected = {"the kitten": {RIGHT}, "dog": {WRONG}, "": set[str]()}[answer]
    assert {RIGHT, WRONG} & colors_in(tmp_path / "contact_sheet.png") == expected
