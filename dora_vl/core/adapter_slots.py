"""Several adapters in one layer at once, unmerged: each row of a batch has its own, or none. For inference alone.

    y_r = g_r (W x_r + t_r s_r B_r A_r x_r) + b

t_r is the strength at which the row has its adapter, 1 unless it asks for another (`strength.py`), and g_r that
strength's gain. The frozen product is one for all rows. A row without an adapter, or at strength 0, keeps its bits:
nothing is added to it but zeros.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.strength import AppliedAdapter, GainByStrength, layer_between

ONE_PRODUCT = 2**15
"""Up to this many numbers of A x, over all adapters of a layer, one masked product computes them, since the calls are
what a decoded token costs. Above it, as for a prompt, arithmetic costs more, and adapters are computed one by one."""
MAX_CACHED_GAINS, MAX_CACHED_LAYERS = 16, 4
"""A layer keeps at most this many gains, and layers of an adapter's own, for strengths other than 1."""
Axis = Literal["rows", "pictures"]
"""The first axis of a layer's input counts rows of the batch, or the pictures of all rows."""
Slot = str | AppliedAdapter | None
"""Says what a row has: an adapter by its key, a share of one, or the base."""
SlotRanks = tuple[tuple[str, int], ...]
"""Lists the adapters that a layer holds, in the order of its matrices, each with its rank."""
Value = TypeVar("Value")


class RowSpan(NamedTuple):
    """Rows one after another that have the same share of an adapter; None is the base."""

    adapter: AppliedAdapter | None
    rows: slice

    @property
    def key(self) -> str | None:
        """Names the adapter."""
        return None if self.adapter is None else self.adapter.key


class RowChoice(NamedTuple):
    """Says which of a layer's adapters each row of a batch takes."""

    mask: Float[Tensor, "rows ranks"]
    """Holds the strength, mostly 1, at the ranks of the row's own adapter."""
    gain_index: Int[Tensor, " rows"]
    """Numbers the row's gain among those of `shares`, from 1; 0 is the base's."""
    shares: tuple[AppliedAdapter, ...]


def applied_adapter(row: Slot) -> AppliedAdapter | None:
    """Returns a row's slot as a share; None is the base, as is a share of strength 0."""
    share = AppliedAdapter(row) if isinstance(row, str) else row
    return None if share is None or share.strength == 0 else share


def row_spans(rows: Sequence[Slot]) -> tuple[RowSpan, ...]:
    """Lists the runs of rows with equal shares; they are fewest where rows are sorted."""
    runs, start = [], 0
    for share, alike in groupby(map(applied_adapter, rows)):
        stop = start + sum(1 for _ in alike)
        runs.append(RowSpan(share, slice(start, stop)))
        start = stop
    return tuple(runs)


@dataclass
class ActiveAdapters:
    """Says which adapter each row and each picture has in the batch that goes through the model now.

    One for a model; all of its `SlotLayer`s read it. Outside `holding` every row is the base's.
    """

    _runs: dict[Axis, tuple[RowSpan, ...]] = field(default_factory=dict)
    _choices: dict[tuple[object, ...], RowChoice] = field(default_factory=dict)

    @contextlib.contextmanager
    def holding(self, rows: Sequence[Slot], pictures: Sequence[Slot] = (None,)) -> Iterator[None]:
        """Gives the model's batch these rows inside the block, each with an adapter, a share of one, or the base.

        `pictures` says the same of pictures, in the rows' order; a single entry is that of all, however many there are.
        """
        self._runs, self._choices = {"rows": row_spans(rows), "pictures": row_spans(pictures)}, {}
        try:
            yield
        finally:
            self._runs, self._choices = {}, {}

    def runs(self, axis: Axis, length: int) -> tuple[RowSpan, ...]:
        """Returns the runs of an input whose first axis has this length; refuses another than the batch's."""
        runs = self._runs.get(axis, (RowSpan(None, slice(0, length)),))
        if len(runs) == 1 and axis == "pictures":
            return (RowSpan(runs[0].adapter, slice(0, length)),)
        if runs[-1].rows.stop != length:
            raise RuntimeError(f"a layer was given {length} of what the batch has {runs[-1].rows.stop} {axis} of")
        return runs

    def choice(self, axis: Axis, layout: SlotRanks, like: Tensor) -> RowChoice:
        """Chooses what each row takes of a layer's adapters; layers that hold the same ones share the choice."""
        key = (axis, layout, like.dtype, like.device)
        if key not in self._choices:
            stops = dict(zip(dict(layout), accumulate(rank for _, rank in layout), strict=True))
            mask = like.new_zeros(len(like), sum(rank for _, rank in layout))
            gain_index = torch.zeros(len(like), dtype=torch.int64, device=like.device)
            shares: dict[AppliedAdapter, int] = {}
            for run in self._runs[axis]:
                if run.adapter is not None and run.key in stops:
                    stop = stops[run.key]
                    mask[run.rows, stop - dict(layout)[run.key] : stop] = run.adapter.strength
                    gain_index[run.rows] = shares.setdefault(run.adapter, len(shares) + 1)
            self._choices[key] = RowChoice(mask, gain_index, tuple(shares))
        return self._choices[key]


@dataclass(frozen=True)
class SlotChange:
    """One adapter's change of one linear layer, ready for inference: what is computed once, when it is loaded."""

    lora_A: Float[Tensor, "rank in_"]
    """A has no rows where only a magnitude was trained."""
    scaled_B: Float[Tensor, "rank out"]
    """Holds (s B)^T, so that adapters can lie one after another in one matrix."""
    minus_one: Float[Tensor, " out"] | None
    """Holds the gain minus one; None for plain LoRA."""
    by_strength: GainByStrength | None = None
    """Makes the gain at another strength; None for plain LoRA."""

    @classmethod
    @torch.no_grad()
    def of(cls, layer: AdaptedLayer, dtype: torch.dtype) -> SlotChange:
        """Takes over the change that an adapted linear layer makes; its norm comes from the layer's own product."""
        (rows, columns), like = layer.matrix_shape(), layer.weight
        a, b = layer.factors() or (like.new_zeros(0, columns), like.new_zeros(rows, 0))
        full = layer.gain()
        minus_one = None if full is None else (full - 1).to(dtype)
        scaled_b = (b.to(dtype) * layer.adapter.scale).t().contiguous()
        return cls(a.to(dtype).contiguous(), scaled_b, minus_one, GainByStrength.of(layer))

    def minus_one_at(self, strength: float) -> Float[Tensor, " out"] | None:
        """Returns the gain minus one of a share of the adapter."""
        if strength == 1 or self.by_strength is None:
            return self.minus_one
        return (self.by_strength.at(strength) - 1).to(self.scaled_B.dtype)


class SlotLayer(nn.Module):
    """A layer of the base in whose place each row of a batch has the layer of its own adapter.

    An adapter is a `SlotChange` of the layer's product, or a layer of its own (an adapted embedding, a norm or a
    projector whose weights were trained). Other attributes are those of the layer inside, which stays as it is: any
    layer whose first input and whose output count rows (pictures) along their first axis.
    """

    base: Any

    def __init__(self, base: nn.Module, batch: ActiveAdapters, axis: Axis) -> None:
        super().__init__()
        self.base = base
        self.axis: Axis = axis
        self.training = base.training
        self._batch = batch
        self._changes: dict[str, SlotChange] = {}
        self._own: dict[str, nn.Module] = {}  # a plain dictionary: they are none of the base's modules
        self._forget_shares()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def put(self, key: str, adapter: SlotChange | nn.Module) -> None:
        """Takes an adapter in."""
        self._forget_shares()
        if isinstance(adapter, nn.Module):
            self._own[key] = adapter.eval()
        else:
            self._stack({**self._changes, key: adapter})

    def _stack(self, changes: Mapping[str, SlotChange]) -> None:
        """Lays the adapters into one matrix each for A and B; the adapters' own are views of them from then on."""
        ranks = [len(change.lora_A) for change in changes.values()]
        self._all_A = torch.cat([change.lora_A for change in changes.values()])
        self._all_B = torch.cat([change.scaled_B for change in changes.values()])
        views = zip(changes.items(), self._all_A.split(ranks), self._all_B.split(ranks), strict=True)
        self._changes = {key: replace(change, lora_A=own_A, scaled_B=own_B) for (key, change), own_A, own_B in views}
        self._layout = tuple(zip(changes, ranks, strict=True))

    def _forget_shares(self) -> None:
        self._gains: dict[AppliedAdapter, Tensor | None] = {}
        self._between: dict[AppliedAdapter, nn.Module] = {}
        self._table: tuple[tuple[AppliedAdapter, ...], Tensor] | None = None

    @torch.no_grad()
    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Computes the layer's output, each row's by its own adapter."""
        runs = self._batch.runs(self.axis, len(inputs[0]) if inputs else 0)
        if len(runs) == 1 and runs[0].key in self._own:
            return self._own_layer(runs[0])(*inputs, **named)
        output = self.base(*inputs, **named)
        changed = [run for run in runs if run.key in self._changes]
        if len(changed) > 1 and inputs[0].numel() // inputs[0].shape[-1] * len(self._all_A) <= ONE_PRODUCT:
            output = self._changed_in_one_product(output, inputs[0])
        else:
            for run in changed:
                output[run.rows] = self._changed(
                    output[run.rows], inputs[0][run.rows], cast(AppliedAdapter, run.adapter)
                )
        for run in runs:
            if run.key in self._own:
                output[run.rows] = self._own_layer(run)(inputs[0][run.rows], *inputs[1:], **named)
        return output

    def _changed_in_one_product(self, output: Tensor, x: Tensor) -> Tensor:
        chosen = self._batch.choice(self.axis, self._layout, x)
        each_row = (len(x), *(1,) * (x.dim() - 2), -1)
        # A row without an adapter has zeros for both, and keeps its bits.
        hidden = F.linear(x, self._all_A.to(x.dtype)).mul_(chosen.mask.view(each_row))
        minus_one = self._gains_minus_one(chosen.shares)[chosen.gain_index].view(each_row)
        low_rank = (hidden @ self._all_B.to(x.dtype)).to(output.dtype)
        changed = functional.adapted_output(output, self.base.bias, low_rank, minus_one)
        return changed.to(output.dtype)  # a quantised layer's gains may be float32

    def _changed(self, output: Tensor, x: Tensor, share: AppliedAdapter) -> Tensor:
        change, low_rank = self._changes[share.key], None
        if len(change.lora_A):
            hidden = share.strength * F.linear(x, change.lora_A.to(x.dtype))
            low_rank = (hidden @ change.scaled_B.to(x.dtype)).to(output.dtype)
        return functional.adapted_output(output, self.base.bias, low_rank, self._minus_one(share))

    def _minus_one(self, share: AppliedAdapter) -> Tensor | None:
        change = self._changes[share.key]
        if share.strength == 1:
            return change.minus_one
        return cached_value(self._gains, MAX_CACHED_GAINS, share, lambda: change.minus_one_at(share.strength))

    def _gains_minus_one(self, shares: tuple[AppliedAdapter, ...]) -> Float[Tensor, "base_and_shares out"]:
        """Stacks the base's gain minus one, which is 0, and that of each share."""
        if self._table is None or self._table[0] != shares:
            zero = self._all_B.new_zeros(self._all_B.shape[1])
            gains = [self._minus_one(share) for share in shares]
            self._table = shares, torch.stack([zero, *(zero if gain is None else gain for gain in gains)])
        return self._table[1]

    def _own_layer(self, run: RowSpan) -> nn.Module:
        share = cast(AppliedAdapter, run.adapter)
        layer = self._own[share.key]
        if share.strength == 1:
            return layer
        return cached_value(
            self._between, MAX_CACHED_LAYERS, share, lambda: layer_between(self.base, layer, share.strength)
        )


def cached_value(
    values: dict[AppliedAdapter, Value], most: int, share: AppliedAdapter, compute: Callable[[], Value]
) -> Value:
    """Returns a share's value, computed where it is missing; a full cache is emptied for a new value."""
    if share not in values:
        if len(values) >= most:
            values.clear()
        values[share] = compute()
    return values[share]
