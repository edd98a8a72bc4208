"""Intervals over seeds and units together: how often they hold the truth, and what they are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from dora_vl.errors import UserError
from dora_vl.evaluation.scores.scored import Mean, Ratio, Scored, Tally, paired_differences
from dora_vl.report import contrasts
from dora_vl.report.contrasts import Contenders, quantile


def scored(hits: Sequence[float], *, metric: str = "accuracy", per_unit: int = 1, scale: float = 100.0) -> Scored:
    tally = Tally()
    for number, hit in enumerate(hits):
        tally.add(str(number), hit, {"right": hit, "asked": 1.0}, unit=f"picture {number // per_unit}")
    return tally.scored({metric: Ratio("right", "asked", scale=scale)})


def runs(*hits: Sequence[float], **more: float) -> list[dict[str, Scored]]:
    return [{"test": scored(row, **more)} for row in hits]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("tail", "freedom", "expected"),
    [
        (0.025, 2, 4.302653),
        (0.025, 4, 2.776445),
        (0.025, 10, 2.228139),
        (0.005, 3, 5.840909),
        (0.025, np.inf, 1.959964),
    ],
)
def test_quantiles_are_those_of_the_tables(tail: float, freedom: float, expected: float) -> None:
    assert quantile(tail, freedom) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.0), (3, 0.02), (3, 0.08), (5, 0.0), (5, 0.02), (5, 0.08)])
def test_intervals_hold_the_truth_as_often_as_they_say(
    seeds: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a mean and of a difference, where seeds move the share right by 0, 2 and 8 points.

    The bootstrap's variances are put in as their formulas here, 2,000 tables of 200 units; one table by the bootstrap
    itself agrees with them.
    """
    random, units, tables = np.random.default_rng(7), 200, 2000
    difficulty = random.beta(1.3, 0.7, (tables, 1, units))

    def drawn() -> np.ndarray:
        shift = random.normal(0, spread, (tables, seeds, 1))
        return (random.random((tables, seeds, units)) < np.clip(difficulty + shift, 0, 1)).astype(float)

    ours, theirs = drawn(), drawn()
    truth = 100 * np.clip(random.beta(1.3, 0.7, 10**6) + random.normal(0, spread, 10**6), 0, 1).mean()
    held = {"mean": 0, "difference": 0}
    table = Contenders({"ours": runs(*ours[0]), "theirs": runs(*theirs[0])})
    (measure,) = table.measures
    bootstrapped = table.score(measure, "ours"), table.difference(measure, "ours", "theirs")
    for number in range(tables):
        hits = {"ours": ours[number], "theirs": theirs[number]}
        table = _with_exact_variances(hits, table, monkeypatch)
        score, difference = table.score(measure, "ours"), table.difference(measure, "ours", "theirs")
        if number == 0:
            for one, other in zip(bootstrapped, (score, difference), strict=True):
                assert (one.high - one.low) == pytest.approx(other.high - other.low, rel=0.08)
        held["mean"] += score.low <= truth <= score.high
        held["difference"] += difference.low <= 0 <= difference.high
    for name, count in held.items():
        assert 0.925 < count / tables < 0.975, (name, count / tables)  # 93 to 97, and the chance of 2,000 tables


def _with_exact_variances(
    hits: dict[str, np.ndarray], table: Contenders, monkeypatch: pytest.MonkeyPatch
) -> Contenders:
    """The same table for other hits, two draws standing for all: a mean and its standard error to either side."""

    def spread_of(name: str, other: str | None) -> float:
        apart = hits[name].mean(0) - (0 if other is None else hits[other].mean(0))
        return float(apart.var() / apart.size) * 10_000

    def of_seeds(_: object, name: str) -> contrasts.SeedPart:
        rows = hits[name]
        each = float((rows.var(1) / rows.shape[1]).mean()) * 10_000
        shared = max(0.0, each - spread_of(name, None)) / (len(rows) - 1)
        return contrasts.SeedPart(float(rows.mean(1).var(ddof=1)) / len(rows) * 10_000, shared, len(rows))

    def mean_draws(_: object, name: str) -> np.ndarray:
        other = "theirs" if name == "ours" else None
        own = np.sqrt(spread_of(name, None))
        if other is None:  # chosen so that the difference of the two has its own variance
            together = spread_of("ours", "theirs")
            return np.array([0.0, 0.0]) if together == 0 else _partner(np.sqrt(spread_of("ours", None)), together)
        return np.array([-own, own])

    monkeypatch.setattr(table, "by_seed", lambda _, name: list(100 * hits[name].mean(1)))
    monkeypatch.setattr(table, "_of_seeds", of_seeds)
    monkeypatch.setattr(table, "_mean_draws", mean_draws)
    return table


def _partner(own: float, together: float) -> np.ndarray:
    return np.array([-1.0, 1.0]) * (own - np.sqrt(together))


def test_few_seeds_give_an_interval_over_units_alone() -> None:
    first, second = [1.0] * 60 + [0.0] * 40, [1.0] * 90 + [0.0] * 10
    two, three = (Contenders({"a": runs(first, second, *more)}) for more in ([], [[1.0] * 75 + [0.0] * 25]))
    narrow, wide = (table.score(table.measures[0], "a") for table in (two, three))
    assert narrow.value == wide.value == pytest.approx(75)
    assert narrow.high - narrow.low < 16
    assert wide.high - wide.low > 40  # seeds of 60, 75 and 90, and t of two degrees of freedom


def test_items_of_one_unit_are_drawn_together() -> None:
    hits = [1.0] * 300 + [0.0] * 100
    alone, together = (Contenders({"a": runs(hits, hits, hits, per_unit=count)}) for count in (1, 10))
    narrow, wide = (table.score(table.measures[0], "a") for table in (alone, together))
    assert (wide.high - wide.low) == pytest.approx(np.sqrt(10) * (narrow.high - narrow.low), rel=0.1)


def test_a_score_is_the_formula_of_its_scorer_and_the_mean_over_sets() -> None:
    """300 items of one set right and 100 of another wrong are 50, not 75; CIDEr is no share."""
    right, wrong = scored([1.0] * 300), scored([0.0] * 100)
    table = Contenders({"a": [{"boolq": right, "piqa": wrong}]})
    assert [measure.name for measure in table.measures] == ["average", "boolq", "piqa"]
    assert table.score(table.measures[0], "a").value == 50
    tally = Tally()
    for number, task in enumerate(["boolq"] * 300 + ["piqa"] * 100):
        tally.add(str(number), float(task == "boolq"), {f"right {task}": float(task == "boolq"), f"asked {task}": 1.0})
    shares = {task: Ratio(f"right {task}", f"asked {task}") for task in ("boolq", "piqa")}
    average = tally.scored({"average": Mean(tuple(shares.values())), **shares})
    table = Contenders({"a": [{"generation": average}]})
    assert table.score(table.measures[0], "a").value == 50
    twice = Contenders({"a": [{"generation": average, "likelihood": average}]})
    assert [measure.name for measure in twice.measures] == ["generation", "likelihood"]
    captions = scored([3.1, 3.0, 3.2] * 10, metric="CIDEr")
    table = Contenders({"a": [{"coco": captions, "vqa": right}]})
    assert [(measure.name, measure.metric) for measure in table.measures] == [("coco", "CIDEr"), ("vqa", "accuracy")]
    score = table.score(table.measures[0], "a")
    assert score.value == pytest.approx(310)
    assert 305 < score.low < 310 < score.high < 315


def test_equal_answers_have_wilsons_limits() -> None:
    table = Contenders({"a": runs([1.0] * 40, [1.0] * 40, [1.0] * 40), "b": runs([1.0] * 40)})
    score = table.score(table.measures[0], "a")
    assert (score.low, score.high) == (pytest.approx(91.24, abs=0.01), 100)
    apart = table.difference(table.measures[0], "a", "b")
    expected = paired_differences(scored([1.0] * 40), scored([1.0] * 40))["accuracy"]
    assert (apart.low, apart.high) == pytest.approx((expected.low, expected.high))


def test_a_difference_over_many_contrasts_is_wider() -> None:
    random = np.random.default_rng(3)
    base = (random.random((3, 400)) < 0.7).astype(float)
    better = np.maximum(base, random.random((3, 400)) < 0.1)
    table = Contenders({"a": runs(*better), "b": runs(*base)})
    one, of_many = (table.difference(table.measures[0], "a", "b", contrasts=count) for count in (1, 20))
    assert (one.low, one.high) == (of_many.low, of_many.high) == one.simultaneous
    assert of_many.simultaneous is not None
    assert of_many.simultaneous[0] < one.low < one.value < one.high < of_many.simultaneous[1]


def test_runs_of_other_items_are_refused() -> None:
    with pytest.raises(UserError):
        Contenders({"a": runs([1.0, 0.0, 1.0]), "b": runs([1.0, 0.0])})
