"""The adapted linear layer as `torch.compile` should see it: plain operations and one opaque one for the norm.

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

if TYPE_CHECKING:
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
    return functional.changed_output(output, frozen, low_rank, _gain(layer, factors))


def _gain(layer: ProductLayer, factors: tuple[Tensor, Tensor] | None) -> Tensor | None:
    magnitude = layer.magnitude
    if magnitude is None:
        return None
    weight, squared = layer.as_matrix(layer.weight).detach(), layer._norms_squared
    if squared is None:
        squared = functional.row_norms_squared(weight)
    if factors is None:
        return functional.gain(magnitude, functional.root(squared))
    with torch.autocast(layer.weight.device.type, enabled=False):
        norms = safe_norms(weight, squared, factors[0].detach(), factors[1].detach(), layer.scale())
        if not layer.adapter.detach_norm:
            on_A = F.linear(factors[0].to(weight.dtype), weight)
            live = functional.root(functional.factored_norms_squared(squared, *factors, on_A, layer.scale())[0])
            norms = norms + (live - live.detach())
    return functional.gain(magnitude, norms)


@torch.library.custom_op(
    "dora_vl::safe_norms",
    mutates_args=(),
    schema="(Tensor weight, Tensor squared, Tensor a, Tensor b, float scale) -> Tensor",
)
def safe_norms(weight: Tensor, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """n of each row, rows that cancel taken dense; their number is known only at run time, which no graph can hold."""
    norms, cancelled = functional.direction_norms(squared, a, b, F.linear(a.to(weight.dtype), weight), scale)
    if cancelled.numel():
        dense = functional.dense_direction(weight[cancelled], a, b[cancelled], scale)
        norms = norms.index_copy(0, cancelled, functional.root(dense.square().sum(dim=1)))
    return norms.clone()


@safe_norms.register_fake
def _(weight: Tensor, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.empty_like(squared)
