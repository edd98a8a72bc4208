"""Packs samples into sequences as forests of segments: what samples share is stored once, the rest lies side by side.

A sequence is made of trees of segments. A token sees its own segment up to itself and all segments above it, and its
position is that of its own path. A sample is the path from a root to a leaf: by itself it is a tree of one segment;
several lie side by side in a sequence (packing), questions about the same pictures are branches after them, and the
choices of a question are branches after it. `build_trees` finds what samples share, `deal_trees` fills sequences, and
`pack` makes a sequence's tensors, which say which tokens attend to which; `backbones.packed_attention` has a model
follow them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dora_vl.data.samples import ALIGNED, IGNORED_LABEL, Sample
from dora_vl.shapes import Bool, Int


@dataclass(frozen=True)
class Segment:
    """The tokens `start` to `stop` of a sample, after those of its tree's segment number `parent`, None for a root."""

    sample: Sample
    start: int
    stop: int
    parent: int | None = None

    def __len__(self) -> int:
        return self.stop - self.start


Tree = tuple[Segment, ...]
"""Lists segments: parents come before their children, and only the first segment has none."""


def tokens_of(tree: Tree) -> int:
    """Counts its tokens."""
    return sum(map(len, tree))


def build_trees(samples: Sequence[Sample], *, budget: int, shared: bool = True) -> list[Tree]:
    """Returns the samples as few trees of at most `budget` tokens each; a single sample may be longer.

    Where they may be `shared`, samples of the same pictures or videos, or text-only ones of one conversation, are
    put into one tree if they begin alike; else each sample is a tree of its own.
    """
    groups: dict[object, list[Sample]] = {}
    for number, sample in enumerate(samples):
        key = (sample.media or sample.id) if shared else ""
        groups.setdefault(key or number, []).append(sample)
    return [tree for group in groups.values() for tree in _trees(group, budget)]


def _trees(group: list[Sample], budget: int) -> list[Tree]:
    """Returns one tree if all pictures are in what the samples share, and it is short enough; else several."""
    if len(group) == 1:
        return [(Segment(group[0], 0, len(group[0].input_ids)),)]
    tree = _branches(group) if all(_same_media(group[0], sample) for sample in group[1:]) else ()
    if len(tree) <= 1 or tree[0].stop < max(1, tree[0].sample.media_end):
        return [tree for sample in group for tree in _trees([sample], budget)]
    if tokens_of(tree) > budget:
        half = len(group) // 2
        return [*_trees(group[:half], budget), *_trees(group[half:], budget)]
    return [tree]


def _branches(group: list[Sample]) -> Tree:
    """Returns the samples' tokens, those that begin alike in one segment; nothing if they do not even begin alike."""
    columns = [_columns(sample) for sample in group]
    trained = [int((sample.labels != IGNORED_LABEL).int().argmax()) for sample in group]
    segments: list[Segment] = []

    def add(members: list[int], start: int, parent: int | None) -> None:
        """Adds what the members, alike up to `start`, still have in common, and after it a branch for each way on."""
        if len(members) == 1:
            segments.append(Segment(group[members[0]], start, len(columns[members[0]]), parent))
            return
        # Nothing that is trained is shared: every sample's loss stays its own.
        stop = min(trained[member] for member in members)
        first = columns[members[0]]
        for member in members[1:]:
            differs = (first[start:stop] != columns[member][start:stop]).any(1).nonzero()
            stop = start + int(differs[0]) if len(differs) else stop
        if stop > start:
            segments.append(Segment(group[members[0]], start, stop, parent))
            parent = len(segments) - 1
        branches: dict[object, list[int]] = {}
        for member in members:
            is_trained = trained[member] <= stop
            branches.setdefault(member if is_trained else tuple(columns[member][stop].tolist()), []).append(member)
        for branch in branches.values():
            add(branch, stop, parent)

    add(list(range(len(group))), 0, None)
    return tuple(segments) if sum(segment.parent is None for segment in segments) == 1 else ()


def _columns(sample: Sample) -> Int[Tensor, "seq columns"]:
    """Returns what two tokens must have in common to be one: id, position, and a processor's other values."""
    length = len(sample.input_ids)
    columns = [sample.input_ids[:, None], sample.own_positions().T]
    columns += [value.reshape(length, -1).long() for name, value in sample.inputs.items() if name in ALIGNED]
    return torch.cat(columns, dim=1)


def _same_media(first: Sample, second: Sample) -> bool:
    """Tells whether two samples show a model the same pictures and videos, prepared in the same way."""

    def same(value: Any, other: Any) -> bool:
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            return value is other or torch.equal(value, other)
        return bool(value == other)

    names = [name for name in first.inputs if name not in ALIGNED]
    return names == [name for name in second.inputs if name not in ALIGNED] and all(
        same(first.inputs[name], second.inputs[name]) for name in names
    )


def deal_trees(lengths: Sequence[int], sequences: int) -> list[list[int]]:
    """Deals trees to `sequences` of about equally many tokens: the longest first, to the shortest sequence."""
    filled = [(0, sequence) for sequence in range(sequences)]
    trees: list[list[int]] = [[] for _ in range(sequences)]
    for tree in sorted(range(len(lengths)), key=lambda tree: -lengths[tree]):
        tokens, sequence = heapq.heappop(filled)
        trees[sequence].append(tree)
        heapq.heappush(filled, (tokens + lengths[tree], sequence))
    return [sorted(sequence) for sequence in trees if sequence]


@dataclass(frozen=True)
class Packed:
    """Trees one after another, as tensors of their tokens.

    Attributes:
        labels: the token at each place where it is trained, else -100; never at a root's first, which nothing predicts.
        positions: by the axes that the family has.
        segment: the number of each token's segment.
        steps: how far each token is from its path's beginning.
        sources: the place whose hidden state predicts each token, that before it on its path; -1 at a root's first.
        sees: True where a segment's tokens see another's; each sees itself and all above it.
        samples: whose tokens each segment holds; of several, which share it, the first.
        roots: the samples whose pictures and videos are in the sequence, in order.
    """

    input_ids: Int[Tensor, " seq"]
    labels: Int[Tensor, " seq"]
    positions: Int[Tensor, "axes seq"]
    segment: Int[Tensor, " seq"]
    steps: Int[Tensor, " seq"]
    sources: Int[Tensor, " seq"]
    sees: Bool[Tensor, "segments segments"]
    inputs: dict[str, Tensor]
    samples: tuple[Sample, ...]
    roots: tuple[Sample, ...]


def pack(trees: Sequence[Tree]) -> Packed:
    """Returns a sequence of trees."""
    segments: list[Segment] = []
    parents: list[int | None] = []
    for tree in trees:
        first = len(segments)
        segments += tree
        parents += [None if segment.parent is None else first + segment.parent for segment in tree]
    lengths = torch.tensor([len(segment) for segment in segments])
    starts = (lengths.cumsum(0) - lengths).tolist()
    sees = torch.eye(len(segments), dtype=torch.bool)
    steps, sources = [], []
    for number, (segment, parent) in enumerate(zip(segments, parents, strict=True)):
        steps.append(torch.arange(segment.start, segment.stop))
        sources.append(torch.arange(len(segment)) + starts[number] - 1)
        sources[number][0] = -1
        if parent is not None:
            sees[number] |= sees[parent]
            sources[number][0] = starts[parent] + len(segments[parent]) - 1
    before = torch.cat(sources)

    def joined(of_sample: Callable[[Sample], Tensor]) -> Tensor:
        """Returns a tensor of every segment's tokens, from those of its sample, whose last dimension they are."""
        return torch.cat([of_sample(segment.sample)[..., segment.start : segment.stop] for segment in segments], dim=-1)

    names = dict.fromkeys(name for segment in segments for name in segment.sample.inputs if name in ALIGNED)
    return Packed(
        input_ids=joined(lambda sample: sample.input_ids),
        labels=joined(lambda sample: sample.labels).masked_fill(before < 0, IGNORED_LABEL),
        positions=joined(lambda sample: sample.own_positions()),
        segment=torch.repeat_interleave(torch.arange(len(segments)), lengths),
        steps=torch.cat(steps),
        sources=before,
        sees=sees,
        inputs={
            # zeros where a processor says nothing of text-only samples
            name: joined(lambda sample, name=name: sample.inputs.get(name, torch.zeros_like(sample.input_ids)[None])[0])
            for name in names
        },
        samples=tuple(segment.sample for segment in segments),
        roots=tuple(segment.sample for segment in segments if segment.parent is None),
    )
