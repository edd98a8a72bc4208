"""Layers of one shape compute their gains together: a few batched operations instead of about twenty for each layer.

A gain is due once an optimizer step, for every layer at once. One layer takes some twenty operations on small
tensors, and a model has hundreds of layers: dispatched one by one that is a twentieth of a training step of a
135M-parameter model on CPU. The first layer that finds its own gain out of date brings its family's up to date.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dora_vl.core import functional
from dora_vl.core.fast.fused import norm_kernels
from dora_vl.core.gain import SHARD_MARKS, Gain, is_plain_parameter, quick_gains

if TYPE_CHECKING:
    from dora_vl.core.linear import ProductLayer

LARGEST_BATCH_BYTES = 2**26
"""Of one batch's factors in float32; a family of wide layers is taken in several."""


class GainFamily:
    """The layers whose gains are computed in one go.

    Members are held weakly. A copy, by `copy.deepcopy` or pickle, is a family without members, which the copied
    layers join when they compute their first gain.
    """

    def __init__(self) -> None:
        self._members: weakref.WeakValueDictionary[int, ProductLayer] = weakref.WeakValueDictionary()

    def __deepcopy__(self, memo: dict[int, object]) -> GainFamily:
        return GainFamily()

    def __reduce__(self) -> tuple[type[GainFamily], tuple[()]]:
        return GainFamily, ()

    def join(self, layer: ProductLayer) -> None:
        """Makes a layer a member."""
        self._members[id(layer)] = layer

    def refresh(self, caller: ProductLayer, dtype: torch.dtype) -> bool:
        """Updates `caller` and all other layers of its shape that are out of date; False if there are none.

        Layers whose tensors are not here in whole and at rest are left out: the next shards of ZeRO-3 and FSDP may be
        on their way, and offloaded weights are elsewhere.
        """
        self.join(caller)
        if not _is_here(caller, caller.weight.device):
            return False
        due = [layer for layer in self._members.values() if layer is caller or _is_due(layer, caller)]
        if len(due) < 2:
            return False
        for batch in _batches(due):
            gains, squared = _gains(batch, dtype)
            for layer, gain, own_squared in zip(batch, gains, squared, strict=True):
                layer.keep_gain(gain or layer.careful_gain(own_squared, dtype), dtype)
        return True


def found_families(layers: Iterable[ProductLayer]) -> None:
    """Gives layers of one shape and rank one family."""
    families: defaultdict[tuple[object, ...], GainFamily] = defaultdict(GainFamily)
    for layer in layers:
        layer.family = families[layer.matrix_shape(), layer.adapter.rank]
        layer.family.join(layer)


def _is_due(layer: ProductLayer, caller: ProductLayer) -> bool:
    alike = (layer.adapter.rank, layer.scale(), layer.weight.dtype) == (
        caller.adapter.rank,
        caller.scale(),
        caller.weight.dtype,
    )
    return alike and not layer.merged and layer.gain_is_out_of_date() and _is_here(layer, caller.weight.device)


def _is_here(layer: ProductLayer, device: torch.device) -> bool:
    """Whether every tensor of the layer is a plain one on this device that nothing shards."""
    return all(
        isinstance(tensor, nn.Parameter)
        and is_plain_parameter(tensor)
        and tensor.device == device
        and SHARD_MARKS.isdisjoint(vars(tensor))
        for tensor in (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude)
    )


def _batches(layers: list[ProductLayer]) -> Iterable[list[ProductLayer]]:
    rows, columns = layers[0].matrix_shape()
    size = max(2, LARGEST_BATCH_BYTES // (4 * layers[0].adapter.rank * (rows + columns)))
    return (layers[start : start + size] for start in range(0, len(layers), size))


def _gains(layers: list[ProductLayer], dtype: torch.dtype) -> tuple[list[Gain | None], Float[Tensor, "layers out"]]:
    """The quick gain of each layer, or None, and the squared norms it comes from."""
    magnitudes = torch.stack([layer.magnitude.detach() for layer in layers if layer.magnitude is not None])
    frozen = torch.stack([layer.weight_norms_squared() for layer in layers])
    with torch.autocast(frozen.device.type, enabled=False):
        squared = _norms_squared(layers, frozen)
    return quick_gains(magnitudes, frozen, squared, _biases(layers, magnitudes), dtype), squared


def _biases(layers: list[ProductLayer], like: Float[Tensor, "layers out"]) -> Float[Tensor, "layers out"] | None:
    """The layers' biases, zero where one has none; None where none has."""
    if all(layer.bias is None for layer in layers):
        return None
    biases = torch.zeros_like(like)
    for place, layer in zip(biases, layers, strict=True):
        if layer.bias is not None:
            place.copy_(layer.bias.detach())
    return biases


def _norms_squared(layers: list[ProductLayer], frozen: Float[Tensor, "layers out"]) -> Float[Tensor, "layers out"]:
    """The squared norms of layers of one shape: those that each would compute alone, on CPU to the bit.

    B A A^T is one product for all, at rank 128 four times as fast as one for each. W A^T and A A^T are taken layer by
    layer: W would have to be copied, and how the cores divide the sums of A A^T depends on the number of layers.
    """
    weights = [layer.as_matrix(layer.weight) for layer in layers]
    factors = zip(*(layer.factors() or () for layer in layers), strict=True)
    a, b = (_stacked(one, weights[0].dtype) for one in factors)
    weight_on_A, gram = torch.empty_like(b), a.new_empty(len(a), a.shape[1], a.shape[1])
    for weight, own_a, place, gram_place in zip(weights, a, weight_on_A, gram, strict=True):
        torch.mm(weight, own_a.t(), out=place)
        torch.mm(own_a, own_a.t(), out=gram_place)
    kernels = norm_kernels(b)
    grown = functional.with_growth if kernels is None else kernels.norms_squared
    return grown(frozen, b, weight_on_A, gram, layers[0].scale())


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Float[Tensor, "layers rows columns"]:
    """Stacked and cast in one copy; at rank 128 a stack first and a cast after it took a tenth longer."""
    stack = factors[0].new_empty(len(factors), *factors[0].shape, dtype=dtype)
    for place, factor in zip(stack.unbind(), factors, strict=True):
        place.copy_(factor)
    return stack
