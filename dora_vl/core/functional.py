"""DoRA's equation (arXiv 2402.09353, equation 5) in torch's own operations, without the dense product.

Letters, as in the paper, for one adapted linear layer:

    W [out, in]   frozen weight           b [out]      bias, outside the equation
    A [rank, in]  B [out, rank]           s            alpha / rank (or alpha / sqrt(rank))
    m [out]       magnitude               V = W + s B A       the direction before normalisation
    n [out]       n_i = ||V_i||_2, the norm of each output row of V
    g [out]       g = m / n               f = W x + b         what the frozen layer gives by itself
    h [rank]      h = s A x

    y = g * (W x + s B A x) + b = g * (f - b + B h) + b       merged:  W' = g * V, b unchanged

The paper writes W as [in, out] and says "column-wise"; with torch's [out, in] that is one norm a row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dora_vl.core.fast import cpu_step
from dora_vl.core.fast.kernels import kernels_for
from dora_vl.core.step import CANCELLATION, NORM_RANGE, Gain, accumulation_dtype, scaled_product
from dora_vl.core.step import factor_gradients as factor_gradients
from dora_vl.shapes import Float, Int

NORM_CHUNK_ROWS = 1024
"""This many rows of W become float32 at a time, so that a norm never needs a second copy of the weight."""


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Returns the dtype that autocast wants; None if it is off, or unknown to the device (meta)."""
    is_on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Leaves autocast, where it is on."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


# -- the norm and the gain -------------------------------------------------------------------------------------------


def row_norms_squared(weight: Float[Tensor, "out in_"]) -> Float[Tensor, " out"]:
    """Computes ||W_i||^2 of each output row in float32, a block of rows at a time."""
    dtype = accumulation_dtype(weight.dtype)
    blocks = weight.detach().split(NORM_CHUNK_ROWS)
    return torch.cat([block.to(dtype).square().sum(dim=1) for block in blocks])


def factored_norms_squared(
    weight_norms_squared: Float[Tensor, "*experts out"],
    lora_A: Float[Tensor, "*experts rank in_"],
    lora_B: Float[Tensor, "*experts out rank"],
    weight_on_A: Float[Tensor, "*experts out rank"],
    scale: float,
) -> Float[Tensor, "*experts out"]:
    """Computes n_i^2 = ||W_i||^2 + 2 s B_i.(W A^T + s/2 B A A^T)_i in memory of out*rank + rank^2, never out*in.

    `weight_on_A` is the frozen layer applied to A's rows, W A^T, so no weight is read here: quantised and
    sharded layers need nothing more. Differentiable in A and B.

    The products take A and B as the forward pass does, in the frozen layer's dtype, so n belongs to the direction that
    is used; at rank 128 that is also four times as fast on CPU as in float32. Sums over rows are float32.
    """
    dtype, wide = torch.promote_types(weight_on_A.dtype, NORM_RANGE), weight_norms_squared.dtype
    a, b = (factor.to(weight_on_A.dtype).to(dtype) for factor in (lora_A, lora_B))
    half = weight_on_A.to(dtype) + b @ (a @ a.mT * (scale / 2))
    change = torch.linalg.vecdot(b.to(wide), half.to(wide))
    return torch.add(weight_norms_squared, change, alpha=2 * scale)


def safe_sqrt(squared: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Takes a square root that is 0, with gradient 0 instead of infinity, where rounding or a zero row leaves none."""
    positive = squared > 0
    return torch.where(positive, squared, 1.0).sqrt() * positive


def direction_norms(
    weight_norms_squared: Float[Tensor, " out"], norms_squared: Float[Tensor, " out"]
) -> tuple[Float[Tensor, " out"], Int[Tensor, " cancelled"]]:
    """Returns n from n^2, and the rows where its terms cancel too far to be trusted."""
    cancelled = (norms_squared.detach() <= CANCELLATION * weight_norms_squared).nonzero().flatten()
    return safe_sqrt(norms_squared) if cancelled.numel() else norms_squared.sqrt(), cancelled


def dense_direction(
    weight: Float[Tensor, "rows in_"],
    lora_A: Float[Tensor, "rank in_"] | None,
    lora_B: Float[Tensor, "rows rank"] | None,
    scale: float,
) -> Float[Tensor, "rows in_"]:
    """Computes V = W + s B A in float32, for merging and for the few rows whose factored norm cancels."""
    dtype = accumulation_dtype(weight.dtype)
    if lora_A is None or lora_B is None:
        return weight.to(dtype)
    return weight.to(dtype) + scale * (lora_B.to(dtype) @ lora_A.to(dtype))


def norms(
    weight: Float[Tensor, "out in_"],
    weight_norms_squared: Float[Tensor, " out"],
    lora_A: Float[Tensor, "rank in_"],
    lora_B: Float[Tensor, "out rank"],
    scale: float,
) -> Float[Tensor, " out"]:
    """Computes n of each row without a gradient, dense for rows that cancel.

    Asking for them is free on CPU. On CUDA it would stop the host in every layer and rule CUDA graphs out, so the
    kernels decide there for themselves; only where there are none (float64, no Triton) is it asked for.
    """
    kernels = kernels_for(weight, weight.numel())
    if kernels is not None:
        return kernels.norms(weight, weight_norms_squared, lora_A, lora_B, scale)
    on_A = weight @ lora_A.to(weight.dtype).t()
    squared = factored_norms_squared(weight_norms_squared, lora_A, lora_B, on_A, scale)
    result, cancelled = direction_norms(weight_norms_squared, squared)
    if cancelled.numel():
        dense = dense_direction(weight[cancelled], lora_A, lora_B[cancelled], scale)
        result = result.index_copy(0, cancelled, safe_sqrt(dense.square().sum(dim=1)))
    return result


@torch.library.custom_op(
    "dora_vl::norms",
    mutates_args=(),
    schema="(Tensor weight, Tensor squared, Tensor a, Tensor b, float scale) -> Tensor",
)
def norms_in_graph(weight: Tensor, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Computes `norms` as one opaque operation: no graph can hold the number of rows that cancel."""
    return norms(weight, squared, a, b, scale).clone()


@norms_in_graph.register_fake
def _(weight: Tensor, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.empty_like(squared)


def gain(
    magnitude: Float[Tensor, "*experts out"], norms: Float[Tensor, "*experts out"]
) -> Float[Tensor, "*experts out"]:
    """Computes g = m / n; a row of V that is all zero has no direction and keeps g = 1 instead of 0/0."""
    smallest = torch.finfo(norms.dtype).tiny
    return torch.where(norms > 0, magnitude.to(norms.dtype) / norms.clamp_min(smallest), 1.0)


def merged_weight(
    weight: Float[Tensor, "out in_"],
    lora_A: Float[Tensor, "rank in_"] | None,
    lora_B: Float[Tensor, "out rank"] | None,
    magnitude: Float[Tensor, " out"] | None,
    scale: float,
) -> Float[Tensor, "out in_"]:
    """Computes W' = m V / ||V||, or V without a magnitude (LoRA), in float32; returns it in W's dtype."""
    direction = dense_direction(weight, lora_A, lora_B, scale)
    if magnitude is not None:
        direction = gain(magnitude, safe_sqrt(row_norms_squared(direction))).unsqueeze(1) * direction
    return direction.to(weight.dtype)


# -- the output --------------------------------------------------------------------------------------------------------


def adapted_output(
    product: Float[Tensor, "*shape"],
    bias: Float[Tensor, "*broadcast"] | None,
    low_rank: Float[Tensor, "*shape"] | None,
    minus_one: Float[Tensor, "*broadcast"] | None,
    frozen: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Computes y = f + B h + (g - 1) (f - b + B h); bitwise f where g = 1 and B h = 0.

    g - 1 and not g, since bfloat16 has nothing between 1 and 1.0078. `frozen` stands for f - b where dropout is on the
    input of the whole change, as PEFT and the reference have it, at the price of a second product of W.
    """
    changed = product if low_rank is None else product + low_rank
    if minus_one is None:
        return changed
    if frozen is None:
        return torch.addcmul(changed, changed if bias is None else changed - bias, minus_one)
    return torch.addcmul(changed, frozen if low_rank is None else frozen + low_rank, minus_one)


def adapted_linear(  # noqa: PLR0913 - the operands of the equation
    x: Float[Tensor, "*batch in_"],
    frozen_layer: Callable[[Tensor], Tensor],
    bias: Float[Tensor, " out"] | None,
    factors: tuple[Float[Tensor, "rank in_"], Float[Tensor, "out rank"]] | None,
    minus_one: Float[Tensor, " out"] | None,
    scale: float,
    dropped: Float[Tensor, "*batch in_"] | None = None,
    *,
    whole_change: bool = False,
) -> Float[Tensor, "*batch out"]:
    """Computes y of x, where `frozen_layer` gives f; `dropped` is x after dropout, for A only or the whole change."""
    product, low_rank, frozen = frozen_layer(x), None, None
    dropped = x if dropped is None else dropped
    if factors is not None:
        low_rank = F.linear(scale * F.linear(dropped, factors[0]), factors[1]).to(product.dtype)
    if whole_change:
        frozen = frozen_layer(dropped) if bias is None else frozen_layer(dropped) - bias
    return adapted_output(product, bias, low_rank, minus_one, frozen)


# -- the two passes of an eager step, for `linear.AdaptedStep`; `fast` has the same two as kernels ---------------------


def gains(magnitude: Float[Tensor, " out"], norms: Float[Tensor, " out"], dtype: torch.dtype, weight_size: int) -> Gain:
    """Computes the gain of a layer for activations of a dtype; `weight_size` is the size of its weight."""
    if norms.device.type == "cpu" and cpu_step.is_usable(norms.dtype, weight_size):
        return Gain(*cpu_step.gains(magnitude, norms), dtype)
    full = gain(magnitude, norms).to(accumulation_dtype(dtype))
    return Gain(full, torch.where(norms > 0, norms.reciprocal(), 0.0), dtype)


def output(
    product: Float[Tensor, "rows out"],
    x: Float[Tensor, "rows in_"],
    a: Float[Tensor, "rank in_"],
    b: Float[Tensor, "out rank"],
    bias: Float[Tensor, " out"] | None,
    gain: Gain | None,
    scale: float,
) -> tuple[Float[Tensor, "rows out"], Float[Tensor, "rows rank"]]:
    """Computes y and h = s A x from f; all in the dtype of x."""
    hidden = scaled_product(x, a.t(), scale)
    return adapted_output(product, bias, hidden @ b.t(), None if gain is None else gain.minus_one), hidden


def gradients(
    dy: Float[Tensor, "rows out"],
    product: Float[Tensor, "rows out"],
    b: Float[Tensor, "out rank"],
    bias: Float[Tensor, " out"] | None,
    gain: Gain,
    scale: float,
) -> tuple[Float[Tensor, "rows out"], Float[Tensor, "rows rank"], Float[Tensor, " out"], Float[Tensor, " out"]]:
    """Computes dz = g dy, dh = s dz B, and the sums over rows of dy (f - b) and of dy, in float32."""
    if dy.device.type == "cpu" and dy.numel():
        # What batch normalisation in evaluation mode gives backward for mean b and variance 1: two passes over memory
        # instead of five, and torch's CPU kernel takes half-precision activations with float32 gains.
        mean, variance = torch.zeros_like(gain.full), torch.ones_like(gain.full)
        mean = mean if bias is None else bias.to(mean.dtype)
        fused, operands = torch.ops.aten.native_batch_norm_backward, (dy.contiguous(), product.contiguous())
        dz, dm, db = fused(*operands, gain.full, mean, variance, None, None, False, 0.0, (True, True, True))
    else:
        dz, dtype = torch.addcmul(dy, dy, gain.minus_one), gain.full.dtype
        dm = (dy * (product if bias is None else product - bias)).sum(dim=0, dtype=dtype)
        db = dy.sum(dim=0, dtype=dtype)
    return dz, scaled_product(dz, b, scale), dm, db
