"""What once came out wrong without a word: each case against the equation written out, or refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dora_vl.core import DoRAConfig, DoRALinear, adapted_layers, apply_dora, strip_adapters
from dora_vl.core.config import AdaptedPart
from dora_vl.core.fast import cpu_step
from dora_vl.errors import UserError
from tests.core.dense_dora import config, move_layer, moved_layer, reference_of
from tests.core.test_experts import adapted as adapted_experts
from tests.core.test_experts import inputs as expert_inputs
from tests.core.test_layers import KINDS, input_of, moved

# -- rows that vanish ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smallest", [0, 2**60], ids=["compiled", "python"])
@pytest.mark.parametrize("edit", [lambda y: y.mul_(0.5), torch.relu_], ids=["mul", "relu"])
@pytest.mark.parametrize("detach_norm", [True, False])
def test_a_zero_row_whose_output_is_edited_in_place(monkeypatch, smallest, edit, detach_norm) -> None:
    """B has left 0 and the magnitude not yet: the row's g is 0, and its gradient in m is that over n."""
    monkeypatch.setattr(cpu_step, "SMALLEST", smallest)
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(6, 5), config(detach_norm=detach_norm))
    with torch.no_grad():
        layer.weight[1].zero_()
        move_layer(layer)
        layer.magnitude[1] = 0.0
    wide, x = copy.deepcopy(layer).double(), torch.randn(7, 6)
    edit(layer(x)).square().sum().backward()
    expected, leaves = reference_of(wide, x.double())
    edit(expected.clone()).square().sum().backward()
    for name in ("lora_A", "lora_B", "magnitude", "bias"):
        torch.testing.assert_close(getattr(layer, name).grad.double(), leaves[name].grad, rtol=1e-4, atol=1e-5)
    assert float(leaves["magnitude"].grad[1].abs()) > 0


def test_a_zero_row_edited_in_place_trains_for_many_steps() -> None:
    base = nn.Linear(6, 5)
    with torch.no_grad():
        base.weight[1].zero_()
    layer = DoRALinear(base, config())
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        layer(torch.randn(4, 6)).mul_(0.5).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
        optimizer.step()
    assert float(layer.magnitude[1].detach().abs()) > 0


# -- float16 ---------------------------------------------------------------------------------------------------


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


# -- a frozen weight that was unfrozen -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfrozen_weight_is_refused_where_it_would_get_no_gradient(kind) -> None:
    model, x = moved(kind).eval(), input_of(kind)
    before = model(x)
    layer = model.inner["layer"]
    layer.weight.requires_grad_(True)
    with pytest.raises(RuntimeError):
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


# -- torch's encoders ------------------------------------------------------------------------------------------


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


def test_a_projection_that_torchs_attention_never_calls_is_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2)})
    path = "torch.nn.modules.linear.NonDynamicallyQuantizableLinear"
    with pytest.raises(UserError):
        apply_dora(model, config(targets=("*",), opaque_layers=(path,)))


# -- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": "8"},
        {"rank": 8.0},
        {"rank": True},
        {"alpha": "32"},
        {"dropout": None},
        {"detach_norm": 1},
        {"method": 3},
        {"kinds": ("linears",)},
        {"kinds": "linear"},
        {"targets": (1,)},
        {"rank_pattern": {"*": "8"}},
        {"alpha_pattern": 8},
        {"parts": {"vision": {"targets": ("*",)}}},
        {"also_train": {"projector": "*.projector.*"}},
        {"random_seed": "0"},
    ],
    ids=str,
)
def test_a_setting_of_another_type_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        DoRAConfig(**{"targets": ("*",), **wrong})


def test_a_parts_setting_of_another_type_is_named_and_numpys_numbers_are_numbers() -> None:
    wrong: Any = "8"
    with pytest.raises(UserError, match="rank"):
        AdaptedPart(targets=("*",), rank=wrong)
    numbers: Any = {"rank": np.int64(4), "alpha": np.float32(8), "targets": ["*"]}
    assert DoRAConfig(**numbers).scale == 2
    assert moved_layer(config(**numbers)).adapter.rank == 4
