"""Adapted convolutions, where the filter of each output channel is one row of W, and embeddings.

An embedding is a linear layer on one-hot rows, so W is the table transposed and each column has one norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, cast

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.config import DoRAConfig
from dora_vl.core.layer import AdaptedLayer
from dora_vl.errors import UserError


class ConvLayer(AdaptedLayer):
    """What one and two dimensions share: A is a convolution to `rank` channels, B one of width 1, as in PEFT."""

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
        """(output channels, input channels times the kernel's size)."""
        return self.out_channels, self.in_channels * math.prod(self.kernel_size)

    def as_matrix(self, weight: Tensor) -> Float[Tensor, "out in_"]:
        """One filter a row."""
        return weight.flatten(1)

    def from_matrix(self, matrix: Float[Tensor, "out in_"]) -> Tensor:
        """[out, in, *kernel]."""
        return matrix.view_as(self.weight)

    def factors(self) -> tuple[Float[Tensor, "rank in_"], Float[Tensor, "out rank"]] | None:
        """A and B, one filter a row."""
        return None if self.lora_A is None or self.lora_B is None else (self.lora_A.flatten(1), self.lora_B.flatten(1))

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A is [rank, in, *kernel], B is [out, rank, 1, ...]."""
        return (rank, self.in_channels, *self.kernel_size), (self.out_channels, rank, *(1 for _ in self.kernel_size))

    def magnitude_file_shape(self) -> tuple[int, ...]:
        """[1, out, 1, ...]."""
        return (1, self.out_channels, *(1 for _ in self.kernel_size))

    def setting_beyond_peft(self) -> str | None:
        """A dilation, or a padding mode other than zeros, where it matters: PEFT 0.21 builds its A without both.

        PEFT's A has this layer's kernel, stride and padding alone. A dilation changes nothing along an axis of width
        1, and a padding mode nothing where nothing is padded.
        """
        settings = vars(self)
        if any(step > 1 and width > 1 for step, width in zip(settings["dilation"], self.kernel_size, strict=True)):
            return f"dilation={settings['dilation']}"
        if settings["padding_mode"] != "zeros" and any(settings["_reversed_padding_repeated_twice"]):
            return f"padding_mode={settings['padding_mode']!r}"
        return None

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution with this layer's stride, padding and dilation."""
        return self._conv_forward(x, weight, bias)  # pyright: ignore[reportCallIssue] - torch's, of either dimension

    def forward(self, input: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """y = g (W * x + s B A * x) + b."""
        weight, bias = self.weight, None if self.bias is None else self.bias.to(self.weight.dtype)
        output = self.convolve(input, weight, bias)
        if self.merged:
            self.refuse_training_while_merged()
            return output
        a, b, gain = self.lora_A, self.lora_B, self.gain()
        probability = self.adapter.dropout if self.training and a is not None else 0.0
        dropped = F.dropout(input, probability) if probability else input
        axes = self.weight.ndim - 2
        channel = (-1, *(1 for _ in range(axes)))
        low_rank = None
        if a is not None and b is not None:
            hidden = self.convolve(dropped, a.to(output.dtype), None)
            low_rank = self.adapter.scale * (b.flatten(1).to(output.dtype) @ hidden.flatten(-axes))
            low_rank = low_rank.view_as(output)
        if probability and self.adapter.dropout_mode == "whole_change":
            frozen = self.convolve(dropped, weight, None)
        else:
            frozen = output if bias is None else output - bias.view(channel)
        return functional.changed_output(output, frozen, low_rank, None if gain is None else gain.view(channel))


class DoRAConv1d(ConvLayer, nn.Conv1d):
    """An adapted `nn.Conv1d`."""


class DoRAConv2d(ConvLayer, nn.Conv2d):
    """An adapted `nn.Conv2d`."""


SCALED_EMBEDDINGS: Mapping[str, str] = {
    "transformers.models.bart.modeling_bart.BartScaledWordEmbedding": "embed_scale",
    "transformers.models.mbart.modeling_mbart.MBartScaledWordEmbedding": "embed_scale",
}
"""Class path of an embedding that multiplies its rows -> the attribute that holds the factor."""


class DoRAEmbedding(AdaptedLayer, nn.Embedding):
    """An adapted `nn.Embedding`; the magnitude has one number for each of the embedding's dimensions, as in PEFT.

    There is no dropout here: its input are token ids.
    """

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
        """(embedding dimension, vocabulary)."""
        return self.embedding_dim, self.num_embeddings

    def as_matrix(self, weight: Tensor) -> Float[Tensor, "out in_"]:
        """[dimension, vocabulary]."""
        return weight.t()

    def from_matrix(self, matrix: Float[Tensor, "out in_"]) -> Tensor:
        """[vocabulary, dimension]."""
        return matrix.t()

    def plain(self) -> nn.Module:
        """The embedding that was here before."""
        base = cast(nn.Embedding, self._replaced[0])
        base.weight = self.weight
        return base.train(self.training)

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """y = g (W[id] + s B A[id]), times the model's own factor where the embedding has one."""
        rows = F.embedding(input, self.weight, self.padding_idx)
        if self.merged:
            self.refuse_training_while_merged()
        else:
            low_rank = None
            if self.lora_A is not None and self.lora_B is not None:
                hidden = F.embedding(input, self.lora_A.t(), self.padding_idx)
                low_rank = (self.adapter.scale * F.linear(hidden, self.lora_B)).to(rows.dtype)
            rows = functional.changed_output(rows, rows, low_rank, self.gain())
        return rows * self.output_factor if self.output_factor != 1 else rows
