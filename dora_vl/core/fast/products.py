"""The matrix products of a step, each in the form that its shape is fastest in; and whether Triton's kernels run.

On CPU, products with the frozen weight are taken in two halves of their rows where that keeps both halves of the
cores busy. oneDNN gives some products of half-precision numbers to fewer cores than there are: on two cores with AMX,
bfloat16, 768 rows and 576 columns, to one of the two. The same product in two halves of its rows then runs in two
thirds of the time. Which shapes are concerned depends on the processor, the cores and the library, so a shape that
comes again and again is timed both ways, once. Timings differ from run to run, so halves are taken only of shapes
where they give the bits of the whole product, whatever the numbers: no result hangs on a timing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

FEWEST_ROWS, MOST_ROWS = 256, 4096
"""Fewer rows are not worth a second call; more keep all cores busy, and are not worth asking for either."""
SMALLEST_WEIGHT = 2**17
"""Numbers of a weight below which the second call costs what it saves."""
WORTH = 0.93
"""Of the whole product's time, the share below which halves are taken; a little more than timings differ by chance."""
SIGHTINGS = 4
"""How often a shape must come before it is asked about, which takes the time of a dozen products: batches of varying
length never get there, and pay nothing."""
MOST_SHAPES = 1024
"""That are remembered; the oldest is forgotten for a new one."""
ATTEMPTS = 3
"""Timings of either way, in turns, of which the best counts: whatever disturbs a timing makes it longer."""
ROUNDING = 2.0**-20
"""Of a sum's terms, about what float32 loses of them; a bias of that size hides no rounding."""


_halved: dict[tuple[object, ...], bool | int] = {}
"""Shape -> whether halves are taken, or how often it came so far."""


def frozen_product(
    rows: Float[Tensor, "rows inner"],
    matrix: Float[Tensor, "inner columns"],
    bias: Float[Tensor, " columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """`rows @ matrix + bias`, whole or in halves, with the bits of the whole product; without a graph of its own."""
    parts = 2 if rows.is_contiguous() and takes_halves(len(rows), matrix, bias) else 1
    return product_in_parts(rows, matrix, bias, parts)


def takes_halves(count: int, matrix: Float[Tensor, "inner columns"], bias: Float[Tensor, " columns"] | None) -> bool:
    """Whether products of `count` contiguous rows with such a matrix are taken in halves."""
    threads = torch.get_num_threads()
    if not (
        matrix.device.type == "cpu"
        and matrix.element_size() == 2
        and FEWEST_ROWS <= count <= MOST_ROWS
        and matrix.numel() >= SMALLEST_WEIGHT
        and threads > 1
        and (matrix.is_contiguous() or matrix.t().is_contiguous())
    ):
        return False
    # The very number of rows: the next may be summed in another order.
    key = (count, matrix.shape, matrix.stride(), matrix.dtype, bias is None, threads)
    answer = _halved.get(key, 0)
    if answer is not True and answer is not False:
        answer = answer + 1
        if answer == SIGHTINGS:
            rows = matrix.new_empty(count, len(matrix)).normal_(generator=torch.Generator().manual_seed(0))
            answer = halves_are_faster(rows, matrix, bias) and halves_have_the_bits(rows, matrix, bias)
        if key not in _halved and len(_halved) == MOST_SHAPES:
            del _halved[next(iter(_halved))]
        _halved[key] = answer
    return answer is True


def scaled_product(
    rows: Float[Tensor, "rows inner"], matrix: Float[Tensor, "inner columns"], scale: float
) -> Float[Tensor, "rows columns"]:
    """`scale * rows @ matrix`, scaled and rounded inside the product, where it costs no pass over memory."""
    return torch.addmm(rows.new_empty(()), rows, matrix, beta=0, alpha=scale)


def product_in_parts(rows: Tensor, matrix: Tensor, bias: Tensor | None, parts: int) -> Tensor:
    """In one call, or in several, of which each writes its part."""
    if parts == 1:
        return torch.mm(rows, matrix) if bias is None else torch.addmm(bias, rows, matrix)
    result, size = rows.new_empty(len(rows), matrix.shape[1]), -(-len(rows) // parts)
    for part, out in zip(rows.split(size), result.split(size), strict=True):
        _ = torch.mm(part, matrix, out=out) if bias is None else torch.addmm(bias, part, matrix, out=out)
    return result


def halves_are_faster(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> bool:
    """Whether halves take clearly less time than the whole product."""

    def seconds(parts: int) -> float:
        start = time.perf_counter()
        product_in_parts(rows, matrix, bias, parts)
        return time.perf_counter() - start

    turns = [(seconds(1), seconds(2)) for _ in range(ATTEMPTS)]
    whole, halves = map(min, zip(*turns, strict=True))
    return halves < WORTH * whole


def halves_have_the_bits(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> bool:
    """Whether halves sum in the order of the whole product, for all numbers of such shapes and strides.

    The terms of each sum cancel in pairs, so that its rounding is all that is left, in another order another one.
    The pairs lie scattered: at like places of two parts they would leave zero in any order within the parts. The
    operands at hand would not do: a gradient's rows may be zero, and large sums round their last bits away.
    """
    draw, pairs = torch.Generator().manual_seed(0), rows.shape[1] // 2
    left, right = torch.randperm(rows.shape[1], generator=draw)[: 2 * pairs].chunk(2)
    terms = rows.new_empty(len(rows), pairs).normal_(generator=draw)
    rows, matrix = torch.zeros_like(rows), torch.empty_like(matrix).normal_(generator=draw)
    rows[:, left], rows[:, right] = terms, -terms
    matrix[left] = matrix[right]
    bias = bias if bias is None else torch.empty_like(bias).normal_(std=ROUNDING, generator=draw)
    return torch.equal(*(product_in_parts(rows, matrix, bias, parts) for parts in (1, 2)))


SWITCH = "DORA_VL_TRITON"
"""Set to 0 in the environment before the first pass, the eager operations are used everywhere."""
OLDEST_CAPABILITY = (8, 0)
"""Of the GPU: the first with bfloat16 matrix products."""
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Of activations and weights that the kernels know."""
_left_out: list[None] = []
"""As many as blocks of `without_kernels` are open."""
_kernels: dict[tuple[torch.device, torch.dtype], ModuleType | None] = {}
"""What `triton_kernels` answers, once it was asked."""


def triton_kernels(tensor: Tensor) -> ModuleType | None:
    """The kernels for activations and weights like `tensor`, imported once they are wanted; None: eager operations.

    The environment and the card decide, once for a device and dtype.
    """
    if _left_out:
        return None
    key = tensor.device, tensor.dtype
    if key not in _kernels:
        _kernels[key] = None
        on_gpu = tensor.device.type == "cuda"
        may_run = on_gpu or (tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
        is_old = on_gpu and torch.cuda.get_device_capability(tensor.device) < OLDEST_CAPABILITY
        installed = importlib.util.find_spec("triton") is not None
        if may_run and not is_old and tensor.dtype in DTYPES and os.environ.get(SWITCH) != "0" and installed:
            _kernels[key] = importlib.import_module("dora_vl.core.fast.triton")
    return _kernels[key]


@contextmanager
def without_kernels() -> Iterator[None]:
    """The eager operations inside the block, for comparisons; a backward pass belongs into the block of its forward."""
    _left_out.append(None)
    try:
        yield
    finally:
        _left_out.pop()
