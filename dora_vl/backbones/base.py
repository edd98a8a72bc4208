"""What a backbone hands to a head."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class Features(NamedTuple):
    """The positions of a batch that predict a label, one after another, and what they predict.

    `targets` are the token ids that stand one position later; `rows` says which row of the batch each comes
    from, so that a head can normalise per sample. Without labels there is one position a row, its last, and
    `targets` is -100 there. A tuple, because DeepSpeed's ZeRO-3 hooks look for tensors in tuples and not in other
    classes.
    """

    hidden: Float[Tensor, "labelled width"]
    logits: Float[Tensor, "labelled vocab"]
    targets: Int[Tensor, " labelled"]
    rows: Int[Tensor, " labelled"]
