"""Adapted linear layers: an `nn.Linear` that carries its own adapter, with the same `weight` and `bias`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.config import DoRAConfig
from dora_vl.core.fast.dropout import SHARED_DROPOUT
from dora_vl.core.layer import AdaptedLayer, is_traced
from dora_vl.core.step import AdaptedStep, passes


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
        product_of: Callable[[Tensor], Float[Tensor, "*batch out"]],
        bias: Float[Tensor, " out"] | None,
        weight: Float[Tensor, "out in_"] | None = None,
    ) -> Float[Tensor, "*batch out"]:
        """Computes y of the input; `product_of` gives W x + b, and `weight` is W where it can be multiplied by."""
        adapter, factors, magnitude = self.adapter, self.factors(), self.magnitude
        x = input if weight is None else input.to(weight.dtype)
        with_graph, scale, masked = torch.is_grad_enabled(), adapter.scale, None
        # Dropout before the question of a graph: reentrant checkpointing runs its first pass in training mode
        # without one, and must draw there what the recomputation draws again.
        probability = adapter.dropout if self.training and factors is not None else 0.0
        whole_change = bool(probability) and adapter.dropout_mode == "whole_change" and magnitude is not None
        if whole_change or is_traced():
            masked = F.dropout(x, probability) if probability else None
            operands = (x, product_of, bias, *self.operands(x.dtype), scale, masked)
            return functional.adapted_linear(*operands, whole_change=whole_change)
        dropped = SHARED_DROPOUT.draw(input, probability, id(self)) if probability else None
        if factors is not None and with_graph and (magnitude is None or adapter.detach_norm):
            product = product_of(x) if weight is None else None
            x = x if product is None else x.to(product.dtype)
            gain = None if magnitude is None else self.current_gain(x.dtype)
            operands = (x, product, weight, bias, *factors, magnitude, gain, scale, dropped)
            return cast(Tensor, AdaptedStep.apply(*operands))
        if dropped is not None:
            masked, scale = dropped.apply(x), scale / (1 - probability)
        if factors is None or with_graph:
            return functional.adapted_linear(x, product_of, bias, *self.operands(x.dtype), scale, masked)
        product = product_of(x)
        a, b, gain = self.operands_without_graph(product.dtype)
        rows = (x if masked is None else masked).to(product.dtype).reshape(-1, x.shape[-1])
        flat = product.reshape(-1, product.shape[-1])
        with functional.without_autocast(x.device):
            y, _ = passes(flat, self.matrix_shape(), gain).output(flat, rows, a, b, bias, gain, scale)
        return y.view(product.shape)


class ProductLayer(LinearLayer):
    """A layer that multiplies by one dense weight: the hot path of training and decoding."""

    def forward(self, input: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
        """Computes y = g (W x + s B A x) + b; W x + b alone while merged."""
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

    def from_matrix(self, matrix: Float[Tensor, "out in_"]) -> Tensor:
        """Returns [in, out]."""
        return matrix.t()
