"""Choice among given answers by their likelihood: always a valid choice, without any search."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def likeliest(log_probabilities: Float[Tensor, "batch choices"]) -> Int[Tensor, " batch"]:
    """The most likely choice of each row; of equals the first."""
    return log_probabilities.argmax(1)


def choice_margin(
    log_probabilities: Float[Tensor, "batch choices"], correct: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """How much likelier the right choice is than the best wrong one, in natural logarithms; above 0 is right."""
    right = log_probabilities.gather(1, correct[:, None])[:, 0]
    others = log_probabilities.scatter(1, correct[:, None], float("-inf"))
    return right - others.amax(1)
