"""Several adapters in one layer at once, unmerged: each row of a batch has its own, or none. For inference alone.

    y_r = g_r (W x_r + s_r B_r A_r x_r) + b

The frozen product is one for all rows. A row without an adapter keeps its bits: nothing is added to it but zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.gain import Gain, careful_gain
from dora_vl.core.layer import AdaptedLayer

Place = Literal["rows", "pictures"]
"""What the first axis of a layer's input counts: rows of the batch, or the pictures of all rows."""

ONE_PRODUCT = 2**15
"""Up to so many numbers of A x, of all adapters that a layer holds, they are taken in one product and masked: a decoded
token costs its calls. Beyond, a prompt's tokens cost their arithmetic, and each adapter's rows are taken apart."""


class Run(NamedTuple):
    """Rows one after another that have the same adapter; key None is the base."""

    key: str | None
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """Where they stand."""
        return slice(self.start, self.stop)


def runs_of(keys: Sequence[str | None]) -> tuple[Run, ...]:
    """The runs of equal keys; fewest where rows are sorted by adapter."""
    runs: list[Run] = []
    start = 0
    for key, alike in groupby(keys):
        stop = start + len(list(alike))
        runs.append(Run(key, start, stop))
        start = stop
    return tuple(runs)


Layout = tuple[tuple[str, int], ...]
"""The adapters that a layer holds, in the order of its matrices, each with its rank."""


class Choice(NamedTuple):
    """What of a layer's adapters each row of a batch takes."""

    mask: Float[Tensor, "rows ranks"]
    """One at the ranks of the row's own adapter."""
    place: Int[Tensor, " rows"]
    """Of its gain among the layer's; 0 is the base's."""


@dataclass
class BatchAtHand:
    """Which adapter each row, and each picture, of the batch has that goes through the model now.

    One for a model; all of its `RowLayer`s read it. Outside `holding` every row is the base's.
    """

    _runs: dict[Place, tuple[Run, ...]] = field(default_factory=dict)
    _choices: dict[tuple[object, ...], Choice] = field(default_factory=dict)

    @contextlib.contextmanager
    def holding(self, rows: Sequence[str | None], pictures: Sequence[str | None] = (None,)) -> Iterator[None]:
        """Meanwhile the model's batch has these rows.

        Args:
            rows: the adapter of each row.
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
            return (Run(runs[0].key, 0, length),)
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
    start = 0
    for number, (key, rank) in enumerate(layout, 1):
        for run in runs:
            if run.key == key:
                mask[run.rows, start : start + rank] = 1
                place[run.rows] = number
        start += rank
    return Choice(mask, place)


@dataclass(frozen=True)
class RowChange:
    """One adapter's change of one linear layer, ready for inference: what is computed once, when it is loaded."""

    lora_A: Float[Tensor, "rank in_"]
    """Of no rows for a magnitude alone."""
    scaled_B: Float[Tensor, "rank out"]
    """(s B)^T, so that adapters can lie one after another in one matrix."""
    gain: Gain | None
    """None for plain LoRA."""

    @classmethod
    @torch.no_grad()
    def of(cls, layer: AdaptedLayer, dtype: torch.dtype) -> RowChange:
        """The change that an adapted linear layer makes, its norm from the layer's own product."""
        (rows, columns), like = layer.matrix_shape(), layer.weight
        a, b = layer.factors() or (like.new_zeros(0, columns), like.new_zeros(rows, 0))
        full = layer.gain()
        gain = None if full is None else careful_gain(full, layer.norms(), layer.bias, dtype)
        return cls(a.to(dtype).contiguous(), (b.to(dtype) * layer.scale()).t().contiguous(), gain)

    def minus_one(self) -> Float[Tensor, " out"]:
        """The gain minus one; zero for plain LoRA."""
        return self.scaled_B.new_zeros(self.scaled_B.shape[1]) if self.gain is None else self.gain.minus_one


class _Stack(NamedTuple):
    """All adapters of a layer, one after another."""

    layout: Layout
    lora_A: Float[Tensor, "ranks in_"]
    scaled_B: Float[Tensor, "ranks out"]
    minus_one: Float[Tensor, "adapters_and_base out"]


class RowLayer(nn.Module):
    """A layer of the base in whose place each row of a batch has the layer of its own adapter.

    An adapter is a `RowChange` of the layer's product, or a layer of its own (an adapted embedding, a norm or a
    projector whose weights were trained). Other attributes are those of the layer inside, which stays as it is.

    Args:
        base: any layer whose first input and whose output count rows (pictures) along their first axis.
        batch: the model's, which says which row has which adapter.
        place: what that axis counts.
    """

    def __init__(self, base: nn.Module, batch: BatchAtHand, place: Place) -> None:
        super().__init__()
        self.base = base
        self.place: Place = place
        self.training = base.training
        self._batch = batch
        self._changes: dict[str, RowChange] = {}
        self._own: dict[str, nn.Module] = {}  # a plain dictionary: they are none of the base's modules
        self._stack: _Stack | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @property
    def keys(self) -> tuple[str, ...]:
        """The adapters that it holds."""
        return (*self._changes, *self._own)

    def put(self, key: str, adapter: RowChange | nn.Module) -> None:
        """Takes an adapter in."""
        if isinstance(adapter, nn.Module):
            self._own[key] = adapter.eval()
        else:
            self._restack({**self._changes, key: adapter})

    def drop(self, key: str) -> None:
        """Lets an adapter go; one that it does not hold is none here."""
        self._own.pop(key, None)
        if key in self._changes:
            self._restack({name: one for name, one in self._changes.items() if name != key})

    @torch.no_grad()
    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The layer's output, each row's by its own adapter."""
        runs = self._batch.runs(self.place, len(inputs[0]) if inputs else 0)
        if len(runs) == 1 and runs[0].key in self._own:
            return self._own[runs[0].key](*inputs, **named)
        output = self.base(*inputs, **named)
        changed = [run for run in runs if run.key in self._changes]
        if changed:
            self._change_(output, inputs[0], runs, changed)
        for run in runs:
            if run.key in self._own:
                output[run.rows] = self._own[run.key](inputs[0][run.rows], *inputs[1:], **named)
        return output

    def _change_(self, output: Tensor, x: Tensor, runs: Sequence[Run], changed: Sequence[Run]) -> None:
        stack = self._stack
        assert stack is not None
        if len(changed) > 1 and x.numel() // x.shape[-1] * len(stack.lora_A) <= ONE_PRODUCT:
            chosen = self._batch.choice(self.place, stack.layout, x)
            hidden = F.linear(x, stack.lora_A.to(x.dtype))
            hidden.mul_(chosen.mask.view(len(x), *(1,) * (x.dim() - 2), -1))
            functional.changed_rows_(output, hidden, stack.scaled_B.t(), self._bias, stack.minus_one[chosen.place])
            return
        for run in changed:
            change = self._changes[cast(str, run.key)]
            y, rows = output[run.rows].view(-1, output.shape[-1]), x[run.rows].flatten(end_dim=-2)
            hidden = F.linear(rows, change.lora_A.to(rows.dtype)) if len(change.lora_A) else None
            b = change.scaled_B.t() if hidden is not None else None
            functional.changed_product_(y, hidden, b, self._bias, change.gain)

    @property
    def _bias(self) -> Float[Tensor, " out"] | None:
        return cast("Tensor | None", self.base.bias)

    def _restack(self, changes: Mapping[str, RowChange]) -> None:
        """Lays the adapters into one matrix each for A and B; the adapters' own are views of them from then on."""
        self._changes, self._stack = {}, None
        if not changes:
            return
        ones = list(changes.values())
        a, b = (torch.cat(parts) for parts in zip(*((one.lora_A, one.scaled_B) for one in ones), strict=True))
        gains = [one.minus_one() for one in ones]
        ranks = [len(one.lora_A) for one in ones]
        self._stack = _Stack(
            tuple(zip(changes, ranks, strict=True)), a, b, torch.stack([torch.zeros_like(gains[0]), *gains])
        )
        for key, one, own_a, own_b in zip(changes, ones, a.split(ranks), b.split(ranks), strict=True):
            self._changes[key] = RowChange(own_a, own_b, one.gain)
