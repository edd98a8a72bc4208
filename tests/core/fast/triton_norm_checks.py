"""Norms from the kernels against dense ones in float64: rows that cancel too, and nothing that the host waits for.

Run by test_triton_kernels.py in a process of its own: Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dora_vl.core import DoRAConfig, apply_dora, functional
from dora_vl.core.fast.products import kernels_for
from dora_vl.core.gain import CANCELLATION

if kernels_for(torch.device(os.environ.get("CHECKED_DEVICE", "cpu")), torch.float32) is None:
    pytest.skip("runs in Triton's interpreter or on a GPU", allow_module_level=True)

from dora_vl.core.fast import triton as kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE = 1.7


@pytest.fixture(autouse=True)
def device():
    torch.set_default_device(os.environ.get("CHECKED_DEVICE", "cpu"))
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)


def operands(out: int, columns: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(out, columns).to(dtype), 0.1 * torch.randn(rank, columns), 0.3 * torch.randn(out, rank)


def cancel(weight: Tensor, a: Tensor, b: Tensor, rows: list[int]) -> None:
    """Makes W_i nearly -s B_i A: what is left of V_i is a thousandth of it."""
    weight[rows] = (-SCALE * (b[rows] @ a) * 1.001).to(weight.dtype)


def dense_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.double() + SCALE * (b.double() @ a.double()), dim=1)


@pytest.mark.parametrize("rank", [1, 3, 16, 130, 257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_norms_of_several_layers(dtype, rank):
    layers = [operands(75, 40, rank, dtype) for _ in range(3)]
    frozen = torch.stack([weight.float().square().sum(1) for weight, _, _ in layers])
    a, b = (torch.stack([layer[place] for layer in layers]).to(dtype) for place in (1, 2))
    on_A = torch.stack(
        [(weight.float() @ one.float().t()).to(dtype) for (weight, _, _), one in zip(layers, a, strict=True)]
    )
    gram = (a.float() @ a.float().mT).to(dtype)
    expected = frozen.double() + 2 * SCALE * (
        b.double() * (on_A.double() + SCALE / 2 * b.double() @ gram.double())
    ).sum(-1)
    found = kernels.norms_squared(frozen, b, on_A, gram, SCALE)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6 * float(expected.max()))
    turned = [one.mT.contiguous().mT for one in (b, on_A, gram)]
    assert torch.equal(kernels.norms_squared(frozen.t().contiguous().t(), *turned, SCALE), found)
    for place in range(3):
        alone = [one[place : place + 1] for one in (frozen, b, on_A, gram)]
        assert torch.equal(kernels.norms_squared(*alone, SCALE)[0], found[place]), "each as it would be alone"


@pytest.mark.parametrize("transposed", [False, True], ids=["out x in", "in x out"])
@pytest.mark.parametrize("rows", [[], [0], [3, 16, 17, 74], list(range(75))], ids=lambda rows: f"{len(rows)} cancel")
@pytest.mark.parametrize(("dtype", "rank"), [(torch.float32, 1), (torch.bfloat16, 5), (torch.float16, 130)], ids=str)
def test_rows_that_cancel_are_dense(dtype, rank, rows, transposed):
    weight, a, b = operands(75, 100, rank, dtype)
    cancel(weight, a, b, rows)
    weight = weight.t().contiguous().t() if transposed else weight
    frozen = functional.row_norms_squared(weight)
    found, expected = kernels.norms(weight, frozen, a, b, SCALE), dense_norms(weight, a, b)
    cancelled = expected.square() <= CANCELLATION * frozen
    assert int(cancelled.sum()) >= len(rows)
    torch.testing.assert_close(found[cancelled].double(), expected[cancelled], rtol=1e-4, atol=0)
    factored = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(found[~cancelled].double(), expected[~cancelled], rtol=factored, atol=0)


def test_rows_without_length_and_a_change_of_nothing():
    weight, a, b = operands(40, 30, 4, torch.float32)
    weight[5], b[5] = 0, 0
    norms = kernels.norms(weight, functional.row_norms_squared(weight), a, b, SCALE)
    assert float(norms[5]) == 0
    frozen = functional.row_norms_squared(weight)
    unchanged = kernels.norms(weight, frozen, a, torch.zeros_like(b), SCALE)
    assert torch.equal(unchanged, functional.root(frozen)), "a gain of 1 to the last bit"


class Asked(TorchDispatchMode):
    """Fails on whatever makes the host wait for a number of the device."""

    def __torch_dispatch__(self, func, types, positional=(), named=None):
        assert str(func).split(".")[1] not in {"nonzero", "_local_scalar_dense", "masked_select", "index"}, func
        return func(*positional, **(named or {}))


def test_the_host_asks_for_nothing():
    weight, a, b = operands(40, 30, 4, torch.float32)
    cancel(weight, a, b, [7])
    frozen = functional.row_norms_squared(weight)
    with Asked():  # a mode sees the operation from outside alone, hence its inside
        found = functional.trusted_norms(weight, frozen, a, b, SCALE)
    assert torch.equal(found, functional.safe_norms(weight, frozen, a, b, SCALE))
    torch.testing.assert_close(found.double(), dense_norms(weight, a, b), rtol=1e-4, atol=0)
    with Asked(), pytest.raises(AssertionError, match="nonzero"):
        functional.direction_norms(frozen, frozen)


def test_a_family_computes_its_gains_through_them(monkeypatch):
    calls = []
    real = kernels.norms_squared
    monkeypatch.setattr(kernels, "norms_squared", lambda *operands: calls.append(1) or real(*operands))
    model = nn.ModuleList(nn.Linear(30, 40) for _ in range(3))
    apply_dora(model, DoRAConfig(targets=("*",), rank=5, alpha=8.5, dropout=0.0))
    with torch.no_grad():
        for layer in model:
            layer.lora_B.normal_(std=0.1)
            layer.magnitude.mul_(1.3)
    for layer in model:
        layer(torch.randn(2, 30))
    assert calls == [1]
    for layer in model:
        expected = layer.magnitude.double() / dense_norms(
            layer.weight.detach(), layer.lora_A.detach(), layer.lora_B.detach()
        )
        torch.testing.assert_close(layer._gain[0].full.double(), expected.detach(), rtol=1e-5, atol=0)
