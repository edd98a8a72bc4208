"""Limits where all units agree, as where every answer is right: percentiles of equal draws would call that certain.

Forty of forty right may be 91 % of all such questions; the bootstrap of forty equal units says 100 % to 100 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

from dora_vl.scores.scored import Formula, Mean, Numbers, Ratio, Table, Total

Z = 1.959963984540054
"""Of a normal distribution 95 % lies within so many standard deviations."""
Limits = tuple[float, float]


def wilson(share: float, units: int) -> Limits:
    """The 95 % interval of a share that was seen in so many units (Wilson 1927, without a continuity correction)."""
    scale = 1 + Z**2 / units
    middle = (share + Z**2 / (2 * units)) / scale
    half = Z * sqrt(share * (1 - share) / units + Z**2 / (4 * units**2)) / scale
    return (0.0 if share <= 0 else middle - half), (1.0 if share >= 1 else middle + half)


def limits_of(formula: Formula, table: Table) -> Limits | None:
    """Wilson's limits of a metric that is a share, over the units that have any of it; None for other metrics.

    A mean or sum of shares has the mean or sum of theirs, which is wide rather than narrow.
    """
    if isinstance(formula, Mean | Total):
        return _joined(formula, [limits_of(part, table) for part in formula.parts])
    found = _shares(formula, table)
    if found is None or not isinstance(formula, Ratio):
        return None
    top, bottom = found
    low, high = wilson(float(top.sum() / bottom.sum()), len(bottom))
    return formula.scale * low, formula.scale * high


def difference_limits(formula: Formula, ours: Table, theirs: Table) -> Limits | None:
    """Limits of the difference of two shares that is the same in every unit; None for other metrics.

    The units that were not seen may be otherwise: by Wilson's upper limit for none of so many, a share of them, and
    each of these anything from -1 to 1.
    """
    if isinstance(formula, Mean | Total):
        return _joined(formula, [difference_limits(part, ours, theirs) for part in formula.parts])
    first, second = _shares(formula, ours), _shares(formula, theirs)
    if first is None or second is None or not isinstance(formula, Ratio):
        return None
    value = float(first[0].sum() / first[1].sum() - second[0].sum() / second[1].sum())
    other = wilson(0.0, len(first[1]))[1]
    return formula.scale * (value - other * (value + 1)), formula.scale * (value + other * (1 - value))


def _joined(formula: Mean | Total, parts: Sequence[Limits | None]) -> Limits | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    low, high = np.sum(known, axis=0) / (len(known) if isinstance(formula, Mean) else 1)
    return float(low), float(high)


def _shares(formula: Formula, table: Table) -> tuple[Numbers, Numbers] | None:
    """Both sides of a ratio in each unit that has any of it, where the one is a part of the other."""
    if not isinstance(formula, Ratio):
        return None
    columns = dict(zip(table.names, table.columns.T, strict=True))
    nothing = np.zeros(len(table.units))
    below = (formula.bottom,) if isinstance(formula.bottom, str) else formula.bottom
    top, bottom = columns.get(formula.top, nothing), np.sum([columns.get(one, nothing) for one in below], axis=0)
    asked = bottom > 0
    if not asked.any() or (top < 0).any() or (top > bottom).any():
        return None
    return top[asked], bottom[asked]
