"""Where a chart's lines and ticks are, by hand; confusion and wrong answers counted by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import pytest

from dora_vl.evaluation.predictions import Prediction
from dora_vl.evaluation.results import AnswerScore, SetResult
from dora_vl.evaluation.scores.scored import ItemScore
from dora_vl.report.answers import confusion, low_and_high
from dora_vl.report.charts import MOST_POINTS, Chart, Series, chart


def places(drawn: Chart, colour: int) -> list[tuple[float, float]]:
    """The corners of a line, in the drawing's units."""
    (path,) = re.findall(rf'd="([^"]*)" [^>]*stroke: var\(--c{colour}\)', drawn.svg)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


def test_a_line_is_where_its_numbers_are() -> None:
    drawn = chart("t", [Series(name="a", x=[10.0, 20.0, 30.0], y=[0.0, 50.0, 100.0])], y_label="y", zero=True)
    assert drawn is not None
    left, right, top, bottom = drawn.data["box"]
    low, high = drawn.data["x"]
    x = [left + (value - low) / (high - low) * (right - left) for value in (10, 20, 30)]
    y = [bottom - value / drawn.data["y"][1] * (bottom - top) for value in (0, 50, 100)]
    assert places(drawn, 0) == [pytest.approx(point, abs=0.01) for point in zip(x, y, strict=True)]
    assert drawn.data["y"][0] == 0
    assert drawn.legend == ()


def test_a_logarithmic_axis() -> None:
    drawn = chart("t", [Series(name="a", x=[0.0, 1.0, 2.0], y=[0.01, 0.1, 1.0])], y_label="y", log=True)
    assert drawn is not None
    first, second, third = (y for _, y in places(drawn, 0))
    assert first - second == pytest.approx(second - third, abs=0.02)


def test_long_lines_are_thinned_to_means_and_gaps_left_out() -> None:
    y = [float(number % 2) for number in range(10 * MOST_POINTS)]
    drawn = chart("t", [Series(name="a", x=[float(number) for number in range(len(y))], y=y)], y_label="y")
    assert drawn is not None
    (series,) = drawn.data["series"]
    assert len(series["x"]) == MOST_POINTS
    assert set(series["y"]) == {0.5}
    gaps = chart("t", [Series(name="a", x=[1.0, 2.0, 3.0], y=[1.0, math.nan, 2.0])], y_label="y")
    assert gaps is not None
    assert len(places(gaps, 0)) == 2
    assert chart("t", [Series(name="a", x=[1.0], y=[math.inf])], y_label="y") is None


def item(truth: str, answer: str, kind: str = "", *, share: float | None = None) -> AnswerScore:
    right = float(truth == answer) if share is None else share
    score = ItemScore(unit="", share=right, columns={}, failed=not answer)
    return AnswerScore(score=score, kind=kind, truth=truth, answer=answer)


def of_set(items: Mapping[str, AnswerScore], headline: str = "accuracy") -> SetResult:
    predictions = {name: Prediction(id=name) for name in items}
    return SetResult(name="s", entry={"headline": headline}, scored=None, items=items, predictions=predictions)


def test_confusion_counts_by_hand() -> None:
    pairs = [("yes", "yes"), ("yes", "no"), ("yes", "Yes."), ("no", "no"), ("no", "a boat"), ("yes", "yes")]
    items = {str(number): item(*pair) for number, pair in enumerate([*pairs, ("yes", "")])}  # the last has no answer
    matrix = confusion("t", of_set(items))
    assert matrix is not None
    assert matrix.labels == ("yes", "no")
    assert matrix.columns == ("yes", "no", "other")
    assert matrix.counts == ((3, 1, 0), (0, 1, 1))
    assert confusion("t", of_set({str(number): item(f"answer {number}", "x") for number in range(6)})) is None


def test_wrong_and_right_answers_come_of_every_kind_in_turn() -> None:
    items = {"right": item("x", "x", "b")} | {f"{kind}{n}": item("x", "y", kind) for kind, n in ("a1", "a2", "b1")}
    wrong, right = low_and_high(of_set(items))
    assert ([answer.id for answer in wrong], [answer.id for answer in right]) == (["a1", "b1", "a2"], ["right"])
    shares = {"low": 0.9, "lower": 0.7, "high": 1.6}
    graded = of_set({name: item("x", "x", share=share) for name, share in shares.items()}, headline="CIDEr")
    low, high = low_and_high(graded)
    assert ([answer.id for answer in low], [answer.id for answer in high]) == (["lower", "low"], ["high"])
