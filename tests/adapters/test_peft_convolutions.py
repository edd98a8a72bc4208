"""Convolutions of every geometry and PEFT, both ways: the same numbers, or a refusal, never other numbers.

PEFT 0.21 builds its A with the layer's kernel, stride and padding, without its dilation and padding mode.
"""

from __future__ import annotations

import contextlib
import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn

from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.core import DoRAConfig, adapted_layers, apply_dora
from dora_vl.errors import UserError
from tests.adapters.peft_folders import moved_peft
from tests.core.dense_dora import move_layer, unchanged

MODES = ("zeros", "reflect", "replicate", "circular")
SIDES = (9, 11)


class One(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@st.composite
def convolutions(draw) -> nn.Module:
    """A convolution of one or two dimensions whose settings differ by axis."""
    dims = draw(st.integers(1, 2))

    def axes(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(least, most), min_size=dims, max_size=dims)))

    padding = draw(st.sampled_from(["numbers", "same", "valid"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    return (nn.Conv1d, nn.Conv2d)[dims - 1](
        6,
        4,
        axes(1, 3),
        stride=1 if padding == "same" else axes(1, 2),
        padding=axes(0, 2) if padding == "numbers" else padding,
        dilation=axes(1, 2),
        padding_mode=draw(st.sampled_from(MODES)),
        bias=draw(st.booleans()),
    )


def is_beyond_peft(conv: Any) -> bool:
    """Whether it has what PEFT's A leaves out: a dilation that moves something, or a padding of other values."""
    spread = any(step > 1 and size > 1 for step, size in zip(conv.dilation, conv.kernel_size, strict=True))
    widest = max(conv.kernel_size) - 1
    pads = {"same": widest, "valid": 0}[conv.padding] if isinstance(conv.padding, str) else max(conv.padding)
    return spread or (conv.padding_mode != "zeros" and pads > 0)


def adapted(conv: nn.Module, method: str, alpha: float = 4.0) -> nn.Module:
    model = One(copy.deepcopy(conv))
    config = DoRAConfig(targets=("conv",), kinds=("conv",), rank=3, alpha=alpha, dropout=0.0, method=method)
    apply_dora(model, config)
    for _, layer in adapted_layers(model):
        move_layer(layer)
    return model.eval()


def assert_same(output: torch.Tensor, expected: torch.Tensor) -> None:
    error = {torch.float64: 1e-10, torch.float32: 1e-6}[expected.dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(output, expected, rtol=0, atol=error)


def peft_type(folder) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


def pefts_output(conv: nn.Module, folder, x: torch.Tensor) -> torch.Tensor:
    return PeftModel.from_pretrained(One(copy.deepcopy(conv)), folder).eval()(x).detach()


def rewritten(folder, field: str, value: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))


@settings(max_examples=30, deadline=None)
@given(convolutions(), st.sampled_from(["dora", "lora"]), st.sampled_from([torch.float32, torch.float64]))
def test_peft_computes_the_same_or_refuses(tmp_path_factory, conv, method, dtype):
    folder = tmp_path_factory.mktemp("conv") / "adapter"
    conv = conv.to(dtype)
    x = torch.randn(2, 6, *SIDES[: conv.weight.ndim - 2], dtype=dtype)
    ours = adapted(conv, method)
    expected = ours(x).detach()
    save_adapter(ours, folder)
    again = One(copy.deepcopy(conv))
    load_adapter(again, folder)
    torch.testing.assert_close(again.eval()(x), expected, rtol=0, atol=0)
    if peft_type(folder) == "LORA":
        assert_same(pefts_output(conv, folder, x), expected)
        return
    with pytest.raises(KeyError):
        pefts_output(conv, folder, x)
    # Not refused without need: under PEFT's name it is another result, or sizes that do not match.
    rewritten(folder, "peft_type", "LORA")
    with contextlib.suppress(RuntimeError):
        assert (pefts_output(conv, folder, x) - expected).abs().max() > 1e-3 * expected.abs().max()


@settings(max_examples=20, deadline=None)
@given(convolutions(), st.booleans())
def test_a_folder_of_pefts_loads_with_its_numbers_or_is_refused(tmp_path_factory, conv, use_dora):
    folder = tmp_path_factory.mktemp("conv") / "adapter"
    theirs = moved_peft(One(copy.deepcopy(conv)), target_modules=["conv"], use_dora=use_dora).eval()
    theirs.save_pretrained(folder)
    x = torch.randn(2, 6, *SIDES[: conv.weight.ndim - 2])
    model = One(copy.deepcopy(conv)).eval()
    if is_beyond_peft(conv):
        # So does a model that is adapted already.
        for other in (model, adapted(conv, "dora" if use_dora else "lora", alpha=7.0)):
            with unchanged(other), pytest.raises(UserError):
                load_adapter(other, folder)
    else:
        load_adapter(model, folder)
        assert_same(model.eval()(x).detach(), theirs(x).detach())
