"""Adapted layers other than linear ones: convolutions, embeddings, and experts that are one tensor.

In a convolution the filter of each output channel is one row of W. An embedding is a linear layer on one-hot rows, so W
is the table transposed and each column has one norm. Of experts each has the equation of `functional.py` for itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.config import DoRAConfig
from dora_vl.core.gain import gain_of, operands
from dora_vl.core.layer import AdaptedLayer
from dora_vl.errors import UserError
from dora_vl.shapes import Float, Int


class ConvLayer(AdaptedLayer):
    """Holds what one and two dimensions share: A is a convolution to `rank` channels, B one of width 1, as in PEFT."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]

    def __init__(self, base: nn.Conv1d | nn.Conv2d, config: DoRAConfig) -> None:
        nn.Module.__init__(self)
        if base.groups > 1:
            raise UserError(f"a convolution with groups={base.groups} cannot be adapted; leave it out of targets")
        geometry = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        for name in (*geometry, "padding_mode", "_reversed_padding_repeated_twice", "transposed", "output_padding"):
            setattr(self, name, vars(base)[name])
        self.weight, self.bias = base.weight, base.bias
        self.start_adapter(base, config)

    def matrix_shape(self) -> tuple[int, int]:
        """Returns (output channels, input channels times the kernel's size)."""
        return self.out_channels, self.in_channels * math.prod(self.kernel_size)

    def as_matrix(self, weight: Tensor) -> Float[Tensor, "out in_"]:
        """Returns one filter per row."""
        return weight.flatten(1)

    def from_matrix(self, matrix: Float[Tensor, "out in_"]) -> Tensor:
        """Returns [out, in, *kernel]."""
        return matrix.view_as(self.weight)

    def factors(self) -> tuple[Float[Tensor, "rank in_"], Float[Tensor, "out rank"]] | None:
        """Returns A and B, one filter per row."""
        return None if self.lora_A is None or self.lora_B is None else (self.lora_A.flatten(1), self.lora_B.flatten(1))

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns [rank, in, *kernel] for A and [out, rank, 1, ...] for B."""
        return (rank, self.in_channels, *self.kernel_size), (self.out_channels, rank, *(1 for _ in self.kernel_size))

    def magnitude_file_shape(self) -> tuple[int, ...]:
        """Returns [1, out, 1, ...]."""
        return (1, self.out_channels, *(1 for _ in self.kernel_size))

    def setting_beyond_peft(self) -> str | None:
        """Names a dilation, or a padding mode other than zeros, where it matters: PEFT 0.21 builds its A without both.

        PEFT's A has only this layer's kernel, stride and padding. A dilation changes nothing along an axis of width
        1, and a padding mode nothing where nothing is padded.
        """
        settings = vars(self)
        if any(step > 1 and width > 1 for step, width in zip(settings["dilation"], self.kernel_size, strict=True)):
            return f"dilation={settings['dilation']}"
        if settings["padding_mode"] != "zeros" and any(settings["_reversed_padding_repeated_twice"]):
            return f"padding_mode={settings['padding_mode']!r}"
        return None

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolves with this layer's stride, padding and dilation."""
        return self._conv_forward(x, weight, bias)  # pyright: ignore[reportCallIssue] - torch's, of either dimension

    def forward(self, input: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Computes y = g (W * x + s B A * x) + b."""
        self.refuse_what_would_not_train()
        weight, bias = self.weight, None if self.bias is None else self.bias.to(self.weight.dtype)
        output = self.convolve(input, weight, bias)
        if self.merged:
            return output
        a, b, gain = self.lora_A, self.lora_B, gain_of(self)
        probability = self.adapter.dropout if self.training and a is not None else 0.0
        dropped = F.dropout(input, probability) if probability else input
        axes, low_rank, frozen = self.weight.ndim - 2, None, None
        channel = (-1, *(1 for _ in range(axes)))
        if a is not None and b is not None:
            hidden = self.convolve(dropped, a.to(output.dtype), None)
            low_rank = self.adapter.scale * (b.flatten(1).to(output.dtype) @ hidden.flatten(-axes))
            low_rank = low_rank.view_as(output)
        if probability and self.adapter.dropout_mode == "whole_change":
            frozen = self.convolve(dropped, weight, None)
        bias = None if bias is None else bias.view(channel)
        minus_one = None if gain is None else (gain - 1).to(output.dtype).view(channel)
        return functional.adapted_output(output, bias, low_rank, minus_one, frozen)


class DoRAConv1d(ConvLayer, nn.Conv1d):
    """An adapted `nn.Conv1d`."""


class DoRAConv2d(ConvLayer, nn.Conv2d):
    """An adapted `nn.Conv2d`."""


SCALED_EMBEDDINGS: Mapping[str, str] = {
    "transformers.models.bart.modeling_bart.BartScaledWordEmbedding": "embed_scale",
    "transformers.models.mbart.modeling_mbart.MBartScaledWordEmbedding": "embed_scale",
}
"""Maps the class path of an embedding that multiplies its rows to the attribute that holds the factor."""


class DoRAEmbedding(AdaptedLayer, nn.Embedding):
    """An adapted `nn.Embedding`: a magnitude for each of its dimensions, as in PEFT; ids as input have no dropout."""

    FILE_LEAVES: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_embedding_A",
        "lora_B": "lora_embedding_B",
        "magnitude": "lora_magnitude_vector",
    }

    def __init__(self, base: nn.Embedding, config: DoRAConfig) -> None:
        nn.Module.__init__(self)
        if base.max_norm is not None:
            raise UserError("an embedding with max_norm rewrites its weight in every pass and cannot be adapted")
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"):
            setattr(self, name, vars(base)[name])
        self.sparse = False
        kind = f"{type(base).__module__}.{type(base).__qualname__}"
        self.output_factor = float(vars(base)[SCALED_EMBEDDINGS[kind]]) if kind in SCALED_EMBEDDINGS else 1.0
        self.weight, self.bias = base.weight, None
        self.start_adapter(base, config)

    def matrix_shape(self) -> tuple[int, int]:
        """Returns (embedding dimension, vocabulary)."""
        return self.embedding_dim, self.num_embeddings

    def as_matrix(self, weight: Tensor) -> Float[Tensor, "out in_"]:
        """Returns [dimension, vocabulary]."""
        return weight.t()

    def original_layer(self) -> nn.Module:
        """Returns the original embedding."""
        base = cast(nn.Embedding, self._replaced[0])
        base.weight = self.weight
        return base.train(self.training)

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """Computes y = g (W[id] + s B A[id]), times the model's own factor where the embedding has one."""
        self.refuse_what_would_not_train()
        rows = F.embedding(input, self.weight, self.padding_idx)
        if not self.merged:
            low_rank, gain = None, gain_of(self)
            if self.lora_A is not None and self.lora_B is not None:
                hidden = F.embedding(input, self.lora_A.t(), self.padding_idx)
                low_rank = (self.adapter.scale * F.linear(hidden, self.lora_B)).to(rows.dtype)
            rows = functional.adapted_output(rows, None, low_rank, None if gain is None else (gain - 1).to(rows.dtype))
        return rows * self.output_factor if self.output_factor != 1 else rows


# Experts that are one tensor: transformers keeps the weights of a layer's experts as `gate_up_proj` (or `up_proj`) and
# `down_proj`, [experts, out, in] or transposed, and says in attributes how its forward uses them (its
# `use_experts_implementation`). By these a layer is known here, whatever its class: rows sorted by expert, first
# product, gate, second product, weighted sum. The norms of all experts are taken in one batch, from the factors;
# products go expert by expert, over those that got rows.

STATED = frozenset(("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "num_experts"))
"""transformers says in these attributes how a layer's experts compute."""


def expert_projections(module: nn.Module) -> tuple[str, ...]:
    """Names the 3-D weights that a module of experts multiplies by and that can be adapted; none for other modules."""
    attributes = vars(module)
    if not attributes.keys() >= STATED:
        return ()
    names = ("gate_up_proj" if attributes["has_gate"] else "up_proj", "down_proj")
    return tuple(name for name in names if module._parameters.get(name) is not None)


class ExpertsProjection(AdaptedLayer):
    """One 3-D weight of a layer's experts with A, B and magnitude for each of them."""

    def __init__(self, experts: nn.Module, leaf: str, config: DoRAConfig) -> None:
        super().__init__()
        self.weight = cast(Tensor, experts._parameters[leaf])
        self.bias = None
        self.transposed = bool(vars(experts)["is_transposed"])
        count, first, second = self.weight.shape
        self.experts = count
        self.out_features, self.in_features = (second, first) if self.transposed else (first, second)
        self.start_adapter(experts, config)

    # -- what the norm and the file need -----------------------------------------------------------------------

    def matrix_shape(self) -> tuple[int, int]:
        """Returns (out, in) of one expert."""
        return self.out_features, self.in_features

    def as_matrix(self, weight: Tensor) -> Float[Tensor, "*experts out in_"]:
        """Returns [out, in], of one expert or of all."""
        return weight.transpose(-2, -1) if self.transposed else weight

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns [experts, rank, in] and [experts, out, rank]."""
        return (self.experts, rank, self.in_features), (self.experts, self.out_features, rank)

    def magnitude_file_shape(self) -> tuple[int, ...]:
        """Returns [experts, out]."""
        return self.experts, self.out_features

    def setting_beyond_peft(self) -> str | None:
        """Says that PEFT adapts no magnitudes here, and lays out A and B differently."""
        return "experts that are one tensor"

    def frozen_norms_squared(self) -> Float[Tensor, "experts out"]:
        """Computes ||W_e,i||^2 of every row of every expert."""
        return torch.stack([functional.row_norms_squared(weight) for weight in self.frozen_matrix()])

    # -- forward -----------------------------------------------------------------------------------------------

    def forward(
        self, rows: Float[Tensor, "rows in_"], counts: Sequence[int], bias: Float[Tensor, "experts out"] | None
    ) -> Float[Tensor, "rows out"]:
        """Computes y = g_e (W_e x + s B_e A_e x) + b_e of rows in their experts' order, `counts` of each."""
        self.refuse_what_would_not_train()
        rows = rows.to(functional.autocast_dtype(rows.device) or rows.dtype)
        if self.merged:
            return products(rows, counts, self.as_matrix(self.weight), bias)
        if not len(rows):
            return rows.new_zeros(0, self.out_features)
        none, scale = [None] * self.experts, self.adapter.scale
        factors, minus_one = operands(self, rows.dtype)
        # unbind, not an index for each expert: the backward pass of an index is as large as all experts.
        weights = self.as_matrix(self.weight).unbind()
        biases, gains = (none if tensor is None else tensor.unbind() for tensor in (bias, minus_one))
        pairs = none if factors is None else list(zip(factors[0].unbind(), factors[1].unbind(), strict=True))
        probability = self.adapter.dropout if self.training and factors is not None else 0.0
        whole_change = bool(probability) and self.adapter.drops_whole_change
        outputs: list[Tensor] = []
        for expert, x in enumerate(rows.split(list(counts))):
            if not len(x):
                continue
            weight, own_bias = weights[expert].to(x.dtype), biases[expert]
            own_bias = None if own_bias is None else own_bias.to(x.dtype)
            frozen_layer = partial(F.linear, weight=weight, bias=own_bias)
            masked = F.dropout(x, probability) if probability else None
            change = pairs[expert], gains[expert], scale, masked
            outputs.append(functional.adapted_linear(x, frozen_layer, own_bias, *change, whole_change=whole_change))
        return torch.cat(outputs)


def products(
    rows: Float[Tensor, "rows in_"],
    counts: Sequence[int],
    weight: Float[Tensor, "experts out in_"],
    bias: Float[Tensor, "experts out"] | None,
) -> Float[Tensor, "rows out"]:
    """Computes W_e x + b_e of rows in their experts' order."""
    pieces = [
        F.linear(x, weight[expert].to(x.dtype), None if bias is None else bias[expert].to(x.dtype))
        for expert, x in enumerate(rows.split(list(counts)))
        if len(x)
    ]
    return torch.cat(pieces) if pieces else rows.new_zeros(0, weight.shape[1])


class AdaptedExperts(nn.Module):
    """A layer's experts with an adapter around one or both of their products, in place of the original module.

    What is not adapted keeps its name. An adapted weight becomes the child of that name, so its own name gets
    `.weight` after it.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    post_expert_norm: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        if vars(base).get("_is_expert_parallel"):
            raise UserError("experts that are spread over ranks (expert parallelism) cannot be adapted; use ZeRO")
        self._replaced = (base,)  # in a tuple, so that torch does not see it
        vars(self).update({name: value for name, value in vars(base).items() if not name.startswith("_")})
        for name, parameter in base._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in base._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in base._non_persistent_buffers_set)
        for name, child in base._modules.items():
            self.add_module(name, child)

    def adapt(self, leaf: str, config: DoRAConfig) -> None:
        """Puts an adapter around the product with one of the weights."""
        projection = ExpertsProjection(self, leaf, config)
        del self._parameters[leaf]
        self.add_module(leaf, projection)

    def original_layer(self) -> nn.Module:
        """Returns the original module, with the weights as they are now, merged or not."""
        (base,) = self._replaced
        for name, child in self._modules.items():
            if isinstance(child, ExpertsProjection):
                base.register_parameter(name, cast(nn.Parameter, child.weight))
        for name, parameter in self._parameters.items():
            base.register_parameter(name, parameter)
        return base.train(self.training)

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens width"],
        top_k_index: Int[Tensor, "tokens chosen"],
        top_k_weights: Float[Tensor, "tokens chosen"],
    ) -> Float[Tensor, "tokens width"]:
        """Computes the weighted sum of the outputs of each token's experts."""
        return self._weighted_sum(hidden_states, top_k_index, top_k_weights)  # pyright: ignore[reportCallIssue]

    # A graph cannot hold the number of rows that each expert gets. `torch.compiler.disable` is the same, but
    # imports the compiler with this file, a second for every program.
    @torch._disable_dynamo
    def _weighted_sum(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen = top_k_index.shape[-1]
        order = top_k_index.flatten().argsort(stable=True)
        counts = top_k_index.flatten().bincount(minlength=self.num_experts).tolist()
        base: Any = self._replaced[0]
        rows = self._product("gate_up_proj" if self.has_gate else "up_proj", hidden_states[order // chosen], counts)
        rows = self._product("down_proj", base._apply_gate(rows) if self.has_gate else base.act_fn(rows), counts)
        if self.has_post_expert_norm:
            rows = self.post_expert_norm(rows)
        weighted = rows * top_k_weights.flatten()[order].unsqueeze(-1)
        by_token = torch.empty_like(order)
        by_token[order] = torch.arange(len(order), device=order.device)
        summed = weighted[by_token].view(*top_k_index.shape, -1).sum(dim=1)
        return summed.to(hidden_states.dtype)

    def _product(self, leaf: str, rows: Tensor, counts: Sequence[int]) -> Tensor:
        bias = self._parameters[f"{leaf}_bias"] if self.has_bias else None
        child = self._modules.get(leaf)
        if child is not None:
            return child(rows, counts, bias)
        weight = cast(Tensor, self._parameters[leaf])
        return products(rows, counts, weight.mT if self.is_transposed else weight, bias)
