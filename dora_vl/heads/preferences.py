"""Losses that learn from which of several answers is preferred, each with its equation and source.

Letters, for one prompt x with a preferred answer w and a rejected answer l:

    p(y)    log-probability of answer y under the model: the sum over its tokens
    r(y)    the same under the reference, the model as it was when training began
    n(y)    how many tokens y has
    g(y)    beta (p(y) - r(y)), the reward that the model itself gives y (arXiv 2305.18290, equation 5)
    m       g(w) - g(l), the margin
    s       the logistic function

Every loss is a mean over pairs, or over answers where nothing is paired. `heads.objectives` adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dora_vl.shapes import Bool, Float, Int

Pairs = Int[Tensor, "2 pairs"]
"""Holds a number of each pair's preferred answer, and one of its rejected answer."""


class Answers(NamedTuple):
    """Holds log-probabilities of the answers of a batch.

    `reference` is None where the loss needs none. `weights` are above 0 for preferred answers, below 0 for rejected
    ones, and 0 for answers to another prompt.
    """

    log_probs: Float[Tensor, " answers"]
    reference: Float[Tensor, " answers"] | None
    tokens: Float[Tensor, " answers"]
    weights: Float[Tensor, " answers"]
    pairs: Pairs

    def gains(self) -> Float[Tensor, " answers"]:
        """Computes p - r of each answer."""
        assert self.reference is not None
        return self.log_probs - self.reference

    def mean_gains(self) -> Float[Tensor, " answers"]:
        """Computes (p - r) / n of each answer."""
        return self.gains() / self.tokens

    def means(self) -> Float[Tensor, " answers"]:
        """Computes p / n of each answer."""
        return self.log_probs / self.tokens

    def mean_of_pairs(self, values: Float[Tensor, " pairs"]) -> Float[Tensor, ""]:
        """Computes the mean; 0 of no pair."""
        return values.sum() / max(1, self.pairs.shape[1])

    def margins(self, values: Float[Tensor, " answers"]) -> Float[Tensor, " pairs"]:
        """Computes the value of the preferred answer less that of the rejected one, for each pair."""
        return values[self.pairs[0]] - values[self.pairs[1]]

    def of_each(self, values: Float[Tensor, " answers"]) -> Float[Tensor, ""]:
        """Computes the mean over pairs of both answers' values; over the answers where nothing is paired."""
        if self.pairs.shape[1]:
            return self.mean_of_pairs(values[self.pairs].sum(0))
        return mean_over(values, self.weights != 0)

    def signed(self, values: Float[Tensor, " answers"]) -> Float[Tensor, " answers"]:
        """Returns the values of preferred answers, and the others' with the other sign."""
        return torch.where(self.weights > 0, values, -values)


def mean_over(values: Float[Tensor, " answers"], kept: Bool[Tensor, " answers"]) -> Float[Tensor, ""]:
    """Computes the mean over some answers, 0 where there is none; the host waits for nothing."""
    return torch.where(kept, values, 0).sum() / kept.sum().clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Holds the numbers of a loss's equation.

    Attributes:
        beta: the weight of the log-ratio; a smaller one lets the model go further from the reference.
        margin: gamma of SimPO, the reward by which the preferred answer is to be better.
        kl: z of KTO, the mean p - r of answers to other prompts, at which an answer is neither good nor bad.
    """

    beta: float = 0.1
    margin: float = 0.5
    kl: Tensor | float = 0.0


def dpo(answers: Answers, hyper: Hyperparameters) -> Float[Tensor, ""]:
    """-log s(m). Direct preference optimisation, arXiv 2305.18290, equation 7."""
    return answers.mean_of_pairs(-F.logsigmoid(hyper.beta * answers.margins(answers.gains())))


def ipo(answers: Answers, hyper: Hyperparameters) -> Float[Tensor, ""]:
    """(h - 1 / (2 beta))^2 with h = (p - r)(w) / n(w) - (p - r)(l) / n(l). arXiv 2310.12036, equation 17.

    The mean over tokens is not in the paper; its authors say that the equation is meant so.
    """
    differences = answers.margins(answers.mean_gains())
    return answers.mean_of_pairs((differences - 1 / (2 * hyper.beta)).square())


def kto(answers: Answers, hyper: Hyperparameters) -> Float[Tensor, ""]:
    """1 - s(g - z) of a preferred answer, 1 - s(z - g) of a rejected one. arXiv 2402.01306, equation 8."""
    value = answers.signed(hyper.beta * (answers.gains() - hyper.kl))
    return mean_over(1 - torch.sigmoid(value), answers.weights != 0)


def bco(answers: Answers, hyper: Hyperparameters) -> Float[Tensor, ""]:
    """-log s(g - delta) of a preferred answer, -log s(delta - g) of a rejected one. arXiv 2404.04656, equation 10.

    delta is 0 for pairs, whose rewards balance each other, as TRL has it; else the mean reward, here of the batch,
    halfway between the preferred answers' and the rejected ones'.
    """
    rewards = hyper.beta * answers.gains()
    if not answers.pairs.shape[1]:
        kinds = [answers.weights > 0, answers.weights < 0]
        means = [mean_over(rewards.detach(), kind) for kind in kinds]
        rewards = rewards - sum(means) / torch.stack([kind.any() for kind in kinds]).sum().clamp_min(1)
    return answers.of_each(-F.logsigmoid(answers.signed(rewards)))


def apo_zero(answers: Answers, hyper: Hyperparameters) -> Float[Tensor, ""]:
    """1 - s(g) of a preferred answer, s(g) of a rejected one: raises the one, lowers the other. arXiv 2408.06266."""
    return answers.of_each(torch.sigmoid(-answers.signed(hyper.beta * answers.gains())))


def simpo(answers: Answers, hyper: Hyperparameters) -> Float[Tensor, ""]:
    """-log s(beta (p(w) / n(w) - p(l) / n(l)) - gamma). arXiv 2405.14734, equation 6."""
    return answers.mean_of_pairs(-F.logsigmoid(hyper.beta * answers.margins(answers.means()) - hyper.margin))


def anchor(answers: Answers, hyper: Hyperparameters) -> Float[Tensor, ""]:
    """-log s(g(w)): keeps the preferred answers' rewards above 0. arXiv 2406.11839, L_AncPO, with delta 0."""
    return mean_over(-F.logsigmoid(hyper.beta * answers.gains()), answers.weights > 0)


def sft(answers: Answers, hyper: Hyperparameters) -> Float[Tensor, ""]:
    """-p / n over all preferred answers: the mean over their tokens, as supervised tuning takes it."""
    preferred = answers.weights > 0
    tokens = torch.where(preferred, answers.tokens, 0).sum().clamp_min(1)
    return -torch.where(preferred, answers.log_probs, 0).sum() / tokens


def cpo(answers: Answers, hyper: Hyperparameters) -> Float[Tensor, ""]:
    """-log s(beta (p(w) - p(l))), and what `sft` takes. arXiv 2401.08417, equation 5."""
    of_pairs = -F.logsigmoid(hyper.beta * answers.margins(answers.log_probs))
    return sft(answers, hyper) + answers.mean_of_pairs(of_pairs)


def orpo(answers: Answers, hyper: Hyperparameters) -> Float[Tensor, ""]:
    """-beta log s(o(w) - o(l)) with o = log(q / (1 - q)) and log q = p / n, and what `sft` takes. arXiv 2403.07691."""
    means = answers.means().clamp_max(-1e-6)  # at 0 the odds are infinite
    odds = means - torch.log1p(-means.exp())
    return sft(answers, hyper) - hyper.beta * answers.mean_of_pairs(F.logsigmoid(answers.margins(odds)))
