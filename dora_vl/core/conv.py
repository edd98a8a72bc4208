"""Adapted convolutions: the filter of each output channel is one row of W."""

from __future__ import annotations

import math
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.config import DoRAConfig
from dora_vl.core.layer import AdaptedLayer
from dora_vl.errors import UserError

Conv = nn.Conv1d | nn.Conv2d


class ConvLayer(AdaptedLayer):
    """What one and two dimensions share: A is a convolution to `rank` channels, B one of width 1, as in PEFT."""

    out_channels: int

    def _adopt(self, base: Conv, config: DoRAConfig) -> None:
        if base.groups > 1:
            raise UserError(f"a convolution with groups={base.groups} cannot be adapted; leave it out of targets")
        geometry = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        for name in (*geometry, "padding_mode", "_reversed_padding_repeated_twice", "transposed", "output_padding"):
            setattr(self, name, vars(base)[name])
        self.weight, self.bias = base.weight, base.bias
        self.start_adapter(base, config)

    def matrix_shape(self) -> tuple[int, int]:
        """(output channels, input channels times the kernel's size)."""
        kernel = cast(tuple[int, ...], vars(self)["kernel_size"])
        return self.out_channels, vars(self)["in_channels"] * math.prod(kernel)

    def as_matrix(self, weight: Tensor) -> Float[Tensor, "out in_"]:
        """One filter a row."""
        return weight.flatten(1)

    def from_matrix(self, matrix: Float[Tensor, "out in_"]) -> Tensor:
        """[out, in, *kernel]."""
        return matrix.view_as(self.weight)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A is [rank, in, *kernel], B is [out, rank, 1, ...]."""
        kernel = cast(tuple[int, ...], vars(self)["kernel_size"])
        return (rank, vars(self)["in_channels"], *kernel), (self.out_channels, rank, *(1 for _ in kernel))

    def magnitude_file_shape(self) -> tuple[int, ...]:
        """[1, out, 1, ...]."""
        return (1, self.out_channels, *(1 for _ in cast(tuple[int, ...], vars(self)["kernel_size"])))

    def setting_beyond_peft(self) -> str | None:
        """A dilation, or a padding mode other than zeros, where it matters: PEFT 0.21 builds its A without both.

        PEFT's A has this layer's kernel, stride and padding alone. A dilation changes nothing along an axis of width
        1, and a padding mode nothing where nothing is padded.
        """
        own = vars(self)
        if any(step > 1 and width > 1 for step, width in zip(own["dilation"], own["kernel_size"], strict=True)):
            return f"dilation={own['dilation']}"
        if own["padding_mode"] != "zeros" and any(own["_reversed_padding_repeated_twice"]):
            return f"padding_mode={own['padding_mode']!r}"
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
        low_rank = None
        if a is not None and b is not None:
            hidden = self.convolve(dropped, a.to(output.dtype), None)
            low_rank = self.scale() * (b.flatten(1).to(output.dtype) @ hidden.flatten(-self._dims))
            low_rank = low_rank.view_as(output)
        if probability and self.adapter.dropout_mode == "whole_change":
            frozen = self.convolve(dropped, weight, None)
        else:
            frozen = output if bias is None else output - self._a_channel(bias)
        return functional.changed_output(output, frozen, low_rank, None if gain is None else self._a_channel(gain))

    @property
    def _dims(self) -> int:
        return self.weight.ndim - 2

    def _a_channel(self, vector: Float[Tensor, " out"]) -> Tensor:
        return vector.view(-1, *(1 for _ in range(self._dims)))


class DoRAConv1d(ConvLayer, nn.Conv1d):
    """An adapted `nn.Conv1d`."""

    def __init__(self, base: nn.Conv1d, config: DoRAConfig) -> None:
        nn.Module.__init__(self)
        self._adopt(base, config)


class DoRAConv2d(ConvLayer, nn.Conv2d):
    """An adapted `nn.Conv2d`."""

    def __init__(self, base: nn.Conv2d, config: DoRAConfig) -> None:
        nn.Module.__init__(self)
        self._adopt(base, config)
