"""Parity with PEFT 0.21's DoRA and LoRA: outputs and all gradients, float64, dropout off and with one fixed mask."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dora_vl.core import DoRAConfig, apply_dora
from tests.core.dense_dora import move


class Pair(nn.Module):
    """Two linear layers, one without a bias, so that names have more than one level."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"q_proj": nn.Linear(7, 11), "v_proj": nn.Linear(11, 5, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["v_proj"](torch.tanh(self.inner["q_proj"](x)))


def pair() -> Pair:
    torch.manual_seed(3)
    return Pair().double()


def ours(method: str, dropout: float = 0.0, mode: str = "whole_change", **changes) -> Pair:
    model = pair()
    config = DoRAConfig(
        targets=("*_proj",), method=method, rank=3, alpha=7.0, dropout=dropout, dropout_mode=mode, **changes
    )
    apply_dora(model, config)
    move(model)
    return model


def peft_of(model: Pair, method: str, dropout: float = 0.0, *, rslora: bool = False) -> nn.Module:
    """The same base under PEFT with the same A, B and magnitudes."""
    config = LoraConfig(
        r=3,
        lora_alpha=7,
        lora_dropout=dropout,
        target_modules=["q_proj", "v_proj"],
        use_dora=method == "dora",
        use_rslora=rslora,
    )
    peft = get_peft_model(pair(), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, layer in model.inner.items():
            theirs = peft.base_model.model.inner[name]
            theirs.lora_A.default.weight.copy_(layer.lora_A)
            theirs.lora_B.default.weight.copy_(layer.lora_B)
            if method == "dora":
                theirs.lora_magnitude_vector.default.weight.copy_(layer.magnitude)
    return peft


def assert_same(model: Pair, peft: nn.Module, dropout: float) -> None:
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = []
    for net, value in zip((model, peft), inputs, strict=True):
        torch.manual_seed(11)  # one mask a layer, drawn by F.dropout in the same order
        outputs.append(net(value))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-10)
    for name, layer in model.inner.items():
        theirs = peft.base_model.model.inner[name]
        found = {"A": layer.lora_A.grad, "B": layer.lora_B.grad}
        expected = {"A": theirs.lora_A.default.weight.grad, "B": theirs.lora_B.default.weight.grad}
        if layer.magnitude is not None:
            found["m"], expected["m"] = layer.magnitude.grad, theirs.lora_magnitude_vector.default.weight.grad
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-10, msg=f"{name} {key}")


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_without_dropout(method, rslora):
    model = ours(method, rank_scaling="sqrt" if rslora else "linear")
    assert_same(model, peft_of(model, method, rslora=rslora), 0.0)


def test_with_one_fixed_mask():
    model = ours("dora", dropout=0.4)
    assert_same(model, peft_of(model, "dora", dropout=0.4), 0.4)
