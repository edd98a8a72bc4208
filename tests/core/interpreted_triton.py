"""Run by test_triton_kernels.py in a process of its own: the kernels against plain torch in float64."""

from __future__ import annotations

import copy
import itertools
import os
from typing import Literal

import torch
from torch import Tensor, nn

from dora_vl.core import DoRAConfig, DoRALinear
from dora_vl.core.fused import fused_kernels

# Odd sizes, one row as in decoding, several blocks and splits; ranks that are no power of two, below and above a block.
SHAPES = [(1, 5, 1), (7, 130, 3), (65, 70, 20), (130, 257, 80)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def reference_output(
    product: Tensor, hidden: Tensor | None, b: Tensor | None, bias: Tensor | None, minus_one: Tensor, scale: float
) -> Tensor:
    wide = product.double() - (0 if bias is None else bias.double())
    if hidden is not None and b is not None:
        wide = wide + scale * hidden.double() @ b.to(hidden.dtype).double().t()
    wide = (1 + minus_one.double()) * wide
    return wide if bias is None else wide + bias.double()


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    size = expected.double().abs().max().clamp_min(1e-9)
    error = float((found.double() - expected.double()).abs().max() / size)
    assert error <= TOLERANCE[dtype], (what, dtype, error)


def check(rows: int, out: int, rank: int, dtype: torch.dtype, *, with_bias: bool, with_low_rank: bool) -> None:
    torch.manual_seed(0)
    kernels = fused_kernels(torch.empty(1, dtype=dtype))
    assert kernels is not None
    product, dy = torch.randn(rows, out, dtype=dtype), torch.randn(rows, out, dtype=dtype)
    bias = torch.randn(out, dtype=dtype) if with_bias else None
    minus_one = (torch.rand(out) - 0.5).to(dtype)
    hidden = torch.randn(rows, rank, dtype=dtype) if with_low_rank else None
    b = torch.randn(out, rank) if with_low_rank else None
    expected = reference_output(product, hidden, b, bias, minus_one, 1.0)
    y = kernels.adapted_output_(product.clone(), hidden, b, bias, minus_one)
    case = f"{rows}x{out} rank {rank} bias {with_bias} low rank {with_low_rank}"
    assert y.dtype == dtype
    close(y, expected, dtype, f"y {case}")
    found = kernels.backward_pass(dy, y, b, minus_one, 0.7, with_bias=with_bias)
    dz = (1 + minus_one.double()) * dy.double()
    close(found.dz, dz, dtype, f"dz {case}")
    close(found.dy_y, (dy.double() * y.double()).sum(0), torch.float32, f"dy_y {case}")
    assert found.dz.dtype == dtype
    assert (found.dy_sum is None) == (not with_bias)
    assert (found.dh is None) == (not with_low_rank)
    if found.dy_sum is not None:
        close(found.dy_sum, dy.double().sum(0), torch.float32, f"dy_sum {case}")
    if found.dh is not None and b is not None:
        close(found.dh, 0.7 * found.dz.double() @ b.to(dtype).double(), dtype, f"dh {case}")


def check_no_op() -> None:
    """g = 1 and B = 0 change no bit."""
    for dtype in TOLERANCE:
        kernels = fused_kernels(torch.empty(1, dtype=dtype))
        assert kernels is not None
        product = torch.randn(9, 33, dtype=dtype)
        hidden, bias = torch.randn(9, 3, dtype=dtype), torch.randn(33, dtype=dtype)
        y = kernels.adapted_output_(product.clone(), hidden, torch.zeros(33, 3), bias, torch.zeros(33, dtype=dtype))
        assert torch.equal(y, product), dtype


def check_large_rank_and_strided() -> None:
    """A rank that leaves dh to torch, and an upstream gradient that is one number expanded."""
    kernels = fused_kernels(torch.empty(1))
    assert kernels is not None
    rank = kernels.LARGEST_RANK + 1
    dy, b, minus_one = torch.ones(()).expand(5, 12), torch.randn(12, rank), torch.rand(12)
    found = kernels.backward_pass(dy, None, b, minus_one, 2.0, with_bias=False)
    close(found.dh, 2 * ((1 + minus_one) * dy) @ b, torch.float32, "dh of a large rank")
    assert found.dy_y is None


def check_layer(*, method: Literal["dora", "magnitude"], bias: bool, dropout: float) -> None:
    """A whole layer, forward and backward: through the kernels in float32, and eagerly in float64."""
    torch.manual_seed(0)
    config = DoRAConfig(targets=("*",), method=method, rank=5, alpha=7.0, dropout=dropout)
    narrow = DoRALinear(nn.Linear(33, 70, bias=bias), config)
    narrow.weight.requires_grad_(False)
    with torch.no_grad():
        if narrow.lora_B is not None:
            narrow.lora_B.normal_(std=0.3)
        if narrow.magnitude is not None:
            narrow.magnitude.mul_(torch.linspace(0.5, 1.7, 70))
    wide, x, upstream = copy.deepcopy(narrow).double(), torch.randn(2, 9, 33), torch.randn(2, 9, 70)
    results: list[dict[str, Tensor]] = []
    for layer, dtype in ((narrow, torch.float32), (wide, torch.float64)):
        inputs = x.detach().to(dtype).requires_grad_()
        torch.manual_seed(5)
        y = layer(inputs)
        y.backward(upstream.to(dtype))
        gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        results.append({"y": y.detach(), "x": inputs.grad, **gradients})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        close(results[0][name], expected, torch.float32, f"{name} of a {method} layer, bias {bias}, {dropout}")
    with torch.no_grad():
        close(narrow.eval()(x), wide.eval()(x.double()), torch.float32, f"{method} layer in eval")


if __name__ == "__main__":
    torch.set_default_device(os.environ.get("CHECKED_DEVICE", "cpu"))
    for (rows, out, rank), dtype, with_bias, with_low_rank in itertools.product(
        SHAPES, TOLERANCE, (True, False), (True, False)
    ):
        check(rows, out, rank, dtype, with_bias=with_bias, with_low_rank=with_low_rank)
    check_no_op()
    check_large_rank_and_strided()
    for bias, dropout in itertools.product((True, False), (0.0, 0.4)):
        check_layer(method="dora", bias=bias, dropout=dropout)
    check_layer(method="magnitude", bias=True, dropout=0.0)
