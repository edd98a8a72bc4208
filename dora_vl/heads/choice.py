"""Choice among given answers, always a valid one, without any search: by likelihood, or true or false by two logits."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor


def likeliest(log_probabilities: Float[Tensor, "batch choices"]) -> Int[Tensor, " batch"]:
    """The most likely choice of each row; of equals the first."""
    return log_probabilities.argmax(1)


def says_true(logits: Float[Tensor, "batch vocab"], *, true_token: int, false_token: int) -> Bool[Tensor, " batch"]:
    """Whether each row prefers the token of "true" (NLVR2 in VL-T5); of equals it is false."""
    return logits[:, true_token] > logits[:, false_token]
