"""The norm n and the gain g of an adapted layer: in eager passes, with a gradient, and in a graph."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from dora_vl.core import functional
from dora_vl.core.layer import FROZEN, AdaptedLayer, is_traced
from dora_vl.core.step import Gain
from dora_vl.shapes import Float, Int


def kept_norms(layer: AdaptedLayer) -> Float[Tensor, "*experts out"]:
    """Returns n without a gradient, computed once per optimizer step."""
    return layer.cached("norms", layer.compute_norms)


def norms_with_grad(layer: AdaptedLayer) -> Float[Tensor, "*experts out"]:
    """Computes n with its gradient in A and B; rows that cancel are computed from the dense V."""
    frozen, factors = layer.weight_norms_squared(), layer.factors()
    if factors is None:
        return functional.safe_sqrt(frozen)
    with functional.without_autocast(layer.weight.device):
        squared = factored_norms_squared(layer, frozen)
        norms, cancelled = functional.direction_norms(frozen.flatten(), squared.flatten())
        if cancelled.numel():
            dense = _dense_rows(layer, cancelled, *factors)
            norms = norms.index_copy(0, cancelled, functional.safe_sqrt(dense.square().sum(dim=1)))
    return norms.view_as(frozen)


def factored_norms_squared(layer: AdaptedLayer, frozen: Float[Tensor, "*experts out"]) -> Float[Tensor, "*experts out"]:
    """Computes n^2 from ||W||^2 and the factors, with its gradient; exact except for rows that cancel."""
    a, b = cast("tuple[Tensor, Tensor]", layer.factors())
    return functional.factored_norms_squared(frozen, a, b, layer.frozen_product(a), layer.adapter.scale)


def _dense_rows(layer: AdaptedLayer, index: Int[Tensor, " rows"], a: Tensor, b: Tensor) -> Float[Tensor, "rows in_"]:
    """Computes the rows of V at these indices, counted over all experts."""
    weight, scale = layer.frozen_matrix(), layer.adapter.scale
    if not layer.experts:
        return functional.dense_direction(weight[index], a, b[index], scale)
    size = weight.shape[1]
    parts = [(expert, index[index // size == expert] % size) for expert in (index // size).unique().tolist()]
    return torch.cat([functional.dense_direction(weight[e, rows], a[e], b[e, rows], scale) for e, rows in parts])


def gain_of(layer: AdaptedLayer) -> Float[Tensor, "*experts out"] | None:
    """Computes g with its gradient in m (and through the norm, unless `detach_norm`); None for LoRA."""
    if layer.magnitude is None:
        return None
    if is_traced():
        norms = _traced_norms(layer)
    else:
        norms = kept_norms(layer) if layer.adapter.detach_norm else norms_with_grad(layer)
    return functional.gain(layer.magnitude, norms)


def current_gain(layer: AdaptedLayer, dtype: torch.dtype) -> Gain:
    """Returns the gain without a gradient for activations of a dtype, computed once per optimizer step."""

    def compute() -> Gain:
        numbers = math.prod(layer.matrix_shape())
        return functional.gains(cast(Tensor, layer.magnitude), layer.compute_norms(), dtype, numbers)

    return layer.cached("gain", compute, dtype)


def operands(layer: AdaptedLayer, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """Returns A and B, and g - 1, with their gradients, in the activations' dtype."""
    factors, gain = layer.factors(), gain_of(layer)
    factors = None if factors is None else (factors[0].to(dtype), factors[1].to(dtype))
    return factors, None if gain is None else (gain - 1).to(dtype)


def operands_without_graph(layer: AdaptedLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Gain | None]:
    """Returns A, B and the gain for activations of a dtype; keeps them in eval, so that decoding casts nothing."""

    def compute() -> tuple[Tensor, Tensor, Gain | None]:
        a, b = cast("tuple[Tensor, Tensor]", layer.factors())
        return a.to(dtype), b.to(dtype), None if layer.magnitude is None else current_gain(layer, dtype)

    return compute() if layer.training else layer.cached("operands", compute, dtype)


def _traced_norms(layer: AdaptedLayer) -> Float[Tensor, "*experts out"]:
    """Computes n by plain operations and an opaque one, in every pass of a graph, so that it is never stale.

    Rows that cancel of a layer whose weight cannot be read are not taken dense here.
    """
    factors, detached = layer.factors(), layer.adapter.detach_norm
    # Not what eager passes keep, since no graph sees that W was edited; a quantised weight stays as it is.
    recompute = layer.weight_is_readable or FROZEN not in layer.kept
    squared = layer.frozen_norms_squared() if recompute else layer.kept[FROZEN][0]
    if factors is None:
        return functional.safe_sqrt(squared)
    with functional.without_autocast(layer.weight.device):
        live = (
            None
            if layer.weight_is_readable and detached
            else functional.safe_sqrt(factored_norms_squared(layer, squared))
        )
        if not layer.weight_is_readable and live is not None:
            return live.detach() if detached else live
        weight, (a, b) = layer.as_matrix(layer.weight).detach(), factors
        norms = functional.norms_in_graph(weight, squared, a.detach(), b.detach(), layer.adapter.scale)
        return norms if live is None else norms + (live - live.detach())
