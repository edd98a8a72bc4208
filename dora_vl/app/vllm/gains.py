"""The gains of one of vLLM's linear layers, several of the model's in one (q, k, v), whatever its weight is kept as.

Where W can be read it is; packed and quantised weights cannot, and the layer's own product says what they are: of the
rows of the identity, once, for ||W||^2, then of A's few rows for each adapter. Nothing of W's size is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dora_vl.core import functional
from dora_vl.core.opaque import columns_by_product

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
    squared, found = torch.zeros_like(expected[0]), torch.zeros_like(expected)
    for start, columns in columns_by_product(product, in_features, dtype, device):
        squared += columns.float().square().sum(dim=0)
        found += probes[:, start : start + len(columns)].float() @ columns.float()
    off = _share_off(found, expected)
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


def _share_off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))


@torch.no_grad()
def gains_minus_one(layer: FrozenLayer, slices: Sequence[Slice | None], sizes: Sequence[int]) -> Float[Tensor, " out"]:
    """g - 1 of each of a layer's outputs, in float32: zero where a slice has no magnitude.

    Args:
        slices: one for each of the layer's slices, in their order.
        sizes: their outputs.
    """
    result = torch.zeros(sum(sizes), device=layer.device)
    present = [one for one in slices if one is not None]
    if not present:
        return result
    frozen = layer.norms_squared()
    on_A = iter(layer.on_rows(torch.cat([one.lora_A for one in present])).split([len(one.lora_A) for one in present]))
    start = 0
    for one, size in zip(slices, sizes, strict=True):
        if one is not None:
            rows = torch.arange(start, start + size, device=layer.device)
            norms = _norms(layer, one, rows, frozen[rows], next(on_A)[:, rows])
            result[rows] = functional.gain(one.magnitude.to(norms), norms) - 1
        start += size
    return result


def _norms(layer: FrozenLayer, one: Slice, rows: Tensor, frozen: Tensor, on_A: Tensor) -> Float[Tensor, " out"]:
    """n of a slice's rows, those that cancel from the dense direction."""
    a, b = one.lora_A.to(layer.device), one.lora_B.to(layer.device)
    squared = layer.total(functional.factored_norms_squared(frozen, a, b, on_A, 1.0))
    norms, cancelled = functional.direction_norms(layer.total(frozen), squared)
    if cancelled.numel():
        dense = functional.dense_direction(layer.rows(rows[cancelled]), a, b[cancelled], 1.0)
        norms[cancelled] = functional.root(layer.total(functional.row_norms_squared(dense)))
    return norms
