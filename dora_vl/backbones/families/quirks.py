"""How single families join the pictures of a batch, and which words their layers must pass by; `table` names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from dora_vl.data.batches import concatenated, joined_values, stacked, values_by_name

PATCHES = ("pixel_values", "pixel_values_videos")
POINTING = {"image_token_pooling": "pixel_values", "video_token_pooling": "pixel_values_videos"}
CROSSING, SEES = "cross_attn", "full_text_row_masked_out_mask"
"""These name the attention module of a layer through which words look at pictures (mllama), and the input that says
which words see any."""


def a_picture_for_each(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Gives samples without pictures ones of zeros: the model (mllama) looks pictures up by the sample's number.

    The first tile of each is said to be there, or attention divides by zero.
    """
    blank = {name: torch.zeros_like(value) for inputs in samples for name, value in inputs.items()}
    joined = concatenated([{**blank, **inputs} for inputs in samples])
    if joined:
        joined["aspect_ratio_mask"][:, :, 0] = 1
    return joined


def patches_in_one_row(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins the patches of all pictures along their last dimension (MiniCPM-V)."""
    return {
        name: torch.cat(values, dim=-1) if name in PATCHES else joined_values(values)
        for name, values in values_by_name(samples).items()
    }


def with_moved_pointers(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Moves what points to patches of a sample's pixels, -1 for none, to where they are in the batch's (Molmo 2)."""
    by_name = values_by_name(samples)
    joined = {name: joined_values(values) for name, values in by_name.items() if name not in POINTING}
    for name in by_name.keys() & POINTING:
        starts = accumulate((patches.shape[0] * patches.shape[1] for patches in by_name[POINTING[name]]), initial=0)
        pointers = [
            torch.where(indices >= 0, indices + start, indices)
            for indices, start in zip(by_name[name], starts, strict=False)
        ]
        joined[name] = stacked(pointers, -1)
    return joined


def words_pass_by(_: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Any], output: Tensor) -> Tensor:
    """Undoes a layer's change of samples that see no picture, as a forward hook.

    Transformers skips such layers where no sample of a batch has a picture. Where one has, the others attend to all
    pictures alike.
    """
    sees = named.get(SEES)
    return output if sees is None else torch.where(sees.flatten(1).any(1)[:, None, None], output, inputs[0])
