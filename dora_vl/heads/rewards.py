"""Losses that learn from rewards of answers that the model drew itself, each with its equation and source.

Letters, for a prompt with the drawn answers 1 to G, answer i of n_i tokens, among the N answers of a step:

    r_i     its reward
    a_i     its advantage: how much better it is than the others of its prompt
    p_t     log-probability of token t under the model, which drew it
    f_t     the same under the reference, the model as it was when training began

Answers are learned from once, by the model that drew them. So the ratio of PPO (arXiv 1707.06347, equation 7) is 1,
nothing is clipped, and every loss here is

    - sum over answers i and their tokens t of  w_i a_i p_t

An answer without a reward (NaN) is left out of its group's mean and spread, and its advantage is 0.
The weights w_i say how tokens and answers are averaged. They are all that tells the losses apart, with the advantage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dora_vl.shapes import Float, Int

SMALLEST_SPREAD = 1e-4
"""This is added to standard deviations, so that equal rewards are not divided by zero."""
Rewards = Float[Tensor, "prompts group"]


def standardised(rewards: Rewards) -> Rewards:
    """(r_i - mean) / standard deviation, over the group. GRPO, arXiv 2402.03300, section 4.1.2."""
    return centred(rewards) / (spread(rewards)[:, None] + SMALLEST_SPREAD)


def centred(rewards: Rewards) -> Rewards:
    """r_i - mean. Dr. GRPO, arXiv 2503.20783: dividing by the spread favours prompts answered nearly always alike."""
    return (rewards - rewards.nanmean(dim=1, keepdim=True)).nan_to_num(0.0)


def against_others(rewards: Rewards) -> Rewards:
    """r_i - mean of the others. RLOO, arXiv 2402.14740, equation 8."""
    rewarded = (~rewards.isnan()).sum(1, keepdim=True)
    return centred(rewards) * rewarded / (rewarded - 1).clamp(min=1)


def spread(rewards: Rewards) -> Float[Tensor, " prompts"]:
    """Returns the standard deviation in each group; 0 where fewer than two answers have a reward."""
    return (centred(rewards).square().sum(1) / ((~rewards.isnan()).sum(1) - 1).clamp(min=1)).sqrt()


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """Says how rewards are learned from: the advantage, and how tokens and answers are averaged.

    `average` over a step's N answers: `means` of each answer's tokens (w = 1 / (N n_i)); `sums` of its tokens (1 / N);
    all `tokens` alike (1 / sum of n); `longest` divides by the most tokens that an answer may have (1 / (N longest)).
    """

    advantages: Callable[[Rewards], Rewards]
    average: Literal["means", "sums", "tokens", "longest"]

    def weights(self, tokens: Int[Tensor, "prompts group"], longest: int) -> Rewards:
        """Returns the weight of each answer's tokens, still to be divided by `divisor`."""
        return torch.ones(tokens.shape) / {"means": tokens, "longest": longest}.get(self.average, 1)

    def divisor(self, tokens: Int[Tensor, "prompts group"]) -> int:
        """Returns N, or the number of all tokens."""
        return int(tokens.sum()) if self.average == "tokens" else tokens.numel()


def divergence(now: Float[Tensor, " tokens"], reference: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """exp(f - p) - (f - p) - 1, an estimate of KL(model, reference) that is never negative. GRPO, equation 4."""
    difference = reference - now
    return difference.exp() - difference - 1
