"""Losses that learn from rewards of answers that the model drew itself, each with its equation and source.

Letters, for a prompt with the drawn answers 1 to G, answer i of n_i tokens:

    r_i     its reward
    a_i     its advantage: how much better it is than the others of its prompt
    p_t     log-probability of token t under the model
    q_t     the same when the answer was drawn, without a gradient
    f_t     the same under the reference, the model as it was when training began
    c_t     exp(p_t - q_t), the ratio; 1 at the first step after the draw

Every loss is the sum over tokens of w_t max(-c_t a_i, -clip(c_t, 1 - low, 1 + high) a_i), where the weights w_t say how
tokens and answers are averaged (PPO, arXiv 1707.06347, equation 7).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

SMALLEST_SPREAD = 1e-4
"""Standard deviations get this added, so that alike rewards divide by no zero."""
Advantages = Callable[[Float[Tensor, "prompts group"]], Float[Tensor, "prompts group"]]


def standardised(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """(r_i - mean) / standard deviation, over the group. GRPO, arXiv 2402.03300, section 4.1.2."""
    return centred(rewards) / (rewards.std(dim=1, keepdim=True) + SMALLEST_SPREAD)


def centred(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """r_i - mean. Dr. GRPO, arXiv 2503.20783: dividing by the spread favours prompts that are nearly always answered
    alike."""
    return rewards - rewards.mean(dim=1, keepdim=True)


def against_others(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """r_i - mean of the others. RLOO, arXiv 2402.14740, equation 8."""
    return centred(rewards) * (rewards.shape[1] / (rewards.shape[1] - 1))


def by_answer(tokens: Int[Tensor, " answers"], longest: int) -> Float[Tensor, " answers"]:
    """1 / (G n_i): a mean over answers of means over tokens."""
    return 1 / (tokens * len(tokens)).double()


def by_token(tokens: Int[Tensor, " answers"], longest: int) -> Float[Tensor, " answers"]:
    """1 / sum of n: a mean over tokens, so that long answers count by their length. DAPO, arXiv 2503.14476."""
    return torch.full((len(tokens),), 1 / float(tokens.sum()), dtype=torch.float64)


def by_longest(tokens: Int[Tensor, " answers"], longest: int) -> Float[Tensor, " answers"]:
    """1 / (G longest): a constant, so that the length changes no token's weight. Dr. GRPO."""
    return torch.full((len(tokens),), 1 / (len(tokens) * longest), dtype=torch.float64)


def by_sequence(tokens: Int[Tensor, " answers"], longest: int) -> Float[Tensor, " answers"]:
    """1 / G: a mean over answers of sums over tokens, the log-probability of the answer. RLOO."""
    return torch.full((len(tokens),), 1 / len(tokens), dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class RewardLoss:
    """Says how rewards are learned from.

    Attributes:
        weights: the weight of each token of an answer, by the answers' lengths and the longest that is allowed.
        low, high: how far the ratio is followed below and above 1.
    """

    advantages: Advantages
    weights: Callable[[Int[Tensor, " answers"], int], Float[Tensor, " answers"]]
    low: float = 0.2
    high: float = 0.2


REWARD_LOSSES: Mapping[str, RewardLoss] = {
    "grpo": RewardLoss(advantages=standardised, weights=by_answer),
    "dr_grpo": RewardLoss(advantages=centred, weights=by_longest),
    "dapo": RewardLoss(advantages=standardised, weights=by_token, high=0.28),
    "rloo": RewardLoss(advantages=against_others, weights=by_sequence),
}


def clipped(
    now: Float[Tensor, " tokens"],
    drawn: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    *,
    low: float,
    high: float,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Returns each token's loss, and 1 where the clip holds the token back."""
    ratio = (now - drawn).exp()
    free, held = -ratio * advantages, -ratio.clamp(1 - low, 1 + high) * advantages
    return torch.maximum(free, held), (held > free).to(now.dtype)


def divergence(now: Float[Tensor, " tokens"], reference: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """exp(f - p) - (f - p) - 1, an estimate of KL(model, reference) that is never negative. GRPO, equation 4."""
    difference = reference - now
    return difference.exp() - difference - 1
