"""Which adapter, or which share of one, each row of the batch has that goes through a model now."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dora_vl.core.strength import Share

Place = Literal["rows", "pictures"]
"""What the first axis of a layer's input counts: rows of the batch, or the pictures of all rows."""

Row = str | Share | None
"""What a row has: an adapter by its key, a share of one, or the base."""


class Run(NamedTuple):
    """Rows one after another that have the same share of an adapter; None is the base."""

    share: Share | None
    start: int
    stop: int

    @property
    def key(self) -> str | None:
        """The adapter's."""
        return None if self.share is None else self.share.key

    @property
    def rows(self) -> slice:
        """Where they stand."""
        return slice(self.start, self.stop)


def share_of(row: Row) -> Share | None:
    """What a row has, written out; nothing of an adapter is the base."""
    share = Share(row) if isinstance(row, str) else row
    return None if share is None or share.strength == 0 else share


def runs_of(rows: Sequence[Row]) -> tuple[Run, ...]:
    """The runs of rows with equal shares; fewest where rows are sorted."""
    runs: list[Run] = []
    start = 0
    for share, alike in groupby(map(share_of, rows)):
        stop = start + len(list(alike))
        runs.append(Run(share, start, stop))
        start = stop
    return tuple(runs)


Layout = tuple[tuple[str, int], ...]
"""The adapters that a layer holds, in the order of its matrices, each with its rank."""


class Choice(NamedTuple):
    """What of a layer's adapters each row of a batch takes."""

    mask: Float[Tensor, "rows ranks"]
    """The strength, mostly 1, at the ranks of the row's own adapter."""
    place: Int[Tensor, " rows"]
    """Of its gain among the layer's: 0 is the base's, then each adapter's, then those of `others`."""
    others: tuple[Share, ...]
    """The shares other than whole adapters."""


@dataclass
class ActiveAdapters:
    """Which adapter each row, and each picture, of the batch has that goes through the model now.

    One for a model; all of its `RowLayer`s read it. Outside `holding` every row is the base's.
    """

    _runs: dict[Place, tuple[Run, ...]] = field(default_factory=dict)
    _choices: dict[tuple[object, ...], Choice] = field(default_factory=dict)

    @contextlib.contextmanager
    def holding(self, rows: Sequence[Row], pictures: Sequence[Row] = (None,)) -> Iterator[None]:
        """Meanwhile the model's batch has these rows.

        Args:
            rows: the adapter of each row, or the share of it.
            pictures: that of each picture, in the rows' order; a single one is that of all, however many there are.
        """
        self._runs, self._choices = {"rows": runs_of(rows), "pictures": runs_of(pictures)}, {}
        try:
            yield
        finally:
            self._runs, self._choices = {}, {}

    def runs(self, place: Place, length: int) -> tuple[Run, ...]:
        """The runs of an input whose first axis has this length.

        Raises:
            RuntimeError: it does not count the rows (pictures) of the batch, so that no row's adapter is known.
        """
        runs = self._runs.get(place, (Run(None, 0, length),))
        if len(runs) == 1 and place == "pictures":
            return (Run(runs[0].share, 0, length),)
        if runs[-1].stop != length:
            raise RuntimeError(f"a layer was given {length} of what the batch has {runs[-1].stop} {place} of")
        return runs

    def choice(self, place: Place, layout: Layout, like: Tensor) -> Choice:
        """What each row takes of a layer's adapters; the same for all layers that hold the same ones."""
        key = (place, layout, like.dtype, like.device)
        if key not in self._choices:
            self._choices[key] = _choice(self._runs[place], layout, like)
        return self._choices[key]


def _choice(runs: Sequence[Run], layout: Layout, like: Tensor) -> Choice:
    mask = like.new_zeros(runs[-1].stop, sum(rank for _, rank in layout))
    place = torch.zeros(len(mask), dtype=torch.int64, device=like.device)
    shares = [Share(key) for key, _ in layout]
    start = 0
    for key, rank in layout:
        for run in runs:
            if run.share is not None and run.key == key:
                mask[run.rows, start : start + rank] = run.share.strength
                if run.share not in shares:
                    shares.append(run.share)
                place[run.rows] = shares.index(run.share) + 1
        start += rank
    return Choice(mask, place, tuple(shares[len(layout) :]))
