# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
"""Dropout whose mask is never stored: drawn inside the kernel from a seed, and drawn again by the backward pass.

Which element is dropped depends on the seed and on its row and column alone, not on tiles: Philox4x32-10 (Salmon et
al., 2011) with the seed as key and (column // 4, row, 0, 0) as counter gives the numbers of four neighbours.

    forward    a masked copy of x, for A to read
    backward   dx += mask * (dh A), with one pass over dx and no [rows, in] tensor beside it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from dora_vl.core.fast.triton_tiles import (
    Config,
    Operands,
    TiledKernel,
    cast_factor,
    dot_precision,
    fits_on_chip,
    on_device,
    padded,
    tiles,
)

RANK_BLOCK_BYTES = 128
"""Of a column of A, what is multiplied at a time."""
COPIED_ROWS, COPIED_COLUMNS = 8, 512
"""A program's share of the masked copy, which is bound by memory whatever the tile."""


@triton.jit
@no_type_check
def _is_kept(seed, row, first_column, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Bool [BLOCK_ROWS, BLOCK_COLUMNS] from the column on that is `first_column`, a multiple of 4."""
    quad = first_column // 4 + tl.arange(0, BLOCK_COLUMNS // 4)
    zero = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS // 4), dtype=tl.int32)
    r0, r1, r2, r3 = tl.philox(seed, zero + quad[None, :], zero + row[:, None], zero, zero)
    # Joined so that the last two axes, read in order, are 0, 1, 2, 3.
    drawn = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (BLOCK_ROWS, BLOCK_COLUMNS))
    return drawn >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["threshold"])
@no_type_check
def _masked_copy_kernel(  # noqa: PLR0913 - Triton takes values one by one
    source, copy, seed, rows, columns, threshold,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1) * BLOCK_COLUMNS
    column = first + tl.arange(0, BLOCK_COLUMNS)
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    kept = _is_kept(tl.load(seed), row, first, threshold, BLOCK_ROWS, BLOCK_COLUMNS)
    # What is dropped is not read, so that an infinity there leaves none behind.
    tl.store(copy + place, tl.load(source + place, mask=inside & kept, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["threshold"])
@no_type_check
def _masked_product_kernel(  # noqa: PLR0913
    base, changed, hidden, factor, seed, rows, columns, rank, threshold,
    WIDE_DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1) * BLOCK_OUT
    column = first + tl.arange(0, BLOCK_OUT)
    in_rows, in_columns = row < rows, column < columns
    wide_row = row.to(tl.int64)[:, None]
    product = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        k = start + tl.arange(0, BLOCK_RANK)
        in_rank = k < rank
        h = tl.load(hidden + wide_row * rank + k[None, :], mask=in_rows[:, None] & in_rank[None, :], other=0.0)
        a = tl.load(
            factor + k.to(tl.int64)[:, None] * columns + column[None, :],
            mask=in_rank[:, None] & in_columns[None, :], other=0.0,
        )  # fmt: skip
        if WIDE_DOT:
            h, a = h.to(tl.float32), a.to(tl.float32)
        product += tl.dot(h, a, input_precision=PRECISION)
    kept = _is_kept(tl.load(seed), row, first, threshold, BLOCK_ROWS, BLOCK_OUT)
    place = wide_row * columns + column[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    value = tl.load(base + place, mask=inside, other=0.0).to(tl.float32) + tl.where(kept, product, 0.0)
    tl.store(changed + place, value.to(changed.dtype.element_ty), mask=inside)


def _fits(config: Config, named: Mapping[str, Any]) -> bool:
    rows, out = config.kwargs["BLOCK_ROWS"], config.kwargs["BLOCK_OUT"]
    operands = (rows + out) * named["BLOCK_RANK"] * named["factor"].element_size()
    return fits_on_chip(config, named["rows"], operands, rows * out, named["factor"].device)


MASKED_PRODUCT = TiledKernel(
    _masked_product_kernel,
    tiles((64, 64, 4, 2), (64, 128, 8, 2), (128, 64, 8, 2), (32, 128, 4, 2), (16, 64, 4, 2)),
    _fits,
    ("rows", "columns", "rank", "PRECISION"),
)


def new_seed(device: torch.device) -> Int[Tensor, ""]:
    """Drawn on the device from torch's generator, which checkpointing saves and restores; no number comes back."""
    return torch.randint(2**62, (), device=device)


def threshold_of(probability: float) -> int:
    """32 random bits below it drop an element; wrapped to what a signed argument holds."""
    bound = min(round(probability * 2**32), 2**32 - 1)
    return bound - 2**32 if bound >= 2**31 else bound


def masked_copy(x: Float[Tensor, "rows in_"], seed: Int[Tensor, ""], probability: float) -> Float[Tensor, "rows in_"]:
    """x with the dropped elements zero; not rescaled."""
    x = x.contiguous()
    copy = torch.empty_like(x)
    if x.numel():
        rows, columns = x.shape
        grid = (triton.cdiv(rows, COPIED_ROWS), triton.cdiv(columns, COPIED_COLUMNS))
        with on_device(x.device):
            _masked_copy_kernel[grid](
                x,
                copy,
                seed,
                rows,
                columns,
                threshold_of(probability),
                BLOCK_ROWS=COPIED_ROWS,
                BLOCK_COLUMNS=COPIED_COLUMNS,
            )
    return copy


def add_masked_product_(
    dx: Float[Tensor, "rows in_"],
    hidden: Float[Tensor, "rows rank"],
    lora_A: Float[Tensor, "rank in_"],
    seed: Int[Tensor, ""],
    probability: float,
) -> Float[Tensor, "rows in_"]:
    """dx += mask * (hidden A) in place, with the mask of `masked_copy`; one rounding.

    Args:
        dx: The gradient so far, in any layout; one that is not contiguous costs a copy.
        hidden: dh, in the dtype of dx.
        lora_A: In any dtype; rounded to that of dx once.
        seed: As `masked_copy` had it.
        probability: As `masked_copy` had it.
    """
    if not dx.numel():
        return dx
    whole, rank = dx.contiguous(), lora_A.shape[0]
    operands = Operands(
        {
            "base": whole,
            "changed": whole,
            "hidden": hidden.contiguous(),
            "factor": cast_factor(lora_A, dx.dtype),
            "seed": seed,
        },
        {"rows": dx.shape[0], "columns": dx.shape[1], "rank": rank, "threshold": threshold_of(probability)},
        {
            "WIDE_DOT": not dx.is_cuda,
            "PRECISION": dot_precision(dx.dtype, rank),
            "BLOCK_RANK": min(padded(rank), RANK_BLOCK_BYTES // dx.element_size()),
        },
    )

    def grid(tile: Mapping[str, Any]) -> tuple[int, int]:
        return triton.cdiv(dx.shape[0], tile["BLOCK_ROWS"]), triton.cdiv(dx.shape[1], tile["BLOCK_OUT"])

    def scratch() -> Operands:
        return replace(operands, tensors={**operands.tensors, "changed": torch.empty_like(whole)})

    MASKED_PRODUCT.launch(operands, grid, MASKED_PRODUCT.config(operands, grid, scratch))
    return dx if whole is dx else dx.copy_(whole)
