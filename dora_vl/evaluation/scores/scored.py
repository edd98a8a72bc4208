"""What every scorer returns: metrics, which are formulas over column sums, and their bootstrap intervals.

A scorer gives each example's columns (right answers, questions asked, n-grams matched...);
a metric is a ratio of their sums. So one bootstrap serves them all: it draws items again, adds the columns up and
applies the same formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dora_vl.data.example import Example
from dora_vl.errors import UserError

Numbers = NDArray[np.float64]
Sums = Mapping[str, Numbers]
"""Maps a column to its sum over the drawn items, a number for each draw."""
Formula = Callable[..., Numbers]
"""Computes a metric of each draw from its sums (a column without entries is not in them) and those of the whole set.
A draw that lacks what the whole set has (such as every item of a rare kind) is NaN; without the latter it is 0."""
AnswersById = Mapping[str, str]
"""Maps examples' ids to answers; an example without an entry has no answer."""
Limits = tuple[float, float]
PERCENT = 100.0
SHARES = ("accuracy", "average")
"""These headlines are of answers that are right or wrong; their values lie between 0 and 100."""


@dataclass(frozen=True)
class Ratio:
    """`scale` times one sum over another, or over several added up, rounded where the official script rounds.

    Where there is nothing to divide by: 0, as the official scripts have it; NaN for a draw of a set that has something.
    """

    top: str
    bottom: str | tuple[str, ...]
    scale: float = PERCENT
    decimals: int | None = None

    def __call__(self, sums: Sums, totals: Sums | None = None) -> Numbers:
        """Returns the ratio of each draw."""
        top, bottom = self.sides(sums)
        of_nothing = 0.0 if totals is None or not self.sides(totals)[1].any() else np.nan
        value = self.scale * np.divide(top, bottom, out=np.full_like(bottom, of_nothing), where=bottom != 0)
        return value if self.decimals is None else np.round(value, self.decimals)

    def sides(self, sums: Sums) -> tuple[Numbers, Numbers]:
        """Returns dividend and divisor of each draw."""
        nothing = np.zeros_like(next(iter(sums.values())))
        below = (self.bottom,) if isinstance(self.bottom, str) else self.bottom
        return sums.get(self.top, nothing), np.sum([sums.get(name, nothing) for name in below], axis=0)


@dataclass(frozen=True)
class Total:
    """The sum of other metrics; NaN for a draw where one of them is."""

    parts: tuple[Formula, ...]
    join: ClassVar[Callable[..., Any]] = staticmethod(np.sum)

    def __call__(self, sums: Sums, totals: Sums | None = None) -> Numbers:
        """Joins the parts' values of each draw."""
        return self.join([part(sums, totals) for part in self.parts], axis=0)


class Mean(Total):
    """The unweighted mean of other metrics; NaN for a draw where one of them is."""

    join = staticmethod(np.mean)


@dataclass(frozen=True, kw_only=True)
class ItemScore:
    """Holds what a scorer makes of one item.

    Attributes:
        unit: the picture, sentence or clip that a bootstrap draws with all that is asked about it.
        share: how right the answer is: from 0 to 1 where it can be right or wrong.
        columns: the numbers that the formulas add up.
        failed: there is no answer, so the item counts as wrong.
    """

    unit: str
    share: float
    columns: Mapping[str, float]
    failed: bool = False


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The result of one test set.

    Attributes:
        metrics: values by name, the headline first; in percent unless the scorer's docstring says otherwise.
        formulas: how metrics are computed from the items' columns; a metric without one has no interval.
        settings: the mode and whatever else decides the numbers.
    """

    metrics: Mapping[str, float]
    items: Mapping[str, ItemScore]
    formulas: Mapping[str, Formula]
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """The number of items, answered or not."""
        return len(self.items)

    @property
    def headline(self) -> str:
        """The name of the metric that represents the set."""
        return next(iter(self.metrics))

    @property
    def failed(self) -> tuple[str, ...]:
        """Ids of the items without an answer."""
        return tuple(name for name, item in self.items.items() if item.failed)

    @property
    def shares(self) -> dict[str, float]:
        """Each item's share of the headline by its id."""
        return {name: item.share for name, item in self.items.items()}

    @cached_property
    def units(self) -> dict[str, int]:
        """Each unit's place in `columns`."""
        return {unit: place for place, unit in enumerate(dict.fromkeys(item.unit for item in self.items.values()))}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(dict.fromkeys(name for item in self.items.values() for name in item.columns))

    @cached_property
    def columns(self) -> Numbers:
        """The items' columns added up by unit, `[units, columns]`."""
        sums, places = np.zeros((len(self.units), len(self.names))), {name: at for at, name in enumerate(self.names)}
        for item in self.items.values():
            for name, value in item.columns.items():
                sums[self.units[item.unit], places[name]] += value
        return sums

    def items_of(self, metric: str) -> int:
        """Counts the items of a metric: those of a kind for its accuracy, else all."""
        formula = self.formulas.get(metric)
        bottom = formula.bottom if isinstance(formula, Ratio) else None
        if not isinstance(bottom, str) or not bottom.startswith("asked"):
            return self.n
        return round(float(self.columns[:, self.names.index(bottom)].sum())) if bottom in self.names else 0


def in_units(metric: str, value: float) -> str:
    """Writes a metric's value, or that of a part of it ("accuracy/number"), with its unit."""
    return f"{value:.2f} %" if metric.partition("/")[0] in SHARES else f"{value:.2f}"


def common_headline(headlines: Sequence[str]) -> str | None:
    """Returns the headline of several sets that may be averaged; different metrics are never mixed.

    None for headlines that are means over tasks themselves: such sets are ways of scoring the same questions.
    """
    names = set(headlines)
    return headlines[0] if len(headlines) > 1 and len(names) == 1 and names != {"average"} else None


class Tally:
    """Collects items while a scorer goes through them."""

    def __init__(self) -> None:
        self._items: dict[str, ItemScore] = {}

    def add(
        self, item: str, share: float, columns: Mapping[str, float], *, unit: str = "", failed: bool = False
    ) -> None:
        """Adds one item to its unit, by default one of its own."""
        self._items[item] = ItemScore(unit=unit or f"item {item}", share=share, columns={**columns}, failed=failed)

    def scored(self, formulas: Mapping[str, Formula], *, settings: Mapping[str, str] | None = None) -> Scored:
        """Scores everything added; the first formula is the headline."""
        if not self._items:
            raise ValueError("nothing to score")
        scored = Scored(metrics={}, items=self._items, formulas=dict(formulas), settings=dict(settings or {}))
        totals = _sums(scored.names, scored.columns, np.ones((1, len(scored.columns))))
        return replace(scored, metrics={name: float(formula(totals)[0]) for name, formula in formulas.items()})


def _sums(names: Sequence[str], columns: Numbers, counts: Numbers) -> Sums:
    """Returns the sums of each draw; counts: `[draws, units]`."""
    return dict(zip(names, (counts @ columns).T, strict=True))


def unit_of(example: Example) -> str:
    """Returns the unit that a bootstrap draws: the one its record names, else its pictures or its video."""
    if "unit" in example.extra:
        return str(example.extra["unit"])
    if example.images:
        return "\n".join(example.images)
    return "" if example.video is None else example.video.path


ACCURACY = Ratio("right", "asked")


def share_of(kind: str) -> Ratio:
    """Returns the accuracy over the items of one kind."""
    return Ratio(f"right {kind}", f"asked {kind}")


def score_points(
    examples: Sequence[Example],
    answers: AnswersById,
    points: Callable[[Example, str], float],
    *,
    metrics: Mapping[str, Formula] | None = None,
    kinds: Callable[[Example], Iterable[str]] = lambda _: (),
    more: Callable[[Example], Mapping[str, float]] = lambda _: {},
    settings: Mapping[str, str] | None = None,
) -> Scored:
    """Scores the mean of each example's points, from 0 to 1, over all and over each kind, in percent.

    Args:
        metrics: the first metrics; only accuracy without them.
        kinds: the metrics' names of the kinds that an example belongs to, such as "answer type/number".
        more: further columns of an example, for `metrics`.
    """
    tally, seen = Tally(), dict[str, None]()
    for example in examples:
        answer = answers.get(example.id)
        share = 0.0 if answer is None else points(example, answer)
        columns = {"right": share, "asked": 1.0}
        for kind in kinds(example):
            seen[kind] = None
            columns |= {f"right {kind}": share, f"asked {kind}": 1.0}
        columns |= more(example)
        tally.add(example.id, share, columns, unit=unit_of(example), failed=answer is None)
    prefixes = list(dict.fromkeys(kind.partition("/")[0] for kind in seen))
    ordered = sorted(seen, key=lambda kind: (prefixes.index(kind.partition("/")[0]), kind))
    formulas: dict[str, Formula] = {**(metrics or {"accuracy": ACCURACY})}
    formulas |= {kind: share_of(kind) for kind in ordered if kind not in formulas}
    return tally.scored(formulas, settings=settings)


RESAMPLES = 2000
COUNTS_AT_ONCE = 4_000_000  # 32 MB
TAIL = 0.025
"""A 95 % interval leaves this share out on either side."""
LEAST_SHARE = 0.1  # percentiles of a smaller share of the draws would say nothing


def share_limits(share: float, units: float) -> Limits:
    """Returns the 95 % interval of a share of `units`, which need not be whole (Clopper and Pearson 1934)."""
    right, wrong = share * units, (1 - share) * units
    low = 0.0 if share <= 0 else _solved(lambda value: beta_share(right, wrong + 1, value), TAIL)
    high = 1.0 if share >= 1 else _solved(lambda value: beta_share(right + 1, wrong, value), 1 - TAIL)
    return low, high


@cache
def quantile(tail: float, freedom: float) -> float:
    """Returns what Student's t exceeds with this probability; the normal's for infinite freedom."""
    if math.isinf(freedom):
        return NormalDist().inv_cdf(1 - tail)
    share = _solved(lambda value: beta_share(freedom / 2, 0.5, value), 2 * tail)  # share = freedom / (freedom + t^2)
    return math.sqrt(freedom / share - freedom)


def _solved(rising: Callable[[float], float], value: float) -> float:
    """Returns where a function that rises from 0 to 1 over 0 to 1 has a value."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2


def beta_share(a: float, b: float, x: float) -> float:
    """Returns the share of a beta distribution below x, by its continued fraction (DLMF 8.17.22)."""
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - beta_share(b, a, 1 - x)
    fraction, above, below = 1.0, 1.0, 0.0
    for n in range(1, 1000):
        m, odd = divmod(n, 2)
        top = -(a + m) * (a + b + m) if odd else m * (b - m)
        term = top * x / ((a + n - 1) * (a + n))
        above, below = 1 + term / above, 1 / (1 + term * below)
        fraction *= above * below
        if abs(above * below - 1) < 1e-12:
            break
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(logarithm) / (a * fraction)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of the first minus that of the second, with its 95 % interval."""

    value: float
    low: float
    high: float


def intervals(scored: Scored) -> dict[str, Limits]:
    """Bootstraps the 95 % interval of every metric that is a formula.

    Units (pictures, sentences, clips) are drawn with replacement, each with all of its questions. What a metric
    takes from the whole set, such as CIDEr's document frequencies, stays that of the whole set.

    A draw without any item of a kind says nothing about that kind and is left out. A metric that fewer than a tenth of
    the draws have (the mean over several kinds of one item each) gets no interval.
    """
    (own,) = drawn([scored])
    limits_of = {name: _interval(values, scored.formulas[name], [scored]) for name, values in own.items()}
    return {name: limits for name, limits in limits_of.items() if limits is not None}


def paired_differences(ours: Scored, theirs: Scored) -> dict[str, Difference]:
    """Bootstraps the difference of each metric that has an interval, on the same draws of units."""
    if ours.items.keys() != theirs.items.keys():
        alone = sorted(ours.items.keys() ^ theirs.items.keys())
        raise UserError(
            f"a paired difference needs the same items: {ours.n} against {theirs.n}, first in only one: {alone[:3]}"
        )
    same = {name: replace(theirs.items[name], unit=item.unit) for name, item in ours.items.items()}
    first, second = drawn([ours, replace(theirs, items=same)])
    differences: dict[str, Difference] = {}
    for name, formula in ours.formulas.items():
        if name in second and (limits := _interval(first[name] - second[name], formula, [ours, theirs])):
            value = ours.metrics[name] - theirs.metrics[name]
            differences[name] = Difference(value=value, low=limits[0], high=limits[1])
    return differences


def draws(units: int) -> Iterator[Numbers]:
    """Yields how often each draw has each unit, `[some draws, units]` at a time, so that memory stays bounded."""
    random = np.random.default_rng(0)
    at_once = max(1, COUNTS_AT_ONCE // units)
    for start in range(0, RESAMPLES, at_once):
        several = range(min(at_once, RESAMPLES - start))
        counts = [np.bincount(random.integers(units, size=units), minlength=units) for _ in several]
        yield np.array(counts, dtype=np.float64)


def drawn(several: Sequence[Scored]) -> list[dict[str, Numbers]]:
    """Computes each score's metrics on the same draws, NaN where a draw has none of a metric's items."""
    parts: list[list[dict[str, Numbers]]] = [[] for _ in several]
    for counts in draws(len(several[0].columns)):
        for part, scored in zip(parts, several, strict=True):
            sums, totals = (_sums(scored.names, scored.columns, each) for each in (counts, np.ones_like(counts[:1])))
            part.append({name: formula(sums, totals) for name, formula in scored.formulas.items()})
    return [{name: np.concatenate([chunk[name] for chunk in part]) for name in part[0]} for part in parts]


def _interval(values: Numbers, formula: Formula, scores: Sequence[Scored]) -> Limits | None:
    """Returns the 95 % interval of draws of a metric, or of a difference; None where too few draws are a number.

    Plain percentiles are too narrow for few units and for shares near 0 or 1 (test_intervals.py simulates it):

    - A share has exact limits for as many independent answers as would vary as the draws do (Korn and Graubard 1998).
      Where the units are all alike they count as one answer each: forty of forty right may be 91 % of all questions.
    - Of anything else the percentiles lie further out, by Student's t and n / (n - 1) (Hesterberg 2015, "expanded
      percentiles"). They never leave what is possible.
    """
    numbers = values[~np.isnan(values)]
    if len(numbers) < max(1, LEAST_SHARE * len(values)):
        return None
    spread, largest = float(numbers.std()), max(1.0, float(np.abs(numbers).max()))
    equal, top = spread < 1e-9 * largest, _largest(formula, scores)
    if top is None or (len(scores) > 1 and not equal):
        units = max(2, _units(formula, scores[0]))
        tail = NormalDist().cdf(-quantile(TAIL, units - 1) * math.sqrt(units / (units - 1)))
        low, high = np.percentile(numbers, (100 * tail, 100 * (1 - tail)))
        return float(low), float(high)
    units = _units(formula, scores[0])
    if len(scores) > 1:  # the units are alike; those not seen may differ, each by anything from -1 to 1
        value, other = float(numbers.mean()) / top, share_limits(0.0, units)[1]
        return top * (value - other * (value + 1)), top * (value + other * (1 - value))
    totals = _sums(scores[0].names, scores[0].columns, np.ones((1, len(scores[0].columns))))
    share = float(formula(totals)[0]) / top
    variance = (spread / top) ** 2 * units / max(1, units - 1)
    low, high = share_limits(share, units if equal else share * (1 - share) / variance)
    return top * low, top * high


def _units(formula: Formula, scored: Scored) -> int:
    """Counts the units that a metric is about; of a sum or mean, those of the part with fewest."""
    if isinstance(formula, Total):
        return min((_units(part, scored) for part in formula.parts), default=0)
    if not isinstance(formula, Ratio):
        return len(scored.columns)
    return int((formula.sides(_by_unit(scored))[1] > 0).sum())


def _largest(formula: Formula, scores: Sequence[Scored]) -> float | None:
    """Returns what a share, or a mean or sum of shares, is at most; None for other metrics."""
    if isinstance(formula, Total):
        parts = [_largest(part, scores) for part in formula.parts]
        return None if not parts or None in parts else float(formula.join(parts, axis=0))
    if not isinstance(formula, Ratio):
        return None
    for scored in scores:
        top, bottom = formula.sides(_by_unit(scored))
        if not (bottom > 0).any() or (top < 0).any() or (top > bottom).any():  # the top is not a share of the bottom
            return None
    return formula.scale


def _by_unit(scored: Scored) -> Sums:
    return dict(zip(scored.names, scored.columns.T, strict=True))
