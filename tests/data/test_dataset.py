"""Every row becomes a sample or a named skip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dora_vl.data.example import Example
from dora_vl.data.samples import ConversationDataset, Encoded, Sample, Skipped, sample_random
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample


def row(name: str, answer: str = "yes it is", images: tuple[str, ...] = ()) -> Example:
    return Example(name, images, (Turn("user", "<image> q" if images else "q"), Turn("assistant", answer)))


def encode(conversation: Example) -> Encoded:
    """One token a word of the answer, after one that is not trained; five words at most."""
    words = [7, *map(len, conversation.turns[-1].text.split())]
    ids = torch.tensor(words[:5])
    return Encoded(ids, torch.cat([torch.tensor([-100]), ids[1:]]), max(0, len(words) - 5))


def picture(path: str) -> Tensor:
    if path == "broken.png":
        raise BadSample(path, "picture broken.png cannot be decoded")
    return torch.full((3, 2, 2), float(len(path)))


def features(path: str) -> Tensor:
    return torch.full((4, 6), float(len(path)))


ROWS = [
    row("text"),
    row("one", "one two three four five six", ("a.png",)),
    row("broken", images=("broken.png",)),
    BadSample("empty", "answer 1 of 1 is empty"),
]


def test_samples_and_skips() -> None:
    read = ConversationDataset(ROWS, encode=encode, picture=picture)
    text, one, *skipped = [read[index] for index in range(len(read))]
    assert isinstance(text, Sample)
    assert isinstance(one, Sample)
    assert (text.id, text.input_ids.tolist(), text.labels.tolist(), text.pictures) == (
        "text",
        [7, 3, 2, 2],
        [-100, 3, 2, 2],
        (),
    )
    assert (one.index, one.cut_tokens, [p.shape for p in one.pictures], one.features) == (1, 2, [(3, 2, 2)], ())
    assert skipped == [
        Skipped(2, "broken", "picture broken.png cannot be decoded"),
        Skipped(3, "empty", "answer 1 of 1 is empty"),
    ]


def test_stored_features_take_the_place_of_pixels() -> None:
    sample = ConversationDataset(ROWS, encode=encode, features=features)[1]
    assert isinstance(sample, Sample)
    assert sample.pictures == ()
    assert [tuple(f.shape) for f in sample.features] == [(4, 6)]


@pytest.mark.parametrize("labels", [[-100, -100, -100], [5, -100, -100]])
def test_nothing_left_to_train_on_is_skipped(labels: list[int]) -> None:
    """The label of the very first token counts for nothing: no position predicts it."""

    def masked(conversation: Example) -> Encoded:
        return Encoded(torch.tensor([5, 6, 7]), torch.tensor(labels), cut_tokens=9)

    skipped = ConversationDataset(ROWS, encode=masked)[0]
    assert isinstance(skipped, Skipped)
    assert skipped.reason == "nothing is left to train on in its 3 tokens after 9 were cut; raise data.max_tokens"


def test_an_error_of_the_program_is_not_taken_for_a_bad_sample() -> None:
    def wrong(conversation: Example) -> Encoded:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        ConversationDataset(ROWS, encode=wrong)[0]


def test_pixels_and_features_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        ConversationDataset(ROWS, encode=encode, picture=picture, features=features)


def test_random_choices_depend_on_seed_epoch_and_index_only() -> None:
    drawn = {key: sample_random(*key).random() for key in [(3, 0, 5), (3, 1, 5), (3, 0, 6), (4, 0, 5)]}
    assert len({*drawn.values()}) == 4
    assert drawn == {key: sample_random(*key).random() for key in drawn}


def test_a_missing_picture_folder_names_every_sample(tmp_path: Path) -> None:
    def read_file(path: str) -> Tensor:
        from dora_vl.data.pictures import open_image

        return torch.zeros(3, *reversed(open_image(tmp_path / "none", path).size))

    skipped = ConversationDataset(ROWS, encode=encode, picture=read_file)[1]
    assert isinstance(skipped, Skipped)
    assert skipped.id == "one"
    assert "picture a.png is missing in" in skipped.reason
