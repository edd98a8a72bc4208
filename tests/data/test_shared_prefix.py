"""Samples of one picture in one row: their layout written out, and what every token sees."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dora_vl.data.batches import Collator, shared_rows, visible
from dora_vl.data.samples import IGNORED_LABEL, Sample

PICTURE = 99
IGNORED = IGNORED_LABEL


def sample(index: int, ids: Sequence[int], answered: int, images: tuple[str, ...] = ("a.png",)) -> Sample:
    """A sample whose last `answered` tokens carry labels."""
    row = torch.tensor(ids)
    labels = torch.full_like(row, IGNORED)
    labels[len(ids) - answered :] = row[len(ids) - answered :]
    inputs = {"image_features": torch.full((len(images), 2, 3), float(index))} if images else {}
    return Sample(index, f"s{index}", row, labels, inputs=inputs, images=images)


def test_two_questions_about_one_picture_written_out() -> None:
    first, second = sample(0, [1, PICTURE, PICTURE, 5, 6, 7], 2), sample(1, [1, PICTURE, PICTURE, 5, 8, 9, 4], 1)
    (row,) = shared_rows([first, second], picture_token_id=PICTURE)
    assert row.input_ids.tolist() == [1, PICTURE, PICTURE, 5, 6, 7, 5, 8, 9, 4]
    assert row.labels.tolist() == [IGNORED] * 3 + [IGNORED, 6, 7] + [IGNORED] * 3 + [4]
    assert row.layout.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 5, 6], [1] * 10, [0] * 3 + [1] * 3 + [2] * 4]
    assert row.pictures_of == (first,)


def test_the_token_that_a_branch_begins_with_is_never_predicted() -> None:
    # Both answers begin right after the picture with the same token: it must stay out of the prefix.
    rows = [sample(0, [1, PICTURE, 5, 6], 2), sample(1, [1, PICTURE, 5, 7], 2)]
    parted = shared_rows(rows, picture_token_id=PICTURE)
    assert [len(row.input_ids) for row in parted] == [4, 4]  # the picture would be in the branches: nothing to share
    rows = [sample(0, [1, PICTURE, 4, 5, 6], 2), sample(1, [1, PICTURE, 4, 5, 7], 2)]
    (row,) = shared_rows(rows, picture_token_id=PICTURE)
    assert row.input_ids.tolist() == [1, PICTURE, 4, 5, 6, 4, 5, 7]
    assert row.labels.tolist() == [IGNORED] * 2 + [IGNORED, 5, 6] + [IGNORED, 5, 7]


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (sample(1, [2, PICTURE, 5, 6], 1), "the text differs before the picture"),
        (sample(1, [1, PICTURE, 5, 6], 1, ("b.png",)), "another picture"),
        (sample(1, [1, 5, 6], 1, ()), "no picture"),
    ],
)
def test_what_cannot_share_stands_by_itself(other: Sample, why: str) -> None:
    rows = shared_rows([sample(0, [1, PICTURE, 5, 6], 1), other], picture_token_id=PICTURE)
    assert sum(len(row.pictures_of) for row in rows) == 2, why
    assert sum(len(row.input_ids) for row in rows) == 4 + len(other.input_ids), why


def test_rows_are_filled_up_to_the_longest_tree() -> None:
    lengths = [9, 4, 5, 3, 2]
    samples = [sample(i, [1, PICTURE, *range(10, 8 + n)], 1, (f"{i}.png",)) for i, n in enumerate(lengths)]
    rows = shared_rows(samples, picture_token_id=PICTURE)
    assert [len(row.input_ids) for row in rows] == [9, 9, 5]
    assert [[one.index for one in row.pictures_of] for row in rows] == [[0], [2, 1], [3, 4]]
    assert rows[1].layout[1].tolist() == [1] * 5 + [2] * 4
    assert rows[1].labels[5] == IGNORED  # nothing is predicted across the border


def test_the_batch_holds_each_picture_once_in_the_order_of_the_rows() -> None:
    same = [sample(index, [1, PICTURE, PICTURE, 20 + index, 7], 1) for index in range(3)]
    other = sample(7, [1, PICTURE, PICTURE, *range(30, 45)], 2, ("b.png",))
    batch = Collator(0, share_pictures_by=PICTURE)([*same, other])
    assert batch["image_features"][:, 0, 0].tolist() == [7.0, 0.0]
    assert batch["samples"] == 4
    assert batch["layout"].shape == (2, 3, 18)
    assert batch["padding_tokens"] == 36 - 18 - (3 + 3 * 2)
    assert (batch["layout"][1, 1] == 0).sum() == batch["padding_tokens"]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(1, 4), min_size=2, max_size=6)), min_size=1, max_size=9)
)
def test_every_token_sees_exactly_what_it_saw_alone(questions: list[tuple[int, list[int]]]) -> None:
    samples = [
        sample(number, [7, PICTURE, *text], 1 + len(text) % 2, (f"{picture}.png",))
        for number, (picture, text) in enumerate(questions)
    ]
    rows = shared_rows(samples, picture_token_id=PICTURE)
    found = sorted(tuple(trail) for row in rows for trail in _labelled_trails(row.input_ids, row.labels, row.layout))
    alone = sorted(
        (*map(int, one.input_ids[:place]), int(one.labels[place]))
        for one in samples
        for place in range(1, len(one.labels))
        if one.labels[place] != IGNORED
    )
    assert found == alone


def _labelled_trails(ids: torch.Tensor, labels: torch.Tensor, layout: torch.Tensor) -> list[list[int]]:
    """For each label: the tokens that its predicting position sees, ordered by position, then the label."""
    seen = visible(layout.unsqueeze(0))[0, 0]
    trails = []
    for place in range(1, len(ids)):
        if labels[place] != IGNORED:
            tokens = seen[place - 1].nonzero().flatten()
            assert layout[0, tokens].tolist() == list(range(len(tokens)))
            trails.append([*ids[tokens].tolist(), int(labels[place])])
    return trails
