"""An epoch's order: a function of (seed, epoch) alone, whole, dealt to ranks in step, resumable."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from dora_vl.data.samplers import (
    MixturePlan,
    MixtureTask,
    ModalityLengthSampler,
    SamplingLengths,
    TreeSampler,
    sampling_lengths,
)
from dora_vl.data.table import load_table

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
