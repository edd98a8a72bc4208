"""Rows as forests: what samples share stands once, and nothing else is shared (`test_batches` writes one out)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dora_vl.data.packing import Packed, grow, pack, tokens_of
from dora_vl.data.samples import IGNORED_LABEL, Sample

PICTURE = 9
PIXELS = torch.arange(6.0).reshape(1, 2, 3)


def sample(text: str, *, trained: str, picture: str | None = None, number: int = 0) -> Sample:
    """`text`'s letters as tokens, the `trained` end labelled; a picture's three tokens stand in front."""
    before = [PICTURE] * 3 if picture else []
    ids = torch.tensor([*before, *(ord(letter) for letter in text)])
    labels = ids.clone()
    labels[: len(ids) - len(trained)] = IGNORED_LABEL
    inputs = {"pixel_values": PIXELS + ord(picture)} if picture else {}
    images = (picture,) if picture else ()
    return Sample(
        index=number, id=str(number), input_ids=ids, labels=labels, media=images, inputs=inputs, media_end=len(before)
    )


ALIKE = (
    sample("Q: what? A: red", trained="red", picture="a", number=0),
    sample("Q: what? A: rose", trained="rose", picture="a", number=1),
    sample("Q: where? A: there", trained="there", picture="a", number=2),
    sample("Q: what? A: red", trained="red", picture="b", number=3),
    sample("Q: what? A: red", trained="red", number=4),
)


def by_picture(item: Sample) -> object:
    return item.media or None


def row_of(samples: Sequence[Sample]) -> Packed:
    return pack(grow(samples, budget=1_000, shares=by_picture))


def test_a_picture_and_what_is_said_of_it_stand_once() -> None:
    row = row_of(ALIKE)
    assert int((row.input_ids == PICTURE).sum()) == 6, "three tokens of each of two pictures"
    assert [root.media for root in row.roots if root.media] == [("a",), ("b",)]
    shared, own = 3 + len("Q: wh") + len("at? A: "), len("red") + len("rose") + len("ere? A: there")
    assert len(row.input_ids) == shared + own + len(ALIKE[3].input_ids) + len(ALIKE[4].input_ids)


def test_nothing_trained_is_shared() -> None:
    twins = (ALIKE[0], replace(ALIKE[0], id="twin"))
    row = row_of(twins)
    assert int((row.labels != IGNORED_LABEL).sum()) == 2 * len("red")
    first = row.sources[(row.labels == ord("r")).nonzero()[:, 0]]
    assert first.tolist() == [first[0], first[0]], "one place predicts the first token of both"


def test_pictures_prepared_otherwise_are_not_shared() -> None:
    other = replace(ALIKE[1], inputs={"pixel_values": PIXELS})
    assert len(grow([ALIKE[0], other], budget=1_000, shares=by_picture)) == 2


def test_a_picture_behind_what_differs_is_not_shared() -> None:
    early, late = (replace(item, media_end=len(item.input_ids) - 4) for item in (ALIKE[0], ALIKE[2]))
    assert len(grow([early, late], budget=1_000, shares=by_picture)) == 2


def test_trees_stay_below_the_budget() -> None:
    many = [sample(f"Q: {number}? A: yes", trained="yes", picture="a", number=number) for number in range(40)]
    trees = grow(many, budget=60, shares=by_picture)
    assert max(map(tokens_of, trees)) <= 60
    assert sum(sum(segment.stop == len(segment.sample.input_ids) for segment in tree) for tree in trees) == 40
