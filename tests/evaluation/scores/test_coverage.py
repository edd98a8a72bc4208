"""How often 95 % intervals hold the truth: few pictures, few clips, shares near 0 and 1, paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pytest

from dora_vl.evaluation.scores.scored import PERCENT, Limits, Ratio, Scored, Tally, intervals, paired_differences

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
