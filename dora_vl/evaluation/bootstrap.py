"""Intervals: how much a score, or the difference of two, would move with another draw of the same test set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dora_vl.errors import UserError
from dora_vl.evaluation.scored import Numbers, Scored

RESAMPLES = 2000
COUNTS_AT_ONCE = 4_000_000  # 32 MB
PERCENTILES = (2.5, 97.5)


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
    """
    (drawn,) = _drawn([scored], seed, resamples)
    return {name: _interval(values) for name, values in drawn.items()}


def paired_differences(
    ours: Scored, theirs: Scored, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Difference]:
    """The difference of each metric, both scored on the same draws of units.

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
        low, high = _interval(first[name] - second[name])
        differences[name] = Difference(value=ours.metrics[name] - theirs.metrics[name], low=low, high=high)
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
            part.append(scored.table.metrics(counts))
    return [{name: np.concatenate([one[name] for one in part]) for name in part[0]} for part in parts]


def _interval(values: Numbers) -> tuple[float, float]:
    low, high = np.percentile(values, PERCENTILES)
    return float(low), float(high)
