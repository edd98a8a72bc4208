"""Where every unit agrees, an interval still says how little that is: Wilson's, as written out and in tables."""

from __future__ import annotations

import pytest

from dora_vl.evaluation.scores.scored import Mean, Ratio, Scored, Tally, Total, intervals, paired_differences, wilson


def questions(hits: list[int], per_unit: int = 1) -> Scored:
    tally = Tally()
    for number, hit in enumerate(hits):
        columns = {"right": float(hit), "asked": 1.0, "right late": float(hit), "asked late": float(number > 9)}
        tally.add(str(number), float(hit), columns, unit=f"picture {number // per_unit}")
    whole, late = Ratio("right", "asked"), Ratio("right", "asked late")
    return tally.scored({"accuracy": whole, "sum": Total((whole, whole)), "mean": Mean((whole, whole)), "odd": late})


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_limits_are_those_of_newcombe_s_table(right: int, of: int, low: float, high: float) -> None:
    """Newcombe, Two-sided confidence intervals for the single proportion (1998), table I, method 3."""
    assert wilson(right / of, of) == pytest.approx((low, high), abs=5e-5)


def test_forty_of_forty_right_are_no_certainty() -> None:
    assert intervals(questions([1] * 40))["accuracy"] == (pytest.approx(91.24, abs=5e-3), 100.0)
    assert intervals(questions([0] * 40))["accuracy"] == (0.0, pytest.approx(100 - 91.24, abs=5e-3))


def test_questions_of_one_picture_count_as_one() -> None:
    alone, together = questions([1] * 40), questions([1] * 40, per_unit=10)
    assert intervals(alone)["accuracy"][0] == pytest.approx(91.24, abs=5e-3)
    assert intervals(together)["accuracy"][0] == pytest.approx(100 * wilson(1.0, 4)[0])


def test_sums_and_means_of_shares_have_theirs_and_what_is_no_share_stays() -> None:
    found = intervals(questions([1] * 40))
    low = found["accuracy"][0]
    assert found["mean"] == pytest.approx((low, 100.0))
    assert found["sum"] == pytest.approx((2 * low, 200.0))
    assert found["odd"][0] < 100 * 40 / 30 < found["odd"][1]  # more than is below it: drawn, as before


def test_one_wrong_answer_is_left_to_the_draws() -> None:
    low, high = intervals(questions([1] * 39 + [0]))["accuracy"]
    assert (low, high) == (92.5, 100.0)


def test_two_that_agree_everywhere_may_still_differ() -> None:
    same = paired_differences(questions([1] * 40), questions([1] * 40))["accuracy"]
    other = 100 * wilson(0.0, 40)[1]
    assert (same.value, same.low, same.high) == (0.0, pytest.approx(-other), pytest.approx(other))
    mixed = questions([1, 0, 0] * 20)
    assert paired_differences(mixed, mixed)["accuracy"].high == pytest.approx(100 * wilson(0.0, 60)[1])
    apart = paired_differences(questions([1] * 40), questions([0] * 40))["accuracy"]
    assert (apart.value, apart.high) == (100.0, pytest.approx(100.0))
    assert apart.low == pytest.approx(100 - 2 * other)
