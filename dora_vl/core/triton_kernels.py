# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
"""The passes over [rows, out] around the frozen product, fused for CUDA with Triton; see `fused.py` for when.

Letters as in `functional.py`. Both functions equal what `functional.AdaptedProduct` does in torch, with one rounding to
the activations' dtype at the end instead of one an operation:

    forward    y = g (W x + h B^T) + b        reads W x + b and h = s A x, writes y, once
    backward   dz = g dy, (dy * y).sum(0), dy.sum(0), dh = s dz B       reads dy and y, writes dz, once

What they leave to the vendor's matrix products are the large ones: W x, dz W, h^T dz. On CPU the kernels run under
Triton's interpreter alone (TRITON_INTERPRET=1), whose dot product does not know bfloat16: `WIDE_DOT` widens there.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
BLOCK_OUT = 64
LARGEST_RANK = 256
"""Above it a program's share of dh no longer fits into registers, and dh is left to the vendor's product."""


@triton.jit
@no_type_check
def _output_kernel(  # noqa: PLR0913 - Triton takes values one by one
    product, hidden, factor, bias, minus_one, rows, out, rank,
    HAS_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr, WIDE_DOT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_RANK: tl.constexpr,
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
            b = b.to(h.dtype)
            if WIDE_DOT:
                h, b = h.to(tl.float32), b.to(tl.float32)
            change += tl.dot(h, tl.trans(b), input_precision="ieee")
        value += change
    away = tl.load(minus_one + column, mask=in_out, other=0.0).to(tl.float32)[None, :]
    result = value + away * value
    if HAS_BIAS:
        result -= away * tl.load(bias + column, mask=in_out, other=0.0).to(tl.float32)[None, :]
    tl.store(product + place, result.to(product.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _backward_kernel(  # noqa: PLR0913
    dy, y, factor, minus_one, dz, dh, dy_y, dy_sum, rows, out, rank, scale, blocks_a_split,
    HAS_Y: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr, WIDE_DOT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    part, split = tl.program_id(0), tl.program_id(1)
    row = part * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, BLOCK_RANK)
    in_rows, in_rank = row < rows, k < rank
    wide_row = row.to(tl.int64)[:, None]
    hidden = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
    for block in range(split * blocks_a_split, (split + 1) * blocks_a_split):
        column = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        in_out = column < out
        inside = in_rows[:, None] & in_out[None, :]
        place = wide_row * out + column[None, :]
        upstream = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        away = tl.load(minus_one + column, mask=in_out, other=0.0).to(tl.float32)[None, :]
        scaled = (upstream + away * upstream).to(dz.dtype.element_ty)
        tl.store(dz + place, scaled, mask=inside)
        sums = part.to(tl.int64) * out + column
        if HAS_Y:
            output = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(dy_y + sums, tl.sum(upstream * output, axis=0), mask=in_out)
        if HAS_BIAS:
            tl.store(dy_sum + sums, tl.sum(upstream, axis=0), mask=in_out)
        if HAS_LOW_RANK:
            b = tl.load(
                factor + column[:, None] * rank + k[None, :], mask=in_out[:, None] & in_rank[None, :], other=0.0
            )
            b = b.to(scaled.dtype)
            if WIDE_DOT:
                scaled, b = scaled.to(tl.float32), b.to(tl.float32)
            hidden += tl.dot(scaled, b, input_precision="ieee")
    if HAS_LOW_RANK:
        wide_part = (split.to(tl.int64) * rows + row)[:, None] * rank + k[None, :]
        tl.store(dh + wide_part, scale * hidden, mask=in_rows[:, None] & in_rank[None, :])


def adapted_output_(
    product: Float[Tensor, "rows out"],
    hidden: Float[Tensor, "rows rank"] | None,
    lora_B: Float[Tensor, "out rank"] | None,
    bias: Float[Tensor, " out"] | None,
    minus_one: Float[Tensor, " out"],
) -> Float[Tensor, "rows out"]:
    """Turns W x + b into g (W x + h B^T) + b in place; bitwise nothing where g = 1 and B = 0.

    Args:
        product: W x + b, contiguous.
        hidden: s A x in the same dtype; None together with `lora_B` for a magnitude alone.
        lora_B: In any dtype; rounded to that of `hidden` for the product, as the eager path does it.
        minus_one: g - 1.
    """
    rows, out = product.shape
    low_rank = hidden is not None and lora_B is not None
    rank = lora_B.shape[1] if lora_B is not None else 1
    block_rows = _block_rows(rows)
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(out, BLOCK_OUT))
    _output_kernel[grid](
        product,
        hidden.contiguous() if hidden is not None else product,
        lora_B.detach().contiguous() if lora_B is not None else product,
        product if bias is None else bias.detach(),
        minus_one,
        rows,
        out,
        rank,
        HAS_BIAS=bias is not None,
        HAS_LOW_RANK=low_rank,
        WIDE_DOT=not product.is_cuda,
        BLOCK_ROWS=block_rows,
        BLOCK_OUT=BLOCK_OUT,
        BLOCK_RANK=min(_padded(rank), 64),
    )
    return product


class Backward(NamedTuple):
    """What one pass over dy gives."""

    dz: Float[Tensor, "rows out"]
    """g dy, in the dtype of dy."""
    dh: Float[Tensor, "rows rank"] | None
    """s dz B, in the dtype of dy."""
    dy_y: Float[Tensor, " out"] | None
    """(dy * y).sum(0) in float32."""
    dy_sum: Float[Tensor, " out"] | None
    """dy.sum(0) in float32, the bias's gradient."""


def backward_pass(
    dy: Float[Tensor, "rows out"],
    y: Float[Tensor, "rows out"] | None,
    lora_B: Float[Tensor, "out rank"] | None,
    minus_one: Float[Tensor, " out"],
    scale: float,
    *,
    with_bias: bool,
) -> Backward:
    """dz, dh and the two column sums; `y` None where no magnitude trains, `lora_B` None where there is none."""
    dy = dy.contiguous()
    rows, out = dy.shape
    rank = 1 if lora_B is None else lora_B.shape[1]
    inside = lora_B is not None and rank <= LARGEST_RANK
    block_rows = _block_rows(rows)
    parts, blocks = triton.cdiv(rows, block_rows), triton.cdiv(out, BLOCK_OUT)
    splits = min(blocks, max(1, triton.cdiv(_programs_wanted(dy), max(parts, 1))))
    dz = torch.empty_like(dy)
    dh = dy.new_empty(splits, rows, rank, dtype=torch.float32) if inside else None
    sums = [dy.new_empty(parts, out, dtype=torch.float32) if wanted else None for wanted in (y is not None, with_bias)]
    _backward_kernel[(parts, splits)](
        dy,
        dy if y is None else y.contiguous(),
        dy if lora_B is None else lora_B.detach().contiguous(),
        minus_one,
        dz,
        dz if dh is None else dh,
        *(dz if total is None else total for total in sums),
        rows,
        out,
        rank,
        scale,
        triton.cdiv(blocks, splits),
        HAS_Y=y is not None,
        HAS_BIAS=with_bias,
        HAS_LOW_RANK=inside,
        WIDE_DOT=not dy.is_cuda,
        BLOCK_ROWS=block_rows,
        BLOCK_OUT=BLOCK_OUT,
        BLOCK_RANK=_padded(rank) if inside else 16,
        num_warps=8 if inside and rank > 64 else 4,
    )
    if lora_B is not None:
        whole = (dz @ lora_B.detach().to(dz.dtype)) * scale if dh is None else _summed(dh).to(dz.dtype)
    else:
        whole = None
    dy_y, dy_sum = (None if total is None else _summed(total) for total in sums)
    return Backward(dz, whole, dy_y, dy_sum)


def _summed(parts: Float[Tensor, "parts ..."]) -> Float[Tensor, ...]:
    return parts[0] if len(parts) == 1 else parts.sum(dim=0)


def _block_rows(rows: int) -> int:
    """16 is the least that the tensor cores take; decoding has one row."""
    return 16 if rows <= 16 else 64


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _programs_wanted(tensor: Tensor) -> int:
    """Enough for every multiprocessor of the device to have two."""
    if not tensor.is_cuda:
        return 4
    return 2 * torch.cuda.get_device_properties(tensor.device).multi_processor_count
