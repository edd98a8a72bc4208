"""A batch holds every token and label once, masks by length; samples of one picture see what they saw alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dora_vl.data.batches import Collator, shared_rows, visible
from dora_vl.data.samples import IGNORED_LABEL, Sample, Skipped


def sample(index: int, ids: list[int], *, cut: int = 0, **inputs: Tensor) -> Sample:
    labels = torch.tensor([-100, *ids[1:]])
    return Sample(torch.tensor(ids), labels, index=index, id=f"s{index}", cut_tokens=cut, inputs=inputs)


def test_right_padding_written_out() -> None:
    batch = Collator(pad_token_id=9)([sample(0, [1, 2, 3]), Skipped(1, "s1", "empty"), sample(2, [4, 9], cut=5)])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1],
        [1, 1, 0],
    ]  # the token 9 at the end of the text is no padding
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 9, -100]]
    assert (batch["samples"], batch["padding_tokens"]) == (2, 1)
    assert (batch["skipped"], batch["cut"]) == ([("s1", "empty")], [("s2", 5)])
    assert not {"pixel_values", "image_features"} & set(batch)


def test_left_padding_written_out() -> None:
    batch = Collator(pad_token_id=0, pad_side="left")([sample(0, [1, 2, 3]), sample(1, [4, 5])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [0, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, 5]]


def test_pictures_follow_the_order_of_rows_and_placeholders() -> None:
    a, b, c = (torch.full((1, 3, 2, 4), float(value)) for value in (1, 2, 3))
    samples = [sample(0, [1, 2], pixel_values=torch.cat([b, a])), sample(1, [1, 2]), sample(2, [1, 2], pixel_values=c)]
    assert Collator(0)(samples)["pixel_values"][:, 0, 0, 0].tolist() == [2, 1, 3]


def test_a_batch_without_any_usable_sample_is_still_a_batch() -> None:
    batch = Collator(pad_token_id=4)([Skipped(0, "a", "x"), Skipped(1, "b", "y")])
    assert batch["input_ids"].tolist() == [[4]]
    assert batch["labels"].tolist() == [[-100]]
    assert batch["attention_mask"].tolist() == [[1]]
    assert (batch["samples"], batch["padding_tokens"], len(batch["skipped"])) == (0, 1, 2)


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=2, max_size=9), min_size=1, max_size=6),
    st.sampled_from(["left", "right"]),
)
def test_every_token_and_label_is_there_once(rows: list[list[int]], side: str) -> None:
    batch = Collator(pad_token_id=0, pad_side=side)([sample(i, ids) for i, ids in enumerate(rows)])  # pyright: ignore
    kept = batch["attention_mask"].bool()
    assert [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], kept, strict=True)] == rows
    assert [row[mask].tolist() for row, mask in zip(batch["labels"], kept, strict=True)] == [
        [-100, *r[1:]] for r in rows
    ]
    assert bool((batch["labels"][~kept] == -100).all())
    assert batch["padding_tokens"] == int((~kept).sum())


PICTURE = 99
IGNORED = IGNORED_LABEL


def asked(index: int, ids: Sequence[int], answered: int, images: tuple[str, ...] = ("a.png",)) -> Sample:
    """A sample whose last `answered` tokens carry labels."""
    row = torch.tensor(ids)
    labels = torch.full_like(row, IGNORED)
    labels[len(ids) - answered :] = row[len(ids) - answered :]
    inputs = {"image_features": torch.full((len(images), 2, 3), float(index))} if images else {}
    return Sample(row, labels, index=index, id=f"s{index}", inputs=inputs, images=images)


def test_two_questions_about_one_picture_written_out() -> None:
    first, second = asked(0, [1, PICTURE, PICTURE, 5, 6, 7], 2), asked(1, [1, PICTURE, PICTURE, 5, 8, 9, 4], 1)
    (row,) = shared_rows([first, second], picture_token_id=PICTURE)
    assert row.input_ids.tolist() == [1, PICTURE, PICTURE, 5, 6, 7, 5, 8, 9, 4]
    assert row.labels.tolist() == [IGNORED] * 3 + [IGNORED, 6, 7] + [IGNORED] * 3 + [4]
    assert row.inputs["layout"][0].tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 5, 6], [1] * 10, [0] * 3 + [1] * 3 + [2] * 4]
    assert row.inputs["image_features"].tolist() == first.inputs["image_features"].tolist()


def test_rows_are_filled_up_to_the_longest_tree() -> None:
    lengths = [9, 4, 5, 3, 2]
    samples = [asked(i, [1, PICTURE, *range(10, 8 + n)], 1, (f"{i}.png",)) for i, n in enumerate(lengths)]
    rows = shared_rows(samples, picture_token_id=PICTURE)
    assert [len(row.input_ids) for row in rows] == [9, 9, 5]
    assert [row.inputs["image_features"][:, 0, 0].tolist() for row in rows] == [[0], [2, 1], [3, 4]]
    assert rows[1].inputs["layout"][0, 1].tolist() == [1] * 5 + [2] * 4
    assert rows[1].labels[5] == IGNORED  # nothing is predicted across the border


def test_the_batch_holds_each_picture_once_in_the_order_of_the_rows() -> None:
    same = [asked(index, [1, PICTURE, PICTURE, 20 + index, 7], 1) for index in range(3)]
    other = asked(7, [1, PICTURE, PICTURE, *range(30, 45)], 2, ("b.png",))
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
        asked(number, [7, PICTURE, *text], 1 + len(text) % 2, (f"{picture}.png",))
        for number, (picture, text) in enumerate(questions)
    ]
    rows = shared_rows(samples, picture_token_id=PICTURE)
    found = sorted(tuple(trail) for row in rows for trail in _labelled_trails(row))
    alone = sorted(
        (*map(int, one.input_ids[:place]), int(one.labels[place]))
        for one in samples
        for place in range(1, len(one.labels))
        if one.labels[place] != IGNORED
    )
    assert found == alone


def _labelled_trails(row: Sample) -> list[list[int]]:
    """For each label: the tokens that its predicting position sees, ordered by position, then the label."""
    ids, labels, layout = row.input_ids, row.labels, row.inputs["layout"][0]
    seen = visible(layout.unsqueeze(0))[0, 0]
    trails = []
    for place in range(1, len(ids)):
        if labels[place] != IGNORED:
            tokens = seen[place - 1].nonzero().flatten()
            assert layout[0, tokens].tolist() == list(range(len(tokens)))
            trails.append([*ids[tokens].tolist(), int(labels[place])])
    return trails
