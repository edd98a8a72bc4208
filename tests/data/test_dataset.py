"""Every row becomes a sample or a named skip."""

from __future__ import annotations

import pytest
import torch

from dora_vl.data.example import Example
from dora_vl.data.samples import ConversationDataset, Encoded, Sample, Skipped, sample_random
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample


def row(name: str, answer: str = "yes it is", images: tuple[str, ...] = ()) -> Example:
    return Example(name, images, (Turn("user", "<image> q" if images else "q"), Turn("assistant", answer)))


def encode(conversation: Example) -> Encoded:
    """One token a word of the answer, after one that is not trained; five words at most."""
    if "broken.png" in conversation.images:
        raise BadSample("broken.png", "picture broken.png cannot be decoded")
    words = [7, *map(len, conversation.turns[-1].text.split())]
    ids = torch.tensor(words[:5])
    pixels = {"pixel_values": torch.zeros(1, 3, 2, 2)} if conversation.images else {}
    return Encoded(ids, torch.cat([torch.tensor([-100]), ids[1:]]), max(0, len(words) - 5), pixels)


ROWS = [
    row("text"),
    row("one", "one two three four five six", ("a.png",)),
    row("broken", images=("broken.png",)),
    BadSample("empty", "answer 1 of 1 is empty"),
]


def test_samples_and_skips() -> None:
    read = ConversationDataset(ROWS, encode=encode)
    text, one, *skipped = [read[index] for index in range(len(read))]
    assert isinstance(text, Sample)
    assert isinstance(one, Sample)
    assert (text.id, text.input_ids.tolist(), text.labels.tolist()) == ("text", [7, 3, 2, 2], [-100, 3, 2, 2])
    assert (one.index, one.cut_tokens, one.images, [*one.inputs]) == (1, 2, ("a.png",), ["pixel_values"])
    assert skipped == [
        Skipped(2, "broken", "picture broken.png cannot be decoded"),
        Skipped(3, "empty", "answer 1 of 1 is empty"),
    ]


@pytest.mark.parametrize("labels", [[-100, -100, -100], [5, -100, -100]])
def test_nothing_left_to_train_on_is_skipped(labels: list[int]) -> None:
    """The label of the very first token counts for nothing: no position predicts it."""

    def masked(conversation: Example) -> Encoded:
        return Encoded(torch.tensor([5, 6, 7]), torch.tensor(labels), cut_tokens=9)

    assert isinstance(ConversationDataset(ROWS, encode=masked)[0], Skipped)


def test_an_error_of_the_program_is_not_taken_for_a_bad_sample() -> None:
    def wrong(conversation: Example) -> Encoded:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        ConversationDataset(ROWS, encode=wrong)[0]


def test_random_choices_depend_on_seed_epoch_and_index_only() -> None:
    drawn = {key: sample_random(*key).random() for key in [(3, 0, 5), (3, 1, 5), (3, 0, 6), (4, 0, 5)]}
    assert len({*drawn.values()}) == 4
    assert drawn == {key: sample_random(*key).random() for key in drawn}
