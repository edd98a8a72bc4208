"""Several adapters in one layer: each row as its own adapter alone makes it, base rows bit by bit the base's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dora_vl.core import DoRAConfig, DoRALinear
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.other_layers import DoRAEmbedding
from dora_vl.core.rows import ActiveAdapters, RowChange, RowLayer
from tests.core.dense_dora import dense_dora

SETTINGS: dict[str, dict[str, Any]] = {
    "dora2": {"rank": 2, "alpha": 5.0},
    "dora5": {"rank": 5, "alpha": 3.0, "rank_scaling": "sqrt"},
    "lora": {"rank": 3, "alpha": 7.0, "method": "lora"},
    "magnitude": {"method": "magnitude"},
}


class Strange(nn.Module):
    """A linear layer of a class unknown to the core."""

    def __init__(self, inside: nn.Linear) -> None:
        super().__init__()
        self.inside = inside
        self.in_features, self.out_features = inside.in_features, inside.out_features

    @property
    def bias(self) -> Tensor | None:
        return self.inside.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)


@torch.no_grad()
def move(layer: AdaptedLayer) -> None:
    """Away from where adapters start, whatever the layer is."""
    if layer.lora_B is not None:
        layer.lora_B.normal_(std=0.3)
    if layer.magnitude is not None:
        layer.magnitude.mul_(torch.linspace(0.5, 1.7, layer.magnitude.numel()))


def adapted(base: nn.Module, name: str, kind: Any = DoRALinear) -> AdaptedLayer:
    torch.manual_seed(len(name))
    layer = kind(base, DoRAConfig(targets=("*",), dropout=0.0, **SETTINGS[name]))
    move(layer)
    return layer.eval()


def expected(layer: AdaptedLayer, linear: nn.Linear, x: Tensor) -> Tensor:
    magnitude = None if layer.magnitude is None else layer.magnitude.detach()
    return dense_dora(x, linear.weight, linear.bias, layer.factors(), magnitude, scale=layer.scale())


@torch.no_grad()
def test_adapters_come_and_go() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    batch = ActiveAdapters()
    row_layer = RowLayer(linear, batch, "rows")
    layers = {name: adapted(linear, name) for name in SETTINGS}
    x = torch.randn(2, 3, 6)
    for name in ("dora2", "lora", "dora5"):
        row_layer.put(name, RowChange.of(layers[name], torch.float32))
    row_layer.drop("dora2")
    row_layer.drop("magnitude")  # was never there
    assert row_layer.keys == ("lora", "dora5")
    with batch.holding(("dora5", "dora2")):
        found = row_layer(x)
    torch.testing.assert_close(found[0], expected(layers["dora5"], linear, x[0]), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], linear(x)[1])  # an adapter that does not change this layer
    for name in ("lora", "dora5"):
        row_layer.drop(name)
    with batch.holding(("dora5", "lora")):
        assert torch.equal(row_layer(x), linear(x))


@torch.no_grad()
def test_a_layer_of_an_adapters_own_takes_its_rows() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(11, 5)
    one = adapted(embedding, "dora2", DoRAEmbedding)
    other = nn.Embedding(11, 5)
    batch = ActiveAdapters()
    row_layer = RowLayer(embedding, batch, "rows")
    row_layer.put("adapted", one)
    row_layer.put("trained", other)
    ids = torch.randint(11, (4, 3))
    with batch.holding((None, "adapted", "trained", "adapted")):
        found = row_layer(ids)
    for number, layer in enumerate((embedding, one, other, one)):
        assert torch.equal(found[number], layer(ids[number : number + 1])[0])
    assert row_layer.embedding_dim == 5  # other attributes are the base's
    with batch.holding(("trained",) * 4):
        assert torch.equal(row_layer(ids), other(ids))


@torch.no_grad()
def test_pictures_are_counted_apart_from_rows() -> None:
    linear = nn.Linear(6, 5)
    layer = adapted(linear, "dora2")
    batch = ActiveAdapters()
    row_layer = RowLayer(linear, batch, "pictures")
    row_layer.put("dora2", RowChange.of(layer, torch.float32))
    x = torch.randn(3, 2, 6)
    with batch.holding((None, "dora2"), (None, "dora2", "dora2")):
        found = row_layer(x)
        assert torch.equal(found[0], linear(x)[0])
        torch.testing.assert_close(found[1:], layer(x[1:]))
    with batch.holding((None, "dora2"), ("dora2",)):  # all pictures are its own, however many
        torch.testing.assert_close(row_layer(x), layer(x))


def test_an_input_that_is_not_the_batch_is_refused() -> None:
    batch = ActiveAdapters()
    row_layer = RowLayer(nn.Linear(6, 5), batch, "rows")
    with batch.holding((None, "a")), pytest.raises(RuntimeError, match=r"3 .* 2 rows"):
        row_layer(torch.zeros(3, 6))


@torch.no_grad()
def test_half_precision_keeps_small_gains() -> None:
    """bfloat16 has nothing between 1 and 1.0078: a gain of 1.003 must not round away."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32, dtype=torch.bfloat16)
    layer = DoRALinear(linear, DoRAConfig(targets=("*",), rank=4, alpha=6.0, dropout=0.0)).eval()
    assert layer.magnitude is not None
    layer.magnitude.mul_(1.003)
    change = RowChange.of(layer, torch.bfloat16)
    torch.testing.assert_close(change.minus_one().float(), torch.full((32,), 0.003), rtol=2e-2, atol=0.0)
