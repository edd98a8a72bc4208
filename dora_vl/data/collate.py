"""Samples of different lengths as one batch: padded, masked by length, every loss on the way counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import NotRequired

from dora_vl.data.dataset import IGNORED_LABEL, Sample, Skipped
from dora_vl.data.shared_prefix import packed_rows, shared_rows


class Batch(TypedDict):
    """What a backbone and the bookkeeping receive. `labels[b, t]` is the token at `t`; the backbone shifts.

    Pictures of all rows stand one after another, in the order of their placeholders; at most one of
    `pixel_values` and `image_features` is there, neither when every row is text only. `samples` counts the
    real samples, `padding_tokens` the positions that hold no token, `cut` what the length limit removed. With
    `layout` (`shared_prefix`) a row holds several samples.
    """

    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    labels: Int[Tensor, "batch seq"]
    pixel_values: NotRequired[Float[Tensor, "images 3 height width"]]
    image_features: NotRequired[Float[Tensor, "images tokens width"]]
    layout: NotRequired[Int[Tensor, "batch 3 seq"]]
    samples: int
    padding_tokens: int
    skipped: list[tuple[str, str]]
    cut: list[tuple[str, int]]


@dataclass(frozen=True)
class Collator:
    """Pads samples to the longest of them. Training pads on the right; decoding needs the left.

    The attention mask comes from lengths, not from ids: an unknown word may share the padding's id.
    """

    pad_token_id: int
    pad_side: Literal["right", "left"] = "right"
    share_pictures_by: int | None = None
    """The picture token's id: samples of the same pictures then share their tokens (`shared_prefix`)."""
    pack: bool = False
    """Several samples stand in a row where they fit, each by itself: the same loss, hardly any padding."""

    def __call__(self, items: Sequence[Sample | Skipped | None]) -> Batch:
        """One batch; None is left out. Without a usable sample, one row of padding without labels keeps ranks in step.

        That row's only position is attended to: a row masked as a whole gives NaN in some attention kernels.
        """
        samples = [item for item in items if isinstance(item, Sample)]
        batch, illustrated = self._rows(samples)
        batch["skipped"] = [(item.id, item.reason) for item in items if isinstance(item, Skipped)]
        pixels = [picture for sample in illustrated for picture in sample.pictures]
        if pixels:
            batch["pixel_values"] = torch.stack(pixels)
        features = [picture for sample in illustrated for picture in sample.features]
        if features:
            batch["image_features"] = torch.stack(features)
        return batch

    def _rows(self, samples: Sequence[Sample]) -> tuple[Batch, Sequence[Sample]]:
        """The rows' tensors and counts, and the samples whose pictures stand in them."""
        if not samples or (self.share_pictures_by is None and not self.pack):
            ids = [sample.input_ids for sample in samples] or [torch.tensor([self.pad_token_id])]
            labels = [sample.labels for sample in samples] or [torch.tensor([IGNORED_LABEL])]
            return self._padded(samples, ids, labels), samples
        shared = self.share_pictures_by
        rows = packed_rows(samples) if shared is None else shared_rows(samples, picture_token_id=shared)
        batch = self._padded(samples, [row.input_ids for row in rows], [row.labels for row in rows])
        batch["layout"] = torch.stack([self._pad([row.layout[k] for row in rows], 0) for k in range(3)], dim=1)
        return batch, [sample for row in rows for sample in row.pictures_of]

    def _padded(self, samples: Sequence[Sample], ids: Sequence[Tensor], labels: Sequence[Tensor]) -> Batch:
        mask = self._pad([torch.ones_like(row) for row in ids], 0)
        return {
            "input_ids": self._pad(ids, self.pad_token_id),
            "attention_mask": mask,
            "labels": self._pad(labels, IGNORED_LABEL),
            "samples": len(samples),
            "padding_tokens": mask.numel() - (sum(len(row) for row in ids) if samples else 0),
            "skipped": [],
            "cut": [(sample.id, sample.cut_tokens) for sample in samples if sample.cut_tokens],
        }

    def _pad(self, rows: Sequence[Int[Tensor, " _"]], value: int) -> Int[Tensor, "batch longest"]:
        longest = max(len(row) for row in rows)
        padded = torch.full((len(rows), longest), value, dtype=torch.int64)
        for target, row in zip(padded, rows, strict=True):
            start = 0 if self.pad_side == "right" else longest - len(row)
            target[start : start + len(row)] = row
        return padded
