"""The run's pictures are whole PNG files that show what they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dora_vl.adapters.decomposition import Panel
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.analyze_command import draw_panels
from dora_vl.evaluation.pictures import (
    COLUMNS,
    SHEET_CELLS,
    TRAIN,
    VALIDATION,
    chosen_for_sheet,
    series,
    smoothed,
    write_contact_sheet,
    write_loss_curve,
)
from dora_vl.evaluation.predictions import Prediction


def prediction(number: int, answer: str = "red") -> Prediction:
    return Prediction(id=str(number), images=[f"{number}.png"], question="what color?", truth="red", prediction=answer)


def colors_in(path: Path) -> set[str]:
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in np.unique(pixels, axis=0)}


def test_the_loss_curve_shows_training_and_validation(tmp_path: Path) -> None:
    entries = [{"step": step, "loss": 3.0 / step, "learning_rate": 1e-3} for step in range(1, 30)]
    write_loss_curve([*entries, {"step": 10, "eval_loss": 1.0}, {"step": 20, "eval_loss": 0.5}], tmp_path / "a.png")
    assert {TRAIN, VALIDATION} <= colors_in(tmp_path / "a.png")
    write_loss_curve(entries, tmp_path / "b.png")
    assert VALIDATION not in colors_in(tmp_path / "b.png")
    with pytest.raises(UserError):
        write_loss_curve([{"step": 1, "loss": "nan"}, {"epoch": 1.0}], tmp_path / "c.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_series_and_average() -> None:
    assert series([{"step": 1, "x": 2.0}, {"step": 2}, {"x": 3.0}, {"step": 3, "x": "nan"}], "x") == ([1], [2.0])
    assert smoothed([4.0, 4.0, 4.0]) == pytest.approx([4.0] * 3)
    assert smoothed([1.0, 8.0], weight=0.5) == pytest.approx([1.0, 4.0])  # 8 to the power of 2 / 3
    assert smoothed([0.5, 0.0], weight=0.5) == pytest.approx([0.5, 0.5])
    assert smoothed([0.0]) == [1.0]
    late = [0.0006] * 40 + [0.4] + [0.0006] * 15
    assert smoothed(late)[-1] == pytest.approx(0.0006, rel=0.1)  # of a logarithmic axis it stays among the losses


def test_the_sheet_is_a_fair_sample_with_a_row_of_mistakes() -> None:
    rows = [prediction(number) for number in range(1000)]
    shares = {row.id: float(int(row.id) < 900) for row in rows}
    fair, mistakes = chosen_for_sheet(rows, shares)
    assert (len(fair), len(mistakes)) == (SHEET_CELLS - COLUMNS, COLUMNS)
    assert all(int(one.id) >= 900 for one in mistakes)
    assert len({one.id for one in fair + mistakes}) == SHEET_CELLS
    assert chosen_for_sheet(rows[:2], {})[1] == []


@pytest.mark.parametrize("count", [1, 7, 60])
def test_the_sheet_survives_broken_pictures_and_long_or_empty_text(tmp_path: Path, count: int) -> None:
    def picture(row: Prediction) -> Image.Image:
        if row.id.startswith("0"):
            raise BadSample(row.id, "picture 0.png is missing in a folder with a long name somewhere")
        return Image.new("RGB", (64, 64 if row.id.startswith("1") else 500), "white")

    rows = [prediction(number, ("red", "", "a very long answer " * 20)[number % 3]) for number in range(count)]
    write_contact_sheet(rows, picture, tmp_path / "sheet.png", title="one", shares={})
    with Image.open(tmp_path / "sheet.png") as sheet:
        sheet.load()
        assert sheet.width > sheet.height / 3
    with pytest.raises(UserError):
        write_contact_sheet([], picture, tmp_path / "sheet.png", title="one", shares={})


def drawn(path: Path, question: str = "what?", said: str = "") -> bytes:
    row = Prediction(id="1", images=["1.png"], question=question, truth="red", prediction="red")
    write_contact_sheet([row], white, path, title="one", shares={}, subtitles={"1": said})
    with Image.open(path) as sheet:
        return sheet.tobytes()


def white(_: Prediction) -> Image.Image:
    return Image.new("RGB", (64, 64), "white")


@pytest.mark.parametrize(
    "changes",
    [
        ({"question": "is $a$ or b?"}, {"question": "is $a $ or b?"}),  # mathematics draws both alike
        ({"question": r"is \$a\$ or b?"}, {"question": "is $a$ or b?"}),  # and drops a backslash before a dollar
        ({}, {"said": "anna: look at the red one. " * 9}),
    ],
)
def test_text_is_drawn_as_it_stands(tmp_path: Path, changes: tuple[dict[str, str], dict[str, str]]) -> None:
    first, second = (drawn(tmp_path / f"{number}.png", **change) for number, change in enumerate(changes))
    assert first != second


@settings(max_examples=8, deadline=None)
@given(st.text(max_size=40), st.text("$\\{}^_ab \n\0\ud800\u200f\u202e", max_size=20))
def test_any_text_can_be_drawn(tmp_path: Path, text: str, marks: str) -> None:
    row = Prediction(id="1", images=["1.png"], question=text, truth=marks, prediction=marks + text)
    write_contact_sheet([row], white, tmp_path / "a.png", title=marks, shares={}, subtitles={"1": text + marks})


def test_any_label_can_be_drawn_over_a_decomposition(tmp_path: Path) -> None:
    panel = Panel(label=r"runs/$x^$ \ud83d", source="", method="dora", points=(), unchanged=0)
    draw_panels([panel], ["a"], tmp_path / "a.png")
