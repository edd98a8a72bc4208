"""Several tasks in one run: which of them each step is about, and which of its samples, the same on every rank.

A step is about one task, whose batch is as large as the task asks for; its samples are dealt out to the ranks and to
the micro-batches that are accumulated, so a run with more ranks does the same steps. The order is a function of
(seed, epoch) alone. VL-Adapter's `roundrobin` is `proportional` here: each task's samples once an epoch, the tasks'
steps shuffled.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Mixing = Literal["proportional", "balanced"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One task's share of a mixture.

    Attributes:
        items: its training items.
        batch_size: items of one optimizer step, over all ranks and micro-batches.
    """

    name: str
    items: int
    batch_size: int

    def __post_init__(self) -> None:
        if self.items < 1 or self.batch_size < 1:
            raise ValueError(f"{self.name}: {self.items} items in batches of {self.batch_size}")

    @property
    def steps(self) -> int:
        """Steps that see each item once; the last may be smaller."""
        return -(-self.items // self.batch_size)


@dataclass(frozen=True)
class Part:
    """What one rank does in one micro-batch; `indices` may be empty where a small last batch does not reach."""

    source: int
    indices: tuple[int, ...]


class MixturePlan:
    """Every micro-batch of an epoch, by its number.

    Micro-batch k belongs to step k // parts; accelerate gives it to rank k % ranks.

    Args:
        parts: micro-batches of one step over all ranks (ranks times accumulation).
        mixing: `proportional`: each task's items once an epoch; `balanced`: as many steps in all, the same number for
            every task, a small task's items several times.
    """

    def __init__(self, sources: Sequence[Source], *, parts: int, mixing: Mixing, seed: int) -> None:
        if not sources or parts < 1:
            raise ValueError(f"{len(sources)} tasks in {parts} parts")
        self.sources = tuple(sources)
        self.parts = parts
        self.seed = seed
        proportional = [source.steps for source in sources]
        equal = -(-sum(proportional) // len(sources))
        self._steps_of = proportional if mixing == "proportional" else [equal] * len(sources)
        self._epoch: int | None = None
        self._tasks: list[int] = []
        self._turns: list[int] = []
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return sum(self._steps_of) * self.parts

    @property
    def items(self) -> int:
        """Items that an epoch reads, those of a small task that come several times included."""
        return sum(_items_in(source, steps) for source, steps in zip(self.sources, self._steps_of, strict=True))

    def part(self, number: int, *, epoch: int) -> Part:
        """Micro-batch `number` of an epoch."""
        self._plan(epoch)
        step, part = divmod(number, self.parts)
        task = self._tasks[step]
        source = self.sources[task]
        round_, turn = divmod(self._turns[step], source.steps)
        order = self._order(epoch, task, round_)
        items = order[turn * source.batch_size : (turn + 1) * source.batch_size]
        first, last = (len(items) * edge // self.parts for edge in (part, part + 1))
        return Part(task, tuple(items[first:last].tolist()))

    def _plan(self, epoch: int) -> None:
        if self._epoch == epoch:
            return
        tasks = [task for task, steps in enumerate(self._steps_of) for _ in range(steps)]
        random.Random(f"{self.seed}/{epoch}/tasks").shuffle(tasks)
        seen = [0] * len(self.sources)
        turns = []
        for task in tasks:
            turns.append(seen[task])
            seen[task] += 1
        self._epoch, self._tasks, self._turns, self._orders = epoch, tasks, turns, {}

    def _order(self, epoch: int, task: int, round_: int) -> np.ndarray:
        key = (task, round_)
        if key not in self._orders:
            source = self.sources[task]
            digest = hashlib.sha256(f"{self.seed}/{epoch}/{source.name}/{round_}".encode()).digest()
            generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
            self._orders = {key_: order for key_, order in self._orders.items() if key_[0] != task}
            self._orders[key] = generator.permutation(source.items)
        return self._orders[key]


def _items_in(source: Source, steps: int) -> int:
    rounds, rest = divmod(steps, source.steps)
    return rounds * source.items + min(rest * source.batch_size, source.items)
