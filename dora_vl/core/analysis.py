"""The weight decomposition analysis of the DoRA paper (arXiv 2402.09353, section 3.2): how a weight was changed.

A weight W [out, in] is a set of vectors, each with a length (its magnitude) and a direction. Against the weight
W_0 before training, with k vectors w_n and magnitudes m_n = ||w_n||,

    dM = sum_n |m_n - m_0n| / k               equation 3
    dD = sum_n (1 - cos(w_n, w_0n)) / k       equation 4

The layer that the authors published, PEFT's and ours take the rows of torch's [out, in] as vectors, one for each output
(`axis="output"`); whoever reads the paper's "column" as one vector for each input, as early LyCORIS did, wants
`axis="input"`. The paper found magnitude and direction to change in opposition under full fine-tuning and DoRA (slope
below 0), in proportion under LoRA (above 0): the query weights of VL-BART.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import correlation, fmean, linear_regression
from typing import Literal

import torch
from torch import Tensor

from dora_vl.shapes import Float

VectorAxis = Literal["output", "input"]
FLAT = 1e-12
"""Points that spread less than this share of their size count as one: a slope would come from rounding."""


@dataclass(frozen=True)
class WeightChange:
    """Says how far one weight matrix moved, averaged over its vectors."""

    magnitude: float
    """This is dM, in the weight's own units."""
    direction: float
    """This is dD: 0 where every vector points where it did, 1 for right angles."""
    vectors: int
    without_direction: int
    """Counts vectors that are all zero before or after: they have no direction, and are left out of dD."""


def change_of_blocks(
    blocks: Iterable[tuple[Float[Tensor, "rows in_"], Float[Tensor, "rows in_"]]], *, axis: VectorAxis
) -> WeightChange:
    """Measures dM and dD of a weight that comes as (before, after) blocks of rows, never twice in memory."""
    sums = []
    for first, second in blocks:
        old, new = first.double(), second.double()
        pairs = ((old, old), (new, new), (old, new))
        sums.append(torch.stack([(left * right).sum(dim=1 if axis == "output" else 0) for left, right in pairs]))
    before, after, cross = torch.cat(sums, dim=1) if axis == "output" else torch.stack(sums).sum(dim=0)
    directed = (before > 0) & (after > 0)
    cosine = cross[directed] / (before[directed] * after[directed]).sqrt()
    away = (1 - cosine).clamp_min(0)
    return WeightChange(
        magnitude=float((after.sqrt() - before.sqrt()).abs().mean()),
        direction=float(away.mean()) if len(away) else 0.0,
        vectors=len(before),
        without_direction=int((~directed).sum()),
    )


@dataclass(frozen=True)
class FittedLine:
    """The least-squares line through points, and how well it fits them."""

    slope: float
    intercept: float
    correlation: float
    """This is Pearson's correlation of x and y."""


def fit_line(x: Sequence[float], y: Sequence[float]) -> FittedLine | None:
    """Fits y = slope x + intercept; None for fewer than two points, or where x or y does not vary."""
    for values in (x, y):
        if len(values) < 2 or math.dist(values, [fmean(values)] * len(values)) <= FLAT * math.hypot(*values):
            return None
    line = linear_regression(x, y)
    return FittedLine(line.slope, line.intercept, correlation(x, y))
