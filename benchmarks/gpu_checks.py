"""Every Triton kernel against the eager operations, on the device at hand: `gpu.py` runs it before it times anything.

Truth is the eager path in float64. In float32 the kernels must be as near as rounding allows; in bfloat16, no farther
from the truth than a little more than the eager path is.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dora_vl import DoRAConfig, apply_dora
from dora_vl.core.fast.dropout import SHARED_DROPOUT, Dropped, draw_dropped
from dora_vl.core.fast.kernels import without_kernels
from dora_vl.core.functional import norms, row_norms_squared

EXACT = 2e-5
"""Error allowed in float32, as a share of the largest value: thousands of terms are summed in another order."""
ROUNDED = 2.0**-6
"""Error always allowed in bfloat16, as a share of the largest value: the interpreter truncates some roundings."""


@dataclass(frozen=True)
class Check:
    """Compares an error with its limit."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Returns True when the error is within its limit; NaN fails."""
        return self.error <= self.allowed


class Sealed(nn.Module):
    """A linear layer that hides its weight, as quantised layers do."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.secret, self.bias = inner.weight, inner.bias

    def forward(self, x: Tensor) -> Tensor:
        """Computes the product in the weight's dtype."""
        return nn.functional.linear(x.to(self.secret.dtype), self.secret, self.bias)


SWITCH = "DORA_VL_TRITON_TILES"
SEALED = f"{Sealed.__module__}.{Sealed.__qualname__}"


def checks(device: str, *, smoke: bool) -> Iterator[Check]:
    """Yields all checks; tiles are fixed, to compile once, except in the last layer. `smoke` takes tiny shapes."""
    shapes = [(33, 40, 52)] if smoke else [(1, 2048, 2560), (77, 1000, 1504), (1024, 2048, 2560)]
    ranks = (3, 20) if smoke else (1, 16, 64, 130, 384)
    dtypes = (torch.float32, torch.bfloat16)
    with mock.patch.dict(os.environ, {SWITCH: "fixed"}):
        for (rows, columns, out), rank, dtype in product(shapes, ranks, dtypes):
            for name, changes in VARIANTS.items():
                yield from _layer_checks(name, changes, (rows, columns, out, rank), dtype, device)
        for rank, dtype in product(ranks, dtypes):
            yield _cancelled(rank, dtype, device, width=64 if smoke else 2048)
        yield _repeats(device, width=64 if smoke else 4096)
    yield from _layer_checks("linear in timed tiles", {"dropout": 0.3}, (*shapes[-1], 16), torch.bfloat16, device)


VARIANTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear with dropout": {"dropout": 0.3},
    "magnitude": {"method": "magnitude"},
    "opaque": {"opaque": True},
    "opaque with dropout": {"opaque": True, "dropout": 0.3},
}


def _layer_checks(
    name: str, changes: dict[str, Any], sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> Iterator[Check]:
    rows, columns, out, rank = sizes
    layer = _adapted(columns, out, rank, dtype, device, **changes)
    wide = copy.deepcopy(layer).double()
    x, upstream = (torch.randn(rows, size, device=device, dtype=dtype) for size in (columns, out))
    dropped = draw_dropped(x, 0.3)
    fused = _passed(layer, x, upstream, dropped)
    with without_kernels():
        eager, truth = _passed(layer, x, upstream, dropped), _passed(wide, x.double(), upstream.double(), dropped)
    for key, exact in truth.items():
        error, own = (_error(tensors[key], exact) for tensors in (fused, eager))
        allowed = EXACT if dtype == torch.float32 else max(1.5 * own, ROUNDED)  # own: the eager path's error
        shape = f"{rows} x {columns} -> {out}, rank {rank}"
        yield Check(f"{name}, {key}, {shape}, {str(dtype).removeprefix('torch.')}", error, allowed)


def _adapted(
    columns: int, out: int, rank: int, dtype: torch.dtype, device: str, *, opaque: bool = False, **changes: Any
) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Linear(columns, out, device=device, dtype=dtype)
    config = DoRAConfig(
        targets=("*",), rank=rank, alpha=1.5 * rank, opaque_layers=(SEALED,), **{"dropout": 0.0, **changes}
    )
    model = nn.Sequential(Sealed(base) if opaque else base)
    apply_dora(model, config)
    with torch.no_grad():
        for leaf, parameter in model.named_parameters():
            if leaf.endswith("lora_B"):
                parameter.normal_(std=0.02)
            elif leaf.endswith("magnitude"):
                parameter.mul_(torch.linspace(0.5, 1.7, out, device=device))
    return model.train()


def _passed(model: nn.Module, x: Tensor, upstream: Tensor, dropped: Dropped) -> dict[str, Tensor]:
    """Computes outputs in training and inference, and gradients, by name."""
    model.zero_grad()
    model[0].forget_norms(frozen=True)  # pyright: ignore[reportIndexIssue]
    inputs = x.detach().requires_grad_()
    with mock.patch.object(SHARED_DROPOUT, "draw", return_value=dropped):  # by every layer
        y = model(inputs)
    y.backward(upstream)
    trained = {f"d {name.removeprefix('0.')}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        quiet = model.eval()(x)
    model.train()
    assert inputs.grad is not None
    return {"y": y.detach(), "y in inference": quiet, "d x": inputs.grad, **trained}


def _error(computed: Tensor, exact: Tensor) -> float:
    return float((computed.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def _cancelled(rank: int, dtype: torch.dtype, device: str, *, width: int) -> Check:
    """Checks norms of which a few cancel to a thousandth."""
    torch.manual_seed(0)
    weight = torch.randn(width, width, device=device).to(dtype)
    a, b = 0.1 * torch.randn(rank, width, device=device), 0.3 * torch.randn(width, rank, device=device)
    weight[::17] = (-1.001 * (b @ a))[::17].to(dtype)
    taken = norms(weight, row_norms_squared(weight), a, b, 1.0)[::17]
    exact = torch.linalg.vector_norm(weight.double() + b.double() @ a.double(), dim=1)[::17]
    error = float(((taken.double() - exact) / exact).abs().max())
    return Check(f"norms of rows that cancel, rank {rank}, {str(dtype).removeprefix('torch.')}", error, 1e-3)


def _repeats(device: str, *, width: int) -> Check:
    """Runs a pass with dropout twice under one seed; the results must be equal bit by bit."""
    layer = _adapted(width, width, 16, torch.float32, device, dropout=0.1)
    x, results = torch.randn(64, width, device=device), []
    for _ in range(2):
        torch.manual_seed(7)
        layer.zero_grad()
        layer(x).square().sum().backward()
        results.append([parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None])
    differing = sum(int((first != second).sum()) for first, second in zip(*results, strict=True))
    return Check("elements that differ when a pass with dropout is repeated", differing, 0)


def compiled_check(device: str, backend: str) -> Check:
    """Checks a compiled layer, in one graph, against the eager one; on CUDA it is recorded as a CUDA graph."""
    layer: Callable[..., Tensor] = _adapted(64, 96, 5, torch.float32, device)
    x = torch.randn(33, 64, device=device)
    options: dict[str, Any] = {"mode": "reduce-overhead"} if device == "cuda" else {}
    compiled = torch.compile(layer, fullgraph=True, backend=backend, **options)
    with torch.no_grad():
        expected = layer(x).double()
        errors = [_error(compiled(x), expected) for _ in range(3)]  # on CUDA the first two warm up and record
    return Check("compiled, in one graph", max(errors), EXACT)
