"""Loss of next-token generation, from logits that exist only where a label does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class GenerationLoss:
    """The loss to go backward from, and how many tokens it saw."""

    loss: Float[Tensor, ""]
    labelled_tokens: Int[Tensor, ""]


def generation_loss(
    logits: Float[Tensor, "labelled vocab"],
    targets: Int[Tensor, " labelled"],
    *,
    divide_by: Int[Tensor, ""] | Float[Tensor, ""] | float | None = None,
) -> GenerationLoss:
    """Cross-entropy of the labelled positions, summed in float32 and divided.

    Args:
        logits: one row for each labelled position, already shifted: row i predicts `targets[i]`.
        targets: token ids.
        divide_by: the sum is divided by this; None divides by the labelled tokens here, which makes a mean.

    Without any labelled position the loss is 0 and still belongs to the graph, so that ranks stay in step.
    """
    count = torch.tensor(targets.numel(), device=logits.device)
    if targets.numel() == 0:
        return GenerationLoss(logits.float().sum() * 0.0, count)
    total = functional.cross_entropy(logits.float(), targets, reduction="sum")
    return GenerationLoss(total / (count if divide_by is None else divide_by), count)
