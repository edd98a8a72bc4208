"""True or false by two logits at one place (NLVR2 in VL-T5): no search, nothing else can be said."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor


def says_true(logits: Float[Tensor, "batch vocab"], *, true_token: int, false_token: int) -> Bool[Tensor, " batch"]:
    """Whether each row prefers the token of "true"; of equals it is false."""
    return logits[:, true_token] > logits[:, false_token]
