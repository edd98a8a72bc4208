"""A share of an adapter: between the base (0) and the adapter (1), bit by bit at both ends, and beyond, written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dora_vl.core import DoRAConfig, DoRALinear, functional
from dora_vl.core import rows as rows_module
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.other_layers import DoRAConv2d, DoRAEmbedding
from dora_vl.core.quantised import QuantisedLinear
from dora_vl.core.rows import ActiveAdapters, RowChange, RowLayer
from dora_vl.core.strength import MOST_STRENGTH, GainByStrength, Share, checked_strength, layer_between
from dora_vl.errors import UserError
from tests.core.test_rows import SETTINGS, Strange, adapted

STRENGTHS = (0.0, 0.3, 1.0, 1.7, 3.0)


def written_out(layer: AdaptedLayer, weight: Tensor, bias: Tensor | None, x: Tensor, strength: float) -> Tensor:
    """y of one layer with a dense direction, nothing shared with `dora_vl.core`."""
    factors = layer.factors()
    change = torch.zeros_like(weight) if factors is None else layer.scale() * factors[1] @ factors[0]
    direction = weight + strength * change
    if layer.magnitude is not None:
        before = torch.linalg.vector_norm(weight, dim=1)
        magnitude = ((1 - strength) * before + strength * layer.magnitude).clamp_min(0)
        direction = magnitude.unsqueeze(1) * direction / torch.linalg.vector_norm(direction, dim=1, keepdim=True)
    y = x @ direction.t()
    return y if bias is None else y + bias


@pytest.mark.parametrize("one_product", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [DoRALinear, QuantisedLinear])
@torch.no_grad()
def test_rows_of_one_batch_have_adapters_at_strengths_of_their_own(
    kind: Any, bias: bool, one_product: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(rows_module, "ONE_PRODUCT", 10**9 if one_product else 0)
    torch.manual_seed(0)
    linear = nn.Linear(7, 5, bias=bias)
    base = Strange(linear) if kind is QuantisedLinear else linear
    batch = ActiveAdapters()
    row_layer = RowLayer(base, batch, "rows")
    layers = {name: adapted(base, name, kind) for name in SETTINGS}
    for name, layer in layers.items():
        row_layer.put(name, RowChange.of(layer, torch.float32))
    rows = [None, *(Share(name, strength) for name in SETTINGS for strength in STRENGTHS)]
    x = torch.randn(len(rows), 3, 7)
    for _ in range(2):  # the second time from what was kept
        with batch.holding(rows):
            found = row_layer(x)
        for number, row in enumerate(rows):
            if row is None or row.strength == 0:
                assert torch.equal(found[number], linear(x)[number])
                continue
            expected = written_out(layers[row.key], linear.weight, linear.bias, x[number], row.strength)
            torch.testing.assert_close(found[number], expected, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(found[number], linear(x)[number], atol=1e-2)


@pytest.mark.parametrize("name", ["dora2", "dora5", "magnitude"])
@torch.no_grad()
def test_the_gain_is_exact_at_both_ends(name: str) -> None:
    torch.manual_seed(1)
    layer = adapted(nn.Linear(31, 17), name)
    gain = GainByStrength.of(layer)
    assert gain is not None
    assert torch.equal(gain.at(0.0), torch.ones(17))
    assert torch.equal(gain.at(1.0), layer.gain())
    assert torch.equal(gain.norms_at(1.0), layer.norms())


@torch.no_grad()
def test_norms_on_the_line_hold_where_a_row_nearly_vanishes() -> None:
    """V = W + sBA is nearly -W in a row: halfway its length is almost nothing."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    layer = DoRALinear(linear, DoRAConfig(targets=("*",), rank=2, alpha=6.0, dropout=0.0)).eval()
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    layer.lora_A[0] = linear.weight[3] + 0.01 * torch.randn(6)
    layer.lora_B.normal_(std=0.2)
    layer.lora_B[3] = torch.tensor([-2.0, 0.0]) / layer.scale()
    gain = GainByStrength.of(layer)
    assert gain is not None
    for strength in (0.25, 0.5, 0.75):
        dense = linear.weight.double() + strength * layer.scale() * layer.lora_B.double() @ layer.lora_A.double()
        expected = torch.linalg.vector_norm(dense, dim=1)
        assert strength != 0.5 or expected[3] < 0.1 * torch.linalg.vector_norm(linear.weight[3])
        torch.testing.assert_close(gain.norms_at(strength).double(), expected, rtol=1e-3, atol=1e-6)


def test_a_magnitude_falls_silent_and_does_not_turn_round() -> None:
    base, trained = torch.tensor([2.0, 2.0, 2.0]), torch.tensor([1.0, 3.0, -1.0])
    assert functional.magnitude_between(base, trained, 3.0).tolist() == [0.0, 5.0, -7.0]
    assert torch.equal(functional.magnitude_between(base, trained, 1.0), trained)
    assert torch.equal(functional.magnitude_between(base, trained, 0.0), base)


def own_layers() -> dict[str, tuple[nn.Module, nn.Module]]:
    """Layers as the base and as an adapter of its own has them."""
    torch.manual_seed(0)
    linear, norm, embedding, conv = nn.Linear(6, 5), nn.LayerNorm(6), nn.Embedding(11, 5), nn.Conv2d(3, 4, 2)
    trained_bias = adapted(nn.Linear(6, 5), "dora5")
    trained_bias.weight, before = linear.weight, linear.bias
    trained_bias.bias = nn.Parameter(before + torch.randn(5))
    trained_bias.forget_norms(frozen=True)
    other_norm = nn.LayerNorm(6)
    nn.init.normal_(other_norm.weight)
    nn.init.normal_(other_norm.bias)
    nested = nn.Sequential(nn.Linear(6, 4), nn.GELU())
    return {
        "linear": (linear, nn.Linear(6, 5)),
        "norm": (norm, other_norm),
        "embedding": (embedding, adapted(embedding, "dora2", DoRAEmbedding)),
        "conv": (conv, adapted(conv, "dora2", DoRAConv2d)),
        "bias": (linear, trained_bias),
        "inside": (nested, nn.Sequential(nn.Linear(6, 4), nn.GELU())),
    }


def input_for(name: str) -> Tensor:
    if name == "embedding":
        return torch.arange(9).view(3, 3)
    return torch.randn(3, 3, 6, 6) if name == "conv" else torch.randn(3, 4, 6)


@pytest.mark.parametrize("name", ["linear", "norm", "bias", "inside"])
@torch.no_grad()
def test_whole_weights_lie_between_the_bases_and_the_adapters(name: str) -> None:
    base, own = own_layers()[name]
    x = input_for(name)
    torch.testing.assert_close(layer_between(base, own, 1.0)(x), own(x))
    between = layer_between(base, own, 0.4)
    if name == "bias":
        assert isinstance(own, AdaptedLayer)
        assert own.bias is not None
        bias = 0.6 * base.bias + 0.4 * own.bias  # pyright: ignore[reportOperatorIssue]
        expected = written_out(own, own.weight, bias, x, 0.4)
    else:
        before, after = dict(base.named_parameters()), dict(own.named_parameters())
        mixed = {leaf: 0.6 * before[leaf] + 0.4 * after[leaf] for leaf in before}
        expected = torch.func.functional_call(base, mixed, (x,))
    torch.testing.assert_close(between(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(between(x), own(x), atol=1e-2)


@pytest.mark.parametrize("name", ["embedding", "conv"])
@torch.no_grad()
def test_other_adapted_layers_at_a_strength(name: str) -> None:
    base, own = own_layers()[name]
    assert isinstance(own, AdaptedLayer)
    before = {leaf: parameter.clone() for leaf, parameter in own.named_parameters()}
    identity = nn.Identity()
    for strength in (0.3, 1.7):
        between = layer_between(base, own, strength)
        matrix = own.as_matrix(own.weight)
        rows = written_out(own, matrix, None, torch.eye(matrix.shape[1]), strength).t()  # the merged matrix
        merged = type(base).__new__(type(base))
        merged.__dict__ = {**vars(base), "_parameters": {**base._parameters, "weight": own.from_matrix(rows)}}
        x = input_for(name)
        torch.testing.assert_close(identity(between(x)), merged(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[leaf], parameter) for leaf, parameter in own.named_parameters())


@torch.no_grad()
def test_rows_of_a_layer_of_an_adapters_own_at_strengths() -> None:
    base, own = own_layers()["embedding"]
    batch = ActiveAdapters()
    row_layer = RowLayer(base, batch, "rows")
    row_layer.put("a", own)
    ids = torch.arange(12).view(6, 2) % 11
    strengths = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)  # more than are kept
    assert len(strengths) > rows_module.KEPT_LAYERS
    with batch.holding([Share("a", one) for one in strengths]):
        found = row_layer(ids)
    for number, strength in enumerate(strengths):
        assert torch.equal(found[number], layer_between(base, own, strength)(ids[number : number + 1])[0])
    with batch.holding([Share("a", 0.0)] * 6):
        assert torch.equal(row_layer(ids), base(ids))


@torch.no_grad()
def test_an_adapter_put_anew_forgets_the_strengths_of_the_old() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(7, 5)
    batch = ActiveAdapters()
    row_layer = RowLayer(linear, batch, "rows")
    x = torch.randn(2, 7)
    for name in ("dora2", "dora5"):
        layer = adapted(linear, name)
        row_layer.put("a", RowChange.of(layer, torch.float32))
        row_layer.put("b", RowChange.of(layer, torch.float32))
        with batch.holding((Share("a", 0.5), Share("b", 0.5))):
            found = row_layer(x)
        torch.testing.assert_close(found, written_out(layer, linear.weight, linear.bias, x, 0.5), rtol=1e-5, atol=1e-5)
        row_layer.drop("a")


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, MOST_STRENGTH * 1.01, "much", None, True, 10**400])
def test_what_is_no_strength_is_refused_in_a_line(value: Any) -> None:
    with pytest.raises(UserError, match="strength"):
        checked_strength(value)
