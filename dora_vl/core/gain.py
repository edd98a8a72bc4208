"""What a layer keeps of its gain between forward passes: computed once an optimizer step, read at every pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

CANCELLATION = 0.15
"""Where a row's squared norm falls below this share of its frozen weight's, the factored form lost too many digits."""
FRAGILE_GAIN = 0.05
"""Below it a row's product cannot be rebuilt from the output in the backward pass."""
LARGE_BIAS = 8.0
"""Above this multiple of the magnitude, which is the product's size for inputs near one, a bias hides its digits."""


class Fragile(NamedTuple):
    """Some output rows, and one over the norm of each."""

    rows: Int[Tensor, " fragile"]
    per_norm: Float[Tensor, " fragile"]


@dataclass(frozen=True)
class Gain:
    """The gain of one layer, valid until its factors or magnitude change.

    Gain minus one is kept beside it in the activations' dtype, because a half-precision gain rounds small changes of
    magnitude away (bfloat16 has nothing between 1 and 1.0078) while the difference keeps its digits; `z + (gain - 1) z`
    then rounds once.
    """

    full: Float[Tensor, " out"]
    """In float32."""
    minus_one: Float[Tensor, " out"]
    per_magnitude: Float[Tensor, " out"]
    """One over the magnitude, in float32: turns the sum of output times its gradient into the magnitude's gradient."""
    fragile: Fragile | None = None
    """Rows whose product is kept for the backward pass: of a gain near 0, or a bias far larger than the product."""


def careful_gain(
    full: Float[Tensor, " out"],
    norms: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None,
    dtype: torch.dtype,
) -> Gain:
    """A gain from its float32 values and the norms they came from, whatever the rows hold."""
    per_norm = torch.where(norms > 0, norms.reciprocal(), 0.0)  # a row without a direction gives m no gradient
    unsound = full.abs() < FRAGILE_GAIN
    if bias is not None:
        unsound = unsound | (bias.detach().abs() > LARGE_BIAS * (full * norms).abs())
    rows = unsound.nonzero().flatten()
    fragile = Fragile(rows, per_norm[rows]) if rows.numel() else None
    return Gain(full, (full - 1).to(dtype), per_norm / full, fragile)


def quick_gains(
    magnitudes: Float[Tensor, "layers out"],
    weight_norms_squared: Float[Tensor, "layers out"],
    norms_squared: Float[Tensor, "layers out"],
    biases: Float[Tensor, "layers out"] | None,
    dtype: torch.dtype,
) -> list[Gain | None]:
    """The gains of several layers in a third of the operations; None for a layer with a row that needs more care.

    An adapted model has hundreds of layers, and on CPU an operation on a vector costs its dispatch. One number says
    whether all rows of a layer are sound: the least of its squared norms beside the frozen weight's and, brought to
    the same bound, of its gains and of its magnitudes beside the bias.
    """
    full = magnitudes / norms_squared.sqrt()
    shares = torch.minimum(norms_squared / weight_norms_squared, full.abs() * (CANCELLATION / FRAGILE_GAIN))
    if biases is not None:
        shares = torch.minimum(shares, magnitudes.abs() * (CANCELLATION * LARGE_BIAS) / biases.abs())
    sound = (shares.amin(dim=-1) > CANCELLATION).tolist()  # False for NaN too
    parts = zip(full, (full - 1).to(dtype), magnitudes.reciprocal(), strict=True)
    return [Gain(*part) if is_sound else None for is_sound, part in zip(sound, parts, strict=True)]


def apply_gain(
    product: Float[Tensor, "rows out"], bias: Float[Tensor, " out"] | None, gain: Gain
) -> Float[Tensor, "rows out"]:
    """Scales a product that carries its bias already, in place, the bias left as it is; bitwise nothing at gain 1."""
    product.addcmul_(product, gain.minus_one)
    if bias is not None:
        product.sub_(gain.minus_one * bias)
    return product


def scaled_with_sums(
    gradient: Float[Tensor, "rows out"], output: Float[Tensor, "rows out"], gain: Gain
) -> tuple[Float[Tensor, "rows out"], Float[Tensor, " out"], Float[Tensor, " out"]]:
    """On CPU: gradient times gain, and the sums over rows of gradient times output and of the gradient, in float32.

    They are what batch normalisation in evaluation mode gives backward for mean 0 and variance 1: two passes over
    memory instead of five, and torch's CPU kernel takes half-precision activations with float32 gains.
    """
    mean, variance = torch.zeros_like(gain.full), torch.ones_like(gain.full)
    rows = gradient.contiguous(), output.contiguous()
    fused = torch.ops.aten.native_batch_norm_backward
    return fused(*rows, gain.full, mean, variance, None, None, False, 0.0, (True, True, True))
