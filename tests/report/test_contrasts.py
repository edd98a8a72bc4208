"""Intervals over seeds and units together: how often they hold the truth, and what they are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from dora_vl.errors import UserError
from dora_vl.evaluation.scores.scored import Mean, Ratio, Scored, Tally
from dora_vl.report import contrasts
from dora_vl.report.contrasts import Contenders, Estimate, half_width, quantile


def scored(hits: Sequence[float], *, metric: str = "accuracy") -> Scored:
    tally = Tally()
    for number, hit in enumerate(hits):
        tally.add(str(number), hit, {"right": hit, "asked": 1.0})
    return tally.scored({metric: Ratio("right", "asked")})


def runs(*hits: Sequence[float]) -> list[dict[str, Scored]]:
    return [{"test": scored(row)} for row in hits]


@pytest.mark.parametrize(
    ("tail", "freedom", "expected"),
    [(0.025, 2, 4.302653), (0.025, 10, 2.228139), (0.005, 3, 5.840909), (0.025, np.inf, 1.959964)],
)
def test_quantiles_are_those_of_the_tables(tail: float, freedom: float, expected: float) -> None:
    assert quantile(tail, freedom) == pytest.approx(expected, abs=2e-5)


def variances(hits: np.ndarray) -> tuple[contrasts.SeedPart, float]:
    """What seeds and units add to the variance of a mean, by their formulas instead of a bootstrap."""
    each, together = 1e4 * (hits.var(1) / hits.shape[1]).mean(), 1e4 * hits.mean(0).var() / hits.shape[1]
    return contrasts.seed_part(list(100 * hits.mean(1)), float(each), float(together)), float(together)


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.0), (3, 0.02), (3, 0.08), (5, 0.0), (5, 0.02), (5, 0.08)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int, spread: float) -> None:
    """Of a mean and of a difference, where seeds move the share right by 0, 2 and 8 points: 2,000 tables."""
    random, units, tables = np.random.default_rng(7), 200, 2000
    difficulty = random.beta(1.3, 0.7, (tables, 1, units))

    def drawn() -> np.ndarray:
        shift = random.normal(0, spread, (tables, seeds, 1))
        return (random.random((tables, seeds, units)) < np.clip(difficulty + shift, 0, 1)).astype(float)

    every, others = drawn(), drawn()
    truth = 100 * np.clip(random.beta(1.3, 0.7, 10**6) + random.normal(0, spread, 10**6), 0, 1).mean()
    held = np.zeros(2)
    for number, (ours, theirs) in enumerate(zip(every, others, strict=True)):
        (own, of_units), (other, _) = variances(ours), variances(theirs)
        apart = 1e4 * float((ours.mean(0) - theirs.mean(0)).var()) / units
        halves = half_width([own], of_units, 0.025, units), half_width([own, other], apart, 0.025, units)
        held += np.abs([100 * ours.mean() - truth, 100 * (ours.mean() - theirs.mean())]) <= halves
        if number == 0:  # the bootstrap itself says the same
            table = Contenders({"ours": runs(*ours), "theirs": runs(*theirs)})
            (measure,) = table.measures
            drawn_limits = table.score(measure, "ours"), table.difference(measure, "ours", "theirs")
            assert [row.high - row.low for row in drawn_limits] == pytest.approx(2 * np.array(halves), rel=0.08)
    assert (held / tables > 0.93).all()
    assert (held / tables < 0.975).all()  # 97, and the chance of 2,000 tables


def test_few_seeds_give_an_interval_over_items_only_where_it_is_asked_for() -> None:
    first, second = [1.0] * 60 + [0.0] * 40, [1.0] * 90 + [0.0] * 10
    two, three = (Contenders({"a": runs(first, second, *more)}) for more in ([], [[1.0] * 75 + [0.0] * 25]))
    assert two.score(two.measures[0], "a") == Estimate(pytest.approx(75))
    assert two.difference(two.measures[0], "a", "a") == Estimate(0.0)
    narrow, wide = two.score(two.measures[0], "a", over_seeds=False), three.score(three.measures[0], "a")
    assert None not in (narrow.low, narrow.high, wide.low, wide.high)
    assert narrow.value == wide.value == pytest.approx(75)
    assert narrow.high - narrow.low < 16
    assert wide.high - wide.low > 40  # seeds of 60, 75 and 90, and t of two degrees of freedom


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
    score = table.score(table.measures[0], "a", over_seeds=False)
    assert score.value == pytest.approx(310)
    assert 305 < score.low < 310 < score.high < 315


def test_runs_of_other_items_are_refused() -> None:
    with pytest.raises(UserError):
        Contenders({"a": runs([1.0, 0.0, 1.0]), "b": runs([1.0, 0.0])})
