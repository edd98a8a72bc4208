"""A family of layers computes, in one go, the very gains that each layer computes alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dora_vl.core import apply_dora, functional, merge_dora
from dora_vl.core.gain import Gain
from tests.core.dense_dora import config


def stack_of(count: int = 4, *, dtype: torch.dtype = torch.float32, rank: int = 3, width: int = 7) -> nn.Sequential:
    """Layers of one shape, with a zero row and a tiny gain among them, and one of another; all moved."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width, bias=number != 1) for number in range(count)]
    model = nn.Sequential(*layers, nn.Linear(width, 5)).to(dtype)
    apply_dora(model, config(rank=rank, alpha=5.0))
    with torch.no_grad():
        for layer in model:
            layer.lora_B.normal_(std=0.1)
            layer.magnitude.mul_(1.2).add_(0.05)
        model[1].weight[3], model[1].lora_B[3] = 0.0, 0.0
        model[2].magnitude[4] = 1e-4
    return model


@torch.no_grad()
def assert_as_alone(layer: Any, dtype: torch.dtype) -> None:
    gain, alone = layer.recall("gain"), copy.deepcopy(layer)  # a copy has a family of its own
    alone(torch.zeros(1, layer.in_features, dtype=dtype))
    expected = alone.recall("gain")
    for name in ("full", "minus_one", "per_magnitude"):
        assert torch.equal(getattr(gain, name), getattr(expected, name)), name
    assert (gain.fragile is None) == (expected.fragile is None)


@pytest.mark.parametrize(
    ("dtype", "rank", "width"),
    [
        (torch.float32, 3, 7),
        (torch.bfloat16, 3, 7),
        (torch.float64, 3, 7),
        (torch.float32, 16, 576),  # so wide that cores share a product
        (torch.bfloat16, 128, 576),
    ],
)
def test_one_call_brings_all_up_to_date_with_their_own_gains(dtype, rank, width):
    model = stack_of(dtype=dtype, rank=rank, width=width)
    model[2](torch.randn(2, width, dtype=dtype))
    for layer in model[:4]:
        assert_as_alone(layer, dtype)
    assert model[4].recall("gain") is None  # of another shape


def test_merged_sharded_and_offloaded_layers_are_left_out():
    model = stack_of(5)
    merge_dora(model)
    for index in (0, 2, 3, 4):
        model[index].unmerge()
    model[2].lora_A.ds_status = "in flight"  # as DeepSpeed ZeRO-3 marks its parameters
    model[3].weight = nn.Parameter(model[3].weight.detach().to("meta"), requires_grad=False)  # offloaded
    model[0](torch.randn(2, 7))
    assert [layer.recall("gain") is None for layer in model[:5]] == [False, True, True, True, False]


def test_copies_found_a_family_of_their_own():
    model, x = stack_of(), torch.randn(2, 7)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert twin[0].family is not model[0].family
    assert twin[0].family is twin[1].family
    for factor in (2.0, 0.7):  # every layer has joined by the second change, which is computed in one go
        with torch.no_grad():
            for layer in twin:
                layer.lora_B.mul_(factor)
        twin[0](x) if factor == 0.7 else twin(x)
    assert twin[3].recall("gain") is not None
    assert torch.equal(model(x), model(x))


def test_wide_layers_are_taken_in_batches(monkeypatch):
    monkeypatch.setattr("dora_vl.core.linear.LARGEST_BATCH_BYTES", 1)
    shapes = []
    computed = functional.with_growth
    monkeypatch.setattr(
        functional, "with_growth", lambda frozen, *rest: shapes.append(tuple(frozen.shape)) or computed(frozen, *rest)
    )
    model = stack_of(5)
    model[0](torch.randn(1, 7))
    assert shapes == [(2, 7), (2, 7), (1, 7)]
    assert_as_alone(model[4], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["plain", "transposed", "expanded"])
def test_scaled_gradient_and_sums_are_those_written_out(dtype, layout):
    torch.manual_seed(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dy, y = torch.randn(9, 5).to(dtype), torch.randn(9, 5).to(dtype)
    if layout == "transposed":
        dy, y = (tensor.t().contiguous().t() for tensor in (dy, y))
    if layout == "expanded":
        dy = torch.tensor(0.3, dtype=dtype).expand(9, 5)
    full, magnitude = 1 + 0.3 * torch.randn(5, dtype=wide), torch.rand(5, dtype=wide) + 1
    gain = Gain(full, (full - 1).to(dtype), 1 / magnitude)
    dz, _, dm, db = functional.backward_pass(dy, y, None, None, gain, 1.0, with_bias_sum=True)
    assert dz.dtype == dtype
    torch.testing.assert_close(dz, (dy.double() * full.double()).to(dtype))
    torch.testing.assert_close(dm, ((dy.double() * y.double()).sum(0) / magnitude.double()).to(wide))
    torch.testing.assert_close(db, dy.double().sum(0).to(wide))
