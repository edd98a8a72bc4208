# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
"""The norms of V's rows on CUDA: many layers in one launch, and no number that the host must wait for.

    n^2 = ||W||^2 + 2 s B.(W A^T + s/2 B A A^T)        a row at a time, in float32

Which rows cancel is known on the device alone. A compiled graph can neither ask for it nor hold a result of that
size, so a second kernel looks at all rows, sixteen a program: a program without a row that cancels copies what it
found and ends, one with such a row reads its rows of W and takes their norms dense.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dora_vl.core.fast.triton_tiles import dot_precision, on_device, padded
from dora_vl.core.gain import CANCELLATION

RANK_BLOCK = 32
ROWS = 64
"""Of a program that takes squared norms."""
CAREFUL_ROWS = 16
"""Of a program that looks for rows that cancel; the fewer, the fewer others are taken dense with one."""
CAREFUL_COLUMNS = 64


@triton.jit
@no_type_check
def _squared_kernel(  # noqa: PLR0913 - Triton takes values one by one
    frozen, factor, weight_on_A, gram, squared, out, rank, scale,
    WIDE_DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < out
    place = (layer * out + row)[:, None] * rank
    own_gram = gram + layer * rank * rank
    change = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        k = start + tl.arange(0, BLOCK_RANK)
        in_rank = k < rank
        inside = in_rows[:, None] & in_rank[None, :]
        grown = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
        for inner in range(0, rank, BLOCK_RANK):
            j = inner + tl.arange(0, BLOCK_RANK)
            in_inner = j < rank
            b = tl.load(factor + place + j[None, :], mask=in_rows[:, None] & in_inner[None, :], other=0.0)
            g = tl.load(own_gram + j[:, None] * rank + k[None, :], mask=in_inner[:, None] & in_rank[None, :], other=0.0)
            if WIDE_DOT:
                b, g = b.to(tl.float32), g.to(tl.float32)
            grown += tl.dot(b, g, input_precision=PRECISION)
        on_A = tl.load(weight_on_A + place + k[None, :], mask=inside, other=0.0).to(tl.float32)
        own = tl.load(factor + place + k[None, :], mask=inside, other=0.0).to(tl.float32)
        change += tl.sum(own * (on_A + (scale / 2) * grown), axis=1)
    known = tl.load(frozen + layer * out + row, mask=in_rows, other=0.0)
    tl.store(squared + layer * out + row, known + 2 * scale * change, mask=in_rows)


@triton.jit
@no_type_check
def _careful_kernel(  # noqa: PLR0913
    frozen, squared, weight, lora_A, lora_B, trusted, out, columns, rank, row_stride, column_stride,
    scale, cancellation,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < out
    known = tl.load(frozen + row, mask=in_rows, other=1.0)
    found = tl.load(squared + row, mask=in_rows, other=1.0)
    cancelled = found <= cancellation * known
    wide_row = row.to(tl.int64)[:, None]
    if tl.max(cancelled.to(tl.int32), axis=0) > 0:
        total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        for first in range(0, columns, BLOCK_COLUMNS):
            column = first + tl.arange(0, BLOCK_COLUMNS)
            in_columns = column < columns
            change = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
            for start in range(0, rank, BLOCK_RANK):
                k = start + tl.arange(0, BLOCK_RANK)
                in_rank = k < rank
                b = tl.load(lora_B + wide_row * rank + k[None, :], mask=in_rows[:, None] & in_rank[None, :], other=0.0)
                a = tl.load(
                    lora_A + k.to(tl.int64)[:, None] * columns + column[None, :],
                    mask=in_rank[:, None] & in_columns[None, :], other=0.0,
                )  # fmt: skip
                change += tl.dot(b.to(tl.float32), a.to(tl.float32), input_precision="ieee")
            w = tl.load(
                weight + wide_row * row_stride + column.to(tl.int64)[None, :] * column_stride,
                mask=in_rows[:, None] & in_columns[None, :], other=0.0,
            )  # fmt: skip
            direction = w.to(tl.float32) + scale * change
            total += tl.sum(direction * direction, axis=1)
        found = tl.where(cancelled, total, found)
    tl.store(trusted + row, tl.where(found < 0, 0.0, found), mask=in_rows)


def norms_squared(
    weight_norms_squared: Float[Tensor, "layers out"],
    lora_B: Float[Tensor, "layers out rank"],
    weight_on_A: Float[Tensor, "layers out rank"],
    gram: Float[Tensor, "layers rank rank"],
    scale: float,
) -> Float[Tensor, "layers out"]:
    """n^2 of layers of one shape from W A^T and A A^T, these in one dtype; exact but for rows that cancel."""
    layers, out, rank = lora_B.shape
    squared = torch.empty_like(weight_norms_squared, memory_format=torch.contiguous_format)
    with on_device(squared.device):
        _squared_kernel[(triton.cdiv(out, ROWS), layers)](
            weight_norms_squared.contiguous(),
            lora_B.contiguous(),
            weight_on_A.contiguous(),
            gram.contiguous(),
            squared,
            out,
            rank,
            scale,
            WIDE_DOT=not squared.is_cuda,
            PRECISION=dot_precision(lora_B.dtype, rank),
            BLOCK_ROWS=ROWS,
            BLOCK_RANK=min(padded(rank), RANK_BLOCK),
        )
    return squared


def norms(
    weight: Float[Tensor, "out in_"],
    weight_norms_squared: Float[Tensor, " out"],
    lora_A: Float[Tensor, "rank in_"],
    lora_B: Float[Tensor, "out rank"],
    scale: float,
) -> Float[Tensor, " out"]:
    """n of each row, those that cancel taken dense, without a shape or a branch that hangs on values.

    Without a row that cancels the second launch reads two vectors. With one it reads the sixteen rows of W in its
    program: one row in sixteen, spread evenly, is as dear as all of W.

    Args:
        weight: In any layout; it is read where it lies.
        weight_norms_squared: In float32.
        lora_A: In any dtype; taken in the weight's for the factored form, in float32 for rows that cancel.
        lora_B: As `lora_A`.
        scale: s.
    """
    a, b = (factor.detach().contiguous() for factor in (lora_A, lora_B))
    cast_a, cast_b = a.to(weight.dtype), b.to(weight.dtype)
    frozen = weight_norms_squared.contiguous()
    squared = norms_squared(frozen[None], cast_b[None], (weight @ cast_a.t())[None], (cast_a @ cast_a.t())[None], scale)
    found = torch.empty_like(frozen)
    with on_device(weight.device):
        _careful_kernel[(triton.cdiv(len(frozen), CAREFUL_ROWS),)](
            frozen,
            squared,
            weight,
            a,
            b,
            found,
            *weight.shape,
            a.shape[0],
            *weight.stride(),
            scale,
            CANCELLATION,
            BLOCK_ROWS=CAREFUL_ROWS,
            BLOCK_COLUMNS=CAREFUL_COLUMNS,
            BLOCK_RANK=min(padded(a.shape[0]), RANK_BLOCK),
        )
    return found.sqrt_()  # torch's, as the magnitudes came to be, so that a change of nothing has gain 1
