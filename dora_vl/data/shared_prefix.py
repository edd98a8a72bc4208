"""Samples about the same pictures as one row: the pictures' tokens once, then each sample's own tokens.

A picture takes 49 to 576 tokens, a question about it twenty. Question sets ask several questions about each picture,
so most of a step runs the same picture tokens through the same weights again. Attention is causal: what stands
before the first differing token is the same in every such sample. It is kept once, as a prefix, and each
sample's remainder is a branch that sees the prefix and itself, at the positions it would have had alone. Loss and
gradients are those of separate rows (tests hold that to rounding); only dropout inside the prefix is drawn once.

A row's layout is three numbers a token, `[3, seq]`: position, group (1, 2... for the trees that share a row, 0 for
padding), branch (0 for a prefix, which its whole group sees; 1, 2... for the branches, which see themselves).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dora_vl.data.dataset import IGNORED_LABEL, Sample


@dataclass(frozen=True)
class SharedRow:
    """One row of a batch. `pictures_of` are the samples whose pictures stand in it, one for each tree, in order."""

    input_ids: Int[Tensor, " seq"]
    labels: Int[Tensor, " seq"]
    layout: Int[Tensor, "3 seq"]
    pictures_of: tuple[Sample, ...]


def visible(layout: Int[Tensor, "batch 3 seq"]) -> Bool[Tensor, "batch 1 seq seq"]:
    """Which earlier tokens each token sees: its group's prefix and its own branch, and itself."""
    _, groups, branches = layout.unbind(dim=1)
    same_group = groups.unsqueeze(2) == groups.unsqueeze(1)
    own_branch = branches.unsqueeze(2) == branches.unsqueeze(1)
    prefix = (branches == 0).unsqueeze(1)
    causal = torch.ones(layout.shape[2], layout.shape[2], dtype=torch.bool, device=layout.device).tril()
    return (causal & same_group & (own_branch | prefix)).unsqueeze(1)


def shared_rows(samples: Sequence[Sample], *, picture_token_id: int) -> list[SharedRow]:
    """A micro-batch's samples as few full rows; samples of the same pictures share them where their text allows it."""
    trees = [tree for group in _by_pictures(samples) for tree in _trees(group, picture_token_id)]
    return [_join(row) for row in _fill_rows(trees)]


def packed_rows(samples: Sequence[Sample]) -> list[SharedRow]:
    """A micro-batch's samples as few full rows, nothing shared: each sees itself alone, from position 0."""
    return [_join(row) for row in _fill_rows([_tree([sample], len(sample.input_ids)) for sample in samples])]


def _by_pictures(samples: Iterable[Sample]) -> list[list[Sample]]:
    groups: dict[tuple[object, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.images or (sample.index, sample.id), []).append(sample)
    return list(groups.values())


def _trees(group: list[Sample], picture_token_id: int) -> list[SharedRow]:
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


def _tree(group: list[Sample], shared: int) -> SharedRow:
    branches = [torch.arange(len(sample.input_ids)) for sample in group]
    prefix = torch.stack([torch.arange(shared), torch.ones(shared).long(), torch.zeros(shared).long()])
    layout = [prefix]
    for number, places in enumerate(branches, start=1):
        own = places[shared:]
        layout.append(torch.stack([own, torch.ones_like(own), torch.full_like(own, number)]))
    return SharedRow(
        torch.cat([group[0].input_ids[:shared], *(sample.input_ids[shared:] for sample in group)]),
        torch.cat([group[0].labels[:shared], *(sample.labels[shared:] for sample in group)]),
        torch.cat(layout, dim=1),
        (group[0],),
    )


def _fill_rows(trees: Sequence[SharedRow]) -> list[list[SharedRow]]:
    """First fit, longest first, into rows as long as the longest tree: hardly any padding, few rows."""
    rows: list[list[SharedRow]] = []
    free: list[int] = []
    longest = max((len(tree.input_ids) for tree in trees), default=0)
    for tree in sorted(trees, key=lambda one: -len(one.input_ids)):
        length = len(tree.input_ids)
        place = next((number for number, room in enumerate(free) if room >= length), None)
        if place is None:
            rows.append([tree])
            free.append(longest - length)
        else:
            rows[place].append(tree)
            free[place] -= length
    return rows


def _join(trees: Sequence[SharedRow]) -> SharedRow:
    """Trees one after another; the first token of each carries no label, so none is predicted across a border."""
    layouts = [tree.layout.clone() for tree in trees]
    for number, layout in enumerate(layouts, start=1):
        layout[1] = number
    labels = [tree.labels.clone() for tree in trees]
    for one in labels:
        one[0] = IGNORED_LABEL
    return SharedRow(
        torch.cat([tree.input_ids for tree in trees]),
        torch.cat(labels),
        torch.cat(layouts, dim=1),
        tuple(sample for tree in trees for sample in tree.pictures_of),
    )
