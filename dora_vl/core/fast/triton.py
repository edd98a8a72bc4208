# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
"""The passes around the frozen product, the norms and dropout as Triton kernels for CUDA; letters as in functional.py.

Each equals what torch's operations do, with one rounding to the activations' dtype at the end instead of one an
operation. The large products (W x, dz W, h^T dz) are the vendor's. On CPU the kernels run under Triton's interpreter
alone (TRITON_INTERPRET=1), whose dot product does not know bfloat16: `WIDE_DOT` widens there. The first call for a
bucket of shapes times the tiles of a small space once, into scratch memory and never into a caller's buffer; later
calls are plain launches of the winner. Buckets are powers of two of rows: batches of variable length are timed some
ten times at most in a run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton import Config
from triton.testing import do_bench

from dora_vl.core.gain import CANCELLATION, NORM_RANGE, Gain

SWITCH = "DORA_VL_TRITON_TILES"
"""Set to `fixed` in the environment, one configuration stands for all: sums in one order, and nothing is timed.

`torch.use_deterministic_algorithms(True)` does the same."""
MOST_ROWS = 16384
"""Row counts from here on share one bucket."""
SHARED_BYTES = 99 * 1024
"""Of a block on the smallest supported cards (capability 8.6 and 8.9), where torch does not say."""
ACCUMULATORS = 128
"""Float32 numbers of accumulator a thread may hold, of its 255 registers."""
LARGEST_EXACT_RANK = 64
"""Float32 products of more ranks take three TF32 products, whose digits are float32's, in place of scalar ones."""


Named = Mapping[str, Any]
"""What a launch is given, by the kernel's own names: tensors, numbers and constants."""


@dataclass
class TiledKernel:
    """A kernel with the tiles that it may run in."""

    kernel: Any
    space: Sequence[Config]
    """What is timed; the first that fits is the fixed choice, so the most moderate stands first."""
    fits: Callable[[Config, Named], bool]
    """Whether a configuration fits into shared memory and registers."""
    keys: Sequence[str]
    """The kernel's arguments on which the timing hangs, besides dtypes and the card; `rows` counts by its bucket."""
    _chosen: dict[tuple[object, ...], Config] = field(default_factory=dict)
    _tuners: dict[object, Any] = field(default_factory=dict)
    """One for each kind of card: triton's own cache knows shapes alone."""

    def config(self, named: Named, grid: Callable[..., Any], scratch: Callable[[], Named]) -> Config:
        """The tiles for these operands; timed on `scratch`, whose outputs nobody reads."""
        device = _device_of(named)
        if not _may_time(device):
            return self.fitting(named)[0]
        bucket = min(padded(int(named["rows"])), MOST_ROWS)
        card, bucketed = _card(device), {**named, "rows": bucket}
        dtypes = (value.dtype for value in named.values() if isinstance(value, Tensor))
        case = (card, *(bucketed[name] for name in self.keys), *dtypes)
        if case not in self._chosen:
            if card not in self._tuners:
                self._tuners[card] = triton.autotune(
                    configs=list(self.space),
                    key=list(self.keys),
                    prune_configs_by={
                        "early_config_prune": lambda configs, positional, **named: self.fitting({**positional, **named})
                    },
                    do_bench=partial(do_bench, warmup=5, rep=20),
                )(self.kernel)
            with on_device(device):
                self._tuners[card][grid](**scratch())
            self._chosen[case] = self._tuners[card].best_config
        return self._chosen[case]

    def fitting(self, named: Named) -> list[Config]:
        """Those of the space that fit; the last, which is the smallest, where none does."""
        return [config for config in self.space if self.fits(config, named)] or [self.space[-1]]

    def launch(self, named: Named, grid: Callable[..., Any], config: Config) -> None:
        """Runs the kernel once."""
        with on_device(_device_of(named)):
            self.kernel[grid](**named, **config.all_kwargs())

    def launch_on_tiles(self, named: Named, columns: str, result: str) -> None:
        """Runs it over the tiles of [rows, columns]; what is timed writes into scratch, not into `result`."""

        def grid(tile: Mapping[str, Any]) -> tuple[int, int]:
            return triton.cdiv(named["rows"], tile["BLOCK_ROWS"]), triton.cdiv(named[columns], tile["BLOCK_OUT"])

        config = self.config(named, grid, lambda: {**named, result: torch.empty_like(named[result])})
        self.launch(named, grid, config)


def _device_of(named: Named) -> torch.device:
    return next(value.device for value in named.values() if isinstance(value, Tensor))


def _may_time(device: torch.device) -> bool:
    """Not where one configuration or determinism is asked for, nor while a CUDA graph is recorded, nor on a CPU."""
    if device.type != "cuda" or os.environ.get(SWITCH) == "fixed" or torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.cuda.is_current_stream_capturing()


def tiles(*shapes: tuple[int, int, int, int]) -> list[Config]:
    """A space from rows and columns of a tile, warps and pipeline stages; the few-row ones stand last."""
    return [
        Config({"BLOCK_ROWS": rows, "BLOCK_OUT": out}, num_warps=warps, num_stages=stages)
        for rows, out, warps, stages in shapes
    ]


def padded(size: int) -> int:
    """A power of two, 16 at least: the least that the tensor cores take."""
    return max(16, triton.next_power_of_2(size))


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors' in a model spread over several."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def fits_on_chip(config: Config, rows: int, operand_bytes: int, accumulators: int, device: torch.device) -> bool:
    """By shared memory and registers, and no more rows than there are: decoding has one.

    `operand_bytes` is what a product reads at a time, `accumulators` the float32 sums of a program.
    """
    tile = config.kwargs["BLOCK_ROWS"] * config.kwargs["BLOCK_OUT"]
    exchanged = 4 * tile  # a tile changes its layout through shared memory
    shared = SHARED_BYTES
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared = getattr(properties, "shared_memory_per_block_optin", SHARED_BYTES)
    return (
        config.kwargs["BLOCK_ROWS"] <= padded(rows)
        and accumulators + tile <= ACCUMULATORS * 32 * config.num_warps
        and config.num_stages * operand_bytes + exchanged <= shared
    )


@cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cast_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A or B in the activations' dtype, once a call: every block of rows reads it."""
    return factor.detach().to(dtype).contiguous()


def dot_precision(dtype: torch.dtype, rank: int) -> str:
    """Of a kernel's products: what torch is told for its own float32 ones; half precision has but one.

    `ieee` runs on the scalar units, which is no loss while the pass is bound by memory; from larger ranks on
    `tf32x3` gives float32's digits on the tensor cores.
    """
    matmul = torch.backends.cuda.matmul
    try:
        precision = str(matmul.fp32_precision)  # from torch 2.9 on
    except AttributeError:
        precision = "tf32" if matmul.allow_tf32 else "ieee"
    if dtype != torch.float32 or precision == "tf32":
        return "tf32"
    return "ieee" if rank <= LARGEST_EXACT_RANK else "tf32x3"


def _product_fits(config: Config, named: Named) -> bool:
    """`TiledKernel.fits` of a kernel that multiplies a tile's rows by a factor, `BLOCK_RANK` at a time."""
    rows, out = config.kwargs["BLOCK_ROWS"], config.kwargs["BLOCK_OUT"]
    operands = (rows + out) * named["BLOCK_RANK"] * named["factor"].element_size()
    return fits_on_chip(config, named["rows"], operands, rows * out, named["factor"].device)


# The backward pass over [rows, out].
#
#     dz = g dy, dh = s dz B, dm, db      reads dy and y, writes dz, once; a second, small kernel adds up
#
# Sums over rows are taken by each program over its own rows and added up in one order: no atomic operations, so that a
# pass repeats to the bit.


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
        offset = wide_row * out + column[None, :]
        upstream = tl.load(dy + offset, mask=inside, other=0.0).to(tl.float32)
        away = tl.load(minus_one + column, mask=in_out, other=0.0).to(tl.float32)[None, :]
        scaled = (upstream + away * upstream).to(dz.dtype.element_ty)
        tl.store(dz + offset, scaled, mask=inside)
        sums = part.to(tl.int64) * out + column
        if HAS_KEPT:
            output = tl.load(kept + offset, mask=inside, other=0.0).to(tl.float32)
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
        in_hidden = number < hidden_numbers
        total = tl.zeros((BLOCK_HIDDEN,), dtype=tl.float32)
        for split in range(0, splits):
            total += tl.load(dh_parts + split * hidden_numbers + number, mask=in_hidden, other=0.0)
        tl.store(dh + number, total.to(dh.dtype.element_ty), mask=in_hidden)
    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_out = column < out
    of_magnitude = tl.zeros((BLOCK_PARTS, BLOCK_OUT), dtype=tl.float32)
    of_bias = tl.zeros((BLOCK_PARTS, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        offset = part.to(tl.int64)[:, None] * out + column[None, :]
        inside = (part < parts)[:, None] & in_out[None, :]
        if HAS_KEPT:
            of_magnitude += tl.load(magnitude_parts + offset, mask=inside, other=0.0)
        if SUM_BIAS:
            of_bias += tl.load(bias_parts + offset, mask=inside, other=0.0)
    if HAS_KEPT:
        per = tl.load(per_magnitude + column, mask=in_out, other=0.0).to(tl.float32)
        tl.store(dm + column, per * tl.sum(of_magnitude, axis=0), mask=in_out)
    if SUM_BIAS:
        tl.store(db + column, tl.sum(of_bias, axis=0), mask=in_out)


def _backward_fits(config: Config, named: Named) -> bool:
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


def backward_pass(
    dy: Float[Tensor, "rows out"],
    kept: Float[Tensor, "rows out"] | None,
    lora_B: Float[Tensor, "out rank"] | None,
    bias: Float[Tensor, " out"] | None,
    gain: Gain,
    scale: float,
    *,
    with_bias_sum: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dz = g dy and dh = s dz B in the dtype of dy, dm = (dy (kept - b)).sum(0) / m and db = dy.sum(0) in float32.

    For a gain without fragile rows. `kept` is y, for a gain whose `per_magnitude` is 1 / m; None where no magnitude
    trains. `bias` stands in it outside the gain and is subtracted before anything is added up. In the first kernel dy
    stands for a tensor that is not there, which is then not read.
    """
    dy = dy.contiguous()
    rows, out = dy.shape
    factor = None if lora_B is None else cast_factor(lora_B, dy.dtype)
    rank = 1 if factor is None else factor.shape[1]
    inside = factor is not None and rank <= LARGEST_RANK[dy.element_size()]
    named = {
        "dy": dy,
        "kept": dy if kept is None else kept.contiguous(),
        "bias": dy if bias is None else bias.detach().contiguous(),
        "factor": dy if factor is None else factor,
        "minus_one": gain.minus_one.contiguous(),
        "rows": rows,
        "out": out,
        "rank": rank,
        "scale": scale,
        "HAS_KEPT": kept is not None,
        "HAS_BIAS": bias is not None and kept is not None,
        "SUM_BIAS": with_bias_sum,
        "HAS_LOW_RANK": inside,
        "WIDE_DOT": not dy.is_cuda,
        "PRECISION": dot_precision(dy.dtype, rank),
        "BLOCK_RANK": padded(rank) if inside else 16,
    }
    dh = None
    new = dy.new_empty if dy.numel() else dy.new_zeros
    dm, db = (new(out, dtype=torch.float32) if needed else None for needed in (kept is not None, with_bias_sum))
    if dy.numel():
        dz, dh = _launch_backward(named, gain.per_magnitude.contiguous(), dm, db)
    else:
        dz, dh = torch.empty_like(dy), dy.new_zeros(rows, rank) if inside else None
    if factor is not None and dh is None:
        dh = torch.addmm(dz.new_empty(()), dz, factor, beta=0, alpha=scale)
    return dz, dh, dm, db


def _launch_backward(
    named: Named, per_magnitude: Tensor, dm: Tensor | None, db: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """dz and dh; fills dm and db with what the programs found, in one launch and always in one order."""
    dy, rows, out, inside = named["dy"], named["rows"], named["out"], named["HAS_LOW_RANK"]
    programs = 2 * torch.cuda.get_device_properties(dy.device).multi_processor_count if dy.is_cuda else 4
    none = dy.new_empty(1, dtype=torch.float32)

    def grid(tile: Mapping[str, Any]) -> tuple[int, int]:
        # Splits of the columns, so that every multiprocessor has two programs.
        parts, blocks = triton.cdiv(rows, tile["BLOCK_ROWS"]), triton.cdiv(out, tile["BLOCK_OUT"])
        return parts, min(blocks, max(1, triton.cdiv(programs, parts)))

    def with_results(tiles: list[Config]) -> dict[str, Any]:
        parts, splits = (max(sizes) for sizes in zip(*(grid(tile.kwargs) for tile in tiles), strict=True))
        dz, hidden_dtype = torch.empty_like(dy), dy.dtype if splits == 1 else torch.float32
        return {
            **named,
            "dz": dz,
            "dh": dy.new_empty((splits, rows, named["rank"]), dtype=hidden_dtype) if inside else dz,
            "magnitude_parts": none if dm is None else none.new_empty(parts, out),
            "bias_parts": none if db is None else none.new_empty(parts, out),
        }

    config = BACKWARD.config(named, grid, lambda: with_results(BACKWARD.fitting(named)))
    results = with_results([config])
    BACKWARD.launch(results, grid, config)
    dz, dh_parts = results["dz"], results["dh"]
    parts = results["bias_parts" if dm is None else "magnitude_parts"]
    sum_hidden = inside and len(dh_parts) > 1
    dh = dh_parts[0] if inside else None
    if sum_hidden:
        dh = dz.new_empty(dh_parts.shape[1:])
    summed = 0 if dm is None and db is None else out
    numbers = dh.numel() if sum_hidden and dh is not None else 0
    if summed or numbers:
        operands = (results["magnitude_parts"], results["bias_parts"], per_magnitude, dh_parts)
        sums = (parts if dm is None else dm, parts if db is None else db, dz if dh is None else dh)
        blocks = max(triton.cdiv(summed, SUMMED_COLUMNS), triton.cdiv(numbers, SUMMED_HIDDEN))
        flags = {"HAS_KEPT": dm is not None, "SUM_BIAS": db is not None, "SUM_HIDDEN": sum_hidden}
        tile = {"BLOCK_PARTS": 32, "BLOCK_OUT": SUMMED_COLUMNS, "BLOCK_HIDDEN": SUMMED_HIDDEN}
        with on_device(dz.device):
            _sums_kernel[(blocks,)](*operands, *sums, len(parts), summed, len(dh_parts), numbers, **flags, **tile)
    return dz, dh


# The forward pass: y = g (W x + h B^T) + b        reads W x + b and h = s A x, writes y, once


RANK_BLOCK_BYTES = 128
"""Of a row of B or a column of A, what is multiplied at a time: twice as much of float32 spills kilobytes (ptxas)."""


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
    offset = wide_row * out + column[None, :]
    inside = in_rows[:, None] & in_out[None, :]
    value = tl.load(product + offset, mask=inside, other=0.0).to(tl.float32)
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
    tl.store(y + offset, result.to(y.dtype.element_ty), mask=inside)


OUTPUT = TiledKernel(
    _output_kernel,
    tiles((64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 4, 2), (128, 128, 8, 3), (32, 128, 4, 3), (16, 128, 4, 2),
          (16, 256, 4, 2), (16, 64, 4, 2)),
    _product_fits,
    ("rows", "out", "rank", "HAS_BIAS", "HAS_LOW_RANK", "PRECISION"),
)  # fmt: skip


def adapted_output(
    product: Float[Tensor, "*batch out"],
    hidden: Float[Tensor, "rows rank"] | None,
    lora_B: Float[Tensor, "out rank"] | None,
    bias: Float[Tensor, " out"] | None,
    minus_one: Float[Tensor, " out"],
    *,
    in_place: bool = False,
) -> Float[Tensor, "*batch out"]:
    """g (W x + h B^T) + b of W x + b: a new tensor, no view of another, or in place; bitwise nothing at g = 1, B = 0.

    A product that is not contiguous costs a copy; B is rounded to the dtype of h once, as the eager path does it.
    """
    contiguous = product.contiguous()
    y = contiguous if in_place else torch.empty_like(contiguous)
    if product.numel():
        out, rank = product.shape[-1], 1 if lora_B is None else lora_B.shape[1]
        named = {
            "product": contiguous,
            "y": y,
            "hidden": contiguous if hidden is None else hidden.contiguous(),
            "factor": contiguous if lora_B is None else cast_factor(lora_B, product.dtype),
            "bias": contiguous if bias is None else bias.detach().contiguous(),
            "minus_one": minus_one.contiguous(),
            "rows": product.numel() // out,
            "out": out,
            "HAS_BIAS": bias is not None,
            "HAS_LOW_RANK": hidden is not None and lora_B is not None,
            **_product_constants(contiguous, rank),
        }
        OUTPUT.launch_on_tiles(named, "out", "y")
    return product.copy_(y) if in_place and contiguous is not product else y


def _product_constants(activations: Tensor, rank: int) -> dict[str, Any]:
    """What a kernel is told that multiplies a tile's rows by a factor, `BLOCK_RANK` at a time."""
    return {
        "rank": rank,
        "WIDE_DOT": not activations.is_cuda,
        "PRECISION": dot_precision(activations.dtype, rank),
        "BLOCK_RANK": min(padded(rank), RANK_BLOCK_BYTES // activations.element_size()),
    }


# The norms of V's rows on CUDA: many layers in one launch, and no number that the host must wait for.
#
#     n^2 = ||W||^2 + 2 s B.(W A^T + s/2 B A A^T)        a row at a time, in float32
#
# Which rows cancel is known on the device alone. A compiled graph can neither ask for it nor hold a result of that
# size, so a second kernel looks at all rows, sixteen a program: a program without a row that cancels copies what it
# found and ends, one with such a row reads its rows of W and takes their norms dense.


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
    offset = (layer * out + row)[:, None] * rank
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
            b = tl.load(factor + offset + j[None, :], mask=in_rows[:, None] & in_inner[None, :], other=0.0)
            g = tl.load(own_gram + j[:, None] * rank + k[None, :], mask=in_inner[:, None] & in_rank[None, :], other=0.0)
            if WIDE_DOT:
                b, g = b.to(tl.float32), g.to(tl.float32)
            grown += tl.dot(b, g, input_precision=PRECISION)
        on_A = tl.load(weight_on_A + offset + k[None, :], mask=inside, other=0.0).to(tl.float32)
        own = tl.load(factor + offset + k[None, :], mask=inside, other=0.0).to(tl.float32)
        change += tl.sum(own * (on_A + (scale / 2) * grown), axis=1)
    frozen_squared = tl.load(frozen + layer * out + row, mask=in_rows, other=0.0)
    tl.store(squared + layer * out + row, frozen_squared + 2 * scale * change, mask=in_rows)


@triton.jit
@no_type_check
def _careful_kernel(  # noqa: PLR0913
    frozen, squared, weight, lora_A, lora_B, trusted, out, columns, rank, row_stride, column_stride,
    scale, cancellation,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < out
    frozen_squared = tl.load(frozen + row, mask=in_rows, other=1.0)
    norm_squared = tl.load(squared + row, mask=in_rows, other=1.0)
    cancelled = norm_squared <= cancellation * frozen_squared
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
        norm_squared = tl.where(cancelled, total, norm_squared)
    tl.store(trusted + row, tl.where(norm_squared < 0, 0.0, norm_squared), mask=in_rows)


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
    operands = (tensor.contiguous() for tensor in (weight_norms_squared, lora_B, weight_on_A, gram))
    tile = {"BLOCK_ROWS": ROWS, "BLOCK_RANK": min(padded(rank), RANK_BLOCK)}
    products = {"WIDE_DOT": not squared.is_cuda, "PRECISION": dot_precision(lora_B.dtype, rank)}
    with on_device(squared.device):
        _squared_kernel[(triton.cdiv(out, ROWS), layers)](*operands, squared, out, rank, scale, **products, **tile)
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
    program: one row in sixteen, spread evenly, is as dear as all of W. A and B are taken in the weight's dtype for the
    factored form, in float32 for rows that cancel.
    """
    a, b = (factor.detach().contiguous() for factor in (lora_A, lora_B))
    dtype, frozen = torch.promote_types(weight.dtype, NORM_RANGE), weight_norms_squared.contiguous()
    on_A = (weight @ a.to(weight.dtype).t()).to(dtype)
    wide_a, wide_b = (factor.to(weight.dtype).to(dtype) for factor in (a, b))
    squared = norms_squared(frozen[None], wide_b[None], on_A[None], (wide_a @ wide_a.t())[None], scale)
    trusted, rank = torch.empty_like(frozen), a.shape[0]
    sizes = (*weight.shape, rank, *weight.stride())
    tile = {"BLOCK_ROWS": CAREFUL_ROWS, "BLOCK_COLUMNS": CAREFUL_COLUMNS, "BLOCK_RANK": min(padded(rank), RANK_BLOCK)}
    with on_device(weight.device):
        _careful_kernel[(triton.cdiv(len(frozen), CAREFUL_ROWS),)](
            frozen, squared, weight, a, b, trusted, *sizes, scale, CANCELLATION, **tile
        )
    return trusted.sqrt_()  # torch's, as the magnitudes came to be, so that a change of nothing has gain 1


# Dropout whose mask is never stored: drawn inside the kernel from a seed, and drawn again by the backward pass.
#
# Which element is dropped depends on the seed and on its row and column alone, not on tiles: Philox4x32-10 (Salmon et
# al., 2011) with the seed as key and (column // 4, row, 0, 0) as counter gives the numbers of four neighbours.
#
#     forward    a masked copy of x, for A to read
#     backward   dx += mask * (dh A), with one pass over dx and no [rows, in] tensor beside it


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
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    kept = _is_kept(tl.load(seed), row, first, threshold, BLOCK_ROWS, BLOCK_COLUMNS)
    # What is dropped is not read, so that an infinity there leaves none behind.
    tl.store(copy + offset, tl.load(source + offset, mask=inside & kept, other=0.0), mask=inside)


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
    offset = wide_row * columns + column[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    value = tl.load(base + offset, mask=inside, other=0.0).to(tl.float32) + tl.where(kept, product, 0.0)
    tl.store(changed + offset, value.to(changed.dtype.element_ty), mask=inside)


MASKED_PRODUCT = TiledKernel(
    _masked_product_kernel,
    tiles((64, 64, 4, 2), (64, 128, 8, 2), (128, 64, 8, 2), (32, 128, 4, 2), (16, 64, 4, 2)),
    _product_fits,
    ("rows", "columns", "rank", "PRECISION"),
)


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
        tile = {"BLOCK_ROWS": COPIED_ROWS, "BLOCK_COLUMNS": COPIED_COLUMNS}
        with on_device(x.device):
            _masked_copy_kernel[grid](x, copy, seed, rows, columns, threshold_of(probability), **tile)
    return copy


def add_masked_product_(
    dx: Float[Tensor, "rows in_"],
    hidden: Float[Tensor, "rows rank"],
    lora_A: Float[Tensor, "rank in_"],
    seed: Int[Tensor, ""],
    probability: float,
) -> Float[Tensor, "rows in_"]:
    """dx += mask * (dh A) in place, with the mask that `masked_copy` had; one rounding."""
    if not dx.numel():
        return dx
    contiguous = dx.contiguous()
    named = {
        "base": contiguous,
        "changed": contiguous,
        "hidden": hidden.contiguous(),
        "factor": cast_factor(lora_A, dx.dtype),
        "seed": seed,
        "rows": dx.shape[0],
        "columns": dx.shape[1],
        "threshold": threshold_of(probability),
        **_product_constants(dx, len(lora_A)),
    }
    MASKED_PRODUCT.launch_on_tiles(named, "columns", "changed")
    return dx if contiguous is dx else dx.copy_(contiguous)
