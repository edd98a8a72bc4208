"""Applies several unmerged adapters in one layer: each sequence of a batch uses its own, or none. For inference only.

    y_r = g_r (W x_r + t_r s_r B_r A_r x_r) + b

t_r is the strength at which the sequence has its adapter, 1 unless it asks for another (`strength.py`), and g_r that
strength's gain. One frozen product serves all sequences. A sequence without an adapter, or at strength 0, is bitwise
unchanged: only zeros are added to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.gain import gain_of
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.strength import AppliedAdapter, GainByStrength, layer_between
from dora_vl.shapes import Float, Int

ONE_PRODUCT = 2**15
"""Up to this many numbers of A x, over all adapters of a layer, one masked product computes them, since the calls are
what a decoded token costs. Above it, as for a prompt, arithmetic costs more, and adapters are computed one by one."""
MAX_CACHED_GAINS, MAX_CACHED_LAYERS = 16, 4
"""A layer keeps at most this many gains, and layers of an adapter's own, for strengths other than 1."""
Axis = Literal["sequences", "pictures"]
"""The first axis of a layer's input counts sequences of the batch, or the pictures of all sequences."""
Slot = str | AppliedAdapter | None
"""Says what a sequence has: an adapter by its key, one at some strength, or the base (None)."""
SlotRanks = tuple[tuple[str, int], ...]
"""Lists the adapters that a layer holds, in the order of its matrices, each with its rank."""
Value = TypeVar("Value")


class Span(NamedTuple):
    """Consecutive sequences or pictures with the same adapter at the same strength; None is the base."""

    adapter: AppliedAdapter | None
    places: slice

    @property
    def key(self) -> str | None:
        """Names the adapter."""
        return None if self.adapter is None else self.adapter.key


class Choice(NamedTuple):
    """Says which of a layer's adapters each sequence of a batch takes."""

    mask: Float[Tensor, "sequences ranks"]
    """Holds the strength, mostly 1, at the ranks of the sequence's own adapter."""
    gain_index: Int[Tensor, " sequences"]
    """The sequence's gain, as its number from 1 among those of `applied_adapters`; 0 is the base's."""
    applied_adapters: tuple[AppliedAdapter, ...]


def spans_of(slots: Sequence[Slot]) -> tuple[Span, ...]:
    """Groups consecutive slots with equal adapter and strength, 0 as the base; sorted ones make the fewest groups."""
    spans, start = [], 0
    applied = (AppliedAdapter(slot) if isinstance(slot, str) else slot for slot in slots)
    for adapter, group in groupby(None if each is None or each.strength == 0 else each for each in applied):
        stop = start + sum(1 for _ in group)
        spans.append(Span(adapter, slice(start, stop)))
        start = stop
    return tuple(spans)


@dataclass
class ActiveAdapters:
    """Says which adapter each sequence and each picture of the current batch has, for all of a model's `SlotLayer`s."""

    _spans: dict[Axis, tuple[Span, ...]] = field(default_factory=dict)
    _choices: dict[tuple[object, ...], Choice] = field(default_factory=dict)

    @contextlib.contextmanager
    def holding(self, sequences: Sequence[Slot], pictures: Sequence[Slot] = (None,)) -> Iterator[None]:
        """Sets, inside the block, which adapter at which strength each sequence of the model's batch has.

        `pictures` does the same for pictures, in the sequences' order; a single entry holds for all of them.
        """
        self._spans, self._choices = {"sequences": spans_of(sequences), "pictures": spans_of(pictures)}, {}
        try:
            yield
        finally:
            self._spans, self._choices = {}, {}

    def spans(self, axis: Axis, length: int) -> tuple[Span, ...]:
        """Returns the spans of an input whose first axis has this length; refuses a length other than the batch's."""
        spans = self._spans.get(axis, (Span(None, slice(0, length)),))
        if len(spans) == 1 and axis == "pictures":
            return (Span(spans[0].adapter, slice(0, length)),)
        if spans[-1].places.stop != length:
            raise RuntimeError(f"a layer was given {length} of what the batch has {spans[-1].places.stop} {axis} of")
        return spans

    def choice(self, axis: Axis, layout: SlotRanks, like: Tensor) -> Choice:
        """Chooses what each sequence takes of a layer's adapters; layers that hold the same ones share the choice."""
        key = (axis, layout, like.dtype, like.device)
        if key not in self._choices:
            stops = dict(zip(dict(layout), accumulate(rank for _, rank in layout), strict=True))
            mask = like.new_zeros(len(like), sum(rank for _, rank in layout))
            gain_index = torch.zeros(len(like), dtype=torch.int64, device=like.device)
            applied_adapters: dict[AppliedAdapter, int] = {}
            for span in self._spans[axis]:
                if span.adapter is not None and span.key in stops:
                    stop = stops[span.key]
                    mask[span.places, stop - dict(layout)[span.key] : stop] = span.adapter.strength
                    gain_index[span.places] = applied_adapters.setdefault(span.adapter, len(applied_adapters) + 1)
            self._choices[key] = Choice(mask, gain_index, tuple(applied_adapters))
        return self._choices[key]


@dataclass(frozen=True)
class SlotChange:
    """One adapter's change of one linear layer, ready for inference: what is computed once, when it is loaded."""

    lora_A: Float[Tensor, "rank in_"]
    """A has no rank where only a magnitude was trained."""
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
        (outputs, inputs), like = layer.matrix_shape(), layer.weight
        a, b = layer.factors() or (like.new_zeros(0, inputs), like.new_zeros(outputs, 0))
        full = gain_of(layer)
        minus_one = None if full is None else (full - 1).to(dtype)
        scaled_b = (b.to(dtype) * layer.adapter.scale).t().contiguous()
        return cls(a.to(dtype).contiguous(), scaled_b, minus_one, GainByStrength.of(layer))

    def minus_one_at(self, strength: float) -> Float[Tensor, " out"] | None:
        """Returns the gain minus one at this strength."""
        if strength == 1 or self.by_strength is None:
            return self.minus_one
        return (self.by_strength.at(strength) - 1).to(self.scaled_B.dtype)


class SlotLayer(nn.Module):
    """Replaces a layer of the base: each sequence of a batch goes through the layer of its own adapter.

    An adapter is a `SlotChange` of the layer's product, or a layer of its own (an adapted embedding, a norm or a
    projector whose weights were trained). Other attributes are those of the layer inside, which stays as it is: any
    layer whose first input and whose output count sequences (pictures) along their first axis.
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
        self._forget_strengths()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def put(self, key: str, adapter: SlotChange | nn.Module) -> None:
        """Takes an adapter in."""
        self._forget_strengths()
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

    def _forget_strengths(self) -> None:
        self._gains: dict[AppliedAdapter, Tensor | None] = {}
        self._between: dict[AppliedAdapter, nn.Module] = {}
        self._table: tuple[tuple[AppliedAdapter, ...], Tensor] | None = None

    @torch.no_grad()
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Computes the layer's output, each sequence's by its own adapter."""
        spans = self._batch.spans(self.axis, len(inputs[0]) if inputs else 0)
        if len(spans) == 1 and spans[0].key in self._own:
            return self._own_layer(spans[0])(*inputs, **kwargs)
        output = self.base(*inputs, **kwargs)
        changed = [span for span in spans if span.key in self._changes]
        if len(changed) > 1 and inputs[0].numel() // inputs[0].shape[-1] * len(self._all_A) <= ONE_PRODUCT:
            output = self._changed_in_one_product(output, inputs[0])
        else:
            for span in changed:
                output[span.places] = self._changed(
                    output[span.places], inputs[0][span.places], cast(AppliedAdapter, span.adapter)
                )
        for span in spans:
            if span.key in self._own:
                output[span.places] = self._own_layer(span)(inputs[0][span.places], *inputs[1:], **kwargs)
        return output

    def _changed_in_one_product(self, output: Tensor, x: Tensor) -> Tensor:
        chosen = self._batch.choice(self.axis, self._layout, x)
        of_each = (len(x), *(1,) * (x.dim() - 2), -1)
        # A sequence without an adapter has zeros for both, and is bitwise unchanged.
        hidden = F.linear(x, self._all_A.to(x.dtype)).mul_(chosen.mask.view(of_each))
        minus_one = self._gains_minus_one(chosen.applied_adapters)[chosen.gain_index].view(of_each)
        low_rank = (hidden @ self._all_B.to(x.dtype)).to(output.dtype)
        changed = functional.adapted_output(output, self.base.bias, low_rank, minus_one)
        return changed.to(output.dtype)  # a quantised layer's gains may be float32

    def _changed(self, output: Tensor, x: Tensor, applied: AppliedAdapter) -> Tensor:
        change, low_rank = self._changes[applied.key], None
        if len(change.lora_A):
            hidden = applied.strength * F.linear(x, change.lora_A.to(x.dtype))
            low_rank = (hidden @ change.scaled_B.to(x.dtype)).to(output.dtype)
        return functional.adapted_output(output, self.base.bias, low_rank, self._minus_one(applied))

    def _minus_one(self, applied: AppliedAdapter) -> Tensor | None:
        change = self._changes[applied.key]
        if applied.strength == 1:
            return change.minus_one
        return cached_value(self._gains, MAX_CACHED_GAINS, applied, lambda: change.minus_one_at(applied.strength))

    def _gains_minus_one(self, applied_adapters: tuple[AppliedAdapter, ...]) -> Float[Tensor, "base_and_adapters out"]:
        """Stacks the base's gain minus one, which is 0, and that of each adapter and strength."""
        if self._table is None or self._table[0] != applied_adapters:
            zero = self._all_B.new_zeros(self._all_B.shape[1])
            gains = [self._minus_one(applied) for applied in applied_adapters]
            self._table = applied_adapters, torch.stack([zero, *(zero if gain is None else gain for gain in gains)])
        return self._table[1]

    def _own_layer(self, span: Span) -> nn.Module:
        applied = cast(AppliedAdapter, span.adapter)
        layer = self._own[applied.key]
        if applied.strength == 1:
            return layer
        return cached_value(
            self._between, MAX_CACHED_LAYERS, applied, lambda: layer_between(self.base, layer, applied.strength)
        )


def cached_value(
    values: dict[AppliedAdapter, Value], max_size: int, applied: AppliedAdapter, compute: Callable[[], Value]
) -> Value:
    """Returns the value cached for `applied`, or computes it; a full cache is emptied first."""
    if applied not in values:
        if len(values) >= max_size:
            values.clear()
        values[applied] = compute()
    return values[applied]
