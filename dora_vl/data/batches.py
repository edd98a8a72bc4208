"""Samples as one batch: padded, masked by length, pictures that several share read once; every loss counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dora_vl.data.samples import IGNORED_LABEL, Sample, Skipped


def visible(layout: Int[Tensor, "batch 3 seq"]) -> Bool[Tensor, "batch 1 seq seq"]:
    """Which earlier tokens each token sees: its group's prefix and its own branch, and itself."""
    _, groups, branches = layout.unbind(dim=1)
    same_group = groups.unsqueeze(2) == groups.unsqueeze(1)
    own_branch = branches.unsqueeze(2) == branches.unsqueeze(1)
    prefix = (branches == 0).unsqueeze(1)
    causal = torch.ones(layout.shape[2], layout.shape[2], dtype=torch.bool, device=layout.device).tril()
    return (causal & same_group & (own_branch | prefix)).unsqueeze(1)


def shared_rows(samples: Sequence[Sample], *, picture_token_id: int) -> list[Sample]:
    """A micro-batch's samples as few full rows; samples of the same pictures share them where their text allows it.

    A row has the pictures of one sample for each tree in it, and a `layout`: each token's position, group and branch.
    """
    groups: dict[tuple[object, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.images or (sample.index, sample.id), []).append(sample)
    trees = [tree for group in groups.values() for tree in _trees(group, picture_token_id)]
    return [_join(row) for row in _fill_rows(trees)]


def _trees(group: list[Sample], picture_token_id: int) -> list[Sample]:
    """One tree where all pictures stand in the common prefix, else each sample by itself."""
    shared = _shared_tokens(group)
    pictures = group[0].input_ids == picture_token_id
    if len(group) > 1 and bool(pictures.any()) and not bool(pictures[shared:].any()):
        return [_tree(group, shared)]
    return [_tree([sample], len(sample.input_ids)) for sample in group]


def _shared_tokens(group: list[Sample]) -> int:
    """Length of the prefix: the same tokens, and no label on the branches' first, which the prefix would predict."""
    first = group[0].input_ids
    shared = min(int((sample.labels != IGNORED_LABEL).int().argmax()) - 1 for sample in group)
    for sample in group[1:]:
        length = min(shared, len(first), len(sample.input_ids))
        differs = (first[:length] != sample.input_ids[:length]).nonzero()
        shared = int(differs[0]) if len(differs) else length
    return max(0, shared)


def _tree(group: Sequence[Sample], shared: int) -> Sample:
    """A prefix of so many tokens and a branch for what each sample says behind it."""
    prefix = torch.stack([torch.arange(shared), torch.ones(shared).long(), torch.zeros(shared).long()])
    layout = [prefix]
    for number, sample in enumerate(group, start=1):
        rest = torch.arange(shared, len(sample.input_ids))
        layout.append(torch.stack([rest, torch.ones_like(rest), torch.full_like(rest, number)]))
    media = {name: value for name, value in group[0].inputs.items() if name not in ALIGNED}
    return replace(
        group[0],
        input_ids=torch.cat([group[0].input_ids[:shared], *(sample.input_ids[shared:] for sample in group)]),
        labels=torch.cat([group[0].labels[:shared], *(sample.labels[shared:] for sample in group)]),
        inputs={**media, "layout": torch.cat(layout, dim=1)[None]},
    )


def _fill_rows(trees: Sequence[Sample]) -> list[list[Sample]]:
    """First fit, longest first, into rows as long as the longest tree: hardly any padding, few rows."""
    rows: list[list[Sample]] = []
    free: list[int] = []
    longest = max((len(tree.input_ids) for tree in trees), default=0)
    for tree in sorted(trees, key=lambda tree: -len(tree.input_ids)):
        length = len(tree.input_ids)
        place = next((number for number, room in enumerate(free) if room >= length), None)
        if place is None:
            rows.append([tree])
            free.append(longest - length)
        else:
            rows[place].append(tree)
            free[place] -= length
    return rows


def _join(trees: Sequence[Sample]) -> Sample:
    """Trees one after another; the first token of each carries no label, so none is predicted across a border."""
    layouts = [tree.inputs["layout"].clone() for tree in trees]
    labels = [tree.labels.clone() for tree in trees]
    for number, (layout, row) in enumerate(zip(layouts, labels, strict=True), start=1):
        layout[:, 1] = number
        row[0] = IGNORED_LABEL
    names = dict.fromkeys(name for tree in trees for name in tree.inputs if name != "layout")
    inputs = {name: joined_values([tree.inputs[name] for tree in trees if name in tree.inputs]) for name in names}
    return Sample(
        input_ids=torch.cat([tree.input_ids for tree in trees]),
        labels=torch.cat(labels),
        inputs={**inputs, "layout": torch.cat(layouts, dim=2)},
        stored=tuple(outputs for tree in trees for outputs in tree.stored),
    )


ALIGNED = (
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "cross_attention_mask",
)
"""A processor's tensors that hold an entry for each token: cut and padded as the ids are."""
BY_ROW = "cross_attention_mask"
"""A family with this input (mllama) looks its pictures up by row, so a row of words alone has pictures of zeros."""
IN_ONE_ROW = {"pixel_values": "target_sizes", "pixel_values_videos": "target_sizes_videos"}
"""Pixels whose patches all stand in one row, one picture behind another, and the input that tells it (MiniCPM-V)."""
FIRST_TILE = "aspect_ratio_mask"
"""Of mllama's missing pictures the first tile counts as there, as its processor says, or attention divides by zero."""
POINTING = {"image_token_pooling": "pixel_values", "video_token_pooling": "pixel_values_videos"}
"""Places among the patches of a batch's pixels, -1 for none, so those of a later sample begin further on (Molmo 2)."""


@dataclass(frozen=True)
class Collator:
    """Joins samples' inputs by name: tokens are padded, pictures stand one after another.

    Tensors are joined along their first dimension and filled with zeros where other dimensions differ (tiles of a
    picture, pictures of a row), which is what processors do in a batch of their own. A batch without pictures gets a
    further row, `dummy`: under ZeRO-3 every rank must run the vision part, and what trains in it gets gradients of
    zero instead of none. A batch without videos gets `dummy_video`, since ranks must run it equally often, and in many
    families pictures and videos are a pass each; where they have the same inputs, either will do.

    Args:
        pad_token_id: fills short rows.
        dummy: a row with a picture and without labels; None where no rank ever sees a picture, and in decoding.
        dummy_video: likewise with a video.
        pad_side: training pads on the right; decoding needs the left.
        share_pictures_by: the picture token's id: samples of the same pictures then share their tokens.
        pack: several samples stand in a row where they fit, each by itself: the same loss, hardly any padding.
    """

    pad_token_id: int
    dummy: Sample | None = None
    dummy_video: Sample | None = None
    pad_side: Literal["right", "left"] = "right"
    share_pictures_by: int | None = None
    pack: bool = False

    def __call__(self, items: Sequence[Sample | Skipped | None]) -> dict[str, Any]:
        """One batch and its bookkeeping; None is left out."""
        samples = [item for item in items if isinstance(item, Sample)]
        rows = list(samples)
        if samples and self.share_pictures_by is not None:
            rows = shared_rows(samples, picture_token_id=self.share_pictures_by)
        elif samples and self.pack:
            # Nothing is shared: each sees itself alone, from position 0.
            trees = [_tree([sample], len(sample.input_ids)) for sample in samples]
            rows = [_join(row) for row in _fill_rows(trees)]
        tokens = sum(len(row.input_ids) for row in rows)
        for dummy in (self.dummy, self.dummy_video):
            if dummy is not None and not any(_media(dummy) <= _media(row) for row in rows):
                rows.append(_tree([dummy], len(dummy.input_ids)) if rows and "layout" in rows[0].inputs else dummy)
        if not rows:
            nothing = torch.tensor([self.pad_token_id])
            rows = [Sample(nothing, labels=torch.tensor([IGNORED_LABEL]))]
        batch = self._joined(rows)
        shrunk = [(sample.id, sample.lost_pixels) for sample in samples if sample.lost_pixels]
        stored = [outputs for row in rows for outputs in row.stored]
        return {
            **batch,
            "samples": len(samples),
            "sample_ids": [sample.id for sample in samples],
            "padding_tokens": batch["input_ids"].numel() - tokens,
            "skipped": [(item.id, item.reason) for item in items if isinstance(item, Skipped)],
            "cut": [(sample.id, sample.cut_tokens) for sample in samples if sample.cut_tokens],
            **({"shrunk": shrunk} if shrunk else {}),
            **({"stored": stored} if stored else {}),
        }

    def _joined(self, rows: Sequence[Sample]) -> dict[str, Any]:
        joined: dict[str, Any] = {
            "input_ids": self._tokens([row.input_ids[None] for row in rows], self.pad_token_id),
            "labels": self._tokens([row.labels[None] for row in rows], IGNORED_LABEL),
            # By length, not by ids: an unknown word may share the padding's id.
            "attention_mask": self._tokens(
                [row.inputs.get("attention_mask", torch.ones_like(row.input_ids)[None]) for row in rows], 0
            ),
        }
        crossing = any(BY_ROW in row.inputs for row in rows)
        for name in dict.fromkeys(name for row in rows for name in row.inputs if name != "attention_mask"):
            values = [row.inputs[name] for row in rows if name in row.inputs]
            if crossing and name not in ALIGNED:
                values = [row.inputs[name] if name in row.inputs else torch.zeros_like(values[0]) for row in rows]
            if name in ALIGNED:
                like = values[0]  # zeros where a sample has none (words alone beside pictures)
                joined[name] = self._tokens(
                    [
                        row.inputs.get(name, torch.zeros(1, len(row.input_ids), *like.shape[2:], dtype=like.dtype))
                        for row in rows
                    ],
                    0,
                )
            elif any(IN_ONE_ROW.get(name) in row.inputs for row in rows):
                joined[name] = torch.cat(values, dim=-1)
            elif name in POINTING:
                pixels = [row.inputs[POINTING[name]] for row in rows if name in row.inputs]
                starts = accumulate((patches.shape[0] * patches.shape[1] for patches in pixels), initial=0)
                moved = [
                    torch.where(places >= 0, places + start, places)
                    for places, start in zip(values, starts, strict=False)
                ]
                joined[name] = stacked(moved, -1)
            else:
                joined[name] = joined_values(values)
        if crossing and FIRST_TILE in joined:
            joined[FIRST_TILE][:, :, 0] = 1
        return joined

    def _tokens(self, rows: Sequence[Tensor], value: int) -> Tensor:
        if self.pad_side == "left":
            return stacked([row.flip(1) for row in rows], value).flip(1)
        return stacked(rows, value)


def _media(row: Sample) -> frozenset[str]:
    """Names of a row's inputs for pictures and videos."""
    return frozenset(row.inputs).difference(ALIGNED)


def joined_values(values: Sequence[Any]) -> Any:
    """Tensors one after another along the first dimension; lists as one list."""
    if all(isinstance(value, Tensor) for value in values):
        return stacked(values, 0)
    return [entry for value in values for entry in value]


def stacked(tensors: Sequence[Tensor], value: int) -> Tensor:
    """Tensors one after another, each filled up at its ends to the largest size of every other dimension."""
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(list(tensors))
    sizes = [max(tensor.shape[place] for tensor in tensors) for place in range(1, tensors[0].dim())]
    filled = tensors[0].new_full((sum(len(tensor) for tensor in tensors), *sizes), value)
    start = 0
    for tensor in tensors:
        filled[(slice(start, start + len(tensor)), *(slice(size) for size in tensor.shape[1:]))] = tensor
        start += len(tensor)
    return filled


SAMPLES, WEIGHTS = "samples", "sample_weights"
"""Names in a batch: how many usable samples it holds, and what each counts in a mean over them."""


def over_step(batches: Sequence[Mapping[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """A rank's micro-batches of one step with weights for a mean over the step's usable samples, of all ranks.

    How many those are is known only now that the data has been read: a mean over the samples that were asked for would
    count the missing ones as samples of loss 0. Every rank must call it; batches without weights stay as they are.
    """
    if not batches or WEIGHTS not in batches[0]:
        return [dict(batch) for batch in batches]
    total = torch.tensor(sum(batch[SAMPLES] for batch in batches), device=device)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(total)
    samples = max(1, int(total))
    return [{**batch, WEIGHTS: batch[WEIGHTS] * (batch[SAMPLES] / samples)} for batch in batches]
