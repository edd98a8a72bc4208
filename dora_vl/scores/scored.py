"""What every scorer returns: the metrics, and the sums over items that they are functions of.

A metric is a formula over column sums (right answers, questions asked, n-grams matched...), so that one bootstrap
serves them all: it draws items again, adds the columns up and applies the same formula.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dora_vl.data.examples import Example

Numbers = NDArray[np.float64]
Sums = Mapping[str, Numbers]
"""A column's name -> its sum over the drawn items, one number for each draw."""

PERCENT = 100.0
ASKED = "asked"
"""Begins the name of a column that counts items: all, or those of a kind."""


@runtime_checkable
class Formula(Protocol):
    """A metric as a function of column sums; a column without entries is not in them."""

    def __call__(self, sums: Sums, whole: Sums | None = None) -> Numbers:
        """The metric of each draw.

        Args:
            whole: the sums of the whole set; a draw that lacks what the set has (such as every item of a rare kind)
                is then NaN, which is no number of it. Without `whole`, 0.
        """
        ...


@dataclass(frozen=True)
class Ratio:
    """`scale` times one sum over another, or over several added up.

    Where there is nothing to divide by: 0, as the official scripts have it; NaN for a draw of a set that has something.
    """

    top: str
    bottom: str | tuple[str, ...]
    scale: float = PERCENT
    decimals: int | None = None
    """Rounded to so many decimals, where the official script does."""

    def __call__(self, sums: Sums, whole: Sums | None = None) -> Numbers:
        """The ratio of each draw."""
        bottom = self._bottom(sums)
        of_nothing = 0.0 if whole is None or not self._bottom(whole).any() else np.nan
        empty = np.full_like(bottom, of_nothing)
        value = self.scale * np.divide(_column(sums, self.top), bottom, out=empty, where=bottom != 0)
        return value if self.decimals is None else np.round(value, self.decimals)

    def _bottom(self, sums: Sums) -> Numbers:
        below = (self.bottom,) if isinstance(self.bottom, str) else self.bottom
        return np.sum([_column(sums, name) for name in below], axis=0)


@dataclass(frozen=True)
class Total:
    """The sum of other metrics; NaN for a draw where one of them is."""

    parts: tuple[Formula, ...]

    def __call__(self, sums: Sums, whole: Sums | None = None) -> Numbers:
        """The sum of each draw."""
        return np.sum([part(sums, whole) for part in self.parts], axis=0)


@dataclass(frozen=True)
class Mean:
    """The unweighted mean of other metrics; NaN for a draw where one of them is."""

    parts: tuple[Formula, ...]

    def __call__(self, sums: Sums, whole: Sums | None = None) -> Numbers:
        """The mean of each draw."""
        return np.mean([part(sums, whole) for part in self.parts], axis=0)


def _column(sums: Sums, name: str) -> Numbers:
    return sums[name] if name in sums else np.zeros_like(next(iter(sums.values())))


@dataclass(frozen=True, kw_only=True)
class Table:
    """The columns a score was made from: `columns[unit, column]`.

    Attributes:
        units: what a bootstrap draws: pictures, sentences, clips; questions about one stand or fall together.
    """

    units: tuple[str, ...]
    names: tuple[str, ...]
    columns: Numbers
    formulas: Mapping[str, Formula]

    def values(self) -> dict[str, float]:
        """Every metric of the whole set."""
        whole = self._sums(np.ones((1, len(self.units))))
        return {name: float(formula(whole)[0]) for name, formula in self.formulas.items()}

    def drawn(self, counts: Numbers) -> dict[str, Numbers]:
        """Every metric of each draw, NaN where the draw has none of its items.

        Args:
            counts: `[draws, units]`, how often a unit was drawn.
        """
        sums, whole = self._sums(counts), self._sums(np.ones((1, len(self.units))))
        return {name: formula(sums, whole) for name, formula in self.formulas.items()}

    def _sums(self, counts: Numbers) -> Sums:
        return dict(zip(self.names, (counts @ self.columns).T, strict=True))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One benchmark's result.

    Attributes:
        metrics: values by name, the headline first; in percent unless the scorer's docstring says otherwise.
        per_item: each item's share of the headline, from 0 to 1 where it is right or wrong.
        n: items scored, those without an answer included.
        settings: the mode and whatever else decides the numbers.
        failed: ids without an answer; each counts as wrong.
        table: what the intervals are drawn from.
    """

    metrics: dict[str, float]
    per_item: dict[str, float]
    n: int
    settings: dict[str, str]
    failed: tuple[str, ...]
    table: Table

    def items_of(self, metric: str) -> int:
        """How many items a metric is over: those of a kind for an accuracy of that kind, else all."""
        formula = self.table.formulas.get(metric)
        bottom = formula.bottom if isinstance(formula, Ratio) else None
        if not isinstance(bottom, str) or not bottom.startswith(ASKED):
            return self.n
        if bottom not in self.table.names:
            return 0
        return round(float(self.table.columns[:, self.table.names.index(bottom)].sum()))


class Tally:
    """Collects items while a scorer goes through them."""

    def __init__(self) -> None:
        self._columns: dict[str, defaultdict[str, float]] = {}
        self._items: dict[str, float] = {}
        self._failed: list[str] = []

    def add(
        self, item: str, share: float, columns: Mapping[str, float], *, unit: str = "", failed: bool = False
    ) -> None:
        """Adds one item's columns to its unit.

        Args:
            share: the item's share of the headline.
            unit: what the item belongs to; "" makes it a unit of its own.
            failed: it has no answer.
        """
        sums = self._columns.setdefault(unit or f"item {item}", defaultdict(float))
        for name, value in columns.items():
            sums[name] += value
        self._items[item] = share
        if failed:
            self._failed.append(item)

    def scored(
        self,
        formulas: Mapping[str, Formula],
        *,
        settings: Mapping[str, str] | None = None,
        fixed: Mapping[str, float] | None = None,
    ) -> Scored:
        """The result of everything added.

        Args:
            formulas: the metrics, the headline first.
            fixed: metrics that no bootstrap can draw again; they get no interval.

        Raises:
            ValueError: nothing was added.
        """
        if not self._columns:
            raise ValueError("nothing to score")
        names = tuple(dict.fromkeys(name for sums in self._columns.values() for name in sums))
        columns = np.array([[sums.get(name, 0.0) for name in names] for sums in self._columns.values()])
        table = Table(units=tuple(self._columns), names=names, columns=columns, formulas=dict(formulas))
        return Scored(
            metrics={**table.values(), **(fixed or {})},
            per_item=dict(self._items),
            n=len(self._items),
            settings=dict(settings or {}),
            failed=tuple(self._failed),
            table=table,
        )


def unit_of(example: Example) -> str:
    """What a bootstrap draws with this example: its pictures, its video's file, or the example alone."""
    if example.images:
        return "\n".join(example.images)
    return "" if example.video is None else example.video.path


def by_kind(prefix: str, kinds: Sequence[str]) -> dict[str, Formula]:
    """Accuracies by kind from the columns that `kind_columns` gives, in the kinds' alphabetical order."""
    return {f"{prefix}/{kind}": Ratio(f"right {kind}", f"asked {kind}") for kind in sorted(set(kinds))}


def kind_columns(right: float, *kinds: str) -> dict[str, float]:
    """One question's columns: all questions, and for each kind it belongs to."""
    columns = {"right": right, "asked": 1.0}
    for kind in kinds:
        columns |= {f"right {kind}": right, f"asked {kind}": 1.0}
    return columns


ACCURACY = Ratio("right", "asked")
