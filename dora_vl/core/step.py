"""What the eager step and every file of kernels share; letters as in `functional.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dora_vl.shapes import Float

CANCELLATION = 0.15
"""Where a row's squared norm falls below this share of its frozen weight's, the factored form lost too many digits."""
NORM_RANGE = torch.bfloat16
"""A norm's products need this dtype's range: A A^T leaves float16's where a row of A is longer than 255."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of norms and gains: float32, or float64 for float64 weights."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Gain:
    """The gain of one layer without a gradient for activations of `dtype`, true until its factors or magnitude change.

    `per_norm` is 1 / n, the derivative of g by m; 0 for a row without a direction.
    """

    full: Float[Tensor, " out"]
    per_norm: Float[Tensor, " out"]
    dtype: torch.dtype

    @cached_property
    def minus_one(self) -> Float[Tensor, " out"]:
        """Returns g - 1 in the activations' dtype."""
        return (self.full - 1).to(self.dtype)


def scaled_product(
    rows: Float[Tensor, "rows inner"], matrix: Float[Tensor, "inner columns"], scale: float
) -> Float[Tensor, "rows columns"]:
    """Computes `scale * rows @ matrix`, scaled inside the product, where it costs no pass over memory."""
    return torch.addmm(rows.new_empty(()), rows, matrix, beta=0, alpha=scale)


LOW_RANK_LIMIT = 64
"""Below this rank B's gradient is computed as [rank, out], twice as fast on CPU; above, transposing it costs more."""


def factor_gradients(
    dy: Float[Tensor, "rows out"],
    x: Float[Tensor, "rows in_"],
    hidden: Float[Tensor, "rows rank"],
    dh: Float[Tensor, "rows rank"],
    lora_B: Float[Tensor, "out rank"],
    sums: Float[Tensor, " out"] | None,
    gain: Gain | None,
) -> tuple[Float[Tensor, "rank in_"], Float[Tensor, "out rank"], Float[Tensor, " out"] | None]:
    """Computes dA = dh^T x, dB = g dy^T h and dm = (B.dy^T h + the sums over rows of dy (f - b)) / n."""
    on_hidden = (hidden.t() @ dy).t() if lora_B.shape[1] < LOW_RANK_LIMIT else dy.t() @ hidden
    # Contiguous: a gradient laid out unlike its parameter would be copied once more.
    dA, dB = (dh.t() @ x).to(lora_B.dtype), on_hidden.to(lora_B.dtype, memory_format=torch.contiguous_format)
    if gain is None or sums is None:
        return dA, dB, None
    dm = (sums + torch.linalg.vecdot(lora_B, dB)) * gain.per_norm
    return dA, dB.mul_(gain.full.unsqueeze(1)), dm
