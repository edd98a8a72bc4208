"""Quantised layers and inference through the kernels, against the eager path in float64.

Run by test_triton_kernels.py in a process of its own: Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import Tensor, nn

from dora_vl.core import DoRAConfig, DoRALinear, apply_dora, rows
from dora_vl.core.fast.dropout import SHARED_DROPOUT, Dropped
from dora_vl.core.fast.products import kernels_for

if kernels_for(torch.device(os.environ.get("CHECKED_DEVICE", "cpu")), torch.float32) is None:
    pytest.skip("runs in Triton's interpreter or on a GPU", allow_module_level=True)

from dora_vl.core.fast import triton


@pytest.fixture(autouse=True)
def device():
    torch.set_default_device(os.environ.get("CHECKED_DEVICE", "cpu"))
    torch.manual_seed(0)
    yield
    torch.set_default_device(None)


@pytest.fixture
def launches(monkeypatch):
    """How often the kernel of the output ran."""
    calls: list[int] = []
    real = triton._output
    monkeypatch.setattr(triton, "_output", lambda *operands: calls.append(1) or real(*operands))
    return calls


class Sealed(nn.Module):
    """A linear layer that is only ever called."""

    def __init__(self, *, bias: bool = True, trained_bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = 26, 37
        self.secret = nn.Parameter(torch.randn(37, 26), requires_grad=False)
        self.bias = nn.Parameter(3 * torch.randn(37), requires_grad=trained_bias) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.secret.dtype), self.secret, self.bias)


SEALED = f"{Sealed.__module__}.{Sealed.__qualname__}"


def opaque_model(base: nn.Module, **changes) -> nn.Sequential:
    settings = {"rank": 3, "alpha": 7.0, "dropout": 0.0, **changes}
    model = nn.Sequential(base)
    apply_dora(model, DoRAConfig(targets=("*",), opaque_layers=(SEALED,), **settings))
    with torch.no_grad():
        if model[0].lora_B is not None:
            model[0].lora_B.normal_(std=0.3)
        if model[0].magnitude is not None:
            model[0].magnitude.mul_(torch.linspace(-0.02, 1.7, 37))  # gains through 0
    return model


def passed(model: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = model(x)
    found = {"y": y.detach().clone()}
    y.relu_() if y.dtype == torch.float32 else None  # a reader may change it in place; its gradient's mask is the same
    y = y if y.dtype == torch.float32 else y.relu()
    y.backward(upstream.to(y.dtype))
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "x": x.grad, **trained}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        error = float((found[name].double() - one).abs().max() / one.abs().max())
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("trained_bias", [True, False])
@pytest.mark.parametrize("changes", [{}, {"method": "magnitude"}], ids=str)
def test_quantised_layers(monkeypatch, launches, changes, trained_bias, dropout):
    narrow = opaque_model(Sealed(trained_bias=False), dropout=dropout, **changes)
    narrow[0].base.bias.requires_grad_(trained_bias)
    wide = copy.deepcopy(narrow).double()
    x, upstream, seed = torch.randn(2, 9, 26), torch.randn(2, 9, 37), torch.tensor(13)
    masks = {
        torch.float32: seed,
        torch.float64: (triton.masked_copy(torch.ones(18, 26), seed, 0.4) == 0).flatten().nonzero().flatten(),
    }
    monkeypatch.setattr(SHARED_DROPOUT, "draw", lambda tensor, p, user: Dropped(p, masks[tensor.dtype]))
    found = passed(narrow, x, upstream)
    assert launches == [1]
    assert_alike(found, passed(wide, x.double(), upstream))
    assert launches == [1]
    with torch.no_grad():
        quiet = narrow.eval()(x).double()
    assert launches == [1, 1]
    torch.testing.assert_close(quiet, wide.eval()(x.double()).detach(), rtol=1e-5, atol=1e-5)


def test_an_opaque_layer_without_a_bias(launches):
    narrow = opaque_model(Sealed(bias=False))
    x, upstream = torch.randn(5, 26), torch.randn(5, 37)
    assert_alike(passed(narrow, x, upstream), passed(copy.deepcopy(narrow).double(), x.double(), upstream))
    assert launches == [1]


def test_an_opaque_layers_gain_is_kept_and_fresh(launches):
    model, x = opaque_model(Sealed()), torch.randn(5, 26)
    layer = model[0]
    model(x)
    kept = layer._kept["gain"]
    model(x)
    assert layer._kept["gain"] is kept
    before = model(x).detach()
    with torch.no_grad():
        layer.magnitude.mul_(1.5)
    bias = layer.base.bias.detach()
    torch.testing.assert_close(model(x).detach() - bias, 1.5 * (before - bias), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        layer.base.secret.mul_(2)
    fresh = copy.deepcopy(model)
    fresh[0].forget_norms(frozen=True)
    torch.testing.assert_close(model(x), fresh(x))
    assert len(launches) == 6


@pytest.mark.parametrize("changes", [{"detach_norm": False}, {"method": "lora"}], ids=str)
def test_what_the_kernels_do_not_know_is_eager(launches, changes):
    narrow = opaque_model(Sealed(), **changes)
    x, upstream = torch.randn(5, 26), torch.randn(5, 37)
    assert_alike(passed(narrow, x, upstream), passed(copy.deepcopy(narrow).double(), x.double(), upstream))
    assert launches == []


def test_every_launch_is_on_its_tensors_device(monkeypatch):
    """Triton launches on the current device; a model spread over several has its layers on others."""
    from contextlib import nullcontext

    assert isinstance(triton.on_device(torch.device("cuda", 1)), torch.cuda.device)
    assert triton.on_device(torch.device("cuda", 1)).idx == 1
    entered: list[torch.device] = []
    monkeypatch.setattr(triton, "on_device", lambda device: entered.append(device) or nullcontext())
    launched: list[str] = []
    run = type(triton._output_kernel).run
    monkeypatch.setattr(
        type(triton._output_kernel),
        "run",
        lambda kernel, *operands, **named: launched.append(str(kernel)) or run(kernel, *operands, **named),
    )
    layer = DoRALinear(nn.Linear(33, 70), DoRAConfig(targets=("*",), rank=5, dropout=0.4))
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 33, requires_grad=True)).sum().backward()
    weight, a, b = layer.weight.detach(), layer.lora_A.detach(), layer.lora_B.detach()
    triton.norms(weight, weight.square().sum(1), a, b, 2.0)
    assert len(launched) == 8, "masked copy, output, backward, sums, masked copy and product, two for the norms"
    assert entered == [layer.weight.device] * 8


@pytest.mark.parametrize("rows", [1, 21])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["dora", "magnitude", "lora"])
def test_inference(launches, method, bias, rows):
    config = DoRAConfig(targets=("*",), method=method, rank=5, alpha=7.0)
    narrow = DoRALinear(nn.Linear(33, 70, bias=bias), config).eval()
    with torch.no_grad():
        if narrow.lora_B is not None:
            narrow.lora_B.normal_(std=0.3)
        if narrow.magnitude is not None:
            narrow.magnitude.mul_(torch.linspace(-0.02, 1.7, 70))
        x = torch.randn(rows, 1, 33)
        expected = copy.deepcopy(narrow).double()(x.double())
        for _ in range(2):
            torch.testing.assert_close(narrow(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert len(launches) == (0 if method == "lora" else 2)


def test_rows_that_keep_their_product_train_through_the_kernels(launches):
    """Gains through 0, and a bias a thousand times the product."""
    narrow = DoRALinear(nn.Linear(33, 70), DoRAConfig(targets=("*",), rank=5, alpha=7.0, dropout=0.0))
    narrow.weight.requires_grad_(False)
    with torch.no_grad():
        narrow.lora_B.normal_(std=0.3)
        narrow.magnitude.mul_(torch.linspace(-0.02, 1.7, 70))
        narrow.bias[::7] = 1e3
    x, upstream = torch.randn(9, 33), torch.randn(9, 70)
    found = passed(narrow, x, upstream)
    assert launches == [1]
    assert narrow._gain[0].fragile is not None
    expected = passed(copy.deepcopy(narrow).double(), x.double(), upstream)
    for name, one in expected.items():
        error = float((found[name].double() - one).abs().max() / one.abs().max())
        assert error < (1e-4 if name == "magnitude" else 1e-5), (name, error)


@torch.no_grad()
def test_rows_of_several_adapters(monkeypatch, launches):
    """Each adapter's rows go through the kernel, in place; those of the base are left alone."""
    monkeypatch.setattr(rows, "ONE_PRODUCT", 0)
    linear, batch = nn.Linear(26, 37), rows.ActiveAdapters()
    layer, alone = rows.RowLayer(linear, batch, "rows"), {}
    for name, rank in (("one", 3), ("two", 5)):
        adapted = DoRALinear(linear, DoRAConfig(targets=("*",), rank=rank, alpha=7.0, dropout=0.0)).eval()
        adapted.lora_B.normal_(std=0.3)
        adapted.magnitude.mul_(torch.linspace(0.5, 1.7, 37))
        layer.put(name, rows.RowChange.of(adapted, torch.float32))
        alone[name] = copy.deepcopy(adapted).double()
    x = torch.randn(4, 9, 26)
    with batch.holding(("one", None, "two", "two")):
        found = layer(x)
    assert launches == [1, 1]
    assert torch.equal(found[1], linear(x)[1])
    for number, name in ((0, "one"), (2, "two"), (3, "two")):
        torch.testing.assert_close(found[number].double(), alone[name](x[number].double()), rtol=1e-5, atol=1e-5)
