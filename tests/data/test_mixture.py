"""The plan of a mixture: whole epochs, one task a step on every rank, an order that (seed, epoch) alone decides."""

from __future__ import annotations

from collections import Counter

import pytest

from dora_vl.data.order import Mixing, MixturePlan, Source

SOURCES = (
    Source(name="vqav2", items=23, batch_size=6),
    Source(name="gqa", items=31, batch_size=10),
    Source(name="nlvr2", items=5, batch_size=2),
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
    assert {source: sorted(found) for source, found in seen.items()} == {
        number: list(range(source.items)) for number, source in enumerate(SOURCES)
    }


def test_more_ranks_do_the_same_steps() -> None:
    one, four = (MixturePlan(SOURCES, parts=parts, mixing="proportional", seed=5) for parts in (1, 4))
    joined = [(step[0][0], tuple(index for _, indices in step for index in indices)) for step in steps(four, epoch=3)]
    assert joined == [step[0] for step in steps(one, epoch=3)]


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
    items = [index for step in steps(plan, 0) for source, indices in step if source == 2 for index in indices]
    assert len(items) == 5 + 2  # three steps are the whole set, the fourth begins it anew
    assert sorted(items[:5]) == list(range(5))


@pytest.mark.parametrize("mixing", ["proportional", "balanced"])
def test_a_plan_says_how_many_items_an_epoch_reads(mixing: Mixing) -> None:
    plan = MixturePlan(SOURCES, parts=3, mixing=mixing, seed=0)
    assert plan.items == sum(len(plan.part(number, epoch=0).indices) for number in range(len(plan)))
