"""What a linear layer of vLLM does beside its slots of A and B: each token's output times its adapter's gains.

vLLM's classes differ (column- and row-parallel, packed, fully sharded); `DoRALayer` stands in front of each alike and
asks of them what all have in the versions that `plugin` names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dora_vl.core import functional
from dora_vl.core.quantised import columns_by_product
from dora_vl.errors import short_names
from dora_vl.shapes import Float, Int

if TYPE_CHECKING:
    Wrapper = Any
else:
    Wrapper = object

PROBES = 4
"""This many rows are put through the layer to see whether its product is what its weight says."""
MOST_OFF = 0.02
"""The two may differ by this share: bfloat16 and 8-bit integers round an input by less, 8-bit floats by more."""


class Slice(NamedTuple):
    """Holds what an adapter changes in one slice of a layer's outputs; its scale is in B."""

    lora_A: Float[Tensor, "rank in_"]
    lora_B: Float[Tensor, "out rank"]
    magnitude: Float[Tensor, " out"]


def alone(part: Tensor) -> Tensor:
    """Returns the sum over ranks where there is one."""
    return part


@dataclass(frozen=True)
class FrozenLayer:
    """A frozen linear layer, as far as a norm needs to know it; of a sharded one, this rank's part.

    Attributes:
        product: W x of rows, without the bias.
        norms_squared: ||W_i||^2 of every row, over this rank's columns.
        weight: W where it can be read, [out, in]; None where the product alone says what it is.
        total: sums over the ranks that hold other columns of the same rows.
    """

    product: Callable[[Tensor], Tensor]
    in_features: int
    dtype: torch.dtype
    device: torch.device
    total: Callable[[Tensor], Tensor]
    norms_squared: Float[Tensor, " out"]
    weight: Float[Tensor, "out in_"] | None = None

    def rows(self, index: Int[Tensor, " some"]) -> Float[Tensor, "some in_"]:
        """Returns some rows of W."""
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
    dtype: torch.dtype,
    device: torch.device,
    total: Callable[[Tensor], Tensor] = alone,
) -> FrozenLayer:
    """Reads W where it is what the layer multiplies by, else recovers what a norm needs of it.

    Packed and quantised weights cannot be read; the layer's own product says what they are: of the rows of the
    identity, once, for ||W||^2, then of A's few rows for each adapter. Nothing of W's size is kept.

    Args:
        weight: what the layer keeps; taken as W only if it is a matrix that gives the layer's product.
    """
    layer = partial(FrozenLayer, product, in_features, dtype, device, total)
    probes = torch.randn(PROBES, in_features, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    expected = product(probes).float()

    def off(computed: Tensor) -> float:
        return float((computed - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))

    if (
        weight is not None
        and weight.shape == (expected.shape[1], in_features)
        and weight.is_floating_point()
        and weight.element_size() > 1  # 8-bit floats need scales beside them
        and off((probes.to(weight.dtype) @ weight.t()).float()) <= MOST_OFF
    ):
        return layer(functional.row_norms_squared(weight), weight)
    squared, computed = torch.zeros_like(expected[0]), torch.zeros_like(expected)
    for start, columns in columns_by_product(product, in_features, dtype, device):
        squared += columns.float().square().sum(dim=0)
        computed += probes[:, start : start + len(columns)].float() @ columns.float()
    if not off(computed) <= MOST_OFF:
        raise ValueError(
            f"DoRA: {name} multiplies by no weight that its product tells ({off(computed):.1%} off): a layer that "
            "rounds its input coarsely, as to 8-bit floats; serve a base that is not quantised, or one whose weights "
            "alone are"
        )
    return layer(squared)


@torch.no_grad()
def gains_minus_one(layer: FrozenLayer, slices: Sequence[Slice | None], sizes: Sequence[int]) -> Float[Tensor, " out"]:
    """Computes g - 1 of each of a layer's outputs, slice by slice, in float32: zero where one has no magnitude."""
    result = torch.zeros(sum(sizes), device=layer.device)
    present = [part for part in slices if part is not None]
    if not present:
        return result
    on_A = layer.product(torch.cat([part.lora_A for part in present]).to(layer.device, layer.dtype))
    products = iter(on_A.split([len(part.lora_A) for part in present]))
    for part, rows in zip(slices, torch.arange(len(result), device=layer.device).split(list(sizes)), strict=True):
        if part is None:
            continue
        a, b, frozen = part.lora_A.to(layer.device), part.lora_B.to(layer.device), layer.norms_squared[rows]
        squared = layer.total(functional.factored_norms_squared(frozen, a, b, next(products)[:, rows].t(), 1.0))
        norms, cancelled = functional.direction_norms(layer.total(frozen), squared)
        if cancelled.numel():  # those rows from the dense direction
            dense = functional.dense_direction(layer.rows(rows[cancelled]), a, b[cancelled], 1.0)
            norms[cancelled] = functional.safe_sqrt(layer.total(functional.row_norms_squared(dense)))
        result[rows] = functional.gain(part.magnitude.to(norms), norms) - 1
    return result


LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.weight)?$")
EXPORT = "dora-vl export --for vllm writes one that can be served"


class UnservableAdapter(ValueError):
    """An adapter that vLLM's slots cannot hold with its magnitudes; the message says why and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(f"DoRA: {message}")


def as_factor(name: str) -> str:
    """Returns a magnitude's name as that of the B beside it, which vLLM knows to read; other names as they are."""
    return _MAGNITUDE.sub(LORA_B, name)


def take_magnitudes(tensors: MutableMapping[str, Tensor], *, use_dora: bool) -> dict[str, Float[Tensor, " out"]]:
    """Takes an adapter's magnitudes out of its tensors, by the names of their layers in the file, which are PEFT's.

    Refuses a file that is not whole, or not what `adapter_config.json` says of `use_dora`.
    """
    magnitudes = {_MAGNITUDE.sub("", name): name for name in tensors if _MAGNITUDE.search(name)}
    if use_dora != bool(magnitudes):
        raise UnservableAdapter(
            f"adapter_config.json says use_dora: {use_dora}, and the adapter holds {len(magnitudes)} magnitudes; "
            "one of the two is not this adapter's"
        )
    if not magnitudes:
        return {}
    if embedded := [name for name in tensors if ".lora_embedding_" in name]:
        raise UnservableAdapter(f"{embedded[0]} is an embedding's, whose magnitude is not served; {EXPORT}")
    factors = {name.removesuffix(end) for name in tensors for end in (LORA_A, LORA_B) if name.endswith(end)}
    if unpaired := sorted(layer for layer in magnitudes if not {layer + LORA_A, layer + LORA_B} <= tensors.keys()):
        raise UnservableAdapter(f"{len(unpaired)} magnitudes without A and B: {short_names(unpaired)}; {EXPORT}")
    if without := sorted(factors - magnitudes.keys()):
        raise UnservableAdapter(
            f"{len(without)} layers without a magnitude: {short_names(without)}; the file is not whole"
        )
    for layer, name in magnitudes.items():
        a, b, magnitude = tensors[layer + LORA_A], tensors[layer + LORA_B], tensors[name]
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
            raise UnservableAdapter(
                f"{layer}: A {tuple(a.shape)} and B {tuple(b.shape)} are not a linear layer's factors"
            )
        if magnitude.numel() != len(b):
            raise UnservableAdapter(f"{layer}: {magnitude.numel()} magnitudes for {len(b)} outputs")
        if not bool(torch.isfinite(magnitude).all()):
            raise UnservableAdapter(f"{layer}: magnitudes that are not numbers")
    return {layer: tensors.pop(name).flatten().float() for layer, name in magnitudes.items()}


class DoRALayer(Wrapper):
    """Comes before one of vLLM's LoRA wrappers of a linear layer (vllm/lora/layers/base_linear.py)."""

    dora_minus_one: Float[Tensor, "slots_and_base out"]
    """Holds g - 1 of what is in each slot, after a row of zeros for tokens of the base (slot -1)."""
    sum_of_ranks: Callable[[Tensor], Tensor] = staticmethod(alone)
    shards_inputs: bool = False
    """Tells whether ranks hold columns of W, as in row-parallel layers; `sum_of_ranks` is for those."""

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Creates vLLM's slots, and the gains beside them."""
        super().create_lora_weights(max_loras, lora_config, model_config)
        shape, dtype = (max_loras + 1, self.output_size), self.base_layer.params_dtype
        self.dora_minus_one = torch.zeros(shape, dtype=dtype, device=self.device)
        self._recovered: FrozenLayer | None = None  # kept: it took a pass over the identity

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Computes vLLM's W x + B A x + b, then applies each row's gains.

        vLLM gives `bias` where the output has it inside: not on later ranks of a row-parallel layer, nor where the
        model adds it itself.

        A CUDA graph reads vLLM's buffer of slots anew at each replay. Behind the step's tokens the buffer is stale, and
        rows that only pad a graph would look for a slot that is none: hence the clamp.
        """
        y = super().apply(x, bias)
        flat = y.view(-1, y.shape[-1])
        slots = self.punica_wrapper._token_lora_indices[: flat.shape[0]]
        rows = slots.add(1).clamp_(0, self.dora_minus_one.shape[0] - 1)
        minus_one = self.dora_minus_one.index_select(0, rows).to(flat.dtype)
        return functional.adapted_output(flat, bias, None, minus_one).view(y.shape)

    def put_dora(self, slot: int, minus_one: Float[Tensor, " out"] | None) -> None:
        """Writes a slot's row whole, so that nothing stays of the last adapter; None is one without magnitudes."""
        row = self.dora_minus_one[slot + 1]
        row.zero_() if minus_one is None else row.copy_(minus_one)

    def dora_gains(self, name: str, weights: Any) -> Float[Tensor, " out"]:
        """Computes g - 1 of this rank's outputs, from weights as vLLM packs them, with their `magnitude`."""
        sizes = tuple(self.output_slices) if self.n_slices > 1 else (self.output_size,)
        slices = self._slices(name, weights)
        for part, size in zip(slices, sizes, strict=True):
            if part is None:
                continue
            outputs, inputs = len(part.lora_B), part.lora_A.shape[1]
            if (outputs, inputs) != (size, self.input_size) or part.magnitude.numel() != size:
                raise UnservableAdapter(
                    f"{name} is {size} x {self.input_size} here, and the adapter's layer {outputs} x {inputs}; it was "
                    "trained on another base"
                )
        frozen = self._recovered or self._look_at_weight(name)
        if frozen.weight is None:
            self._recovered = frozen
        return gains_minus_one(frozen, slices, sizes)

    def _slices(self, name: str, weights: Any) -> list[Slice | None]:
        """Returns what an adapter changes in each slice, as far as this rank holds it; None for one without adapter."""
        a, b, m = (
            part if isinstance(part, list) else [part] for part in (weights.lora_a, weights.lora_b, weights.magnitude)
        )
        if len(m) != self.n_slices:
            raise UnservableAdapter(f"{name} is {self.n_slices} layers in one, and the adapter has {len(m)}")
        m = [None if part is None else part.view(-1, 1) for part in m]
        if self.tp_size > 1 and self.shards_inputs:
            a = [self.slice_lora_a(a[0])]
        elif self.tp_size > 1:  # of a column-parallel layer this rank's outputs, as vLLM cuts B
            b, m = (
                self.slice_lora_b(parts) if self.n_slices > 1 else [self.slice_lora_b(parts[0])] for parts in (b, m)
            )
        return [
            None if magnitude is None else Slice(lora_A, lora_B, magnitude.view(-1))
            for lora_A, lora_B, magnitude in zip(a, b, m, strict=True)
        ]

    def _look_at_weight(self, name: str) -> FrozenLayer:
        layer = self.base_layer

        def product(rows: Tensor) -> Tensor:
            return layer.quant_method.apply(layer, rows, None)

        weight = getattr(layer, "weight", None)
        total = self.sum_of_ranks if self.tp_size > 1 else alone  # a layer may be whole on each of several ranks
        return frozen_layer(name, product, weight, self.input_size, layer.params_dtype, self.device, total)
