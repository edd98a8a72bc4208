"""Every preference loss and its gradient against its equation, written out number by number in Python's own floats."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from dora_vl.heads.preferences import LOSSES, OF_PICTURES, Answers, Scale, measures, preference_loss
from dora_vl.run.settings import OF_SINGLE_ANSWERS, WITHOUT_REFERENCE

LOG_PROBS = (-3.1, -4.7, -2.2, -9.4, -0.6, -5.5)
REFERENCE = (-3.4, -4.1, -2.9, -8.8, -0.5, -7.3)
TOKENS = (3, 5, 2, 7, 1, 4)
PREFERRED = (True, False, False, True, True, False)
PAIRS = ((0, 1), (0, 2), (3, 5))
"""One prompt with two rejected answers, one pair, and a prompt with a preferred answer alone."""
BETA, MARGIN, LEVEL = 0.3, 0.7, 0.4


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def answers(log_probs: torch.Tensor) -> Answers:
    return Answers(
        log_probs,
        torch.tensor(REFERENCE, dtype=log_probs.dtype),
        torch.tensor(TOKENS, dtype=log_probs.dtype),
        torch.where(torch.tensor(PREFERRED), 1.0, -1.0),
        torch.tensor(PAIRS).T,
    )


NO_PAIRS = torch.zeros(2, 0, dtype=torch.int64)


def gain(p: tuple[float, ...], number: int) -> float:
    return p[number] - REFERENCE[number]


def mean(p: tuple[float, ...], number: int) -> float:
    return p[number] / TOKENS[number]


def odds(p: tuple[float, ...], number: int) -> float:
    q = math.exp(mean(p, number))
    return math.log(q / (1 - q))


def margin(p: tuple[float, ...], w: int, o: int) -> float:
    return BETA * (gain(p, w) - gain(p, o))


def likelihood(p: tuple[float, ...]) -> float:
    """What supervised tuning takes of the preferred answers."""
    return -(p[0] + p[3] + p[4]) / (3 + 7 + 1)


def judged(p: tuple[float, ...], y: int, *, good: bool, threshold: float = 0.0) -> float:
    """A binary classifier's loss."""
    return -math.log(sigmoid((1 if good else -1) * (BETA * gain(p, y) - threshold)))


PAIRED: dict[str, Callable[[tuple[float, ...], int, int], float]] = {
    "dpo": lambda p, w, o: -math.log(sigmoid(margin(p, w, o))),
    "ipo": lambda p, w, o: (gain(p, w) / TOKENS[w] - gain(p, o) / TOKENS[o] - 1 / (2 * BETA)) ** 2,
    "simpo": lambda p, w, o: -math.log(sigmoid(BETA * (mean(p, w) - mean(p, o)) - MARGIN)),
    "cpo": lambda p, w, o: -math.log(sigmoid(BETA * (p[w] - p[o]))) + likelihood(p),
    "orpo": lambda p, w, o: likelihood(p) - BETA * math.log(sigmoid(odds(p, w) - odds(p, o))),
    "bco": lambda p, w, o: judged(p, w, good=True) + judged(p, o, good=False),
    "apo_zero": lambda p, w, o: 1 - sigmoid(BETA * gain(p, w)) + sigmoid(BETA * gain(p, o)),
}
SINGLE: dict[str, Callable[[tuple[float, ...], int, bool], float]] = {
    "kto": lambda p, y, good: 1 - sigmoid((1 if good else -1) * BETA * (gain(p, y) - LEVEL))
}


def written_out(name: str, p: tuple[float, ...]) -> float:
    if name in PAIRED:
        values = [PAIRED[name](p, w, o) for w, o in PAIRS]
    elif name == "sft":
        values = [likelihood(p)]
    elif name == "anchor":
        values = [judged(p, y, good=True) for y, good in enumerate(PREFERRED) if good]
    else:
        values = [SINGLE[name](p, number, good) for number, good in enumerate(PREFERRED)]
    return sum(values) / len(values)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_the_equations(name: str) -> None:
    log_probs = torch.tensor(LOG_PROBS, dtype=torch.float64, requires_grad=True)
    loss = LOSSES[name](answers(log_probs), Scale(beta=BETA, margin=MARGIN, kl=LEVEL))
    assert loss.item() == pytest.approx(written_out(name, LOG_PROBS), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    step = 1e-6
    for number in range(len(LOG_PROBS)):
        up, down = (
            written_out(name, tuple(value + sign * step * (place == number) for place, value in enumerate(LOG_PROBS)))
            for sign in (1, -1)
        )
        assert gradient[number].item() == pytest.approx((up - down) / (2 * step), abs=1e-8)


@pytest.mark.parametrize("name", sorted(WITHOUT_REFERENCE))
def test_losses_without_a_reference_ask_for_none(name: str) -> None:
    given = answers(torch.tensor(LOG_PROBS))
    bare = given._replace(reference=None)
    torch.testing.assert_close(LOSSES[name](bare, Scale()), LOSSES[name](given, Scale()))


@pytest.mark.parametrize("name", sorted(OF_SINGLE_ANSWERS))
def test_losses_of_single_answers_need_no_pair(name: str) -> None:
    given = answers(torch.tensor(LOG_PROBS))
    alone = given._replace(pairs=NO_PAIRS)
    value, with_pairs = (LOSSES[name](each, Scale(beta=BETA)) for each in (alone, given))
    if name in ("sft", "kto", "anchor"):
        assert value == with_pairs
    if name == "bco":
        rewards = [BETA * gain(LOG_PROBS, number) for number in range(6)]
        threshold = ((rewards[0] + rewards[3] + rewards[4]) / 3 + (rewards[1] + rewards[2] + rewards[5]) / 3) / 2
        expected = [judged(LOG_PROBS, y, good=good, threshold=threshold) for y, good in enumerate(PREFERRED)]
        torch.testing.assert_close(value, torch.tensor(expected).mean())
    if name == "apo_zero":
        expected = [sigmoid((-BETA if good else BETA) * gain(LOG_PROBS, y)) for y, good in enumerate(PREFERRED)]
        torch.testing.assert_close(value, torch.tensor(expected).mean())


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_answer_under_other_pictures_is_a_term_of_its_own(name: str) -> None:
    """Answers 1 and 5 are 0 and 3 under other pictures: the mean over these pairs is added to that over the rest."""
    own, of_pictures = torch.tensor([(0, 2)]).T, torch.tensor([(0, 1), (3, 5)]).T
    given = answers(torch.tensor(LOG_PROBS, dtype=torch.float64))._replace(pairs=own)
    scale = Scale(beta=BETA, margin=MARGIN, kl=LEVEL)
    value = preference_loss(given, scale, {name: 0.5}, of_pictures=of_pictures).item()
    if name in PAIRED:
        expected = PAIRED[name](LOG_PROBS, 0, 2)
        if name in OF_PICTURES:
            expected += (PAIRED[name](LOG_PROBS, 0, 1) + PAIRED[name](LOG_PROBS, 3, 5)) / 2
        assert (name in OF_PICTURES) == (name not in ("cpo", "orpo"))
    else:
        expected = written_out(name, LOG_PROBS)
    assert value == pytest.approx(0.5 * expected, rel=1e-12)
    found = measures(given, BETA, of_pictures=of_pictures)
    looks = (margin(LOG_PROBS, 0, 1) + margin(LOG_PROBS, 3, 5)) / 2
    assert found["rewards/picture_margin"].item() == pytest.approx(looks, rel=1e-12)
    assert found["rewards/rejected"].item() == pytest.approx(BETA * gain(LOG_PROBS, 2), rel=1e-12)


def test_measures_are_those_of_the_pairs() -> None:
    found = {
        name: value.item()
        for name, value in measures(answers(torch.tensor(LOG_PROBS)), BETA, of_pictures=NO_PAIRS).items()
    }
    margins = [margin(LOG_PROBS, w, o) for w, o in PAIRS]
    assert found["rewards/margin"] == pytest.approx(sum(margins) / 3, rel=1e-5)
    assert found["rewards/accuracy"] == pytest.approx(sum(value > 0 for value in margins) / 3)
    assert 0 < found["rewards/accuracy"] < 1
    assert found["log_probs/rejected"] == pytest.approx((-4.7 - 2.2 - 5.5) / 3, rel=1e-5)
