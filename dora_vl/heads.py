"""Losses of labelled tokens, in chunks for a large vocabulary, and VL-T5's head over a closed list of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

CHUNK = 256
"""Labels whose scores are in memory together: 0.3 GB for a vocabulary of 100,000 words."""
SMALL_VOCABULARY = 4096
"""Below this size all scores fit in memory; the model's own are used, to the last bit."""
Scores = Callable[[Float[Tensor, "labels width"]], Float[Tensor, "labels vocab"]]


def in_chunks(head: nn.Module) -> bool:
    """Tells whether losses are computed in chunks: the output layer is frozen and its vocabulary is large."""
    is_small = getattr(head, "out_features", SMALL_VOCABULARY) < SMALL_VOCABULARY
    return not is_small and not any(weight.requires_grad for weight in head.parameters())


def label_losses(
    hidden: Float[Tensor, "labels width"], targets: Int[Tensor, " labels"], scores: Scores
) -> Float[Tensor, " labels"]:
    """Computes each label's cross-entropy, in float32.

    A label's loss depends on its own hidden state alone. So its gradient is computed beside it, chunk by chunk, and no
    chunk's scores wait for the backward pass; that is faster than scores of all labels at once.

    Args:
        scores: maps hidden states to the vocabulary's scores, each row by itself and without trained weights.
    """
    losses: Tensor = _LabelLosses.apply(hidden, targets, scores)  # pyright: ignore[reportAssignmentType]
    return losses


def losses_of(scores: Float[Tensor, "labels vocab"], targets: Int[Tensor, " labels"]) -> Float[Tensor, " labels"]:
    """Computes each label's cross-entropy from scores that exist already, in float32."""
    return functional.cross_entropy(scores.float(), targets, reduction="none")


class _LabelLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, scores: Scores) -> Tensor:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        learns = ctx.needs_input_grad[0]
        for part, part_targets in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            with torch.set_grad_enabled(learns):
                part = part.detach().requires_grad_(learns)
                each = losses_of(scores(part), part_targets)
            losses.append(each.detach())
            if learns:
                gradients += torch.autograd.grad(each, part, torch.ones_like(each))
        if learns:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *of_losses: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * of_losses[0].to(gradients.dtype).unsqueeze(1), None, None


class AnswerHead(nn.Module):
    """Scores a fixed answer list from the decoder's first hidden state: two layers with GELU and a norm between.

    VL-T5 has it; its published runs generate instead.

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
    """Computes the binary cross-entropy against soft scores, summed over the answers.

    Args:
        weights: each sample's share of the loss; None takes the mean over the batch.
    """
    each = functional.binary_cross_entropy_with_logits(scores.float(), targets, reduction="none").sum(1)
    return each.mean() if weights is None else (each * weights).sum()
