"""Where a chart's lines and ticks are, by hand; confusion and worst answers counted by hand."""

from __future__ import annotations

import math
import re

import pytest

from dora_vl.adapters.decomposition import Panel, Point
from dora_vl.core.analysis import WeightChange
from dora_vl.report.answers import Item, confusion, worst
from dora_vl.report.charts import MOST_POINTS, Chart, Series, chart
from dora_vl.report.views import by_stack, depth_of, over_depth


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
    with_zero = chart("t", [Series(name="a", x=[0.0, 1.0], y=[0.0, 1.0])], y_label="y", log=True)
    assert with_zero is not None
    assert with_zero.data["log"] is False


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


def item(name: str, truth: str, prediction: str, kind: str = "", share: float | None = None) -> Item:
    right = float(truth == prediction) if share is None else share
    words = {
        "truth": truth,
        "prediction": prediction,
        "whole": prediction,
        "label": truth,
        "prediction_label": prediction,
    }
    return Item(id=name, question="q", kind=kind, share=right, **words)


def test_confusion_counts_by_hand() -> None:
    pairs = [("yes", "yes"), ("yes", "no"), ("yes", "Yes."), ("no", "no"), ("no", "a boat"), ("yes", "yes")]
    matrix = confusion("t", [item(str(number), *pair) for number, pair in enumerate(pairs)])
    assert matrix is not None
    assert matrix.labels == ("yes", "no")
    assert matrix.columns == ("yes", "no", "other")
    assert matrix.counts == ((3, 1, 0), (0, 1, 1))
    open_answers = [item(str(number), f"answer {number}", "x") for number in range(6)]
    assert confusion("t", open_answers) is None


def test_the_worst_are_wrong_and_of_every_kind_in_turn() -> None:
    items = [
        item("a1", "x", "y", "a"),
        item("a2", "x", "y", "a"),
        item("b1", "x", "y", "b"),
        item("right", "x", "x", "b"),
    ]
    assert [entry.id for entry in worst(items, 3, is_accuracy=True)] == ["a1", "b1", "a2"]
    graded = [item("low", "x", "x", share=0.9), item("lower", "x", "x", share=0.7)]
    assert [entry.id for entry in worst(graded, 2, is_accuracy=False)] == ["lower", "low"]


def test_layers_of_two_stacks_are_two_lines() -> None:
    change = WeightChange(magnitude=1.0, direction=0.5, vectors=2, without_direction=0)
    names = [f"model.{side}.layers.{depth}.self_attn.q_proj" for side in ("encoder", "decoder") for depth in (0, 10)]
    points = [Point(name, 1, change) for name in names]
    stacks = by_stack(points)
    assert list(stacks) == ["encoder.self_attn.q_proj", "decoder.self_attn.q_proj"]
    assert [depth_of(point.layer) for point in stacks["decoder.self_attn.q_proj"]] == [0, 10]
    assert list(by_stack(points[:2])) == ["q_proj"]
    assert depth_of("model.multi_modal_projector.linear_1") is None
    several = over_depth(Panel("run", "runs/x", "dora", tuple(points), 0))
    assert [plot.legend[0].name for plot in several] == ["encoder.self_attn.q_proj"] * 2
