"""The layer behaves as `nn.Linear` does in flows that edit, replace, transform or average what it is made of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from dora_vl.core import DoRAConfig, DoRALinear
from dora_vl.core.gain import WatchedParameter, unwatch
from tests.core.dense_dora import assert_same_gradients, dense_dora, moved_layer, reference_of


def config(**changes) -> DoRAConfig:
    return DoRAConfig(**{"targets": ("*",), "rank": 2, "alpha": 6.0, "dropout": 0.0, **changes})


def rows(count: int = 7, width: int = 6, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, width, dtype=dtype, generator=torch.Generator().manual_seed(5)).requires_grad_()


def assert_fresh(layer: DoRALinear, x: torch.Tensor | None = None) -> None:
    x = rows().detach() if x is None else x
    expected, _ = reference_of(layer, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


# -- outputs edited in place ------------------------------------------------------------------------------------------


EDITS = {
    "relu_": lambda y: torch.relu_(y),
    "mul_": lambda y: y.mul_(1.7).tanh(),
    "add_": lambda y: y.add_(0.3).sin(),
    "columns": lambda y: y.index_fill_(-1, torch.tensor([1, 3]), 0.0),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (6,)])
def test_an_output_edited_in_place_has_the_gradients_of_one_that_was_not(edit, dropout, shape):
    layer = moved_layer(config(dropout=dropout)).train()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    results = []
    for clone in (True, False):
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        y = layer(x)
        edit(y.clone() if clone else y).square().sum().backward()
        results.append([x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
        results[-1] = [gradient.clone() for gradient in results[-1]]
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_an_edit_in_place_inside_a_checkpoint(reentrant, dropout):
    layer = moved_layer(config(dropout=dropout)).train()
    block = nn.Sequential(layer, nn.ReLU(inplace=True))
    results = []
    for checkpointed in (False, True):
        layer.zero_grad()
        x = rows()
        torch.manual_seed(3)
        y = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else torch.relu(layer(x))
        y.square().sum().backward()
        results.append([x.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_an_input_edited_in_place_is_still_refused_by_torch():
    layer, x = moved_layer(config()), rows()
    leaf = x * 1.0
    y = layer(leaf)
    leaf.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# -- other tensors in the place of the layer's own --------------------------------------------------------------------


def other_values(layer: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, dtype=value.dtype, generator=generator)
        for name, value in layer.named_parameters()
    }


@pytest.mark.parametrize("training", [True, False])
def test_functional_calls_with_one_set_of_tensors_after_another(training):
    layer, x = moved_layer(config()).train(training), rows().detach()
    assert_fresh(layer)
    for seed in (1, 2, 1):
        values = other_values(layer, seed)
        factors = values["lora_A"], values["lora_B"]
        expected = dense_dora(x, values["weight"], values["bias"], factors, values["magnitude"], scale=3.0)
        torch.testing.assert_close(functional_call(layer, values, (x,)), expected, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(functional_call(layer, values, (x,)), expected, rtol=1e-9, atol=1e-9)
    assert_fresh(layer)


class Doubled(nn.Module):
    def forward(self, original: torch.Tensor) -> torch.Tensor:
        return 2 * original


@pytest.mark.parametrize("leaf", ["lora_A", "lora_B", "magnitude"])
def test_parametrizations_of_what_trains(leaf):
    layer, x = moved_layer(config()), rows().detach()
    assert_fresh(layer)
    values = {name: value.detach().clone() for name, value in layer.named_parameters()}
    parametrize.register_parametrization(layer, leaf, Doubled())
    for factor in (1.0, 3.0):
        with torch.no_grad():
            layer.parametrizations[leaf].original.copy_(factor * values[leaf])
        now = {**values, leaf: 2 * factor * values[leaf]}
        expected = dense_dora(
            x, now["weight"], now["bias"], (now["lora_A"], now["lora_B"]), now["magnitude"], scale=3.0
        )
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
        layer(x).sum().backward()
        assert layer.parametrizations[leaf].original.grad is not None


# -- what is written through .data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", ["lora_A", "lora_B", "magnitude", "weight"])
@pytest.mark.parametrize("training", [True, False])
def test_writes_through_data_are_seen(leaf, training):
    layer = moved_layer(config()).train(training)
    assert_fresh(layer)
    parameter = getattr(layer, leaf)
    parameter.data.mul_(1.3)
    assert_fresh(layer)
    torch._foreach_add_([parameter.data], 0.05)
    assert_fresh(layer)
    parameter.data = parameter.data * 1.4
    assert_fresh(layer)
    kept = parameter.data
    assert_fresh(layer)
    kept.add_(0.02)
    assert_fresh(layer)


def test_watched_parameters_are_parameters_everywhere_else(tmp_path):
    layer = moved_layer(config())
    assert_fresh(layer)
    parameter = layer.lora_B
    assert type(parameter) is WatchedParameter
    parameter.data = parameter.data.clone()
    torch.save({"one": parameter, "state": layer.state_dict()}, tmp_path / "file.pt")
    loaded = torch.load(tmp_path / "file.pt", weights_only=True)
    assert type(loaded["one"]) is nn.Parameter
    assert torch.equal(loaded["one"], parameter)
    twin = copy.deepcopy(layer)
    assert_fresh(twin)
    twin.lora_B.data.mul_(2.0)
    assert_fresh(twin)
    assert_fresh(layer)
    unwatch(parameter)
    assert type(parameter) is nn.Parameter


# -- transforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detach_norm", [True, False])
def test_func_grad_is_autograds_gradient(detach_norm):
    layer, x = moved_layer(config(detach_norm=detach_norm)), rows()
    values = dict(layer.named_parameters())

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, values, (x,)).square().sum()

    found, found_x = torch.func.grad(loss, argnums=(0, 1))({k: v.detach() for k, v in values.items()}, x.detach())
    y = layer(x)
    assert_same_gradients(layer, x, y, reference_of(layer, x), tolerance=1e-9)
    layer.zero_grad()
    x.grad = None
    layer(x).square().sum().backward()
    torch.testing.assert_close(found_x, x.grad, rtol=1e-9, atol=1e-9)
    for name, parameter in values.items():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_vmap_over_inputs_and_over_sets_of_parameters():
    layer, x = moved_layer(config()), rows().detach()
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x), rtol=1e-9, atol=1e-9)
    sets = [other_values(layer, seed) for seed in (1, 2, 3)]
    stacked = {name: torch.stack([one[name] for one in sets]) for name in sets[0]}
    found = torch.vmap(lambda values: functional_call(layer, values, (x,)))(stacked)
    for one, y in zip(sets, found, strict=True):
        torch.testing.assert_close(functional_call(layer, one, (x,)), y, rtol=1e-9, atol=1e-9)
    gradients = torch.vmap(torch.func.grad(lambda values: functional_call(layer, values, (x,)).sum()))(stacked)
    assert gradients["lora_A"].shape == stacked["lora_A"].shape


# -- a bias that hides the product ------------------------------------------------------------------------------------


def test_the_magnitudes_gradient_under_a_bias_a_thousand_times_the_product():
    torch.manual_seed(0)
    base = nn.Linear(64, 48)
    with torch.no_grad():
        base.bias.normal_(std=1e3)
    layer = DoRALinear(base, config(rank=4))
    with torch.no_grad():
        layer.lora_B.normal_(std=0.1)
        layer.magnitude.mul_(1.2)
    layer.weight.requires_grad_(False)
    x = torch.randn(33, 64, requires_grad=True)
    layer(x).tanh().mul(torch.randn(48)).sum().backward()
    exact = copy.deepcopy(layer).double()
    exact.zero_grad()
    upstream = torch.randn(33, 48)
    layer.zero_grad()
    layer(x).backward(upstream)
    y, leaves = reference_of(exact, x.detach().double().requires_grad_())
    y.backward(upstream.double())
    wanted = leaves["magnitude"].grad
    error = float((layer.magnitude.grad - wanted).abs().max() / wanted.abs().max())
    assert error < 2e-6, error
