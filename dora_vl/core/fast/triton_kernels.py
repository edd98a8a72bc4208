# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
"""The passes over [rows, out] around the frozen product, fused for CUDA with Triton; see `fused.py` for when.

Letters as in `functional.py`. Each equals what `functional.AdaptedProduct` does in torch, with one rounding to the
activations' dtype at the end instead of one an operation. Here is the forward pass, in `triton_backward.py` the other:

    y = g (W x + h B^T) + b        reads W x + b and h = s A x, writes y, once

What they leave to the vendor's matrix products are the large ones: W x, dz W, h^T dz. On CPU the kernels run under
Triton's interpreter alone (TRITON_INTERPRET=1), whose dot product does not know bfloat16: `WIDE_DOT` widens there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dora_vl.core.fast.triton_backward import backward_pass as backward_pass
from dora_vl.core.fast.triton_tiles import (
    Config,
    Operands,
    TiledKernel,
    cast_factor,
    dot_precision,
    fits_on_chip,
    padded,
    tiles,
)

RANK_BLOCK_BYTES = 128
"""Of a row of B, what is multiplied at a time: twice as much of float32 spills kilobytes (ptxas)."""


@triton.jit
@no_type_check
def _output_kernel(  # noqa: PLR0913 - Triton takes values one by one
    product, y, hidden, factor, bias, minus_one, rows, out, rank,
    HAS_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr, WIDE_DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_RANK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_rows, in_out = row < rows, column < out
    wide_row = row.to(tl.int64)[:, None]
    place = wide_row * out + column[None, :]
    inside = in_rows[:, None] & in_out[None, :]
    value = tl.load(product + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_LOW_RANK:
        change = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
        for start in range(0, rank, BLOCK_RANK):
            k = start + tl.arange(0, BLOCK_RANK)
            in_rank = k < rank
            h = tl.load(hidden + wide_row * rank + k[None, :], mask=in_rows[:, None] & in_rank[None, :], other=0.0)
            b = tl.load(
                factor + column[:, None] * rank + k[None, :], mask=in_out[:, None] & in_rank[None, :], other=0.0
            )
            if WIDE_DOT:
                h, b = h.to(tl.float32), b.to(tl.float32)
            change += tl.dot(h, tl.trans(b), input_precision=PRECISION)
        value += change
    away = tl.load(minus_one + column, mask=in_out, other=0.0).to(tl.float32)[None, :]
    result = value + away * value
    if HAS_BIAS:
        result -= away * tl.load(bias + column, mask=in_out, other=0.0).to(tl.float32)[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


def _output_fits(config: Config, named: Mapping[str, Any]) -> bool:
    rows, out = config.kwargs["BLOCK_ROWS"], config.kwargs["BLOCK_OUT"]
    operands = (rows + out) * named["BLOCK_RANK"] * named["factor"].element_size()
    return fits_on_chip(config, named["rows"], operands, rows * out, named["minus_one"].device)


OUTPUT = TiledKernel(
    _output_kernel,
    tiles((64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 4, 2), (128, 128, 8, 3), (32, 128, 4, 3), (16, 128, 4, 2),
          (16, 256, 4, 2), (16, 64, 4, 2)),
    _output_fits,
    ("rows", "out", "rank", "HAS_BIAS", "HAS_LOW_RANK", "PRECISION"),
)  # fmt: skip


def adapted_output_(
    product: Float[Tensor, "rows out"],
    hidden: Float[Tensor, "rows rank"] | None,
    lora_B: Float[Tensor, "out rank"] | None,
    bias: Float[Tensor, " out"] | None,
    minus_one: Float[Tensor, " out"],
) -> Float[Tensor, "rows out"]:
    """Turns W x + b into g (W x + h B^T) + b in place; bitwise nothing where g = 1 and B = 0.

    Args:
        product: W x + b, in any layout; one that is not contiguous costs a copy.
        hidden: s A x in the same dtype; None together with `lora_B` for a magnitude alone.
        lora_B: In any dtype; rounded to that of `hidden` once, as the eager path does it.
        bias: In any dtype.
        minus_one: g - 1.
    """
    whole = product.contiguous()
    _output(whole, whole, hidden, lora_B, bias, minus_one)
    return product if whole is product else product.copy_(whole)


def adapted_output(
    product: Float[Tensor, "*batch out"],
    hidden: Float[Tensor, "rows rank"] | None,
    lora_B: Float[Tensor, "out rank"] | None,
    bias: Float[Tensor, " out"] | None,
    minus_one: Float[Tensor, " out"],
) -> Float[Tensor, "*batch out"]:
    """The same into a new tensor, no view of another, for a product that somebody else still reads."""
    product = product.contiguous()
    y = torch.empty_like(product)
    _output(product, y, hidden, lora_B, bias, minus_one)
    return y


def _output(
    product: Tensor, y: Tensor, hidden: Tensor | None, lora_B: Tensor | None, bias: Tensor | None, minus_one: Tensor
) -> None:
    if not product.numel():
        return
    out = product.shape[-1]
    rows = product.numel() // out
    low_rank = hidden is not None and lora_B is not None
    rank = lora_B.shape[1] if lora_B is not None else 1
    operands = Operands(
        {
            "product": product,
            "y": y,
            "hidden": hidden.contiguous() if hidden is not None else product,
            "factor": cast_factor(lora_B, product.dtype) if lora_B is not None else product,
            "bias": product if bias is None else bias.detach().contiguous(),
            "minus_one": minus_one.contiguous(),
        },
        {"rows": rows, "out": out, "rank": rank},
        {
            "HAS_BIAS": bias is not None,
            "HAS_LOW_RANK": low_rank,
            "WIDE_DOT": not product.is_cuda,
            "PRECISION": dot_precision(product.dtype, rank),
            "BLOCK_RANK": min(padded(rank), RANK_BLOCK_BYTES // product.element_size()),
        },
    )

    def grid(tile: Mapping[str, Any]) -> tuple[int, int]:
        return triton.cdiv(rows, tile["BLOCK_ROWS"]), triton.cdiv(out, tile["BLOCK_OUT"])

    def scratch() -> Operands:
        return replace(operands, tensors={**operands.tensors, "y": torch.empty_like(y)})

    OUTPUT.launch(operands, grid, OUTPUT.config(operands, grid, scratch))
