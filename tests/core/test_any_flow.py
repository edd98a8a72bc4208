"""The layer behaves as `nn.Linear` does under edits in place, checkpoints and the transforms of `torch.func`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tests.core.dense_dora import config, moved_layer

EDITS = {
    "relu_": lambda y: torch.relu_(y),
    "mul_": lambda y: y.mul_(1.7).tanh(),
    "columns": lambda y: y.index_fill_(-1, torch.tensor([1, 3]), 0.0),
}


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(
        shape or (7, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    ).requires_grad_()


def gradients(layer: nn.Module, x: torch.Tensor, run) -> list[torch.Tensor]:
    """Of the input and of what trains, with the same dropout at each call."""
    layer.zero_grad()
    x.grad = None
    torch.manual_seed(3)
    run(x).square().sum().backward()
    return [x.grad.clone(), *(p.grad.clone() for p in layer.parameters() if p.requires_grad)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(2, 3, 6), (6,)])
def test_an_output_edited_in_place_has_the_gradients_of_one_that_was_not(edit, dropout, shape):
    layer, x = moved_layer(config(dropout=dropout)).train(), rows(*shape)
    expected = gradients(layer, x, lambda x: edit(layer(x).clone()))
    assert_close(gradients(layer, x, lambda x: edit(layer(x))), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["low_rank", "whole_change"])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_checkpoint_gives_the_same_gradients(reentrant, mode, inplace):
    layer, x = moved_layer(config(dropout=0.4, dropout_mode=mode)).train(), rows()
    block = nn.Sequential(layer, nn.ReLU(inplace=inplace))
    expected = gradients(layer, x, lambda x: torch.relu(layer(x)))
    assert_close(gradients(layer, x, lambda x: checkpoint(block, x, use_reentrant=reentrant)), expected)


def test_an_input_edited_in_place_is_still_refused_by_torch():
    layer, leaf = moved_layer(config()), rows() * 1.0
    y = layer(leaf)
    leaf.mul_(2.0)
    with pytest.raises(RuntimeError):
        y.sum().backward()


@pytest.mark.parametrize("detach_norm", [True, False])
def test_func_grad_is_autograds_gradient(detach_norm):
    layer, x = moved_layer(config(detach_norm=detach_norm)), rows()
    values = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, values, (x,)).square().sum()

    of_values, of_x = torch.func.grad(loss, argnums=(0, 1))(values, x.detach())
    expected = gradients(layer, x, layer)
    trained = [of_values[name] for name, p in layer.named_parameters() if p.requires_grad]
    for found, gradient in zip([of_x, *trained], expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-9)


def test_vmap_over_inputs_and_over_sets_of_parameters():
    layer, x = moved_layer(config()), rows().detach()
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x), rtol=1e-9, atol=1e-9)
    stacked = {name: torch.randn(3, *value.shape, dtype=value.dtype) for name, value in layer.named_parameters()}
    found = torch.vmap(lambda values: functional_call(layer, values, (x,)))(stacked)
    for number, y in enumerate(found):
        values = {name: value[number] for name, value in stacked.items()}
        torch.testing.assert_close(functional_call(layer, values, (x,)), y, rtol=1e-9, atol=1e-9)
    gradients = torch.vmap(torch.func.grad(lambda values: functional_call(layer, values, (x,)).sum()))(stacked)
    assert gradients["lora_A"].shape == stacked["lora_A"].shape
