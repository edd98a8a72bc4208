"""Losses that learn from which of several answers is preferred, each with its equation and source.

Letters, for one prompt x with a preferred answer w and a rejected answer l:

    p(y)    log-probability of answer y under the model: the sum over its tokens
    r(y)    the same under the reference, the model as it was when training began
    n(y)    how many tokens y has
    g(y)    beta (p(y) - r(y)), the reward that the model itself gives y (arXiv 2305.18290, equation 5)
    m       g(w) - g(l), the margin
    s       the logistic function

Every loss gives a number for each pair, or for each answer where nothing is paired; their mean is the batch's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


class Answers(NamedTuple):
    """Holds log-probabilities of the answers of a batch.

    `reference` is None where the loss needs none. `group` numbers the prompts; answers of one prompt share a number.
    """

    log_probs: Float[Tensor, " answers"]
    reference: Float[Tensor, " answers"] | None
    tokens: Float[Tensor, " answers"]
    preferred: Bool[Tensor, " answers"]
    group: Int[Tensor, " answers"]

    def only(self, chosen: Bool[Tensor, " answers"]) -> Answers:
        """Returns some of the answers."""
        reference = None if self.reference is None else self.reference[chosen]
        return Answers(
            self.log_probs[chosen], reference, self.tokens[chosen], self.preferred[chosen], self.group[chosen]
        )

    def gains(self) -> Float[Tensor, " answers"]:
        """Computes p - r of each answer."""
        assert self.reference is not None
        return self.log_probs - self.reference

    def means(self) -> Float[Tensor, " answers"]:
        """Computes p / n of each answer."""
        return self.log_probs / self.tokens

    def pairs(self) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Returns the numbers of a preferred and of a rejected answer, for all pairs of one prompt."""
        together = self.group[:, None] == self.group
        chosen, rejected = (together & self.preferred[:, None] & ~self.preferred).nonzero(as_tuple=True)
        return chosen, rejected


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Holds the numbers of a loss's equation.

    Attributes:
        beta: the weight of the log-ratio; a smaller one lets the model go further from the reference.
        margin: gamma of SimPO, the reward by which the preferred answer is to be better.
        kl: z of KTO, the mean p - r of answers to other prompts, at which an answer is neither good nor bad.
    """

    beta: float = 0.1
    margin: float = 0.5
    kl: Tensor | float = 0.0


Loss = Callable[[Answers, Scale], Float[Tensor, " values"]]


def _margins(answers: Answers, values: Float[Tensor, " answers"]) -> Float[Tensor, " pairs"]:
    """Computes the value of the preferred answer less that of the rejected one, for each pair."""
    chosen, rejected = answers.pairs()
    return values[chosen] - values[rejected]


def dpo(answers: Answers, scale: Scale) -> Float[Tensor, " pairs"]:
    """-log s(m). Direct preference optimisation, arXiv 2305.18290, equation 7."""
    return -F.logsigmoid(scale.beta * _margins(answers, answers.gains()))


def hinge(answers: Answers, scale: Scale) -> Float[Tensor, " pairs"]:
    """max(0, 1 - m). Sequence likelihood calibration (SLiC-HF), arXiv 2305.10425, with DPO's reward."""
    return torch.relu(1 - scale.beta * _margins(answers, answers.gains()))


def ipo(answers: Answers, scale: Scale) -> Float[Tensor, " pairs"]:
    """(h - 1 / (2 beta))^2 with h = (p - r)(w) / n(w) - (p - r)(l) / n(l). arXiv 2310.12036, equation 17.

    The mean over tokens is not in the paper; its authors say that the equation is meant so.
    """
    return (_margins(answers, answers.gains() / answers.tokens) - 1 / (2 * scale.beta)).square()


def kto(answers: Answers, scale: Scale) -> Float[Tensor, " answers"]:
    """1 - s(g - z) of a preferred answer, 1 - s(z - g) of a rejected one. arXiv 2402.01306, equation 8."""
    value = scale.beta * (answers.gains() - scale.kl)
    return 1 - torch.sigmoid(torch.where(answers.preferred, value, -value))


def _of_pairs(answers: Answers, values: Float[Tensor, " answers"]) -> Float[Tensor, " values"]:
    """Adds both answers' values for each pair; returns the values themselves where nothing is paired."""
    chosen, rejected = answers.pairs()
    return values[chosen] + values[rejected] if len(chosen) else values


def bco(answers: Answers, scale: Scale) -> Float[Tensor, " values"]:
    """-log s(g - delta) of a preferred answer, -log s(delta - g) of a rejected one. arXiv 2404.04656, equation 10.

    delta is 0 for pairs, whose rewards balance each other, as TRL has it; else the mean reward, here of the batch,
    halfway between the preferred answers' and the rejected ones'.
    """
    rewards, delta = scale.beta * answers.gains(), torch.zeros(())
    if not len(answers.pairs()[0]):
        kinds = [rewards.detach()[kind] for kind in (answers.preferred, ~answers.preferred) if bool(kind.any())]
        delta = torch.stack([kind.mean() for kind in kinds]).mean() if kinds else delta
    value = rewards - delta.to(rewards)
    return _of_pairs(answers, -F.logsigmoid(torch.where(answers.preferred, value, -value)))


def apo_zero(answers: Answers, scale: Scale) -> Float[Tensor, " values"]:
    """1 - s(g) of a preferred answer, s(g) of a rejected one: raises the one, lowers the other. arXiv 2408.06266."""
    value = scale.beta * answers.gains()
    return _of_pairs(answers, torch.sigmoid(torch.where(answers.preferred, -value, value)))


def apo_down(answers: Answers, scale: Scale) -> Float[Tensor, " pairs"]:
    """s(g(w)) + 1 - s(m): lowers both answers, the rejected one further. arXiv 2408.06266."""
    rewards = scale.beta * answers.gains()
    chosen, _ = answers.pairs()
    return torch.sigmoid(rewards[chosen]) + 1 - torch.sigmoid(_margins(answers, rewards))


def simpo(answers: Answers, scale: Scale) -> Float[Tensor, " pairs"]:
    """-log s(beta (p(w) / n(w) - p(l) / n(l)) - gamma). arXiv 2405.14734, equation 6."""
    return -F.logsigmoid(scale.beta * _margins(answers, answers.means()) - scale.margin)


def sft(answers: Answers, scale: Scale) -> Float[Tensor, " one"]:
    """-p / n over all preferred answers: the mean over their tokens, as supervised tuning takes it."""
    log_probs, tokens = answers.log_probs[answers.preferred], answers.tokens[answers.preferred]
    return -(log_probs.sum() / tokens.sum().clamp_min(1))[None]


def cpo(answers: Answers, scale: Scale) -> Float[Tensor, " pairs"]:
    """-log s(beta (p(w) - p(l))), and what `sft` takes. arXiv 2401.08417, equation 5."""
    return sft(answers, scale) - F.logsigmoid(scale.beta * _margins(answers, answers.log_probs))


def orpo(answers: Answers, scale: Scale) -> Float[Tensor, " pairs"]:
    """-beta log s(o(w) - o(l)) with o = log(q / (1 - q)) and log q = p / n, and what `sft` takes. arXiv 2403.07691."""
    means = answers.means()
    odds = means - torch.log1p(-means.exp())
    return sft(answers, scale) - scale.beta * F.logsigmoid(_margins(answers, odds))


LOSSES: Mapping[str, Loss] = {
    "sft": sft,
    "dpo": dpo,
    "hinge": hinge,
    "ipo": ipo,
    "kto": kto,
    "bco": bco,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "orpo": orpo,
    "simpo": simpo,
    "cpo": cpo,
}


def measures(answers: Answers, beta: float) -> dict[str, Float[Tensor, ""]]:
    """Returns what people watch: rewards, margin, accuracy and log-probabilities; accuracy counts pairs."""
    values = answers.log_probs if answers.reference is None else answers.gains()
    rewards, log_probs = beta * values.detach(), answers.log_probs.detach()
    margins = _margins(answers, rewards)
    return {
        "rewards/chosen": rewards[answers.preferred].mean(),
        "rewards/rejected": rewards[~answers.preferred].mean(),
        "rewards/margin": margins.mean(),
        "rewards/accuracy": (margins > 0).float().mean(),
        "log_probs/chosen": log_probs[answers.preferred].mean(),
        "log_probs/rejected": log_probs[~answers.preferred].mean(),
    }
