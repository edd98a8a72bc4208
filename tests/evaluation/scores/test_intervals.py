"""Intervals: as wide as theory says, the same at every run, by whole units, paired; how often they hold the truth."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pytest

from dora_vl.data.example import Answer, Example
from dora_vl.errors import UserError
from dora_vl.evaluation.scores import exact, vqa
from dora_vl.evaluation.scores import scored as bootstrap
from dora_vl.evaluation.scores.scored import (
    PERCENT,
    Limits,
    Mean,
    Ratio,
    Scored,
    Tally,
    Total,
    intervals,
    paired_differences,
    share_limits,
)


def questions(hits: list[int], per_unit: int = 1) -> Scored:
    tally = Tally()
    for number, hit in enumerate(hits):
        tally.add(str(number), float(hit), {"right": float(hit), "asked": 1.0}, unit=f"picture {number // per_unit}")
    return tally.scored({"accuracy": Ratio("right", "asked")})


def test_the_interval_is_as_wide_as_the_normal_approximation_says() -> None:
    low, high = intervals(questions([1] * 300 + [0] * 100))["accuracy"]
    width = 1.96 * 100 * np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == (pytest.approx(75 - width, abs=0.35), pytest.approx(75 + width, abs=0.35))


def test_questions_about_one_picture_are_drawn_together() -> None:
    alone, together = questions([1, 1, 1, 1, 0, 0, 0, 0] * 25), questions([1, 1, 1, 1, 0, 0, 0, 0] * 25, per_unit=4)
    assert alone.metrics == together.metrics
    narrow, wide = (np.diff(intervals(scored)["accuracy"])[0] for scored in (alone, together))
    assert wide / narrow == pytest.approx(2.0, rel=0.15)  # four equal answers are one observation


def test_draws_are_the_same_at_every_call_also_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = questions([1, 0, 0, 1, 1] * 20)
    whole = intervals(scored)
    assert intervals(scored) == whole
    monkeypatch.setattr(bootstrap, "COUNTS_AT_ONCE", 730)
    assert intervals(scored) == whole


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    random = np.random.default_rng(3)
    base = (random.random(400) < 0.7).astype(int)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:12]] = 1  # the same but for twelve questions more
    ours, theirs = questions(better.tolist()), questions(base.tolist())
    difference = paired_differences(ours, theirs)["accuracy"]
    assert difference.value == pytest.approx(3.0)
    assert 1.0 < difference.low < 3.0 < difference.high < 5.0
    assert intervals(ours)["accuracy"][0] < theirs.metrics["accuracy"] < intervals(ours)["accuracy"][1]
    turned = paired_differences(theirs, ours)["accuracy"]
    assert (turned.value, turned.low, turned.high) == pytest.approx((-3.0, -difference.high, -difference.low))
    with pytest.raises(UserError):  # other items
        paired_differences(questions([1, 0, 1]), questions([1, 0, 1, 1]))


def of_kinds(kinds: list[str], right: set[int]) -> Scored:
    answers = {str(n): "yes" if n in right else "no" for n in range(len(kinds))}
    yes = (Answer(text="yes"),)
    return exact.score([Example(id=str(n), answers=yes, extra={"kind": kind}) for n, kind in enumerate(kinds)], answers)


@pytest.mark.filterwarnings("error")
def test_draws_without_a_rare_kind_are_left_out_of_its_interval_and_of_its_difference() -> None:
    kinds = ["usual"] * 39 + ["rare"]
    ours, theirs = of_kinds(kinds, {*range(20), 39}), of_kinds(kinds, set(range(20)))
    one_unit = 100 * 0.025  # exact of one of one; other draws say nothing of it
    assert intervals(ours)["kind/rare"] == (pytest.approx(one_unit, abs=0.01), 100.0)
    assert intervals(theirs)["kind/rare"] == (0.0, pytest.approx(100 - one_unit, abs=0.01))
    difference = paired_differences(ours, theirs)["kind/rare"]
    assert (difference.value, difference.high) == (100.0, 100.0)
    assert difference.low == pytest.approx(100 - 2 * (100 - one_unit), abs=0.02)
    low, high = intervals(ours)["accuracy"]
    assert low < 100 * 21 / 40 < high  # every draw counts where every draw has items


@pytest.mark.filterwarnings("error")
def test_a_metric_that_hardly_any_draw_has_gets_no_interval() -> None:
    tally, kinds = Tally(), "abcdefgh"
    for kind in kinds:
        tally.add(kind, 1.0, {f"right {kind}": 1.0, f"asked {kind}": 1.0})
    parts = {kind: Ratio(f"right {kind}", f"asked {kind}") for kind in kinds}
    scored = tally.scored({"average": Mean(tuple(parts.values())), **parts})
    assert scored.metrics["average"] == 100.0
    assert set(intervals(scored)) == set(kinds)  # a draw of eight has all eight in 0.24 % of the cases
    assert set(paired_differences(scored, scored)) == set(kinds)


def test_a_metric_of_the_whole_set_alone_has_no_interval() -> None:
    examples = [Example(id=str(n), answers=(Answer(text="yes"),), extra={"global_group": "colour"}) for n in range(5)]
    scored = vqa.gqa_score(examples, {"0": "yes"})
    assert scored.metrics.keys() - intervals(scored).keys() == {"distribution"}


def agreeing(hits: list[int], per_unit: int = 1) -> Scored:
    tally = Tally()
    for number, hit in enumerate(hits):
        columns = {"right": float(hit), "asked": 1.0, "right late": float(hit), "asked late": float(number > 9)}
        tally.add(str(number), float(hit), columns, unit=f"picture {number // per_unit}")
    whole, late = Ratio("right", "asked"), Ratio("right", "asked late")
    return tally.scored({"accuracy": whole, "sum": Total((whole, whole)), "mean": Mean((whole, whole)), "odd": late})


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (0, 20, 0.0, 0.1684), (1, 29, 0.0009, 0.1776)],
)
def test_the_limits_of_a_share_are_those_of_newcombe_s_table(right: int, of: int, low: float, high: float) -> None:
    """Newcombe, Two-sided confidence intervals for the single proportion (1998), table I, method 5."""
    assert share_limits(right / of, of) == pytest.approx((low, high), abs=5e-5)


def test_where_all_agree_a_share_has_exact_limits() -> None:
    limits = intervals(agreeing([1] * 40))
    low = pytest.approx(91.19, abs=5e-3)
    assert limits["accuracy"] == (low, 100.0)
    assert limits["mean"] == pytest.approx(limits["accuracy"])
    assert limits["sum"] == pytest.approx((2 * limits["accuracy"][0], 200.0))
    assert limits["odd"][0] < 100 * 40 / 30 < limits["odd"][1]  # more than is below it is no share: drawn
    assert intervals(agreeing([0] * 40))["accuracy"] == (0.0, pytest.approx(100 - 91.19, abs=5e-3))
    together = intervals(agreeing([1] * 40, per_unit=10))["accuracy"]  # questions of one picture count as one
    assert together[0] == pytest.approx(100 * share_limits(1.0, 4)[0])
    low, high = intervals(agreeing([1] * 39 + [0]))["accuracy"]
    assert (low, high) == (pytest.approx(100 * share_limits(39 / 40, 40)[0], abs=0.3), pytest.approx(99.94, abs=0.02))


TABLES = 2000


def scored(values: np.ndarray, metric: str = "accuracy", scale: float = PERCENT) -> Scored:
    """A table of units by items; a share's top never exceeds its bottom."""
    tally = Tally()
    for unit, row in enumerate(values):
        for item, value in enumerate(row):
            tally.add(f"{unit} {item}", float(value), {"top": float(value), "asked": 1.0}, unit=f"{unit}")
    return tally.scored({metric: Ratio("top", "asked", scale)})


def correlated(random: np.random.Generator, share: float, units: int, items: int, correlation: float) -> np.ndarray:
    """Right answers whose probability differs by unit, so that two of a unit correlate."""
    scale = (1 - correlation) / correlation if correlation else 1e9
    chance = random.beta(share * scale, (1 - share) * scale, (TABLES, units, 1))
    return (random.random((TABLES, units, items)) < chance).astype(float)


def coverage(limits: Sequence[Limits], truth: float, least: float, most: float) -> float:
    """The share of intervals that hold the truth; all lie within what is possible."""
    lows, highs = np.array(limits).T
    assert lows.min() >= least
    assert highs.max() <= most
    return float(((lows <= truth) & (truth <= highs)).mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "units", "items", "correlation"),
    [(0.7, 20, 4, 0.5), (0.7, 20, 10, 0.5), (0.5, 20, 4, 0.5), (0.7, 40, 4, 0.5), (0.97, 200, 1, 0), (0.02, 200, 1, 0)],
)
def test_a_share(share: float, units: int, items: int, correlation: float) -> None:
    values = correlated(np.random.default_rng(1), share, units, items, correlation)
    limits = [intervals(scored(table))["accuracy"] for table in values]
    assert 0.93 <= coverage(limits, 100 * share, 0, 100) <= 0.97 + 0.008  # the chance of 2,000 tables


@pytest.mark.slow
@pytest.mark.parametrize("clips", [20, 100])
def test_a_mean_of_captions_scores(clips: int) -> None:
    values = np.random.default_rng(2).gamma(1.5, 40, (TABLES, clips, 1))
    limits = [intervals(scored(table, "CIDEr", 1.0))["CIDEr"] for table in values]
    assert 0.93 - 0.008 <= coverage(limits, 60.0, 0, 1e4) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs", "units"), [(0.97, 0.97, 200), (0.97, 0.9, 200), (0.9, 0.8, 40), (0.02, 0.05, 200)]
)
def test_a_paired_difference(ours: float, theirs: float, units: int) -> None:
    random = np.random.default_rng(3)
    shared = random.normal(size=(TABLES, units, 1))

    def right(share: float) -> np.ndarray:
        ease = 0.7 * shared + 0.51**0.5 * random.normal(size=shared.shape)
        return (ease < NormalDist().inv_cdf(share)).astype(float)

    limits = []
    for table, other in zip(right(ours), right(theirs), strict=True):
        difference = paired_differences(scored(table), scored(other))["accuracy"]
        limits.append((difference.low, difference.high))
    assert 0.93 - 0.008 <= coverage(limits, 100 * (ours - theirs), -100, 100) <= 0.97 + 0.008
