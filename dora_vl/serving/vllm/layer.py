"""What a linear layer of vLLM does beside its slots of A and B: each token's output times its adapter's gains.

vLLM's classes differ (column- and row-parallel, packed, fully sharded); `DoRALayer` stands in front of each alike and
asks of them what all have. `places` has looked at that before any of it is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dora_vl.core import functional
from dora_vl.core.gain import apply_gain
from dora_vl.core.quantised import columns_by_product
from dora_vl.errors import shown_names

if TYPE_CHECKING:
    Wrapper = Any
else:
    Wrapper = object


# The gains of one of vLLM's linear layers, several of the model's in one (q, k, v), whatever its weight is kept as.
#
# Where W can be read it is; packed and quantised weights cannot, and the layer's own product says what they are: of the
# rows of the identity, once, for ||W||^2, then of A's few rows for each adapter. Nothing of W's size is kept.


PROBES = 4
"""Rows that are put through the layer to see whether its product is what its weight says."""
MOST_OFF = 0.02
"""Share by which the two may differ: bfloat16 and 8-bit integers round an input by less, 8-bit floats by more."""


class Slice(NamedTuple):
    """What an adapter changes in one slice of a layer's outputs; its scale is in B."""

    lora_A: Float[Tensor, "rank in_"]
    lora_B: Float[Tensor, "out rank"]
    magnitude: Float[Tensor, " out"]


def alone(part: Tensor) -> Tensor:
    """The sum over ranks where there is one."""
    return part


@dataclass(frozen=True)
class FrozenLayer:
    """A frozen linear layer, as far as a norm needs to know it; of a sharded one, this rank's part.

    Attributes:
        name: for messages.
        product: W x of rows, without the bias.
        in_features: columns of W here.
        dtype: of the rows that `product` takes.
        weight: W where it can be read, [out, in]; None where the product alone says what it is.
        recovered: ||W_i||^2 of every row here, where `weight` is None.
        total: sums over the ranks that hold other columns of the same rows.
    """

    name: str
    product: Callable[[Tensor], Tensor]
    in_features: int
    dtype: torch.dtype
    device: torch.device
    weight: Float[Tensor, "out in_"] | None = None
    recovered: Float[Tensor, " out"] | None = None
    total: Callable[[Tensor], Tensor] = alone

    def norms_squared(self) -> Float[Tensor, " out"]:
        """||W_i||^2 of this rank's columns."""
        if self.weight is not None:
            return functional.row_norms_squared(self.weight)
        assert self.recovered is not None
        return self.recovered

    def on_rows(self, rows: Float[Tensor, "rows in_"]) -> Float[Tensor, "rows out"]:
        """W applied to rows."""
        return self.product(rows.to(self.device, self.dtype))

    def rows(self, index: Int[Tensor, " some"]) -> Float[Tensor, "some in_"]:
        """Some rows of W."""
        if self.weight is not None:
            return self.weight[index]
        blocks = columns_by_product(self.product, self.in_features, self.dtype, self.device)
        return torch.cat([columns[:, index] for _, columns in blocks]).t()


@torch.no_grad()
def frozen_layer(
    name: str,
    product: Callable[[Tensor], Tensor],
    weight: Tensor | None,
    in_features: int,
    place: tuple[torch.dtype, torch.device],
    total: Callable[[Tensor], Tensor] = alone,
) -> FrozenLayer:
    """Reads W where it is what the layer multiplies by, else recovers what a norm needs of it.

    Args:
        weight: what the layer keeps; taken as W only if it is a matrix that gives the layer's product.
        place: dtype and device of the layer's input.

    Raises:
        ValueError: the product is not that of any W: the layer rounds its input too coarsely, or saturates.
    """
    dtype, device = place
    layer = FrozenLayer(name, product, in_features, dtype, device, total=total)
    draw = torch.Generator().manual_seed(0)
    probes = torch.randn(PROBES, in_features, generator=draw).to(device, dtype)
    expected = product(probes).float()
    if weight is not None and _multiplies_by(weight, probes, expected):
        return replace(layer, weight=weight)
    squared, computed = torch.zeros_like(expected[0]), torch.zeros_like(expected)
    for start, columns in columns_by_product(product, in_features, dtype, device):
        squared += columns.float().square().sum(dim=0)
        computed += probes[:, start : start + len(columns)].float() @ columns.float()
    off = _share_off(computed, expected)
    if not off <= MOST_OFF:
        raise ValueError(
            f"DoRA: {name} multiplies by no weight that its product tells ({off:.1%} off): a layer that rounds its "
            "input coarsely, as to 8-bit floats; serve a base that is not quantised, or one whose weights alone are"
        )
    return replace(layer, recovered=squared)


def _multiplies_by(weight: Tensor, probes: Tensor, expected: Tensor) -> bool:
    """Whether what a layer keeps is W: a matrix of numbers that need no scales beside them, as 8-bit floats do."""
    if weight.shape != (expected.shape[1], probes.shape[1]) or not weight.is_floating_point():
        return False
    return (
        weight.element_size() > 1 and _share_off((probes.to(weight.dtype) @ weight.t()).float(), expected) <= MOST_OFF
    )


def _share_off(computed: Tensor, expected: Tensor) -> float:
    return float((computed - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))


@torch.no_grad()
def gains_minus_one(layer: FrozenLayer, slices: Sequence[Slice | None], sizes: Sequence[int]) -> Float[Tensor, " out"]:
    """g - 1 of each of a layer's outputs, in float32: zero where a slice has no magnitude.

    Args:
        slices: one for each of the layer's slices, in their order.
        sizes: their outputs.
    """
    result = torch.zeros(sum(sizes), device=layer.device)
    present = [item for item in slices if item is not None]
    if not present:
        return result
    frozen = layer.norms_squared()
    on_A = iter(
        layer.on_rows(torch.cat([item.lora_A for item in present])).split([len(item.lora_A) for item in present])
    )
    start = 0
    for item, size in zip(slices, sizes, strict=True):
        if item is not None:
            rows = torch.arange(start, start + size, device=layer.device)
            norms = _norms(layer, item, rows, frozen[rows], next(on_A)[:, rows])
            result[rows] = functional.gain(item.magnitude.to(norms), norms) - 1
        start += size
    return result


def _norms(layer: FrozenLayer, item: Slice, rows: Tensor, frozen: Tensor, on_A: Tensor) -> Float[Tensor, " out"]:
    """n of a slice's rows, those that cancel from the dense direction."""
    a, b = item.lora_A.to(layer.device), item.lora_B.to(layer.device)
    squared = layer.total(functional.factored_norms_squared(frozen, a, b, on_A, 1.0))
    norms, cancelled = functional.direction_norms(layer.total(frozen), squared)
    if cancelled.numel():
        dense = functional.dense_direction(layer.rows(rows[cancelled]), a, b[cancelled], 1.0)
        norms[cancelled] = functional.root(layer.total(functional.row_norms_squared(dense)))
    return norms


# The magnitudes of an adapter's file: taken out of its tensors, each held against the A and B that it belongs to.
#
# Names are those of the file, PEFT's; vLLM's own names of the layers come later.


LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.weight)?$")
EXPORT = "dora-vl export --for vllm writes one that can be served"


class UnservableAdapter(ValueError):
    """An adapter that vLLM's slots cannot hold with its magnitudes; the message says why and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(f"DoRA: {message}")


def as_factor(name: str) -> str:
    """A magnitude's name as that of the B beside it, which vLLM knows to read; other names as they are."""
    return _MAGNITUDE.sub(LORA_B, name)


def take_magnitudes(tensors: MutableMapping[str, Tensor], *, use_dora: bool) -> dict[str, Float[Tensor, " out"]]:
    """Takes an adapter's magnitudes out of its tensors, by the names of their layers in the file.

    Args:
        use_dora: what the adapter's `adapter_config.json` says.

    Raises:
        UnservableAdapter: magnitudes and factors do not belong together. Nothing was taken then.
    """
    magnitudes = {_MAGNITUDE.sub("", name): name for name in tensors if _MAGNITUDE.search(name)}
    if use_dora != bool(magnitudes):
        raise UnservableAdapter(
            f"adapter_config.json says use_dora: {use_dora}, and the adapter holds {len(magnitudes)} magnitudes; "
            "one of the two is not this adapter's"
        )
    if not magnitudes:
        return {}
    _refuse_other_kinds(tensors)
    _refuse_unpaired(tensors, magnitudes)
    _refuse_sizes(tensors, magnitudes)
    return {layer: tensors.pop(name).flatten().float() for layer, name in magnitudes.items()}


def _refuse_other_kinds(tensors: Mapping[str, Tensor]) -> None:
    embedded = [name for name in tensors if ".lora_embedding_" in name]
    if embedded:
        raise UnservableAdapter(f"{embedded[0]} is an embedding's, whose magnitude is not served; {EXPORT}")


def _refuse_unpaired(tensors: Mapping[str, Tensor], magnitudes: Mapping[str, str]) -> None:
    factors = {name.removesuffix(end) for name in tensors for end in (LORA_A, LORA_B) if name.endswith(end)}
    alone = sorted(layer for layer in magnitudes if not {layer + LORA_A, layer + LORA_B} <= tensors.keys())
    if alone:
        raise UnservableAdapter(f"{len(alone)} magnitudes without A and B: {shown_names(alone)}; {EXPORT}")
    without = sorted(factors - magnitudes.keys())
    if without:
        raise UnservableAdapter(
            f"{len(without)} layers without a magnitude: {shown_names(without)}; the file is not whole"
        )


def _refuse_sizes(tensors: Mapping[str, Tensor], magnitudes: Mapping[str, str]) -> None:
    for layer, name in magnitudes.items():
        a, b, magnitude = tensors[layer + LORA_A], tensors[layer + LORA_B], tensors[name]
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
            raise UnservableAdapter(f"{layer}: A {tuple(a.shape)} and B {tuple(b.shape)} are no linear layer's factors")
        if magnitude.numel() != len(b):
            raise UnservableAdapter(f"{layer}: {magnitude.numel()} magnitudes for {len(b)} outputs")
        if not bool(torch.isfinite(magnitude).all()):
            raise UnservableAdapter(f"{layer}: magnitudes that are not numbers")


class DoRALayer(Wrapper):
    """In front of one of vLLM's LoRA wrappers of a linear layer (vllm/lora/layers/base_linear.py).

    Attributes:
        dora_minus_one: g - 1 of what stands in each slot, behind a row of zeros for tokens of the base (slot -1).
    """

    dora_minus_one: Float[Tensor, "slots_and_base out"]
    sum_of_ranks: Callable[[Tensor], Tensor] = staticmethod(alone)
    """For wrappers of row-parallel layers, whose ranks hold columns of W."""
    shards_inputs: bool = False
    """Whether they do."""

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """vLLM's slots, and the gains beside them."""
        super().create_lora_weights(max_loras, lora_config, model_config)
        shape, dtype = (max_loras + 1, self.output_size), self.base_layer.params_dtype
        self.dora_minus_one = torch.zeros(shape, dtype=dtype, device=self.device)
        self._recovered: FrozenLayer | None = None  # what took a pass over the identity; a weight is looked at anew

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """vLLM's W x + B A x + b, then each row's gains, in place.

        vLLM gives `bias` where the output has it inside: not on later ranks of a row-parallel layer, nor where the
        model adds it itself.

        A CUDA graph reads vLLM's buffer of slots anew at each replay. Behind the step's tokens the buffer is stale, and
        rows that only pad a graph would look for a slot that is none: hence the clamp.
        """
        y = super().apply(x, bias)
        flat = y.view(-1, y.shape[-1])
        slots = self.punica_wrapper._token_lora_indices[: flat.shape[0]]
        rows = slots.add(1).clamp_(0, self.dora_minus_one.shape[0] - 1)
        apply_gain(flat, bias, self.dora_minus_one.index_select(0, rows).to(flat.dtype))
        return y

    def put_dora(self, slot: int, minus_one: Float[Tensor, " out"] | None) -> None:
        """Writes a slot's row whole, so that nothing stays of the adapter before; None is one without magnitudes."""
        row = self.dora_minus_one[slot + 1]
        row.zero_() if minus_one is None else row.copy_(minus_one)

    def dora_gains(self, name: str, weights: Any) -> Float[Tensor, " out"]:
        """g - 1 of this rank's outputs, from an adapter's weights as vLLM packs them, with their `magnitude`.

        Raises:
            ValueError: they are of another layer, or nobody can say what this one's weight is.
        """
        sizes = tuple(self.output_slices) if self.n_slices > 1 else (self.output_size,)
        slices = self._slices(name, weights)
        for item, size in zip(slices, sizes, strict=True):
            if item is not None:
                _refuse_other_sizes(name, item, self.input_size, size)
        frozen = self._recovered or self._look_at_weight(name)
        if frozen.weight is None:
            self._recovered = frozen
        return gains_minus_one(frozen, slices, sizes)

    def _slices(self, name: str, weights: Any) -> list[Slice | None]:
        """What an adapter changes in each slice, as far as this rank holds it."""
        a, b, m = (
            item if isinstance(item, list) else [item] for item in (weights.lora_a, weights.lora_b, weights.magnitude)
        )
        if len(m) != self.n_slices:
            raise UnservableAdapter(f"{name} is {self.n_slices} layers in one, and the adapter has {len(m)}")
        m = [None if item is None else item.view(-1, 1) for item in m]
        if self.tp_size > 1 and self.shards_inputs:
            a = [self.slice_lora_a(a[0])]
        elif self.tp_size > 1:
            b, m = self._own_rows(b), self._own_rows(m)
        return [_slice(*parts) for parts in zip(a, b, m, strict=True)]

    def _own_rows(self, parts: Sequence[Tensor | None]) -> list[Tensor | None]:
        """This rank's outputs of a column-parallel layer, as vLLM cuts B."""
        if self.n_slices > 1:
            return self.slice_lora_b(parts)
        return [self.slice_lora_b(parts[0])]

    def _look_at_weight(self, name: str) -> FrozenLayer:
        layer = self.base_layer
        place = layer.params_dtype, self.device

        def product(rows: Tensor) -> Tensor:
            return layer.quant_method.apply(layer, rows, None)

        weight = getattr(layer, "weight", None)
        total = self.sum_of_ranks if self.tp_size > 1 else alone  # a layer may be whole on each of several ranks
        return frozen_layer(name, product, weight, self.input_size, place, total)


def _slice(lora_A: Tensor | None, lora_B: Tensor | None, magnitude: Tensor | None) -> Slice | None:
    """None for a part that has no adapter; all of vLLM's tensors of it are None then."""
    if lora_A is None or lora_B is None or magnitude is None:
        return None
    return Slice(lora_A, lora_B, magnitude.view(-1))


def _refuse_other_sizes(name: str, part: Slice, inputs: int, outputs: int) -> None:
    sizes = tuple(part.lora_B.shape[:1]) + tuple(part.lora_A.shape[1:])
    if sizes != (outputs, inputs) or part.magnitude.numel() != outputs:
        raise UnservableAdapter(
            f"{name} is {outputs} x {inputs} here, and the adapter's layer {sizes[0]} x {sizes[1]}; it was trained on "
            "another base"
        )
