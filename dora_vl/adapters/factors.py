"""One adapted layer as the equation reads it, whatever the layer is: a linear, a convolution, an embedding.

A convolution's kernel is a linear layer's weight once its last axes are flattened; an embedding's table and
transformers' `Conv1D` weight are linear weights transposed. So the equation in `core.functional` serves all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dora_vl.core import functional

MagnitudeAxis = Literal["output", "input"]


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A, B and magnitude of one layer, flattened to two axes; A and B None is a magnitude alone."""

    lora_A: Float[Tensor, "rank in_"] | None
    lora_B: Float[Tensor, "out rank"] | None
    magnitude: Float[Tensor, " length"] | None
    scale: float
    transposed: bool = False
    """The layer stores its weight as [in, out]: an embedding's table, transformers' `Conv1D`."""
    magnitude_axis: MagnitudeAxis = "output"
    """`output`: one magnitude an output row, the paper's form; `input`: one an input column (early LyCORIS)."""
    shared_A: bool = False
    """A is DVoRA's, as wide as the widest layer: `on_weight` cuts it."""

    @property
    def rank(self) -> int:
        """Rows of A; 0 for a magnitude alone."""
        return 0 if self.lora_A is None else len(self.lora_A)

    def on_weight(self, shape: tuple[int, ...], *, transposed: bool) -> Factors:
        """These factors for a layer whose weight has this shape and whose class may store it as [in, out]."""
        turned = replace(self, transposed=True) if transposed else self
        if self.lora_A is None or not self.shared_A:
            return turned
        columns = turned.as_matrix(torch.empty(shape, device="meta")).shape[1]
        return replace(turned, lora_A=self.lora_A[:, :columns], shared_A=False)

    def shape_fits(self, weight: Tensor) -> bool:
        """Whether A, B and the magnitude belong to a weight of this shape."""
        rows, columns = self.as_matrix(weight).shape
        along = rows if self.magnitude_axis == "output" else columns
        return (
            (self.lora_A is None or self.lora_A.shape[1] == columns)
            and (self.lora_B is None or self.lora_B.shape[0] == rows)
            and (self.magnitude is None or self.magnitude.numel() == along)
        )

    def as_matrix(self, weight: Tensor) -> Float[Tensor, "out in_"]:
        """The layer's weight as the equation's [out, in]; a view."""
        return weight.t() if self.transposed else weight.flatten(1)

    def in_layer_shape(self, matrix: Float[Tensor, "out in_"], like: Tensor) -> Tensor:
        """Back from [out, in] to the shape that the layer stores."""
        return matrix.t().contiguous() if self.transposed else matrix.view(like.shape)

    def merged(self, weight: Tensor) -> Tensor:
        """W' in the shape of `weight`, computed and returned in float32 (float64 for float64)."""
        matrix = self.as_matrix(weight.detach())
        wide = matrix.to(functional.accumulation_dtype(weight.dtype))
        if self.magnitude_axis == "input":
            a = None if self.lora_B is None else self.lora_B.t()
            b = None if self.lora_A is None else self.lora_A.t()
            new = functional.merged_weight(wide.t(), a, b, self.magnitude, self.scale).t().contiguous()
        else:
            new = functional.merged_weight(wide, self.lora_A, self.lora_B, self.magnitude, self.scale)
        return self.in_layer_shape(new, weight)

    def gain_on(self, weight: Tensor) -> Float[Tensor, " out"]:
        """g = m / ||W + s B A|| of each output row; ones without a magnitude."""
        matrix = self.as_matrix(weight.detach())
        direction = functional.dense_direction(matrix, self.lora_A, self.lora_B, self.scale)
        if self.magnitude is None:
            return torch.ones(len(matrix), dtype=direction.dtype)
        return functional.gain(self.magnitude, functional.root(functional.row_norms_squared(direction)))


@dataclass(frozen=True, kw_only=True)
class ExpertFactors:
    """A, B and magnitude of experts that are one tensor in the model."""

    lora_A: Float[Tensor, "experts rank in_"] | None
    lora_B: Float[Tensor, "experts out rank"] | None
    magnitude: Float[Tensor, "experts out"] | None
    scale: float

    @property
    def experts_and_rows(self) -> tuple[int, int]:
        """How many experts there are, and output rows of each."""
        known = self.lora_B if self.lora_B is not None else self.magnitude
        assert known is not None
        return known.shape[0], known.shape[1]

    def of(self, expert: int, part: int = 0, parts: int = 1) -> Factors:
        """Those of one expert's matrix, or of the `part`-th of `parts` of its output rows."""
        size = self.experts_and_rows[1] // parts
        rows = slice(part * size, (part + 1) * size)
        return Factors(
            lora_A=None if self.lora_A is None else self.lora_A[expert],
            lora_B=None if self.lora_B is None else self.lora_B[expert, rows],
            magnitude=None if self.magnitude is None else self.magnitude[expert, rows],
            scale=self.scale,
        )
