"""The paper's equations 3 and 4 on weights small enough to work out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dora_vl.core.analysis import change_of_blocks, fit_line

BEFORE = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
AFTER = torch.tensor([[6.0, 8.0], [0.0, 1.0], [0.0, -3.0]])


def test_rows_by_hand():
    """Row 1 doubles (|10 - 5|, same direction), row 2 turns by 90 degrees, row 3 turns round and grows by 1."""
    change = change_of_blocks(zip(BEFORE.split(2), AFTER.split(2), strict=True), axis="output")
    assert change.magnitude == pytest.approx((5 + 0 + 1) / 3, rel=1e-12)
    assert change.direction == pytest.approx((0 + 1 + 2) / 3, rel=1e-12)
    assert (change.vectors, change.without_direction) == (3, 0)


def test_columns_by_hand():
    """Columns (3, 1, 0) -> (6, 0, 0) and (4, 0, 2) -> (8, 1, -3)."""
    change = change_of_blocks(zip(BEFORE.split(2), AFTER.split(2), strict=True), axis="input")
    magnitudes = abs(6 - math.sqrt(10)) + abs(math.sqrt(74) - math.sqrt(20))
    cosines = (18 / (6 * math.sqrt(10)), 26 / math.sqrt(74 * 20))
    assert change.magnitude == pytest.approx(magnitudes / 2, rel=1e-12)
    assert change.direction == pytest.approx(1 - sum(cosines) / 2, rel=1e-12)
    assert change.vectors == 2


def test_a_zero_vector_has_no_direction_nothing_is_nothing_and_little_is_not_lost():
    """A turn by 1e-5 changes the cosine by 5e-11, which float32 cannot tell from 1."""
    before, after = (
        torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]),
        torch.tensor([[0.0, 3.0], [2.0, 0.0], [0.0, 0.0]]),
    )
    change = change_of_blocks([(before, after)], axis="output")
    assert (change.magnitude, change.direction, change.without_direction) == (1.0, 1.0, 2)
    same = change_of_blocks([(BEFORE, BEFORE.clone())], axis="output")
    assert (same.magnitude, same.direction) == (0.0, 0.0)
    little = change_of_blocks([(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1e-5]]))], axis="output")
    assert little.direction == pytest.approx(0.5e-10, rel=1e-4)


def test_line_by_hand():
    """Points (0,1), (1,3), (2,2): slope 1/2, intercept 3/2, correlation 1/2."""
    line = fit_line([0.0, 1.0, 2.0], [1.0, 3.0, 2.0])
    assert line is not None
    assert (line.slope, line.intercept, line.correlation) == pytest.approx((0.5, 1.5, 0.5))


@pytest.mark.parametrize(("x", "y"), [([], []), ([1.0], [2.0]), ([1.0, 1.0], [2.0, 3.0]), ([1.0, 2.0], [3.0, 3.0])])
def test_no_line_without_two_different_points(x, y):
    assert fit_line(x, y) is None
