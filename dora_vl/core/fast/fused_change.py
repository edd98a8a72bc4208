"""The change of a layer whose frozen product is its own affair (a quantised one), through the CUDA kernels.

Letters as in `functional.py`. The layer has given f = W x + b and differentiates it itself; here are

    y = g (f - b + h B^T) + b        h = s A x

and the gradients of f, x, A, B, m and of the b that stands outside. f is kept, not y: y then belongs to whoever reads
it, who may change it in place, and no row needs g to be away from 0.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_vl.core import functional
from dora_vl.core.fast.dropout import Dropped
from dora_vl.core.fast.fused import fused_kernels
from dora_vl.core.gain import Gain


def gain_over_norm(magnitude: Float[Tensor, " out"], norms: Float[Tensor, " out"], dtype: torch.dtype) -> Gain:
    """A gain for `FusedChange`: in place of 1 / m it holds 1 / n, since what is kept is not scaled by g yet."""
    full = functional.gain(magnitude.detach(), norms)
    return Gain(full, (full - 1).to(dtype), torch.where(norms > 0, norms.reciprocal(), 0.0))


class FusedChange(torch.autograd.Function):
    """y from f; keeps x, h and f, and of dropout its seed. `gain` comes from `gain_over_norm`."""

    @staticmethod
    def forward(  # noqa: PLR0913 - the operands of the equation
        ctx: Any,
        frozen: Float[Tensor, "*batch out"],
        x: Float[Tensor, "*batch in_"],
        bias: Float[Tensor, " out"] | None,
        lora_A: Float[Tensor, "rank in_"] | None,
        lora_B: Float[Tensor, "out rank"] | None,
        magnitude: Float[Tensor, " out"],
        gain: Gain,
        scale: float,
        dropped: Dropped | None,
    ) -> Float[Tensor, "*batch out"]:
        """Runs the change; f and x in one dtype."""
        rows = masked = x.reshape(-1, x.shape[-1])
        kernels, hidden = fused_kernels(frozen), None
        assert kernels is not None
        if lora_A is not None and lora_B is not None:
            if dropped is not None:
                masked, scale = dropped.shared_copy(rows), scale / (1 - dropped.probability)
                rows = dropped.kept(rows, masked)
            hidden = functional.scaled_product(masked, lora_A.to(x.dtype).t(), scale)
        y = kernels.adapted_output(frozen, hidden, lora_B, bias, gain.minus_one)
        ctx.probability, positions = (None, None) if dropped is None else (dropped.probability, dropped.positions)
        kept = frozen if magnitude.requires_grad else None
        ctx.save_for_backward(rows if hidden is not None else None, bias, lora_A, lora_B, hidden, kept, positions)
        ctx.gain, ctx.scale, ctx.shapes = gain, scale, (frozen.shape, x.shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - `once_differentiable` hides the names
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        """Gradients of f, x, b, A, B and m."""
        rows, bias, lora_A, lora_B, hidden, frozen, positions = ctx.saved_tensors
        gain, needs = ctx.gain, ctx.needs_input_grad
        dy = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        product = None if frozen is None else frozen.reshape(dy.shape)
        kernels = fused_kernels(dy)
        assert kernels is not None
        done = kernels.backward_pass(dy, product, lora_B, bias, gain, ctx.scale, with_bias_sum=needs[2])
        frozen_shape, input_shape = ctx.shapes
        dx = dA = dB = None
        dm = done.dm
        if hidden is not None:
            dropped = None if positions is None else Dropped(ctx.probability, positions)
            dx = _input_gradient(done.dh, lora_A.to(dy.dtype), dropped).view(input_shape) if needs[1] else None
            masked = rows if dropped is None else dropped.masked(rows)
            dA = (done.dh.t() @ masked).to(lora_A.dtype)
            unscaled = (dy.t() @ hidden).to(lora_B.dtype)
            dB = gain.full[:, None] * unscaled
            if dm is not None:  # what h B^T adds to the product that m scales
                dm = dm + gain.per_magnitude * (lora_B * unscaled).sum(dim=1)
        db = None if done.db is None else -gain.minus_one * done.db  # f has b's gradient too, times g
        return done.dz.view(frozen_shape), dx, db, dA, dB, dm, None, None, None


def _input_gradient(dh: Tensor, lora_A: Tensor, dropped: Dropped | None) -> Float[Tensor, "rows in_"]:
    product = dh @ lora_A
    return product if dropped is None else dropped.apply_(product)
