"""Advantages, weights and divergence against their equations, written out answer by answer."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from dora_vl.heads.rewards import REWARD_LOSSES, SMALLEST_SPREAD, divergence

REWARDS = ((1.0, 0.0, 0.25, 1.0), (0.5, 0.5, 0.5, 0.5))
TOKENS = (3, 1, 2, 4)
LONGEST = 7
NOW = (-0.2, -1.9, -0.7, -2.4, -0.1, -3.0, -0.9, -0.4, -1.1, -2.2)
DRAWN = (-0.5, -1.2, -0.7, -2.9, -0.1, -2.2, -1.4, -0.4, -1.0, -2.6)


def advantage(name: str, group: tuple[float, ...], number: int) -> float:
    above = group[number] - statistics.mean(group)
    if name == "rloo":
        return group[number] - statistics.mean([*group[:number], *group[number + 1 :]])
    return above if name == "dr_grpo" else above / (statistics.stdev(group) + SMALLEST_SPREAD)


WEIGHTS = {
    "grpo": lambda tokens: 1 / (tokens * len(TOKENS)),
    "dapo": lambda tokens: 1 / sum(TOKENS),
    "dr_grpo": lambda tokens: 1 / (len(TOKENS) * LONGEST),
    "rloo": lambda tokens: 1 / len(TOKENS),
}


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_advantages_are_the_papers(name: str) -> None:
    values = REWARD_LOSSES[name].advantages(torch.tensor(REWARDS, dtype=torch.float64))
    expected = [[advantage(name, group, number) for number in range(4)] for group in REWARDS]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert not values[1].any()  # a group without spread teaches nothing


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_weights_and_divisor_are_the_papers(name: str) -> None:
    loss, tokens = REWARD_LOSSES[name], torch.tensor(TOKENS)
    weights = loss.weights(tokens, LONGEST).double() / loss.divisor(tokens)
    expected = torch.tensor([WEIGHTS[name](count) for count in TOKENS], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-7, atol=0)


def test_divergence_is_no_less_than_nothing_and_means_the_kl() -> None:
    now, reference = (torch.tensor(values, dtype=torch.float64) for values in (NOW, DRAWN))
    expected = [math.exp(f - p) - (f - p) - 1 for p, f in zip(NOW, DRAWN, strict=True)]
    assert divergence(now, reference).tolist() == pytest.approx(expected)
    assert float(divergence(now, reference).min()) >= 0
    model, other = (torch.tensor(values, dtype=torch.float64).log() for values in ((0.7, 0.2, 0.1), (0.5, 0.1, 0.4)))
    mean = (model.exp() * divergence(model, other)).sum()  # over what the model draws
    assert mean.item() == pytest.approx((model.exp() * (model - other)).sum().item())
