"""An eager step of one adapted linear layer, forward and backward, as one function of autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.fast.dropout import Dropped
from dora_vl.core.fast.kernels import kernels_for
from dora_vl.core.functional import Gain


class AdaptedStep(torch.autograd.Function):
    """y = g (W x + s B A x) + b with a norm that is a constant; letters as in `functional`.

    Kept for the backward pass are x as A read it, h and f, but not y, which may be edited in place. W gets no gradient:
    it is frozen by construction. `product` is f of a layer that has multiplied by its own weight, which is packed; it
    is None, and W given, where the product is taken here. `gain` None is plain LoRA.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 - the operands of the equation
        ctx: Any,
        x: Float[Tensor, "*batch in_"],
        product: Float[Tensor, "*batch out"] | None,
        weight: Float[Tensor, "out in_"] | None,
        bias: Float[Tensor, " out"] | None,
        lora_A: Float[Tensor, "rank in_"],
        lora_B: Float[Tensor, "out rank"],
        magnitude: Float[Tensor, " out"] | None,
        gain: Gain | None,
        scale: float,
        dropped: Dropped | None,
    ) -> Float[Tensor, "*batch out"]:
        """Runs the layer; every operand but A, B and m in the dtype of x."""
        masked, positions = x.reshape(-1, x.shape[-1]), None
        flat = None if product is None else product.reshape(-1, product.shape[-1])
        if flat is None and weight is not None:
            flat = F.linear(masked, weight, bias)
        assert flat is not None
        if dropped is not None:
            masked, positions, scale = dropped.shared_copy(masked), dropped.positions, scale / (1 - dropped.probability)
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        with functional.without_autocast(x.device):  # f may be in another dtype than autocast's
            y, hidden = passes(flat, (len(b), a.shape[1]), gain).output(flat, masked, a, b, bias, gain, scale)
        ctx.save_for_backward(masked, weight, bias, lora_A, lora_B, hidden, None if gain is None else flat, positions)
        ctx.gain, ctx.scale, ctx.shape = gain, scale, x.shape
        # No view of y, which torch lets nobody edit in place, but the same memory.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - `once_differentiable` hides the names
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, f, b, A, B and m."""
        masked, weight, bias, lora_A, lora_B, hidden, product, positions = ctx.saved_tensors
        gain, needs = ctx.gain, ctx.needs_input_grad
        dy = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        b, db, sums = lora_B.to(dy.dtype), None, None
        kernels = passes(dy, (len(b), lora_A.shape[1]), gain)
        if gain is None:
            dz, dh = dy, functional.scaled_product(dy, b, ctx.scale)
            db = dy.sum(dim=0) if needs[3] and weight is not None else None
        else:
            dz, dh, sums, db = kernels.gradients(dy, product, b, bias, gain, ctx.scale)
            if weight is None:  # f has b's gradient too, times g
                db = -(gain.full - 1) * db
        dA, dB, dm = kernels.of_factors(dy, masked, hidden, dh, lora_B, sums, gain)
        dx = None
        if needs[0]:
            dx = dh @ lora_A.to(dy.dtype)
            if positions is not None:
                dx.view(-1).index_fill_(0, positions, 0)
            dx = (dx if weight is None else dx.addmm_(dz, weight)).view(ctx.shape)
        df = dz.view(*ctx.shape[:-1], -1) if weight is None and needs[1] else None
        db = db.to(bias.dtype) if bias is not None and db is not None and needs[3] else None
        return dx, df, None, db, dA, dB, dm, None, None, None


def passes(product: Float[Tensor, "rows out"], matrix_shape: tuple[int, int], gain: Gain | None) -> Any:
    """Returns what has `output` and `gradients` for such a product: a file of kernels, or `functional`."""
    kernels = None if gain is None else kernels_for(product, max(product.numel(), math.prod(matrix_shape)))
    return functional if kernels is None else kernels
