# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
"""The passes around the frozen product and the norms as Triton kernels for CUDA; letters as in functional.py.

Each equals what torch's operations do, with one rounding to the activations' dtype at the end instead of one per
operation. The large products (W x, dz W, h^T dz) are the vendor's. On CPU the kernels only run under Triton's
interpreter (TRITON_INTERPRET=1), whose dot product does not know bfloat16: `WIDE_DOT` widens there. The first call
for a bucket of shapes times the tiles of a small space once, into scratch memory and never into a caller's buffer;
later calls are plain launches of the winner. Buckets are powers of two of rows: batches of variable length are timed
some ten times at most in a run.
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
from torch import Tensor
from triton import Config
from triton.testing import do_bench

from dora_vl.core.step import CANCELLATION, NORM_RANGE, Gain, scaled_product
from dora_vl.core.step import factor_gradients as factor_gradients
from dora_vl.shapes import Float

SWITCH = "DORA_VL_TRITON_TILES"
"""If the environment sets it to `fixed`, one configuration serves all: sums have one order, and nothing is timed.

`torch.use_deterministic_algorithms(True)` does the same."""
MOST_ROWS = 16384
"""Row counts from here on share one bucket."""
SHARED_BYTES = 99 * 1024
"""The smallest supported cards (capability 8.6 and 8.9) give a block this much; it counts where torch does not say."""
ACCUMULATORS = 128
"""A thread may hold this many float32 numbers of accumulator in its 255 registers."""
LARGEST_EXACT_RANK = 64
"""Above this rank a float32 product becomes three TF32 products, which keep float32's digits; others are scalar."""


Named = Mapping[str, Any]
"""A launch gets these by the kernel's own names: tensors, numbers and constants."""


@dataclass
class TiledKernel:
    """A kernel with the tiles that it may run in."""

    kernel: Any
    space: Sequence[Config]
    """These are timed; the first that fits is the fixed choice, so the most moderate comes first."""
    fits: Callable[[Config, Named], bool]
    """Tells whether a configuration fits into shared memory and registers."""
    keys: Sequence[str]
    """The timing depends on these arguments of the kernel, besides dtypes and the card; `rows` counts by its bucket."""
    _chosen: dict[tuple[object, ...], Config] = field(default_factory=dict)
    _tuners: dict[object, Any] = field(default_factory=dict)
    """Holds a tuner for each kind of card, since triton's own cache only knows shapes."""

    def config(self, named: Named, grid: Callable[..., Any], scratch: Callable[[], Named]) -> Config:
        """Chooses the tiles for these operands; times them on `scratch`, whose outputs nobody reads."""
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
        """Lists the tiles of the space that fit; the last, which is the smallest, where none does."""
        return [config for config in self.space if self.fits(config, named)] or [self.space[-1]]

    def launch(self, named: Named, grid: Callable[..., Any], config: Config) -> None:
        """Runs the kernel once."""
        with on_device(_device_of(named)):
            self.kernel[grid](**named, **config.all_kwargs())


def _device_of(named: Named) -> torch.device:
    return next(value.device for value in named.values() if isinstance(value, Tensor))


def _may_time(device: torch.device) -> bool:
    """Tells whether tiles may be timed: not for a fixed choice, determinism, a CUDA graph's recording, or a CPU."""
    if device.type != "cuda" or os.environ.get(SWITCH) == "fixed" or torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.cuda.is_current_stream_capturing()


def tiles(*shapes: tuple[int, int, int, int]) -> list[Config]:
    """Makes a space of rows and columns of a tile, warps and pipeline stages; those of few rows come last."""
    return [
        Config({"BLOCK_ROWS": rows, "BLOCK_OUT": out}, num_warps=warps, num_stages=stages)
        for rows, out, warps, stages in shapes
    ]


def padded(size: int) -> int:
    """Rounds up to a power of two, at least 16, the smallest that tensor cores take."""
    return max(16, triton.next_power_of_2(size))


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device current: Triton launches there, and a model spread over several has tensors on others."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def fits_on_chip(config: Config, rows: int, operand_bytes: int, accumulators: int, device: torch.device) -> bool:
    """Tells whether a tile fits by shared memory and registers, and has no more rows than there are.

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
    """Casts A or B to the activations' dtype, once per call: every block of rows reads it."""
    return factor.detach().to(dtype).contiguous()


def dot_precision(dtype: torch.dtype, rank: int) -> str:
    """Returns the precision of a kernel's products: torch's setting for its own in float32; half precision has one.

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
    """Tells whether a tile fits in a kernel that multiplies its rows by a factor, `BLOCK_RANK` at a time."""
    rows, out = config.kwargs["BLOCK_ROWS"], config.kwargs["BLOCK_OUT"]
    operands = (rows + out) * named["BLOCK_RANK"] * named["factor"].element_size()
    return fits_on_chip(config, named["rows"], operands, rows * out, named["factor"].device)


# The backward pass over [rows, out].
#
#     dz = g dy, dh = s dz B, and the sums of dy (f - b) and dy      reads dy and f, writes dz, once; a second, small
#                                                                    kernel adds up
#
# Sums over rows are taken by each program over its own rows and added up in one order: no atomic operations, so that a
# pass repeats to the bit.


SUMMED_COLUMNS, SUMMED_HIDDEN = 64, 1024
"""One program of the second kernel takes this many sums."""
LARGEST_RANK = {2: 256, 4: 64}
"""Maps a number's bytes to a rank: above it a program's share of dh and B leaves the chip, and the vendor's product
computes dh."""


@triton.jit
@no_type_check
def _backward_kernel(  # noqa: PLR0913
    dy, product, bias, factor, minus_one, dz, dh, magnitude_parts, bias_parts, rows, out, rank, scale,
    HAS_BIAS: tl.constexpr, HAS_LOW_RANK: tl.constexpr,
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
        frozen = tl.load(product + offset, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:  # before the sum: afterwards a large bias would leave it no digits
            frozen -= tl.load(bias + column, mask=in_out, other=0.0).to(tl.float32)[None, :]
        tl.store(magnitude_parts + sums, tl.sum(upstream * frozen, axis=0), mask=in_out)
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
    magnitude_parts, bias_parts, dh_parts, dm, db, dh, parts, out, splits, hidden_numbers,
    SUM_HIDDEN: tl.constexpr,
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
        of_magnitude += tl.load(magnitude_parts + offset, mask=inside, other=0.0)
        of_bias += tl.load(bias_parts + offset, mask=inside, other=0.0)
    tl.store(dm + column, tl.sum(of_magnitude, axis=0), mask=in_out)
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
    ("rows", "out", "rank", "HAS_BIAS", "HAS_LOW_RANK", "PRECISION"),
)  # fmt: skip


def gradients(
    dy: Float[Tensor, "rows out"],
    product: Float[Tensor, "rows out"],
    b: Float[Tensor, "out rank"],
    bias: Float[Tensor, " out"] | None,
    gain: Gain,
    scale: float,
) -> tuple[Float[Tensor, "rows out"], Float[Tensor, "rows rank"], Float[Tensor, " out"], Float[Tensor, " out"]]:
    """Computes `functional.gradients`."""
    dy = dy.contiguous()
    (rows, out), rank = dy.shape, b.shape[1]
    inside = rank <= LARGEST_RANK[dy.element_size()]
    named = {
        "dy": dy,
        "product": product.contiguous(),
        "bias": dy if bias is None else bias.detach().contiguous(),  # dy stands for a tensor that is not read
        "factor": cast_factor(b, dy.dtype),
        "minus_one": gain.minus_one.contiguous(),
        "rows": rows,
        "out": out,
        "rank": rank,
        "scale": scale,
        "HAS_BIAS": bias is not None,
        "HAS_LOW_RANK": inside,
        "WIDE_DOT": not dy.is_cuda,
        "PRECISION": dot_precision(dy.dtype, rank),
        "BLOCK_RANK": padded(rank) if inside else 16,
    }
    if not dy.numel():
        none = dy.new_zeros(out, dtype=torch.float32)
        return torch.empty_like(dy), dy.new_zeros(rows, rank), none, none
    dz, dh, dm, db = _launch_backward(named)
    return dz, scaled_product(dz, named["factor"], scale) if dh is None else dh, dm, db


def _launch_backward(named: Named) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Computes dz and dh, and both sums from the programs' parts in one launch, always in one order."""
    dy, rows, out, inside = named["dy"], named["rows"], named["out"], named["HAS_LOW_RANK"]
    programs = 2 * torch.cuda.get_device_properties(dy.device).multi_processor_count if dy.is_cuda else 4

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
            "magnitude_parts": dy.new_empty((parts, out), dtype=torch.float32),
            "bias_parts": dy.new_empty((parts, out), dtype=torch.float32),
        }

    config = BACKWARD.config(named, grid, lambda: with_results(BACKWARD.fitting(named)))
    results = with_results([config])
    BACKWARD.launch(results, grid, config)
    dz, dh_parts, parts = results["dz"], results["dh"], results["magnitude_parts"]
    sum_hidden = inside and len(dh_parts) > 1
    dh = dz.new_empty(dh_parts.shape[1:]) if sum_hidden else dh_parts[0] if inside else None
    dm, db = torch.empty_like(parts[0]), torch.empty_like(parts[0])
    numbers = dh.numel() if sum_hidden and dh is not None else 0
    operands = (parts, results["bias_parts"], dh_parts, dm, db, dz if dh is None else dh)
    blocks = max(triton.cdiv(out, SUMMED_COLUMNS), triton.cdiv(numbers, SUMMED_HIDDEN))
    tile = {"BLOCK_PARTS": 32, "BLOCK_OUT": SUMMED_COLUMNS, "BLOCK_HIDDEN": SUMMED_HIDDEN}
    with on_device(dz.device):
        _sums_kernel[(blocks,)](*operands, len(parts), out, len(dh_parts), numbers, SUM_HIDDEN=sum_hidden, **tile)
    return dz, dh, dm, db


# The forward pass: y = f + B h + (g - 1) (f - b + B h)        reads f and h = s A x, writes y, once


RANK_BLOCK_BYTES = 128
"""This many bytes of a row of B or a column of A are multiplied at a time; twice as many would not fit in registers."""


@triton.jit
@no_type_check
def _output_kernel(  # noqa: PLR0913 - Triton takes values one by one
    product, y, hidden, factor, bias, minus_one, rows, out, rank,
    HAS_BIAS: tl.constexpr, WIDE_DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_RANK: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_rows, in_out = row < rows, column < out
    wide_row = row.to(tl.int64)[:, None]
    offset = wide_row * out + column[None, :]
    inside = in_rows[:, None] & in_out[None, :]
    value = tl.load(product + offset, mask=inside, other=0.0).to(tl.float32)
    change = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        k = start + tl.arange(0, BLOCK_RANK)
        in_rank = k < rank
        h = tl.load(hidden + wide_row * rank + k[None, :], mask=in_rows[:, None] & in_rank[None, :], other=0.0)
        b = tl.load(factor + column[:, None] * rank + k[None, :], mask=in_out[:, None] & in_rank[None, :], other=0.0)
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
    ("rows", "out", "rank", "HAS_BIAS", "PRECISION"),
)  # fmt: skip


def output(
    product: Float[Tensor, "rows out"],
    x: Float[Tensor, "rows in_"],
    a: Float[Tensor, "rank in_"],
    b: Float[Tensor, "out rank"],
    bias: Float[Tensor, " out"] | None,
    gain: Gain,
    scale: float,
) -> tuple[Float[Tensor, "rows out"], Float[Tensor, "rows rank"]]:
    """Computes `functional.output`."""
    contiguous, hidden = product.contiguous(), scaled_product(x, a.t(), scale)
    y = torch.empty_like(contiguous)
    if product.numel():
        (rows, out), rank = product.shape, b.shape[1]
        named = {
            "product": contiguous,
            "y": y,
            "hidden": hidden,
            "factor": cast_factor(b, product.dtype),
            "bias": contiguous if bias is None else bias.detach().contiguous(),
            "minus_one": gain.minus_one.contiguous(),
            "rows": rows,
            "out": out,
            "rank": rank,
            "HAS_BIAS": bias is not None,
            "WIDE_DOT": not product.is_cuda,
            "PRECISION": dot_precision(product.dtype, rank),
            "BLOCK_RANK": min(padded(rank), RANK_BLOCK_BYTES // product.element_size()),
        }

        def grid(tile: Mapping[str, Any]) -> tuple[int, int]:
            return triton.cdiv(rows, tile["BLOCK_ROWS"]), triton.cdiv(out, tile["BLOCK_OUT"])

        # What is timed writes into scratch, not into y.
        OUTPUT.launch(named, grid, OUTPUT.config(named, grid, lambda: {**named, "y": torch.empty_like(y)}))
    return y, hidden


# The norms of V's rows on CUDA, without a number that the host must wait for.
#
#     n^2 = ||W||^2 + 2 s B.(W A^T + s/2 B A A^T)        a row at a time, in float32
#
# Which rows cancel is known only on the device. A compiled graph can neither ask for it nor hold a result of that
# size, so a second kernel looks at all rows, sixteen per program: a program without a row that cancels copies what it
# found and ends, one with such a row reads its rows of W and takes their norms dense.


RANK_BLOCK = 32
ROWS = 64
"""A program that computes squared norms takes this many rows."""
CAREFUL_ROWS = 16
"""A program looks at this many rows; where one of them cancels, it computes all of them dense."""
CAREFUL_COLUMNS = 64


@triton.jit
@no_type_check
def _squared_kernel(  # noqa: PLR0913 - Triton takes values one by one
    frozen, factor, weight_on_A, gram, squared, out, rank, scale,
    WIDE_DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < out
    offset = row.to(tl.int64)[:, None] * rank
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
            g = tl.load(gram + j[:, None] * rank + k[None, :], mask=in_inner[:, None] & in_rank[None, :], other=0.0)
            if WIDE_DOT:
                b, g = b.to(tl.float32), g.to(tl.float32)
            grown += tl.dot(b, g, input_precision=PRECISION)
        on_A = tl.load(weight_on_A + offset + k[None, :], mask=inside, other=0.0).to(tl.float32)
        own = tl.load(factor + offset + k[None, :], mask=inside, other=0.0).to(tl.float32)
        change += tl.sum(own * (on_A + (scale / 2) * grown), axis=1)
    frozen_squared = tl.load(frozen + row, mask=in_rows, other=0.0)
    tl.store(squared + row, frozen_squared + 2 * scale * change, mask=in_rows)


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


def norms(
    weight: Float[Tensor, "out in_"],
    weight_norms_squared: Float[Tensor, " out"],
    lora_A: Float[Tensor, "rank in_"],
    lora_B: Float[Tensor, "out rank"],
    scale: float,
) -> Float[Tensor, " out"]:
    """Computes n of each row, dense for rows that cancel, without a shape or branch that depends on values.

    Without a row that cancels the second launch reads two vectors. With one it reads the sixteen rows of W in its
    program: one row in sixteen, spread evenly, is as dear as all of W. A and B are taken in the weight's dtype for the
    factored form, in float32 for rows that cancel.
    """
    a, b = (factor.detach().contiguous() for factor in (lora_A, lora_B))
    dtype, frozen = torch.promote_types(weight.dtype, NORM_RANGE), weight_norms_squared.contiguous()
    on_A = (weight @ a.to(weight.dtype).t()).to(dtype).contiguous()
    wide_a, wide_b = (factor.to(weight.dtype).to(dtype) for factor in (a, b))
    squared, trusted, rank = torch.empty_like(frozen), torch.empty_like(frozen), a.shape[0]
    operands = (frozen, wide_b, on_A, wide_a @ wide_a.t(), squared, len(frozen), rank, scale)
    factored = {"BLOCK_ROWS": ROWS, "WIDE_DOT": not squared.is_cuda, "PRECISION": dot_precision(dtype, rank)}
    sizes, ranks = (*weight.shape, rank, *weight.stride()), min(padded(rank), RANK_BLOCK)
    dense = {"BLOCK_ROWS": CAREFUL_ROWS, "BLOCK_COLUMNS": CAREFUL_COLUMNS}
    with on_device(weight.device):
        _squared_kernel[(triton.cdiv(len(frozen), ROWS),)](*operands, BLOCK_RANK=ranks, **factored)
        _careful_kernel[(triton.cdiv(len(frozen), CAREFUL_ROWS),)](
            frozen, squared, weight, a, b, trusted, *sizes, scale, CANCELLATION, BLOCK_RANK=ranks, **dense
        )
    return trusted.sqrt_()  # torch's, as the magnitudes came to be, so that a change of nothing has gain 1
