"""Adapted layers as `torch.compile` should see them: plain operations and one opaque one for the norm.

The eager path keeps norms between calls and draws dropout by position, neither of which a graph can hold. Here the
compiler fuses and chooses what to keep, and the norm is computed in every pass, so it is never stale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.fast.fused import norm_kernels

if TYPE_CHECKING:
    from dora_vl.core.layer import AdaptedLayer
    from dora_vl.core.linear import ProductLayer


def compiled_linear(layer: ProductLayer, input: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
    """y = g (W x + s B A x) + b without Python state, so that no graph breaks."""
    factors, weight, bias = layer.factors(), layer.as_matrix(layer.weight), layer.bias
    dropping = layer.training and factors is not None
    dropped = F.dropout(input, layer.adapter.dropout) if dropping else input
    product = F.linear(input, weight)
    output = product if bias is None else product + bias.to(product.dtype)
    low_rank = None
    if factors is not None:
        a, b = (factor.to(product.dtype) for factor in factors)
        low_rank = layer.scale() * F.linear(F.linear(dropped.to(product.dtype), a), b)
    whole_change = dropping and layer.adapter.dropout_mode == "whole_change"
    frozen = F.linear(dropped, weight) if whole_change else product
    return functional.changed_output(output, frozen, low_rank, compiled_gain(layer))


def compiled_gain(layer: AdaptedLayer) -> Float[Tensor, " out"] | None:
    """g of any adapted layer, its norm computed in the graph; None for LoRA."""
    magnitude, factors = layer.magnitude, layer.factors()
    if magnitude is None:
        return None
    kept = layer._norms_squared
    # Not what eager passes keep, since no graph sees that W was edited; a quantised weight stays as it is.
    squared = layer.frozen_norms_squared() if layer.weight_is_readable or kept is None else kept[0]
    if factors is None:
        return functional.gain(magnitude, functional.root(squared))
    with torch.autocast(layer.weight.device.type, enabled=False):
        return functional.gain(magnitude, _norms(layer, squared, *factors))


def _norms(layer: AdaptedLayer, squared: Tensor, a: Tensor, b: Tensor) -> Float[Tensor, " out"]:
    """n, with its gradient where `detach_norm` is off; an opaque layer's rows that cancel are not taken dense here."""

    def live() -> Tensor:
        on_A = layer.frozen_on_rows(a)
        return functional.root(functional.factored_norms_squared(squared, a, b, on_A, layer.scale()))

    if not layer.weight_is_readable:
        norms = live()
        return norms.detach() if layer.adapter.detach_norm else norms
    weight = layer.as_matrix(layer.weight).detach()
    norms = safe_norms(weight, squared, a.detach(), b.detach(), layer.scale())
    if layer.adapter.detach_norm:
        return norms
    differentiable = live()
    return norms + (differentiable - differentiable.detach())


@torch.library.custom_op(
    "dora_vl::safe_norms",
    mutates_args=(),
    schema="(Tensor weight, Tensor squared, Tensor a, Tensor b, float scale) -> Tensor",
)
def safe_norms(weight: Tensor, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """n of each row, rows that cancel taken dense; their number is known only at run time, which no graph can hold."""
    return trusted_norms(weight, squared, a, b, scale)


def trusted_norms(weight: Tensor, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`safe_norms` without the door of a graph around it.

    Asking for the rows that cancel is free on CPU. On CUDA it would stop the host in every layer and rule CUDA graphs
    out, so kernels decide there for themselves; only where there are none (float64, no Triton) is it asked for.
    """
    kernels = norm_kernels(weight)
    if kernels is not None:
        return kernels.norms(weight, squared, a, b, scale)
    on_A = F.linear(a.to(weight.dtype), weight)
    norms, cancelled = functional.direction_norms(
        squared, functional.factored_norms_squared(squared, a, b, on_A, scale)
    )
    if cancelled.numel():
        dense = functional.dense_direction(weight[cancelled], a, b[cancelled], scale)
        norms = norms.index_copy(0, cancelled, functional.root(dense.square().sum(dim=1)))
    return norms.clone()


@safe_norms.register_fake
def _(weight: Tensor, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.empty_like(squared)
