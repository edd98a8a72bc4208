# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
"""The backward pass over [rows, out], fused for CUDA with Triton; letters as in `functional.py`.

    dz = g dy, dh = s dz B, dm, db      reads dy and y, writes dz, once; a second, small kernel adds up

Sums over rows are taken by each program over its own rows and added up in one order: no atomic operations, so that a
pass repeats to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
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
    programs_wanted,
    tiles,
)
from dora_vl.core.gain import Gain

SUMMED_COLUMNS, SUMMED_HIDDEN = 64, 1024
"""Sums that one program of the second kernel takes."""
LARGEST_RANK = {2: 256, 4: 64}
"""By bytes of a number; above it a program's share of dh and B leaves the chip, and dh is the vendor's product."""


@triton.jit
@no_type_check
def _backward_kernel(  # noqa: PLR0913
    dy, kept, bias, factor, minus_one, dz, dh, magnitude_parts, bias_parts, rows, out, rank, scale,
    HAS_KEPT: tl.constexpr, HAS_BIAS: tl.constexpr, SUM_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr,
    WIDE_DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    part, split = tl.program_id(0), tl.program_id(1)
    blocks_a_split = tl.cdiv(tl.cdiv(out, BLOCK_OUT), tl.num_programs(1))
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
        if HAS_KEPT:
            output = tl.load(kept + place, mask=inside, other=0.0).to(tl.float32)
            if HAS_BIAS:  # before the sum: afterwards a large bias would leave it no digits
                output -= tl.load(bias + column, mask=in_out, other=0.0).to(tl.float32)[None, :]
            tl.store(magnitude_parts + sums, tl.sum(upstream * output, axis=0), mask=in_out)
        if SUM_BIAS:
            tl.store(bias_parts + sums, tl.sum(upstream, axis=0), mask=in_out)
        if HAS_LOW_RANK:
            b = tl.load(
                factor + column[:, None] * rank + k[None, :], mask=in_out[:, None] & in_rank[None, :], other=0.0
            )
            if WIDE_DOT:
                scaled, b = scaled.to(tl.float32), b.to(tl.float32)
            hidden += tl.dot(scaled, b, input_precision=PRECISION)
    if HAS_LOW_RANK:
        wide_part = (split.to(tl.int64) * rows + row)[:, None] * rank + k[None, :]
        tl.store(dh + wide_part, (scale * hidden).to(dh.dtype.element_ty), mask=in_rows[:, None] & in_rank[None, :])


@triton.jit
@no_type_check
def _sums_kernel(  # noqa: PLR0913
    magnitude_parts, bias_parts, per_magnitude, dh_parts, dm, db, dh, parts, out, splits, hidden_numbers,
    HAS_KEPT: tl.constexpr, SUM_BIAS: tl.constexpr, SUM_HIDDEN: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    if SUM_HIDDEN:  # the programs of both sums go over their numbers side by side, for one launch
        number = tl.program_id(0).to(tl.int64) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
        there = number < hidden_numbers
        total = tl.zeros((BLOCK_HIDDEN,), dtype=tl.float32)
        for split in range(0, splits):
            total += tl.load(dh_parts + split * hidden_numbers + number, mask=there, other=0.0)
        tl.store(dh + number, total.to(dh.dtype.element_ty), mask=there)
    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_out = column < out
    of_magnitude = tl.zeros((BLOCK_PARTS, BLOCK_OUT), dtype=tl.float32)
    of_bias = tl.zeros((BLOCK_PARTS, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        place = part.to(tl.int64)[:, None] * out + column[None, :]
        inside = (part < parts)[:, None] & in_out[None, :]
        if HAS_KEPT:
            of_magnitude += tl.load(magnitude_parts + place, mask=inside, other=0.0)
        if SUM_BIAS:
            of_bias += tl.load(bias_parts + place, mask=inside, other=0.0)
    if HAS_KEPT:
        per = tl.load(per_magnitude + column, mask=in_out, other=0.0).to(tl.float32)
        tl.store(dm + column, per * tl.sum(of_magnitude, axis=0), mask=in_out)
    if SUM_BIAS:
        tl.store(db + column, tl.sum(of_bias, axis=0), mask=in_out)


def _backward_fits(config: Config, named: Mapping[str, Any]) -> bool:
    rows, out = config.kwargs["BLOCK_ROWS"], config.kwargs["BLOCK_OUT"]
    size, rank = named["dy"].element_size(), named["BLOCK_RANK"]
    return fits_on_chip(config, named["rows"], out * rank * size, rows * rank, named["minus_one"].device)


BACKWARD = TiledKernel(
    _backward_kernel,
    tiles((64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (128, 64, 8, 2), (32, 64, 4, 3), (32, 128, 4, 2),
          (16, 128, 4, 2), (16, 64, 8, 2), (16, 64, 4, 2)),
    _backward_fits,
    ("rows", "out", "rank", "HAS_KEPT", "HAS_BIAS", "SUM_BIAS", "HAS_LOW_RANK", "PRECISION"),
)  # fmt: skip


class Backward(NamedTuple):
    """What one pass over dy gives."""

    dz: Float[Tensor, "rows out"]
    """g dy, in the dtype of dy."""
    dh: Float[Tensor, "rows rank"] | None
    """s dz B, in the dtype of dy."""
    dm: Float[Tensor, " out"] | None
    """(dy * (kept - b)).sum(0) / m in float32, the magnitude's gradient."""
    db: Float[Tensor, " out"] | None
    """dy.sum(0) in float32, the bias's gradient."""


def backward_pass(
    dy: Float[Tensor, "rows out"],
    kept: Float[Tensor, "rows out"] | None,
    lora_B: Float[Tensor, "out rank"] | None,
    bias: Float[Tensor, " out"] | None,
    gain: Gain,
    scale: float,
    *,
    with_bias_sum: bool,
) -> Backward:
    """dz, dh and the gradients of magnitude and bias.

    Args:
        dy: The output's gradient, in any layout.
        kept: y, for a `gain` whose `per_magnitude` is 1 / m; None where no magnitude trains.
        lora_B: None for a magnitude alone.
        bias: What stands in `kept` outside the gain, subtracted before anything is added up.
        gain: Without fragile rows.
        scale: s, with what dropout adds to it.
        with_bias_sum: Whether the bias trains.
    """
    dy = dy.contiguous()
    factor = None if lora_B is None else cast_factor(lora_B, dy.dtype)
    operands = _operands(dy, kept, factor, bias, gain, scale, with_bias_sum)
    found = _run_backward(operands, gain.per_magnitude)
    if factor is None or found.dh is not None:
        return found
    return found._replace(dh=torch.addmm(found.dz.new_empty(()), found.dz, factor, beta=0, alpha=scale))


def _operands(
    dy: Tensor,
    kept: Tensor | None,
    factor: Tensor | None,
    bias: Tensor | None,
    gain: Gain,
    scale: float,
    with_bias_sum: bool,
) -> Operands:
    """Of the first kernel; dy stands for a tensor that is not there, which is then not read."""
    rows, out = dy.shape
    rank = 1 if factor is None else factor.shape[1]
    inside = factor is not None and rank <= LARGEST_RANK[dy.element_size()]
    return Operands(
        {
            "dy": dy,
            "kept": dy if kept is None else kept.contiguous(),
            "bias": dy if bias is None else bias.detach().contiguous(),
            "factor": dy if factor is None else factor,
            "minus_one": gain.minus_one.contiguous(),
        },
        {"rows": rows, "out": out, "rank": rank, "scale": scale},
        {
            "HAS_KEPT": kept is not None,
            "HAS_BIAS": bias is not None and kept is not None,
            "SUM_BIAS": with_bias_sum,
            "HAS_LOW_RANK": inside,
            "WIDE_DOT": not dy.is_cuda,
            "PRECISION": dot_precision(dy.dtype, rank),
            "BLOCK_RANK": padded(rank) if inside else 16,
        },
    )


def _run_backward(operands: Operands, per_magnitude: Tensor) -> Backward:
    dy, wants = operands.tensors["dy"], operands.constants
    rows, out = dy.shape
    if not dy.numel():
        sums = [dy.new_zeros(out, dtype=torch.float32) if wants[name] else None for name in ("HAS_KEPT", "SUM_BIAS")]
        dh = dy.new_zeros(rows, int(operands.numbers["rank"])) if wants["HAS_LOW_RANK"] else None
        return Backward(torch.empty_like(dy), dh, *sums)

    def grid(tile: Mapping[str, Any]) -> tuple[int, int]:
        parts, blocks = triton.cdiv(rows, tile["BLOCK_ROWS"]), triton.cdiv(out, tile["BLOCK_OUT"])
        return parts, min(blocks, max(1, triton.cdiv(programs_wanted(dy.device), parts)))

    def results(tiles: list[Config]) -> Operands:
        parts, splits = (max(sizes) for sizes in zip(*(grid(tile.kwargs) for tile in tiles), strict=True))
        return replace(operands, tensors={**operands.tensors, **_result_tensors(operands, parts, splits)})

    config = BACKWARD.config(operands, grid, lambda: results(BACKWARD.fitting(operands.everything())))
    filled = results([config])
    BACKWARD.launch(filled, grid, config)
    found = filled.tensors
    return Backward(found["dz"], *_sums(found, per_magnitude, wants))


def _result_tensors(operands: Operands, parts: int, splits: int) -> dict[str, Tensor]:
    """Room for the results; dh in the end's dtype where nothing is left to add up."""
    dy, wants = operands.tensors["dy"], operands.constants
    dz, none = torch.empty_like(dy), dy.new_empty(1, dtype=torch.float32)
    dh_shape = (splits, dy.shape[0], int(operands.numbers["rank"]))
    sums = (parts, dy.shape[1])
    return {
        "dz": dz,
        "dh": dy.new_empty(dh_shape, dtype=dy.dtype if splits == 1 else torch.float32) if wants["HAS_LOW_RANK"] else dz,
        "magnitude_parts": none.new_empty(sums) if wants["HAS_KEPT"] else none,
        "bias_parts": none.new_empty(sums) if wants["SUM_BIAS"] else none,
    }


def _sums(
    found: Mapping[str, Tensor], per_magnitude: Tensor, wants: Mapping[str, Any]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh, dm and db from what the programs found, in one launch and always in one order."""
    dz, dh_parts = found["dz"], found["dh"]
    parts = found["magnitude_parts" if wants["HAS_KEPT"] else "bias_parts"]
    sum_hidden = wants["HAS_LOW_RANK"] and len(dh_parts) > 1
    dh = dh_parts[0] if wants["HAS_LOW_RANK"] else None
    if sum_hidden:
        dh = dz.new_empty(dh_parts.shape[1:])
    dm, db = (parts.new_empty(dz.shape[1]) if wants[name] else None for name in ("HAS_KEPT", "SUM_BIAS"))
    if dm is None and db is None and not sum_hidden:
        return dh, None, None
    out = 0 if dm is None and db is None else dz.shape[1]
    numbers = dh.numel() if sum_hidden and dh is not None else 0
    with on_device(dz.device):
        _sums_kernel[(max(triton.cdiv(out, SUMMED_COLUMNS), triton.cdiv(numbers, SUMMED_HIDDEN)),)](
            found["magnitude_parts"],
            found["bias_parts"],
            per_magnitude.contiguous(),
            dh_parts,
            parts if dm is None else dm,
            parts if db is None else db,
            dz if dh is None else dh,
            len(parts),
            out,
            len(dh_parts),
            numbers,
            HAS_KEPT=wants["HAS_KEPT"],
            SUM_BIAS=wants["SUM_BIAS"],
            SUM_HIDDEN=sum_hidden,
            BLOCK_PARTS=32,
            BLOCK_OUT=SUMMED_COLUMNS,
            BLOCK_HIDDEN=SUMMED_HIDDEN,
        )
    return dh, dm, db
