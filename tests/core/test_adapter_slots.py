"""Several adapters in one layer, whole, in part or beyond: each row as its own makes it, base rows bit by bit."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from dora_vl.core import DoRALinear, adapter_slots
from dora_vl.core.adapter_slots import ActiveAdapters, SlotChange, SlotLayer
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.quantised import QuantisedLinear
from dora_vl.core.strength import MOST_STRENGTH, AppliedAdapter, checked_strength, layer_between
from dora_vl.errors import UserError
from tests.core.dense_dora import at_strength, config, move_layer
from tests.core.test_layers import Sealed

SETTINGS: dict[str, dict[str, Any]] = {
    "dora2": {"alpha": 5.0},
    "dora5": {"rank": 5, "alpha": 3.0, "rank_scaling": "sqrt"},
    "lora": {"rank": 3, "alpha": 7.0, "method": "lora"},
    "magnitude": {"method": "magnitude"},
}
STRENGTHS = (0.0, 0.3, 1.0, 1.7, 3.0)


def adapted(base: nn.Module, name: str, kind: Any = DoRALinear) -> AdaptedLayer:
    torch.manual_seed(len(name))
    layer = kind(base, config(**SETTINGS[name]))
    move_layer(layer)
    return layer.eval()


def slot_layer_of(base: nn.Module) -> tuple[SlotLayer, ActiveAdapters]:
    batch = ActiveAdapters()
    return SlotLayer(base, batch, "sequences"), batch


@pytest.mark.parametrize("one_product", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [DoRALinear, QuantisedLinear])
@torch.no_grad()
def test_rows_of_one_batch_have_adapters_at_strengths_of_their_own(kind, bias, one_product, monkeypatch):
    monkeypatch.setattr(adapter_slots, "ONE_PRODUCT", 10**9 if one_product else 0)
    torch.manual_seed(0)
    base: Any = nn.Linear(7, 5, bias=bias) if kind is DoRALinear else Sealed()
    weight = base.weight if kind is DoRALinear else base.secret
    if not bias:
        base.bias = None
    slot_layer, batch = slot_layer_of(base)
    layers = {name: adapted(base, name, kind) for name in SETTINGS}
    for name, layer in layers.items():
        slot_layer.put(name, SlotChange.of(layer, torch.float32))
    rows = [None, *(AppliedAdapter(name, strength) for name in SETTINGS for strength in STRENGTHS)]
    x = torch.randn(len(rows), 3, 7)
    for _ in range(2):  # the second time from what was kept
        with batch.holding(rows):
            output = slot_layer(x)
        for number, row in enumerate(rows):
            if row is None or row.strength == 0:
                assert torch.equal(output[number], base(x)[number])
                continue
            expected = at_strength(layers[row.key], weight, base.bias, x[number], row.strength)
            torch.testing.assert_close(output[number], expected, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(output[number], base(x)[number], atol=1e-2)


@torch.no_grad()
def test_another_adapter_under_a_name_takes_its_place_and_an_unknown_one_changes_nothing():
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 5), torch.randn(2, 3, 6)
    slot_layer, batch = slot_layer_of(linear)
    layers = {name: adapted(linear, name) for name in SETTINGS}
    for name, layer in (("one", "dora5"), ("one", "dora2")):
        slot_layer.put(name, SlotChange.of(layers[layer], torch.float32))
    with batch.holding((AppliedAdapter("one", 0.5), "other")):
        output = slot_layer(x)
    expected = at_strength(layers["dora2"], linear.weight, linear.bias, x[0], 0.5)
    torch.testing.assert_close(output[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(output[1], linear(x)[1])


@torch.no_grad()
def test_half_precision_keeps_small_gains():
    """bfloat16 has nothing between 1 and 1.0078: a gain of 1.003 must not round away."""
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(64, 32, dtype=torch.bfloat16), config(rank=4)).eval()
    layer.magnitude.mul_(1.003)
    change = SlotChange.of(layer, torch.bfloat16)
    torch.testing.assert_close(change.minus_one.float(), torch.full((32,), 0.003), rtol=2e-2, atol=0.0)


def biased(linear: nn.Linear) -> AdaptedLayer:
    """An adapted layer over a linear one's weight, whose bias trained."""
    layer = adapted(nn.Linear(6, 5), "dora5")
    layer.weight, layer.bias = linear.weight, nn.Parameter(linear.bias + torch.randn(5))
    layer.forget_norms(frozen=True)
    return layer


@pytest.mark.parametrize("name", ["linear", "norm", "inside", "bias"])
@torch.no_grad()
def test_whole_weights_lie_between_the_bases_and_the_adapters(name):
    torch.manual_seed(0)
    builders = {"norm": nn.LayerNorm, "inside": lambda width: nn.Sequential(nn.Linear(width, 4), nn.GELU())}
    base, own = (builders.get(name, lambda width: nn.Linear(width, 5))(6) for _ in range(2))
    for parameter in own.parameters():
        parameter.normal_()
    own, x = biased(base) if name == "bias" else own, torch.randn(3, 4, 6)
    torch.testing.assert_close(layer_between(base, own, 1.0)(x), own(x))
    between = layer_between(base, own, 0.4)
    if name == "bias":
        expected = at_strength(own, own.weight, 0.6 * base.bias + 0.4 * own.bias, x, 0.4)
    else:
        before, after = dict(base.named_parameters()), dict(own.named_parameters())
        mixed = {leaf: 0.6 * before[leaf] + 0.4 * after[leaf] for leaf in before}
        expected = torch.func.functional_call(base, mixed, (x,))
    torch.testing.assert_close(between(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(between(x), own(x), atol=1e-2)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, MOST_STRENGTH * 1.01, "much", None, True, 10**400])
def test_what_is_no_strength_is_refused(value):
    with pytest.raises(UserError):
        checked_strength(value)
