"""The norm is never stale and never computed twice for one set of parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dora_vl.core import DoRAConfig, DoRALinear, apply_dora, functional
from tests.core.dense_dora import moved_layer, reference_of


def config(**changes) -> DoRAConfig:
    return DoRAConfig(**{"targets": ("*",), "rank": 2, "alpha": 6.0, "dropout": 0.0, **changes})


def assert_fresh(layer: DoRALinear) -> None:
    x = torch.randn(3, 6, dtype=layer.lora_A.dtype)
    expected, _ = reference_of(layer, x)
    mode = layer.training
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    assert layer.training == mode


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("foreach", [True, False])
def test_after_optimizer_steps(optimizer, foreach):
    layer = moved_layer(config())
    stepper = optimizer([p for p in layer.parameters() if p.requires_grad], lr=0.1, foreach=foreach)
    for _ in range(3):
        layer(torch.randn(3, 6, dtype=torch.float64)).square().sum().backward()
        stepper.step()
        stepper.zero_grad()
        assert_fresh(layer)


@pytest.mark.parametrize(("assign", "swap"), [(True, False), (False, False), (False, True)])
def test_after_loading_a_state(assign, swap):
    layer, other = moved_layer(config()).eval(), moved_layer(config())
    assert_fresh(layer)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert_fresh(layer)


def test_after_a_change_of_dtype_or_scale():
    layer = moved_layer(config()).eval()
    assert_fresh(layer)
    layer.float().double()
    assert_fresh(layer)
    layer.adapter = config(alpha=3.0)
    assert_fresh(layer)


def test_an_edit_of_the_weights_data_is_seen_when_it_is_said():
    """The call without `frozen` costs no pass over W, since hand-written optimizers make it at every step."""
    layer = moved_layer(config()).eval()
    assert_fresh(layer)
    kept = layer.weight_norms_squared()
    layer.lora_B.data = layer.lora_B.data * 2
    layer.forget_norms()
    assert_fresh(layer)
    assert layer.weight_norms_squared() is kept
    layer.weight.data.mul_(1.5)
    layer.forget_norms(frozen=True)
    assert_fresh(layer)


@pytest.fixture
def norm_count(monkeypatch):
    """A list with an entry for each layer whose norms were computed, alone or with its family."""
    calls: list[int] = []
    computed = functional.with_growth

    def counted(frozen, *operands):
        calls.extend([1] * (frozen.numel() // frozen.shape[-1]))
        return computed(frozen, *operands)

    monkeypatch.setattr(functional, "with_growth", counted)
    return calls


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("kind", ["none", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("mode", ["low_rank", "whole_change"])
def test_one_norm_a_layer_and_step(norm_count, kind, mode):
    model = nn.Sequential(Block(), Block())
    apply_dora(model, config(targets=("*",), dropout=0.2, dropout_mode=mode))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(3):
        for _ in range(4):
            model.train()  # as trainers do before every micro-batch
            x = torch.randn(2, 6, requires_grad=True)
            for block in model:
                x = block(x) if kind == "none" else checkpoint(block, x, use_reentrant=kind == "reentrant")
            x.square().sum().backward()
        assert len(norm_count) == 4 * (step + 1)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(2, 6))
    assert len(norm_count) == 4 * 4


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["low_rank", "whole_change"])
def test_checkpointing_with_dropout_gives_the_same_gradients(reentrant, mode):
    model = nn.Sequential(Block(), Block()).double()
    apply_dora(model, config(dropout=0.3, dropout_mode=mode))
    x = torch.randn(4, 6, dtype=torch.float64)

    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(2)
        value = x.clone().requires_grad_()
        start = value
        for block in model:
            value = checkpoint(block, value, use_reentrant=reentrant) if checkpointed else block(value)
        value.square().sum().backward()
        return [start.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
