"""A processor's inputs of several samples as one batch, as the processor itself would have batched them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dora_vl.data.dataset import IGNORED_LABEL, Sample, Skipped

BY_ROW = "cross_attention_mask"
"""A family with this input (mllama) looks its pictures up by row, so a row of words alone has pictures of zeros."""


IN_ONE_ROW = {"pixel_values": "target_sizes", "pixel_values_videos": "target_sizes_videos"}
"""Pixels whose patches all stand in one row, one picture behind another, and the input that tells it (MiniCPM-V)."""


FIRST_TILE = "aspect_ratio_mask"
"""Of mllama's missing pictures the first tile counts as there, as its processor says, or attention divides by zero."""
POINTING = {"image_token_pooling": "pixel_values", "video_token_pooling": "pixel_values_videos"}
"""Places among the patches of a batch's pixels, -1 for none, so those of a later sample begin further on (Molmo 2)."""


@dataclass(frozen=True)
class ProcessorCollator:
    """Joins samples' inputs by name: tokens are padded, pictures stand one after another.

    Tensors are joined along their first dimension and filled with zeros where other dimensions differ (tiles of a
    picture, pictures of a row), which is what processors do in a batch of their own. A batch without pictures gets a
    further row, `dummy`: under ZeRO-3 every rank must run the vision part, and what trains in it gets gradients of
    zero instead of none. A batch without videos gets `dummy_video`, since ranks must run it equally often, and in many
    families pictures and videos are a pass each; where they have the same inputs, either will do.

    Args:
        pad_token_id: fills short rows.
        aligned: names of inputs that hold an entry for each token.
        dummy: a row with a picture and without labels; None where no rank ever sees a picture, and in decoding.
        dummy_video: likewise with a video.
        pad_side: training pads on the right; decoding needs the left.
    """

    pad_token_id: int
    aligned: tuple[str, ...]
    dummy: Sample | None = None
    dummy_video: Sample | None = None
    pad_side: Literal["right", "left"] = "right"

    def __call__(self, items: Sequence[Sample | Skipped | None]) -> dict[str, Any]:
        """One batch and its bookkeeping; None is left out."""
        samples = [item for item in items if isinstance(item, Sample)]
        rows = list(samples)
        for dummy in (self.dummy, self.dummy_video):
            if dummy is not None and not any(self._media(dummy) <= self._media(row) for row in rows):
                rows.append(dummy)
        if not rows:
            rows = [self._nothing()]
        batch = self._joined(rows)
        tokens = sum(len(sample.input_ids) for sample in samples)
        shrunk = [(sample.id, sample.lost_pixels) for sample in samples if sample.lost_pixels]
        return {
            **batch,
            "samples": len(samples),
            "sample_ids": [sample.id for sample in samples],
            "padding_tokens": batch["input_ids"].numel() - tokens,
            "skipped": [(item.id, item.reason) for item in items if isinstance(item, Skipped)],
            "cut": [(sample.id, sample.cut_tokens) for sample in samples if sample.cut_tokens],
            **({"shrunk": shrunk} if shrunk else {}),
        }

    def _media(self, row: Sample) -> frozenset[str]:
        """Names of a row's inputs for pictures and videos."""
        return frozenset(row.inputs).difference(self.aligned)

    def _nothing(self) -> Sample:
        ids = torch.tensor([self.pad_token_id])
        mask = {"attention_mask": torch.ones(1, 1, dtype=torch.int64)}
        return Sample(index=-1, id="", input_ids=ids, labels=torch.tensor([IGNORED_LABEL]), inputs=mask)

    def _joined(self, rows: Sequence[Sample]) -> dict[str, Any]:
        joined: dict[str, Any] = {
            "input_ids": self._tokens([row.input_ids[None] for row in rows], self.pad_token_id),
            "labels": self._tokens([row.labels[None] for row in rows], IGNORED_LABEL),
        }
        crossing = any(BY_ROW in row.inputs for row in rows)
        for name in dict.fromkeys(name for row in rows for name in row.inputs):
            values = [row.inputs[name] for row in rows if name in row.inputs]
            if crossing and name not in self.aligned:
                values = [row.inputs[name] if name in row.inputs else torch.zeros_like(values[0]) for row in rows]
            if name in self.aligned:
                joined[name] = self._tokens([_of_row(row, name, like=values[0]) for row in rows], 0)
            elif any(IN_ONE_ROW.get(name) in row.inputs for row in rows):
                joined[name] = torch.cat(values, dim=-1)
            elif name in POINTING:
                pixels = [row.inputs[POINTING[name]] for row in rows if name in row.inputs]
                joined[name] = stacked(_further_on(values, [one.shape[0] * one.shape[1] for one in pixels]), -1)
            else:
                joined[name] = joined_values(values)
        if crossing and FIRST_TILE in joined:
            joined[FIRST_TILE][:, :, 0] = 1
        return joined

    def _tokens(self, rows: Sequence[Tensor], value: int) -> Tensor:
        if self.pad_side == "left":
            return stacked([row.flip(1) for row in rows], value).flip(1)
        return stacked(rows, value)


def _of_row(row: Sample, name: str, *, like: Tensor) -> Tensor:
    """A row's entry for each token; zeros where its sample has none (words alone beside pictures)."""
    found: Mapping[str, Any] = row.inputs
    if name in found:
        return found[name]
    return torch.zeros(1, len(row.input_ids), *like.shape[2:], dtype=like.dtype)


def _further_on(places: Sequence[Tensor], patches: Sequence[int]) -> list[Tensor]:
    """Each sample's places behind the patches of those before it."""
    starts = [sum(patches[:number]) for number in range(len(patches))]
    return [torch.where(one >= 0, one + start, one) for one, start in zip(places, starts, strict=True)]


def joined_values(values: Sequence[Any]) -> Any:
    """Tensors one after another along the first dimension; lists as one list."""
    if all(isinstance(value, Tensor) for value in values):
        return stacked(values, 0)
    return [one for value in values for one in value]


def stacked(tensors: Sequence[Tensor], value: int) -> Tensor:
    """Tensors one after another, each filled up at its ends to the largest size of every other dimension."""
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(list(tensors))
    sizes = [max(tensor.shape[place] for tensor in tensors) for place in range(1, tensors[0].dim())]
    whole = tensors[0].new_full((sum(len(tensor) for tensor in tensors), *sizes), value)
    start = 0
    for tensor in tensors:
        whole[(slice(start, start + len(tensor)), *(slice(size) for size in tensor.shape[1:]))] = tensor
        start += len(tensor)
    return whole
