"""What once came out wrong without a word: each case against the equation written out, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dora_vl.core import DoRALinear, adapted_layers, apply_dora, strip_adapters
from dora_vl.core.fast import cpu_step
from dora_vl.errors import UserError
from tests.core.dense_dora import config, move_layer, moved_layer, reference_of, unchanged
from tests.core.test_experts import adapted as adapted_experts
from tests.core.test_experts import inputs as expert_inputs
from tests.core.test_layers import KINDS, input_of, moved


def with_long_rows(layer: Any) -> Any:
    """A's rows have a norm of 400, whose square no float16 holds; B is small enough for the output."""
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_A.mul_(400 / layer.lora_A.flatten(1).norm(dim=1).min())
        layer.lora_B.normal_(std=2e-3)
        layer.forget_norms()
    return layer


@pytest.mark.parametrize("count", [1, 3])
def test_rows_of_A_that_are_long_in_float16(count) -> None:
    """One layer's gain by itself, and several of one shape in one go; with a graph and without."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(count))).half()
    apply_dora(model, config(rank=4, alpha=4.0))
    x = torch.randn(5, 16).half()
    for _, layer in adapted_layers(model):
        with_long_rows(layer)
        wide = copy.deepcopy(layer).double()
        wide.lora_A.data, wide.lora_B.data = (layer.lora_A.half().double(), layer.lora_B.half().double())
        expected = reference_of(wide, x.double())[0]
        for graph in (True, False):
            with torch.set_grad_enabled(graph):
                torch.testing.assert_close(layer(x).double(), expected, rtol=2e-2, atol=2e-2)


def test_long_rows_of_experts_in_float16() -> None:
    for _, layer in adapted_layers(adapted_experts().half()):
        with_long_rows(layer)
        weight, a, b = (t.half().double() for t in (layer.frozen_matrix(), layer.lora_A, layer.lora_B))
        expected = (weight + layer.adapter.scale * torch.bmm(b, a)).norm(dim=2)
        torch.testing.assert_close(layer.norms().double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfrozen_weight_is_refused_where_it_would_get_no_gradient(kind) -> None:
    model, x = moved(kind).eval(), input_of(kind)
    before = model(x)
    layer = model.inner["layer"]
    layer.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"inner\.layer"):
        model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
    layer.weight.requires_grad_(False)
    torch.testing.assert_close(model(x), before)


def test_an_unfrozen_weight_of_experts_is_refused() -> None:
    model = adapted_experts()
    next(layer for _, layer in adapted_layers(model)).weight.requires_grad_(True)
    with pytest.raises(RuntimeError):
        model(*expert_inputs())


def test_a_view_of_a_flat_parameter_in_the_weights_place_is_taken() -> None:
    """As FSDP1 has it: one parameter holds all of a module, frozen or not, and requires a gradient."""
    layer, x = moved_layer(config()), torch.randn(3, 6, dtype=torch.float64)
    expected = layer(x)
    flat = nn.Parameter(layer.weight.detach().flatten())
    del layer._parameters["weight"]
    layer.weight = flat.view(5, 6)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [
        ({}, True),
        ({"method": "lora"}, True),
        ({"detach_norm": False}, True),
        ({"method": "magnitude"}, False),
        ({"dropout": 0.3}, False),
        ({"dropout": 0.3, "dropout_mode": "whole_change"}, False),
    ],
    ids=str,
)
def test_an_input_edited_in_place_is_refused_or_changes_no_gradient(changes, is_refused) -> None:
    layer, x = moved_layer(config(**changes)).train(), torch.randn(7, 6, dtype=torch.float64)

    def gradients(*, edited: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        between = leaf * 1.0
        y = layer(between)
        if edited:
            between.mul_(2)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        return list(torch.autograd.grad(y.square().sum(), [leaf, *trained]))

    expected = gradients(edited=False)
    if is_refused:
        with pytest.raises(RuntimeError):
            gradients(edited=True)
    else:
        torch.testing.assert_close(gradients(edited=True), expected)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_float64_into_a_float32_layer_is_refused_as_torch_does(method) -> None:
    layer = moved_layer(config(method=method), dtype=torch.float32)
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 6, dtype=torch.float64))


@pytest.mark.parametrize(("compiled", "rank"), [(True, 16), (False, 16), (True, 128)])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_torchs_counter_sees_all_products_of_a_step(monkeypatch, compiled, rank, method) -> None:
    if not compiled:
        monkeypatch.setattr(cpu_step, "SMALLEST", 2**60)
    layer = DoRALinear(nn.Linear(256, 512), config(method=method, rank=rank))
    x = torch.randn(512, 256, requires_grad=True)
    layer(x).sum().backward()  # the norm is kept
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    low_rank = 3 * (256 + 512) * rank  # forward, of the input, of A and B
    assert counter.get_total_flops() == 2 * 512 * (2 * 256 * 512 + low_rank)


@pytest.mark.parametrize("training", [True, False])
def test_a_gain_too_small_for_bfloat16_is_in_the_output(training) -> None:
    """bfloat16 has nothing between 1 and 1.0078."""
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(64, 32, bias=False, dtype=torch.bfloat16), config(rank=4)).train(training)
    x = torch.randn(256, 64).bfloat16()
    with torch.no_grad():
        before = layer(x).double()
        layer.magnitude.mul_(1.003)
    after = layer(x.requires_grad_(training)).detach().double()
    assert float((after * before).sum() / before.square().sum()) == pytest.approx(1.003, abs=5e-4)


def test_pissa_of_a_weight_with_nan_is_refused_and_changes_nothing() -> None:
    model = nn.ModuleDict({"q": nn.Linear(6, 6), "k": nn.Linear(6, 6)})
    with torch.no_grad():
        model["k"].weight[0, 0] = float("nan")
    with unchanged(model), pytest.raises(UserError):
        apply_dora(model, config(init="pissa"))


@pytest.mark.parametrize("target", ["linear1", "linear2"])
@pytest.mark.parametrize("nested", [False, True])
def test_torchs_encoder_gives_the_adapters_output_in_eval(target, nested) -> None:
    """Its fused pass reads the layers' weights; a padding mask makes its inputs nested tensors."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(block, 2) if nested else block
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [2]])
    apply_dora(model, config(targets=(f"*{target}",)))
    for _, layer in adapted_layers(model):
        move_layer(layer)
    named = {"src_key_padding_mask": padding} if nested else {}
    kept = ~padding if nested else torch.ones_like(padding)
    expected = model.train()(x, **named)[kept]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, **named)[kept], expected, rtol=1e-5, atol=1e-5)
        base = copy.deepcopy(model)
        strip_adapters(base)
        assert not torch.allclose(base(x, **named)[kept], expected, atol=1e-2)
