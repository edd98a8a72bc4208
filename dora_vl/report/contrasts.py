"""Means over seeds and their differences, with 95 % intervals over seeds and units (pictures, sentences) together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dora_vl.errors import UserError
from dora_vl.evaluation.scores.scored import (
    SHARES,
    TAIL,
    Numbers,
    Scored,
    common_headline,
    drawn,
    intervals,
    paired_differences,
    quantile,
)

LEAST_SEEDS = 3
"""Fewer do not tell how seeds differ: with one or two, limits over items alone held the truth half of the time."""
UNTRAINED = "untrained"
"""This contender has no seeds: its one run stands for all."""
SHARED = 0.25
"""This share of the units' chance is taken out of the seeds' variance, which holds all of it. Chosen among 0, 1/4,
1/2, 3/4 and 1 by simulations with 3 and 5 seeds that differ by 0, 2 and 8 points: with it the intervals held the truth
in 93.5 to 97 of 100 cases, with 1 in 91.7 to 97.8. tests/report/test_compare.py asks for 92.5 to 97.5."""

SetScores = Mapping[str, Scored]
"""Maps a test set's name to its score."""


@dataclass(frozen=True)
class Estimate:
    """A value, and its interval if seeds are enough; `simultaneous` holds for all contrasts of a table at once."""

    value: float
    low: float | None = None
    high: float | None = None
    simultaneous: tuple[float, float] | None = None

    def interval(self, form: str = ".1f") -> str:
        """Writes both limits; nothing where there are none."""
        return "" if self.low is None else f"{self.low:{form}} to {self.high:{form}}"


@dataclass(frozen=True)
class Measure:
    """A number that contenders are compared by: a set's headline, or the mean over sets of the same headline."""

    name: str
    metric: str
    sets: tuple[str, ...]


class Contenders:
    """The tested runs of several contenders, each set's units drawn again for all of them alike."""

    def __init__(self, runs: Mapping[str, Sequence[SetScores]]) -> None:
        self.runs = runs
        first = next(iter(runs.values()))[0]
        alone = [Measure(name, scored.headline, (name,)) for name, scored in first.items()]
        headline = common_headline([measure.metric for measure in alone])  # None where sets may not be averaged
        self.measures = alone if headline is None else [Measure("average", headline, tuple(first)), *alone]
        everything = [(name, number) for name, several in runs.items() for number in range(len(several))]
        self._draws: dict[tuple[str, str, int], Numbers] = {}
        for of_set, reference in first.items():
            aligned = [_aligned(of_set, runs[name][number], reference, name) for name, number in everything]
            for (name, number), draws in zip(everything, drawn(aligned), strict=True):
                self._draws[of_set, name, number] = draws[reference.headline]

    def by_seed(self, measure: Measure, name: str) -> list[float]:
        """Returns the measure's value of each run of a contender."""
        return [
            sum(results[of_set].metrics[measure.metric] for of_set in measure.sets) / len(measure.sets)
            for results in self.runs[name]
        ]

    def score(self, measure: Measure, name: str, *, over_seeds: bool = True) -> Estimate:
        """Returns a contender's mean over seeds; its interval is over the test's items alone if not over seeds too."""
        value = float(np.mean(self.by_seed(measure, name)))
        if over_seeds and not self._tells_seeds(name):
            return Estimate(value)
        return Estimate(value, *self._interval(measure, name, None, tail=TAIL))

    def difference(self, measure: Measure, name: str, other: str, *, contrasts: int = 1) -> Estimate:
        """Returns a contender's mean less another's, over the same draws of units; one of `contrasts`."""
        value = float(np.mean(self.by_seed(measure, name)) - np.mean(self.by_seed(measure, other)))
        if not (self._tells_seeds(name) and self._tells_seeds(other)):
            return Estimate(value)
        own = self._interval(measure, name, other, tail=TAIL)
        return Estimate(value, *own, self._interval(measure, name, other, tail=TAIL / contrasts))

    def _tells_seeds(self, name: str) -> bool:
        return name == UNTRAINED or len(self.runs[name]) >= LEAST_SEEDS

    def _interval(self, measure: Measure, name: str, other: str | None, *, tail: float) -> tuple[float, float]:
        """Returns limits that leave `tail` out on either side."""
        own = self._of_seeds(measure, name)
        parts = [own] if other is None else [own, self._of_seeds(measure, other)]
        middle = float(np.mean(self.by_seed(measure, name)))
        apart = self._mean_draws(measure, name)
        if other is not None:
            middle -= float(np.mean(self.by_seed(measure, other)))
            apart = apart - self._mean_draws(measure, other)
        units = min(len(self.runs[name][0][of_set].units) for of_set in measure.sets)
        half = half_width(parts, float(np.nanvar(apart)), tail, units)
        if half < 1e-6:
            return self._of_equal_units(measure, name, other)
        low, high = middle - half, middle + half
        least = 0.0 if other is None else -100.0
        return (max(low, least), min(high, 100.0)) if measure.metric in SHARES else (low, high)

    def _mean_draws(self, measure: Measure, name: str) -> Numbers:
        """Returns the contender's mean over seeds in each draw of units."""
        return np.mean([self._draws_of(measure, name, number) for number in range(len(self.runs[name]))], axis=0)

    def _draws_of(self, measure: Measure, name: str, number: int) -> Numbers:
        return np.mean([self._draws[of_set, name, number] for of_set in measure.sets], axis=0)

    def _of_seeds(self, measure: Measure, name: str) -> SeedPart:
        """Returns how far the mean over seeds may be off because of the seeds."""
        numbers = range(len(self.runs[name]))
        each = float(np.mean([np.nanvar(self._draws_of(measure, name, number)) for number in numbers]))
        return seed_part(self.by_seed(measure, name), each, float(np.nanvar(self._mean_draws(measure, name))))

    def _of_equal_units(self, measure: Measure, name: str, other: str | None) -> tuple[float, float]:
        """Returns Wilson's limits, for a score or a difference where all units are alike."""
        limits: list[tuple[float, float]] = []
        for of_set in measure.sets:
            scored = self.runs[name][0][of_set]
            if other is None:
                limits.append(intervals(scored)[measure.metric])
            else:
                apart = paired_differences(scored, self.runs[other][0][of_set])[measure.metric]
                limits.append((apart.low, apart.high))
        low, high = np.mean(limits, axis=0)
        return float(low), float(high)


@dataclass(frozen=True)
class SeedPart:
    """The variance of a mean over `runs` that their seeds make, and the part of it that the units make as well."""

    variance: float
    shared: float
    runs: int


def seed_part(values: Sequence[float], each: float, together: float) -> SeedPart:
    """Returns what seeds add to the variance of a mean over runs of these values; 0 if they are too few to tell.

    Units make the variance `each` of a single run's value, and `together` that of the mean.
    """
    runs = len(values)
    if runs < LEAST_SEEDS:
        return SeedPart(0.0, 0.0, runs)
    return SeedPart(float(np.var(values, ddof=1)) / runs, max(0.0, each - together) / (runs - 1), runs)


def half_width(parts: Sequence[SeedPart], of_units: float, tail: float, units: int) -> float:
    """Returns half of an interval that leaves `tail` out on either side; `of_units` is the variance that units make.

    Both parts of the variance are taken with Student's t: the seeds' has few degrees of freedom, the bootstrap's one
    less than there are units, and is too small by as much.
    """
    seeds = [max(0.0, part.variance - SHARED * part.shared) for part in parts]
    rest = max(0.0, of_units - (1 - SHARED) * sum(part.shared for part in parts))
    freedom = max(1, units - 1)
    squared = quantile(tail, freedom) ** 2 * rest * (freedom + 1) / freedom
    if (total := sum(seeds)) > 0:
        weights = [seed**2 / (part.runs - 1) for seed, part in zip(seeds, parts, strict=True) if seed > 0]
        squared += quantile(tail, total**2 / sum(weights)) ** 2 * total
    return math.sqrt(squared)


def _aligned(of_set: str, results: SetScores, reference: Scored, name: str) -> Scored:
    """Returns a run's score of a set with its items and units in the order of another's."""
    if of_set not in results or results[of_set].items.keys() != reference.items.keys():
        raise UserError(f"{name} was not asked the same items of {of_set} as the others; test all of them again")
    items = {item: replace(results[of_set].items[item], unit=score.unit) for item, score in reference.items.items()}
    return replace(results[of_set], items=items)
