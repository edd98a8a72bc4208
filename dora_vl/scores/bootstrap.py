"""Intervals: how much a score, or the difference of two, would move with another draw of the same test set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dora_vl.errors import UserError
from dora_vl.scores.agreeing_units import Limits, difference_limits, limits_of
from dora_vl.scores.scored import Numbers, Scored

RESAMPLES = 2000
COUNTS_AT_ONCE = 4_000_000  # 32 MB
PERCENTILES = (2.5, 97.5)
LEAST_SHARE = 0.1  # of the draws; percentiles of fewer would say nothing
EQUAL = 1e-9
"""Draws of equal units differ by rounding alone."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of the first minus that of the second, with its 95 % interval."""

    value: float
    low: float
    high: float


def intervals(scored: Scored, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, tuple[float, float]]:
    """The 95 % percentile interval of every metric that is a formula.

    Units (pictures, sentences, clips) are drawn with replacement, each with all of its questions. What a metric
    takes from the whole set, such as CIDEr's document frequencies, stays that of the whole set.

    A draw without any item of a kind says nothing about that kind and is left out of its percentiles. A metric that
    fewer than a tenth of the draws have (the mean over several kinds of one item each) gets no interval.

    Where all draws are the same, which says nothing, a share has Wilson's interval (`agreeing_units`).
    """
    (drawn,) = _drawn([scored], seed, resamples)
    table = scored.table
    found = {name: _interval(values) for name, values in drawn.items()}
    return {
        name: (limits_of(table.formulas[name], table) or limits) if _equal(limits) else limits
        for name, limits in found.items()
        if limits is not None
    }


def paired_differences(
    ours: Scored, theirs: Scored, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Difference]:
    """The difference of each metric that has an interval, both scored on the same draws of units.

    Raises:
        UserError: the two were not scored on the same items.
    """
    if set(ours.per_item) != set(theirs.per_item) or ours.table.units != theirs.table.units:
        alone = sorted(set(ours.per_item) ^ set(theirs.per_item))
        raise UserError(
            f"a paired difference needs the same items: {len(ours.per_item)} against {len(theirs.per_item)}, "
            f"first in one alone: {alone[:3]}"
        )
    first, second = _drawn([ours, theirs], seed, resamples)
    differences = {}
    for name in first.keys() & second.keys():
        limits = _interval(first[name] - second[name])
        if limits is not None:
            if _equal(limits):
                limits = difference_limits(ours.table.formulas[name], ours.table, theirs.table) or limits
            value = ours.metrics[name] - theirs.metrics[name]
            differences[name] = Difference(value=value, low=limits[0], high=limits[1])
    return {name: differences[name] for name in ours.metrics if name in differences}


def draws(units: int, seed: int, resamples: int) -> Iterator[Numbers]:
    """How often each unit is in each draw, `[some draws, units]` at a time, so that memory stays bounded."""
    random = np.random.default_rng(seed)
    at_once = max(1, COUNTS_AT_ONCE // units)
    for start in range(0, resamples, at_once):
        several = range(min(at_once, resamples - start))
        counts = [np.bincount(random.integers(units, size=units), minlength=units) for _ in several]
        yield np.array(counts, dtype=np.float64)


def _drawn(several: Sequence[Scored], seed: int, resamples: int) -> list[dict[str, Numbers]]:
    """Each score's metrics on the same draws."""
    parts: list[list[dict[str, Numbers]]] = [[] for _ in several]
    for counts in draws(len(several[0].table.units), seed, resamples):
        for part, scored in zip(parts, several, strict=True):
            part.append(scored.table.drawn(counts))
    return [{name: np.concatenate([one[name] for one in part]) for name in part[0]} for part in parts]


def _equal(limits: Limits) -> bool:
    return limits[1] - limits[0] <= EQUAL * max(1.0, abs(limits[1]))


def _interval(values: Numbers) -> Limits | None:
    """Percentiles of the draws that are a number; None where too few are."""
    numbers = values[~np.isnan(values)]
    if len(numbers) < max(1, LEAST_SHARE * len(values)):
        return None
    low, high = np.percentile(numbers, PERCENTILES)
    return float(low), float(high)
