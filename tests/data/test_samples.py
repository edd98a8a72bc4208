"""Every row becomes a sample or a named skip; the account of skips ends a broken run, one verdict for all ranks."""

from __future__ import annotations

import pytest
import torch

from dora_vl.data.example import Example
from dora_vl.data.samples import (
    BadSampleCounts,
    BadSampleLedger,
    ConversationDataset,
    Encoded,
    Sample,
    Skipped,
    sample_random,
)
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError


def row(name: str, answer: str = "yes it is", images: tuple[str, ...] = ()) -> Example:
    return Example(name, images, (Turn("user", "<image> q" if images else "q"), Turn("assistant", answer)))


def encode(conversation: Example) -> Encoded:
    """One token a word of the answer, after one that is not trained; five words at most."""
    if "broken.png" in conversation.images:
        raise BadSample("broken.png", "picture broken.png cannot be decoded")
    words = [7, *map(len, conversation.turns[-1].text.split())]
    ids = torch.tensor(words[:5])
    pixels = {"pixel_values": torch.zeros(1, 3, 2, 2)} if conversation.images else {}
    cut, media = max(0, len(words) - 5), conversation.images
    return Encoded(ids, torch.cat([torch.tensor([-100]), ids[1:]]), cut, pixels, media=media)


ROWS = [
    row("text"),
    row("one", "one two three four five six", ("a.png",)),
    row("broken", images=("broken.png",)),
    BadSample("empty", "answer 1 of 1 is empty"),
]


def test_samples_and_skips() -> None:
    read = ConversationDataset(ROWS, encode=encode)
    text, image, *skipped = [read[index] for index in range(len(read))]
    assert isinstance(text, Sample)
    assert isinstance(image, Sample)
    assert (text.id, text.input_ids.tolist(), text.labels.tolist()) == ("text", [7, 3, 2, 2], [-100, 3, 2, 2])
    assert (image.index, image.cut_tokens, image.media, [*image.inputs]) == (1, 2, ("a.png",), ["pixel_values"])
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


def test_random_choices_depend_on_seed_epoch_and_index_only() -> None:
    drawn = {key: sample_random(*key).random() for key in [(3, 0, 5), (3, 1, 5), (3, 0, 6), (4, 0, 5)]}
    assert len({*drawn.values()}) == 4
    assert drawn == {key: sample_random(*key).random() for key in drawn}


def ledger(share: float = 0.001, total: int = 100_000) -> BadSampleLedger:
    return BadSampleLedger(max_bad_share=share, total_samples=total, source="train.json")


def test_each_sample_is_named_once_and_counted_each_time(caplog: pytest.LogCaptureFixture) -> None:
    account = ledger()
    account.record(samples=3, skipped=[("a", "empty")])
    account.record(samples=2, skipped=[("a", "empty"), ("b", "missing")])
    assert len(caplog.records) == 2
    assert account.counts == BadSampleCounts(seen=8, bad=3)
    assert account.reasons == {"a": "empty", "b": "missing"}


@pytest.mark.parametrize(
    ("share", "total", "seen", "bad", "ends"),
    [
        (0.001, 100_000, 1, 1, False),  # the first of a big set
        (0.001, 100_000, 10, 10, True),  # ten of ten: nothing can be read
        (0.001, 100_000, 1_000, 10, False),  # ten times the share, but not more
        (0.001, 100_000, 50_000, 100, False),  # the whole allowance of a pass, used up at half of it
        (0.001, 100_000, 50_000, 101, True),
        (0.001, 100_000, 100_001, 101, False),  # the second pass meets the first bad sample again
        (0.001, 500, 1, 1, True),  # one of 500 is more than 0.1 %, certainly
        (0.0, 100_000, 1, 1, True),
        (0.5, 100, 29, 22, True),  # more than halfway from the share to all
        (1.0, 100, 100, 100, False),
        (0.001, 0, 0, 0, False),
    ],
)
def test_when_a_run_ends(share: float, total: int, seen: int, bad: int, ends: bool) -> None:
    account = ledger(share, total)
    if not ends:
        account.judge(BadSampleCounts(seen, bad))
        return
    with pytest.raises(UserError):
        account.judge(BadSampleCounts(seen, bad))


def test_names_cannot_write_lines_or_colours_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    ledger = BadSampleLedger(max_bad_share=0.0, total_samples=10, source="train.json")
    forged = "x\nerror: all is lost\x1b[2J\u202e"
    ledger.record(samples=1, skipped=[(forged, f"picture {forged} is missing")])
    assert caplog.messages[0].isprintable()
    with pytest.raises(UserError) as raised:
        ledger.judge()
    assert str(raised.value).isprintable()


def test_samples_that_ranks_repeat_are_of_the_same_pass() -> None:
    """Of ten samples four ranks read twelve; the two more do not begin a pass with an allowance of its own."""
    account = BadSampleLedger(max_bad_share=0.1, total_samples=10, source="train.json", read_in_a_pass=12)
    account.judge(BadSampleCounts(seen=12, bad=1))
    with pytest.raises(UserError):
        account.judge(BadSampleCounts(seen=12, bad=2))
    account.judge(BadSampleCounts(seen=13, bad=2))
