"""What a run may learn: one row for each loss of `objective.loss`.

A new loss is a function in `heads.preferences`, or an advantage in `heads.rewards`, and a row here. Settings, checks of
the data, the collator, the loss modules, the log and the estimate read the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dora_vl.heads import preferences, rewards
from dora_vl.heads.preferences import Answers, Hyperparameters, Pairs
from dora_vl.heads.rewards import PolicyGradient
from dora_vl.shapes import Float

Kind = Literal["supervised", "preference", "reward"]
"""supervised learns the data's answers, preference compares them, reward learns from answers that the model draws."""
PAIRS, FLAGS = "pairs", "flags"
"""An answer is better than another one of its prompt, or a flag calls it good or bad by itself."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss, what it needs, and what the log shows of it.

    Attributes:
        loss: the equation of a supervised or preference loss.
        policy: how a reward loss weighs answers and their tokens.
        needs_reference: it compares with the model as it was when training began; with rewards, `objective.kl` decides.
        takes: what the data may say of its answers.
        mixes: it learns from flagged answers also where other answers of the data are pairs.
        exchanged: what the chosen answer with another picture (`objective.exchange_pictures`) is to it: the rejected
            one of a pair, in a term of its own; a further rejected answer; or nothing that it could learn from.
        needs_unmatched: it needs answers to other prompts beside a batch's own.
        settings: the fields of `objective` that only some losses read, and this one does.
        compared: what it compares of two answers; `beta` times that is logged as an answer's reward.
    """

    name: str
    kind: Kind = "preference"
    loss: Callable[[Answers, Hyperparameters], Float[Tensor, ""]] | None = None
    policy: PolicyGradient | None = None
    needs_reference: bool = True
    takes: frozenset[str] = frozenset({PAIRS})
    mixes: bool = False
    exchanged: Literal["pair", "rejected", "nothing"] = "nothing"
    needs_unmatched: bool = False
    settings: frozenset[str] = frozenset({"beta"})
    compared: Callable[[Answers], Float[Tensor, " answers"]] = Answers.gains


def _reward(name: str, policy: PolicyGradient) -> Objective:
    return Objective(
        name=name, kind="reward", policy=policy, needs_reference=False, takes=frozenset(), settings=frozenset()
    )


EITHER = frozenset({PAIRS, FLAGS})
_ROWS = (
    Objective(
        name="sft",
        kind="supervised",
        loss=preferences.sft,
        needs_reference=False,
        takes=EITHER,
        mixes=True,
        settings=frozenset(),
        compared=Answers.means,
    ),
    Objective(name="dpo", loss=preferences.dpo, exchanged="pair"),
    Objective(name="ipo", loss=preferences.ipo, exchanged="pair", compared=Answers.mean_gains),
    Objective(name="kto", loss=preferences.kto, takes=EITHER, mixes=True, exchanged="rejected", needs_unmatched=True),
    Objective(name="bco", loss=preferences.bco, takes=EITHER, exchanged="pair"),
    Objective(name="apo_zero", loss=preferences.apo_zero, takes=EITHER, exchanged="pair"),
    Objective(name="orpo", loss=preferences.orpo, needs_reference=False, compared=Answers.means),  # of odds, which grow
    Objective(
        name="simpo",
        loss=preferences.simpo,
        needs_reference=False,
        exchanged="pair",
        settings=frozenset({"beta", "margin"}),
        compared=Answers.means,
    ),
    Objective(name="cpo", loss=preferences.cpo, needs_reference=False, compared=lambda answers: answers.log_probs),
    Objective(name="anchor", loss=preferences.anchor, takes=EITHER, mixes=True),
    _reward("grpo", PolicyGradient(advantages=rewards.standardised, average="means")),
    _reward("dr_grpo", PolicyGradient(advantages=rewards.centred, average="longest")),
    _reward("dapo", PolicyGradient(advantages=rewards.standardised, average="tokens")),  # arXiv 2503.14476
    _reward("rloo", PolicyGradient(advantages=rewards.against_others, average="sums")),
)
OBJECTIVES: Mapping[str, Objective] = {row.name: row for row in _ROWS}


def preference_loss(
    answers: Answers, hyperparameters: Hyperparameters, weights: Mapping[str, float], *, exchanged: Pairs
) -> Float[Tensor, ""]:
    """Computes the weighted sum of losses, and once more of those that compare pictures, as mDPO does.

    With w under its own picture v and under another one u, and each L a mean over its own pairs:

        L(w with v, l with v) + L(w with v, w with u)        mDPO, arXiv 2406.11839: L_DPO + L_CoPO

    `anchor` is the third term of mDPO. kto has no pairs: w with u is a further rejected answer.

    Args:
        weights: the weight of each loss, by its name.
        exchanged: pairs of a preferred answer and the same under other pictures; `answers.pairs` has none of them.
    """
    # Without any pair the loss is 0 and still belongs to the graph, so that ranks stay in step.
    total = 0 * answers.log_probs.sum()
    of_pictures = answers._replace(pairs=exchanged)
    for name, weight in weights.items():
        objective = OBJECTIVES[name]
        assert objective.loss is not None, "settings refuse a reward's loss in a sum"
        total = total + weight * objective.loss(answers, hyperparameters)
        if objective.exchanged == "pair" and exchanged.shape[1]:
            total = total + weight * objective.loss(of_pictures, hyperparameters)
    return total


def preference_metrics(
    answers: Answers, beta: float, weights: Mapping[str, float], *, exchanged: Pairs
) -> dict[str, Float[Tensor, ""]]:
    """Returns what people watch: rewards, margin, accuracy and log-probabilities; accuracy counts pairs.

    Rewards are those of the loss with the largest weight, of the first such one; `sft` counts last.
    """
    name = max(weights, key=lambda name: (name != "sft", weights[name]))
    of_answers, log_probs = beta * OBJECTIVES[name].compared(answers).detach(), answers.log_probs.detach()
    margins = answers.margins(of_answers)
    metrics = {"rewards/margin": margins.mean(), "rewards/accuracy": (margins > 0).float().mean()}
    if exchanged.shape[1]:
        metrics["rewards/picture_margin"] = answers._replace(pairs=exchanged).margins(of_answers).mean()
    under_other = torch.zeros_like(of_answers, dtype=torch.bool).index_fill(0, exchanged[1], True)
    kinds = {"chosen": answers.weights > 0, "rejected": (answers.weights < 0) & ~under_other}
    for name, kind in kinds.items():
        for what, values in (("rewards", of_answers), ("log_probs", log_probs)):  # of none it is NaN: no log shows it
            metrics[f"{what}/{name}"] = torch.where(kind, values, 0).sum() / kind.sum()
    return metrics
