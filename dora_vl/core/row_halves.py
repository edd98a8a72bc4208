"""Products with the frozen weight on CPU, in two halves of their rows where that keeps both halves of the cores busy.

oneDNN gives some products of half-precision numbers to fewer cores than there are: on two cores with AMX, bfloat16,
768 rows and 576 columns, to one of the two. The same product in two halves of its rows then runs in two thirds of
the time and gives the same bits. Which shapes are concerned depends on the processor, the cores and the library, so
no table of them stands here: the first product of a shape is taken both ways.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

FEWEST_ROWS, MOST_ROWS = 256, 4096
"""Fewer rows are not worth a second call; more keep all cores busy, and are not worth asking for either."""
SMALLEST_WEIGHT = 2**17
"""Numbers of a weight below which the second call costs what it saves."""
WORTH = 0.93
"""Of the whole product's time, the share below which halves are taken; a little more than timings differ by chance."""
ATTEMPTS = 5
"""Timings of either way, in turns, of which the best counts: whatever disturbs a timing makes it longer."""


class RowHalves:
    """Takes products whole or in halves, as it found faster for products of that shape."""

    def __init__(self) -> None:
        self._halved: dict[tuple[object, ...], bool] = {}

    def product(
        self,
        rows: Float[Tensor, "rows inner"],
        matrix: Float[Tensor, "inner columns"],
        bias: Float[Tensor, " columns"] | None = None,
    ) -> Float[Tensor, "rows columns"]:
        """`rows @ matrix + bias`, with the bits of the whole product in either way; without a graph of its own."""
        if not _is_worth_asking(rows, matrix):
            return whole_product(rows, matrix, bias)
        alike = len(rows), matrix.shape, matrix.stride(), rows.dtype, bias is None
        key = (*alike, torch.get_num_threads())  # the very number of rows: bits of another may differ
        if key not in self._halved:
            self._halved[key] = halves_are_faster(rows, matrix, bias)
        return halved_product(rows, matrix, bias) if self._halved[key] else whole_product(rows, matrix, bias)


ROW_HALVES = RowHalves()


def _is_worth_asking(rows: Tensor, matrix: Tensor) -> bool:
    return (
        rows.device.type == "cpu"
        and rows.element_size() == 2
        and FEWEST_ROWS <= len(rows) <= MOST_ROWS
        and matrix.numel() >= SMALLEST_WEIGHT
        and torch.get_num_threads() > 1
    )


def whole_product(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """In one call."""
    return torch.mm(rows, matrix) if bias is None else torch.addmm(bias, rows, matrix)


def halved_product(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """In two calls, of which each writes its half."""
    product, half = rows.new_empty(len(rows), matrix.shape[1]), (len(rows) + 1) // 2
    for part, place in zip(rows.split(half), product.split(half), strict=True):
        if bias is None:
            torch.mm(part, matrix, out=place)
        else:
            torch.addmm(bias, part, matrix, out=place)
    return product


def halves_are_faster(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> bool:
    """Whether halves give the very bits of the whole product, and sooner."""
    ways = whole_product, halved_product
    if not torch.equal(*(way(rows, matrix, bias) for way in ways)):
        return False
    turns = [[_seconds(way, rows, matrix, bias) for way in ways] for _ in range(ATTEMPTS)]
    whole, halves = map(min, zip(*turns, strict=True))
    return halves < WORTH * whole


def _seconds(way: Callable[..., Tensor], *operands: Tensor | None) -> float:
    start = time.perf_counter()
    way(*operands)
    return time.perf_counter() - start
