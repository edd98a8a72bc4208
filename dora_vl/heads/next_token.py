"""The loss of each labelled token, in chunks, so that scores of a large vocabulary are never all in memory.

A label is a token, or the scores that another model gives to all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dora_vl.shapes import Float, Int

CHUNK = 256
"""The scores of this many labels are in memory together: 0.3 GB for a vocabulary of 100,000 words."""
SMALL_VOCABULARY = 4096
"""Below this size all scores fit in memory; the model's own are used, to the last bit."""
Labels = Int[Tensor, " labels"] | Float[Tensor, "labels vocab"]
Scores = Callable[[Float[Tensor, "labels width"]], Float[Tensor, "labels vocab"]]


def in_chunks(head: nn.Module) -> bool:
    """Tells whether losses are computed in chunks: the output layer is frozen and its vocabulary is large."""
    is_small = getattr(head, "out_features", SMALL_VOCABULARY) < SMALL_VOCABULARY
    return not is_small and not any(weight.requires_grad for weight in head.parameters())


def label_losses(hidden: Float[Tensor, "labels width"], targets: Labels, scores: Scores) -> Float[Tensor, " labels"]:
    """Computes `losses_of` each label, in float32.

    A label's loss depends only on its own hidden state. So its gradient is computed with it, chunk by chunk, and no
    chunk's scores wait for the backward pass; that is faster than scores of all labels at once.

    Args:
        scores: maps hidden states to the vocabulary's scores, each row by itself and without trained weights.
    """
    losses: Tensor = _LabelLosses.apply(hidden, targets, scores)  # pyright: ignore[reportAssignmentType]
    return losses


def losses_of(scores: Float[Tensor, "labels vocab"], targets: Labels) -> Float[Tensor, " labels"]:
    """Computes each token's cross-entropy from existing scores, or the divergence KL(target, model), in float32."""
    if targets.dim() == 1:
        return functional.cross_entropy(scores.float(), targets, reduction="none")
    expected = targets.float().log_softmax(-1)
    return functional.kl_div(scores.float().log_softmax(-1), expected, reduction="none", log_target=True).sum(-1)


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
