"""Rows become samples or named skips; batches hold every token once; an order is a function of seed and epoch."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import BatchSampler

from dora_vl.data import batches
from dora_vl.data.batches import Collator
from dora_vl.data.example import Example
from dora_vl.data.packing import Packed, build_trees, pack, tokens_of
from dora_vl.data.samplers import (
    MixturePlan,
    MixtureTask,
    ModalityLengthSampler,
    SamplingLengths,
    TreeSampler,
    sampling_lengths,
)
from dora_vl.data.samples import (
    IGNORED_LABEL,
    BadSampleCounts,
    BadSampleLedger,
    ConversationDataset,
    Encoded,
    Sample,
    Skipped,
    sample_random,
)
from dora_vl.data.table import load_table
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


SOURCES = (
    MixtureTask(name="vqav2", items=23, batch_size=6),
    MixtureTask(name="gqa", items=31, batch_size=10),
    MixtureTask(name="nlvr2", items=5, batch_size=2),
)


def steps(plan: MixturePlan, epoch: int) -> list[list[tuple[int, tuple[int, ...]]]]:
    parts = [plan.part(number, epoch=epoch) for number in range(len(plan))]
    rows = [parts[start : start + plan.parts] for start in range(0, len(parts), plan.parts)]
    return [[(part.source, part.indices) for part in row] for row in rows]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_each_item_comes_once_an_epoch_in_batches_of_its_tasks_size(parts: int) -> None:
    plan = MixturePlan(SOURCES, parts=parts, mixing="proportional", seed=5)
    assert len(plan) == (4 + 4 + 3) * parts
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in steps(plan, epoch=0):
        assert len({source for source, _ in step}) == 1  # the same task on every rank
        sizes = [len(indices) for _, indices in step]
        assert max(sizes) - min(sizes) <= 1
        source = step[0][0]
        assert sum(sizes) <= SOURCES[source].batch_size
        seen[source] += [index for _, indices in step for index in indices]
    assert {source: sorted(items) for source, items in seen.items()} == {
        number: list(range(source.items)) for number, source in enumerate(SOURCES)
    }


def test_more_ranks_do_the_same_steps() -> None:
    single, four = (MixturePlan(SOURCES, parts=parts, mixing="proportional", seed=5) for parts in (1, 4))
    joined = [(step[0][0], tuple(index for _, indices in step for index in indices)) for step in steps(four, epoch=3)]
    assert joined == [step[0] for step in steps(single, epoch=3)]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): steps(MixturePlan(SOURCES, parts=2, mixing="proportional", seed=seed), epoch)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert orders[0, 0] == steps(MixturePlan(SOURCES, parts=2, mixing="proportional", seed=0), 0)
    assert len({str(order) for order in orders.values()}) == 4  # seed 0 in epoch 1 is not seed 1 in epoch 0 either
    again = MixturePlan(SOURCES, parts=2, mixing="proportional", seed=0)
    again.part(3, epoch=7)
    assert steps(again, 1) == orders[0, 1]  # what was asked for before does not matter


def test_balanced_gives_every_task_as_many_steps() -> None:
    plan = MixturePlan(SOURCES, parts=1, mixing="balanced", seed=0)
    tasks = Counter(SOURCES[plan.part(step, epoch=0).source].name for step in range(len(plan)))
    assert tasks == {"vqav2": 4, "gqa": 4, "nlvr2": 4}
    assert plan.items == sum(len(plan.part(step, epoch=0).indices) for step in range(len(plan)))
    items = [index for step in steps(plan, 0) for source, indices in step if source == 2 for index in indices]
    assert len(items) == 5 + 2  # three steps are the whole set, the fourth begins it anew
    assert sorted(items[:5]) == list(range(5))


SAMPLES = st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=70)
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


def sampler(
    samples: list[tuple[int, bool]], sizes: tuple[int, int, int], *, seed: int = 0, epoch: int = 0
) -> ModalityLengthSampler:
    batch_size, world_size, accumulation = sizes
    result = ModalityLengthSampler(
        torch.tensor([length for length, _ in samples], dtype=torch.int64),
        torch.tensor([multimodal for _, multimodal in samples], dtype=torch.bool),
        global_batch=batch_size * world_size * accumulation,
        seed=seed,
    )
    result.set_epoch(epoch)
    return result


def chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


@given(SAMPLES, SIZES, st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_is_a_permutation_the_same_for_everyone_in_batches_of_one_modality_dealt_by_length(
    samples: list[tuple[int, bool]], sizes: tuple[int, int, int], seed: int, epoch: int
) -> None:
    """Through accelerate's own dealing: no rank's shortest is shorter than the next rank's longest."""
    batch_size, world_size, accumulation = sizes
    size = batch_size * world_size * accumulation
    order = list(sampler(samples, sizes, seed=seed, epoch=epoch))
    torch.manual_seed(epoch + 17)  # another rank's global random state
    assert list(sampler(samples, sizes, seed=seed, epoch=epoch)) == order
    assert sorted(order) == list(range(len(samples))) == list(range(len(sampler(samples, sizes))))
    pictures = sum(multimodal for _, multimodal in samples)
    batches, complete = chunks(order, size), pictures // size + (len(samples) - pictures) // size
    for batch in batches[:complete]:
        lengths = [samples[index][0] for index in batch]
        assert len(batch) == size
        assert len({samples[index][1] for index in batch}) == 1
        assert lengths == sorted(lengths, reverse=True)
    tail = [samples[index][1] for batch in batches[complete:] for index in batch]
    assert tail == sorted(tail, reverse=True)  # pictures, then text: at most one micro-batch holds both
    dealt = BatchSampler(sampler(samples, sizes, seed=seed, epoch=epoch), batch_size, drop_last=False)
    ranks = [list(BatchSamplerShard(dealt, world_size, rank)) for rank in range(world_size)]
    for step in range(complete * accumulation):
        of_ranks = [[samples[index][0] for index in ranks[rank][step]] for rank in range(world_size)]
        assert all(min(longer) >= max(shorter) for longer, shorter in itertools.pairwise(of_ranks))


def test_batches_are_drawn_anew_and_not_in_the_order_of_length() -> None:
    samples = [(number, True) for number in range(64)]
    order = list(sampler(samples, (4, 1, 2)))
    longest = [batch[0] for batch in chunks(order, 8)]
    assert longest != sorted(longest, reverse=True)
    assert all(max(batch) - min(batch) > 7 for batch in chunks(order, 8))  # drawn at random, then sorted
    assert len({tuple(sampler(samples, (4, 1, 2), seed=s, epoch=e)) for s in range(4) for e in range(4)}) == 16


def test_lengths_of_rows_count_the_pictures_and_videos(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "two words"}, {"from": "gpt", "value": " one  two\nthree "}]
    rows = [{"id": n, "image": images, "conversations": turns} for n, images in enumerate([None, "a.png", ["a", "b"]])]
    filmed = {"id": 4, "videos": ["a.mp4", "b.mp4"], "image": "a.png", "conversations": turns}
    (tmp_path / "a.json").write_text(json.dumps([*rows, {"id": 3, "conversations": []}, filmed]))
    table = load_table(tmp_path / "a.json")
    lengths, is_multimodal, media, shared = sampling_lengths(table, tokens_per_image=100, tokens_per_video=1000)
    assert lengths.tolist() == [5, 106, 207, 0, 2108]
    assert is_multimodal.tolist() == [False, True, True, False, True]
    assert shared.tolist() == [0, 100, 200, 0, 2100]
    assert media.unique().tolist() == [0, 1, 2, 3]
    assert media[0] == media[3]  # the two without any
    lengths, is_multimodal, *_ = sampling_lengths(table.select([2, 0]), tokens_per_image=10)
    assert (lengths.tolist(), is_multimodal.tolist()) == ([27, 5], [True, False])


def test_trees_stand_in_micro_batches_of_equal_length_and_each_sample_once() -> None:
    """As in LLaVA-1.5's mixture: three of ten are words alone, three questions to a picture's tokens."""
    chance = random.Random(7)
    pictures = [picture for picture in range(1, 701) for _ in range(3)] + [0] * 900
    own = [chance.randint(100, 400) if picture else chance.randint(16, 800) for picture in pictures]
    media = torch.tensor(pictures)
    shared = (media > 0) * 611
    lengths = SamplingLengths(torch.tensor(own) + shared, media > 0, media, shared)
    trees = TreeSampler(lengths, batch_size=16, seed=5)
    order = list(trees)
    assert sorted(order) == list(range(3000))
    shown = [{pictures[index] for index in batch} - {0} for batch in chunks(order, 16)]
    assert sum(map(len, shown)) < 1.05 * 700  # hardly any is in two micro-batches
    tokens = [611 * len(of) + sum(own[i] for i in batch) for of, batch in zip(shown, chunks(order, 16), strict=True)]
    waited = 2 * sum(map(max, zip(tokens[::2], tokens[1::2], strict=False)))  # neighbours are the two ranks' of a step
    assert sum(tokens) > 0.95 * waited
    trees.set_epoch(1)
    assert list(trees) != order
    trees.set_epoch(0)
    assert list(trees) == order
    cut_anew = TreeSampler(lengths, batch_size=4, seed=5)  # as by a run that is resumed with smaller micro-batches
    assert list(cut_anew) != order
    cut_anew.micro_batch = 16
    assert list(cut_anew) == order
