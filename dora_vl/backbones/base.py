"""What a backbone hands to a head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dora_vl.data.dataset import IGNORED_LABEL
from dora_vl.data.shared_prefix import visible
from dora_vl.errors import UserError


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


def max_positions(config: Any) -> int | None:
    """How many tokens of text, pictures among them, a model of this config takes; None where it states no number.

    Learnt positions end in an index error there; rotary ones go on, far from anything that was trained.
    """
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def labelled_positions(
    labels: Int[Tensor, "batch seq"] | None, attention_mask: Int[Tensor, "batch seq"]
) -> tuple[Int[Tensor, " labelled"], Int[Tensor, " labelled"], Int[Tensor, " labelled"]]:
    """Rows, places and targets of the positions that predict a label; without labels, each row's last token."""
    if labels is None:
        rows = torch.arange(len(attention_mask), device=attention_mask.device)
        length = attention_mask.shape[1]
        last = length - 1 - attention_mask.flip(1).argmax(1)
        return rows, last, torch.full_like(rows, IGNORED_LABEL)
    targets = labels[:, 1:]
    rows, places = (targets != IGNORED_LABEL).nonzero(as_tuple=True)
    return rows, places, targets[rows, places]


def layout_attention(layout: Int[Tensor, "batch 3 seq"], *, kernel: str, dtype: torch.dtype) -> Tensor:
    """The mask of rows that hold several samples (`data.shared_prefix`), in the form that the attention kernel takes.

    Raises: UserError for a kernel that takes no mask of its own.
    """
    if kernel not in ("sdpa", "eager"):
        raise UserError(
            "a row of several samples (data.share_pictures, data.packing, likelihoods of choices) needs "
            f"model.attn_implementation sdpa or eager, not {kernel}"
        )
    mask = visible(layout)
    if kernel == "sdpa":
        return mask
    smallest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, device=mask.device, dtype=dtype).masked_fill_(~mask, smallest)
