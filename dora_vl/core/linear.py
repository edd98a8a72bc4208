"""Adapted linear layers, and their eager step, forward and backward, as one function of autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.config import DoRAConfig
from dora_vl.core.fast.dropout import SHARED_DROPOUT, Dropped
from dora_vl.core.fast.kernels import kernels_for
from dora_vl.core.gain import current_gain, operands, operands_without_graph
from dora_vl.core.layer import AdaptedLayer, is_traced
from dora_vl.core.step import Gain
from dora_vl.shapes import Float


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
        """Returns the gradients of x, f, b, A, B and m."""
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
        dA, dB, dm = kernels.factor_gradients(dy, masked, hidden, dh, lora_B, sums, gain)
        dx = None
        if needs[0]:
            dx = dh @ lora_A.to(dy.dtype)
            if positions is not None:
                dx.view(-1).index_fill_(0, positions, 0)
            # Not `addmm_`, which torch's FlopCounterMode does not count.
            dx = (dx if weight is None else torch.addmm(dx, dz, weight, out=dx)).view(ctx.shape)
        df = dz.view(*ctx.shape[:-1], -1) if weight is None and needs[1] else None
        db = db.to(bias.dtype) if bias is not None and db is not None and needs[3] else None
        return dx, df, None, db, dA, dB, dm, None, None, None


def passes(product: Float[Tensor, "rows out"], matrix_shape: tuple[int, int], gain: Gain | None) -> Any:
    """Returns what has `output` and `gradients` for such a product: a file of kernels, or `functional`."""
    kernels = None if gain is None else kernels_for(product, max(product.numel(), math.prod(matrix_shape)))
    return functional if kernels is None else kernels


class LinearLayer(AdaptedLayer):
    """A layer whose product is W x + b, whatever keeps its weight."""

    in_features: int
    out_features: int

    def matrix_shape(self) -> tuple[int, int]:
        """Returns (out, in)."""
        return self.out_features, self.in_features

    def adapted(
        self,
        input: Float[Tensor, "*batch in_"],
        frozen_layer: Callable[[Tensor], Float[Tensor, "*batch out"]],
        bias: Float[Tensor, " out"] | None,
        weight: Float[Tensor, "out in_"] | None = None,
    ) -> Float[Tensor, "*batch out"]:
        """Computes y of the input; `frozen_layer` gives W x + b, and `weight` is W where it can be multiplied by."""
        adapter, factors, magnitude = self.adapter, self.factors(), self.magnitude
        if weight is not None and input.dtype == torch.float64 != weight.dtype:
            frozen_layer(input)  # raises torch's own error
        x = input if weight is None else input.to(weight.dtype)
        with_graph, scale, masked = torch.is_grad_enabled(), adapter.scale, None
        # Dropout before the question of a graph: reentrant checkpointing runs its first pass in training mode
        # without one, and must draw there what the recomputation draws again.
        probability = adapter.dropout if self.training and factors is not None else 0.0
        whole_change = bool(probability) and adapter.drops_whole_change
        if whole_change or is_traced():
            masked = F.dropout(x, probability) if probability else None
            change = *operands(self, x.dtype), scale, masked
            return functional.adapted_linear(x, frozen_layer, bias, *change, whole_change=whole_change)
        dropped = SHARED_DROPOUT.draw(input, probability, id(self)) if probability else None
        if factors is not None and with_graph and (magnitude is None or adapter.detach_norm):
            product = frozen_layer(x) if weight is None else None
            x = x if product is None else x.to(product.dtype)
            gain = None if magnitude is None else current_gain(self, x.dtype)
            step = AdaptedStep.apply(x, product, weight, bias, *factors, magnitude, gain, scale, dropped)
            return cast(Tensor, step)
        if dropped is not None:
            masked, scale = dropped.apply(x), scale / (1 - probability)
        if factors is None or with_graph:
            return functional.adapted_linear(x, frozen_layer, bias, *operands(self, x.dtype), scale, masked)
        product = frozen_layer(x)
        a, b, gain = operands_without_graph(self, product.dtype)
        rows = (x if masked is None else masked).to(product.dtype).reshape(-1, x.shape[-1])
        flat = product.reshape(-1, product.shape[-1])
        with functional.without_autocast(x.device):
            y, _ = passes(flat, self.matrix_shape(), gain).output(flat, rows, a, b, bias, gain, scale)
        return y.view(product.shape)


class ProductLayer(LinearLayer):
    """A layer that multiplies by one dense weight: the hot path of training and decoding."""

    def forward(self, input: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
        """Computes y = g (W x + s B A x) + b; only W x + b while merged."""
        self.refuse_what_would_not_train()
        weight, bias = self.as_matrix(self.weight), self.bias
        if dtype := functional.autocast_dtype(input.device):
            weight = weight.to(dtype)
        bias = None if bias is None else bias.to(weight.dtype)
        if self.merged:
            return F.linear(input if dtype is None else input.to(dtype), weight, bias)
        return self.adapted(input, partial(F.linear, weight=weight, bias=bias), bias, weight)


class DoRALinear(ProductLayer, nn.Linear):
    """An adapted `nn.Linear`."""

    def __init__(self, base: nn.Linear, config: DoRAConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.start_adapter(base, config)


class TransposedLinear(ProductLayer):
    """An adapted linear layer that keeps its weight as [in, out]: transformers' `Conv1D` (GPT-2)."""

    def __init__(self, base: nn.Module, config: DoRAConfig) -> None:
        super().__init__()
        self.weight, self.bias = cast(nn.Parameter, base.weight), cast("nn.Parameter | None", base.bias)
        self.in_features, self.out_features = self.weight.shape
        self.start_adapter(base, config)

    def as_matrix(self, weight: Tensor) -> Float[Tensor, "out in_"]:
        """Returns [out, in]."""
        return weight.t()
