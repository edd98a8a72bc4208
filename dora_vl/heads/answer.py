"""A head that scores each answer of a closed list (VL-T5's classifier form; its published runs generate instead)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dora_vl.shapes import Float, Int


class AnswerHead(nn.Module):
    """Scores a fixed answer list from the decoder's first hidden state: two layers with GELU and a norm between.

    Args:
        width: size of the hidden state.
        answers: the list; scores keep its order.
    """

    def __init__(self, width: int, answers: Sequence[str]) -> None:
        super().__init__()
        self.answers = tuple(answers)
        self.indices = {answer: index for index, answer in enumerate(self.answers)}
        if len(self.indices) != len(self.answers):
            raise ValueError("the answer list names an answer twice")
        self.logit_fc = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width), nn.Linear(2 * width, len(self.answers))
        )

    def forward(self, hidden: Float[Tensor, "batch width"]) -> Float[Tensor, "batch answers"]:
        """Returns a score for each answer; a sigmoid makes it that answer's probability."""
        return self.logit_fc(hidden)

    def targets(self, soft_scores: Sequence[Mapping[str, float]]) -> Float[Tensor, "batch answers"]:
        """Returns soft scores, a row a sample; answers outside the list are left out, so a row may be all zeros."""
        rows = torch.zeros(len(soft_scores), len(self.answers))
        for row, scores in zip(rows, soft_scores, strict=True):
            for answer, score in scores.items():
                if answer in self.indices:
                    row[self.indices[answer]] = score
        return rows

    def chosen(self, scores: Float[Tensor, "batch answers"]) -> list[str]:
        """Returns the best answer of each row."""
        best: Int[Tensor, " batch"] = scores.argmax(1)
        return [self.answers[index] for index in best.tolist()]


def answer_loss(
    scores: Float[Tensor, "batch answers"],
    targets: Float[Tensor, "batch answers"],
    weights: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Computes binary cross-entropy against soft scores, summed over the answers.

    Args:
        weights: each sample's share of the loss; None takes the mean over the batch.
    """
    each = functional.binary_cross_entropy_with_logits(scores.float(), targets, reduction="none").sum(1)
    return each.mean() if weights is None else (each * weights).sum()
