"""A batch holds every token and label once, masks by length; what samples share stands once, and nothing else is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dora_vl.data import batches
from dora_vl.data.batches import Collator
from dora_vl.data.packing import Packed, build_trees, pack, tokens_of
from dora_vl.data.samples import IGNORED_LABEL, Sample, Skipped


def sample(index: int, ids: list[int], *, cut: int = 0, **inputs: Tensor) -> Sample:
    labels = torch.tensor([-100, *ids[1:]])
    return Sample(torch.tensor(ids), labels, index=index, id=f"s{index}", cut_tokens=cut, inputs=inputs)


def test_padding_on_either_side_written_out() -> None:
    samples = [sample(0, [1, 2, 3]), Skipped(1, "s1", "empty"), sample(2, [4, 9], cut=5)]
    batch, left = Collator(pad_token_id=9)(samples), Collator(pad_token_id=9, pad_side="left")(samples)
    assert (batch["input_ids"].tolist(), left["input_ids"].tolist()) == ([[1, 2, 3], [4, 9, 9]], [[1, 2, 3], [9, 4, 9]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]  # the 9 at the end of the text is no padding
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 9, -100]]
    assert left["labels"].tolist() == [[-100, 2, 3], [-100, -100, 9]]
    assert (batch["samples"], batch["padding_tokens"]) == (2, 1)
    assert (batch["skipped"], batch["cut"]) == ([("s1", "empty")], [("s2", 5)])
    assert not {"pixel_values", "image_features"} & set(batch)


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


PICTURE = 99
IGNORED = IGNORED_LABEL


def question(index: int, ids: Sequence[int], answered: int, images: tuple[str, ...] = ("a.png",)) -> Sample:
    """A sample whose last `answered` tokens carry labels."""
    row = torch.tensor(ids)
    labels = torch.full_like(row, IGNORED)
    labels[len(ids) - answered :] = row[len(ids) - answered :]
    inputs = {"image_features": torch.full((len(images), 2, 3), float(ord(images[0][0])))} if images else {}
    end = max((position + 1 for position, token in enumerate(ids) if token == PICTURE), default=0)
    return Sample(row, labels, index=index, id=f"s{index}", inputs=inputs, media=images, media_end=end)


def test_two_questions_about_one_picture_written_out() -> None:
    first, second = question(0, [1, PICTURE, PICTURE, 5, 6, 7], 2), question(1, [1, PICTURE, PICTURE, 5, 8, 9, 4], 1)
    batch = Collator(0, packing="trees")([first, second])
    assert batch["input_ids"].tolist() == [[1, PICTURE, PICTURE, 5, 6, 7, 8, 9, 4]]
    assert batch["labels"].tolist() == [[IGNORED] * 4 + [6, 7] + [IGNORED] * 2 + [4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 6]]
    layout = {name: value[0].tolist() for name, value in batch["layout"].items()}
    assert layout["segment"] == [0] * 4 + [1] * 2 + [2] * 3
    assert layout["sources"] == [-1, 0, 1, 2, 3, 4, 3, 6, 7]
    assert layout["sees"] == [[True, False, False], [True, True, False], [True, False, True]]
    assert batch["image_features"].tolist() == first.inputs["image_features"].tolist()
    assert (batch["samples"], batch["padding_tokens"]) == (2, 0)


def test_long_rows_become_several_and_each_has_its_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PACKED_TOKENS", 12)
    lengths = [9, 4, 5, 3, 2]
    samples = [question(i, [1, PICTURE, *range(10, 8 + n)], 1, (f"{i}.png",)) for i, n in enumerate(lengths)]
    batch = Collator(0, packing="trees")(samples)
    assert batch["attention_mask"].sum(1).tolist() == [12, 11]
    assert batch["padding_tokens"] == 1
    assert batch["image_features"][:, 0, 0].tolist() == [ord(name) for name in "03124"]
    starts = batch["layout"]["sources"] < 0
    assert bool((batch["labels"][starts] == IGNORED).all()), "nothing is predicted across a border"


PLACE = 9
PIXELS = torch.arange(6.0).reshape(1, 2, 3)


def lettered(text: str, *, trained: str, picture: str | None = None, number: int = 0) -> Sample:
    """`text`'s letters as tokens, the `trained` end labelled; a picture's three tokens stand in front."""
    before = [PLACE] * 3 if picture else []
    ids = torch.tensor([*before, *(ord(letter) for letter in text)])
    labels = ids.clone()
    labels[: len(ids) - len(trained)] = IGNORED_LABEL
    inputs = {"pixel_values": PIXELS + ord(picture)} if picture else {}
    images = (picture,) if picture else ()
    return Sample(
        index=number, id=str(number), input_ids=ids, labels=labels, media=images, inputs=inputs, media_end=len(before)
    )


ALIKE = (
    lettered("Q: what? A: red", trained="red", picture="a", number=0),
    lettered("Q: what? A: rose", trained="rose", picture="a", number=1),
    lettered("Q: where? A: there", trained="there", picture="a", number=2),
    lettered("Q: what? A: red", trained="red", picture="b", number=3),
    lettered("Q: what? A: red", trained="red", number=4),
)


def row_of(samples: Sequence[Sample]) -> Packed:
    return pack(build_trees(samples, budget=1_000))


def test_a_picture_and_what_is_said_of_it_stand_once() -> None:
    row = row_of(ALIKE)
    assert int((row.input_ids == PLACE).sum()) == 6, "three tokens of each of two pictures"
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
    assert len(build_trees([ALIKE[0], other], budget=1_000)) == 2


def test_a_picture_behind_what_differs_is_not_shared() -> None:
    early, late = (replace(item, media_end=len(item.input_ids) - 4) for item in (ALIKE[0], ALIKE[2]))
    assert len(build_trees([early, late], budget=1_000)) == 2


def test_trees_stay_below_the_budget() -> None:
    many = [lettered(f"Q: {number}? A: yes", trained="yes", picture="a", number=number) for number in range(40)]
    trees = build_trees(many, budget=60)
    assert max(map(tokens_of, trees)) <= 60
    assert sum(sum(segment.stop == len(segment.sample.input_ids) for segment in tree) for tree in trees) == 40
