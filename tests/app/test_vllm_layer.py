"""A layer's rows by their slots: the base's bits, and each adapter's equation written out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.serving.vllm.adapters import compute_gains, magnitude_of_parts, magnitudes_of, write_gains
from dora_vl.serving.vllm.layer import DoRALayer, UnservableAdapter

INPUTS, SIZES, SLOTS = 8, (6, 4), 3


class Wrapper(nn.Module):
    """What vLLM's wrappers have in common, its kernels written out."""

    def __init__(self, sizes: tuple[int, ...] = SIZES) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.base_layer = nn.Module()
        self.base_layer.weight = torch.randn(sum(sizes), INPUTS, generator=draw)
        self.base_layer.bias = torch.randn(sum(sizes), generator=draw)
        self.base_layer.params_dtype = torch.float32
        self.base_layer.quant_method = SimpleNamespace(apply=lambda layer, x, bias: F.linear(x, layer.weight, bias))
        self.punica_wrapper = SimpleNamespace(_token_lora_indices=torch.full((32,), -1))
        self.output_slices, self.output_size, self.n_slices = sizes, sum(sizes), len(sizes)
        self.input_size, self.tp_size, self.device = INPUTS, 1, torch.device("cpu")

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        self.change = torch.zeros(max_loras + 1, self.output_size, INPUTS)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        slots = self.punica_wrapper._token_lora_indices[: len(x)] + 1
        change = torch.einsum("roi,ri->ro", self.change[slots.clamp(0, len(self.change) - 1)], x)
        return F.linear(x, self.base_layer.weight, bias) + change


class Layer(DoRALayer, Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.apply(x, self.base_layer.bias)


def layer_with(*slots: int, sizes: tuple[int, ...] = SIZES) -> Layer:
    """A layer whose tokens take these slots."""
    layer = Layer(sizes)
    layer.create_lora_weights(SLOTS, None)
    layer.punica_wrapper._token_lora_indices[: len(slots)] = torch.tensor(slots)
    return layer


def weights(seed: int, *, without: int | None = None) -> SimpleNamespace:
    """An adapter's packed weights, one slice perhaps not adapted."""
    draw = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor | None]] = [[], [], []]
    for number, size in enumerate(SIZES):
        for part, shape in zip(parts, ((2, INPUTS), (size, 2), (size,)), strict=True):
            part.append(None if number == without else torch.randn(shape, generator=draw))
    return SimpleNamespace(lora_a=parts[0], lora_b=parts[1], magnitude=parts[2])


def put(layer: Layer, slot: int, adapter: Any) -> None:
    """As vLLM's manager does with its own slots, then ours."""
    layer.change[slot + 1] = 0
    start = 0
    for a, b, size in zip(adapter.lora_a, adapter.lora_b, SIZES, strict=True):
        if a is not None:
            layer.change[slot + 1, start : start + size] = b @ a
        start += size
    layer.put_dora(slot, layer.dora_gains("qkv", adapter))


def written_out(layer: Layer, adapter: Any, x: Tensor) -> Tensor:
    columns = []
    rows = zip(layer.base_layer.weight.split(SIZES), layer.base_layer.bias.split(SIZES), strict=True)
    for (weight, bias), a, b, m in zip(rows, adapter.lora_a, adapter.lora_b, adapter.magnitude, strict=True):
        if a is None:
            columns.append(x @ weight.t() + bias)
        else:
            direction = weight + b @ a
            columns.append(m / direction.norm(dim=1) * (x @ direction.t()) + bias)
    return torch.cat(columns, dim=1)


def test_each_row_by_the_adapter_of_its_slot() -> None:
    layer, x = layer_with(-1, 0, 2, -1, 2, 0), torch.randn(6, INPUTS, generator=torch.Generator().manual_seed(7))
    one, two = weights(3), weights(4, without=1)
    put(layer, 0, one)
    put(layer, 2, two)
    found = layer(x)
    base = F.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    assert torch.equal(found[[0, 3]], base[[0, 3]])
    torch.testing.assert_close(found[[1, 5]], written_out(layer, one, x[[1, 5]]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[[2, 4]], written_out(layer, two, x[[2, 4]]), rtol=1e-4, atol=1e-4)
    assert (found[[1, 5]] - base[[1, 5]]).abs().max() > 0.1


def test_a_bias_that_comes_later_is_not_taken_for_inside() -> None:
    """A row-parallel layer's on other ranks than the first, or one that the model adds itself."""
    layer, x, adapter = layer_with(0, 0), torch.randn(2, INPUTS), weights(3)
    put(layer, 0, adapter)
    bias = layer.base_layer.bias
    torch.testing.assert_close(layer.apply(x) + bias, written_out(layer, adapter, x), rtol=1e-4, atol=1e-4)


def test_a_slot_keeps_nothing_of_the_adapter_before() -> None:
    layer = layer_with(0)
    put(layer, 0, weights(3))
    assert layer.dora_minus_one[1].abs().min() > 0
    put(layer, 0, weights(4, without=0))
    assert (layer.dora_minus_one[1, : SIZES[0]] == 0).all()
    layer.put_dora(0, None)
    assert (layer.dora_minus_one == 0).all()


def adapter_of(**loras: Any) -> SimpleNamespace:
    return SimpleNamespace(loras=loras)


def test_gains_are_computed_for_every_layer_and_written_to_every_one() -> None:
    modules = {"qkv": layer_with(), "other": layer_with(), "norm": object()}
    adapter = adapter_of(qkv=weights(3))
    compute_gains(modules, magnitudes_of(adapter), adapter.loras.get, max_rank=2)
    modules["other"].put_dora(1, torch.ones(10))
    write_gains(modules, 1, adapter.loras.get)
    assert modules["qkv"].dora_minus_one[2].abs().min() > 0
    assert (modules["other"].dora_minus_one == 0).all()


@pytest.mark.parametrize(
    ("loras", "before"),
    [({"experts": weights(3)}, None), ({}, {"experts.1.w1": [torch.ones(3)]}), ({"qkv": weights(3)}, {})],
)
def test_a_magnitude_without_a_place_refuses_the_adapter(loras: dict, before: dict | None) -> None:
    adapter = adapter_of(**loras)
    found = magnitudes_of(adapter) if before is None else before
    with pytest.raises(UnservableAdapter):
        compute_gains({"qkv": layer_with()}, found, adapter.loras.get, max_rank=1)
    assert not any(hasattr(one, "dora_minus_one") for one in loras.values())


def test_an_adapter_of_another_base_is_refused() -> None:
    layer, wider, longer, single = layer_with(), weights(3), weights(3), weights(3)
    wider.lora_a[0] = torch.ones(2, INPUTS + 1)
    longer.lora_b[1] = torch.ones(SIZES[1] + 1, 2)
    single.lora_a, single.lora_b, single.magnitude = single.lora_a[0], single.lora_b[0], single.magnitude[0]
    for adapter in (wider, longer, single):
        with pytest.raises(UnservableAdapter):
            layer.dora_gains("qkv", adapter)


def test_packing_keeps_gaps() -> None:
    magnitude = torch.ones(3)
    parts = [SimpleNamespace(magnitude=magnitude), None, SimpleNamespace()]
    assert magnitude_of_parts(parts) == [magnitude, None, None]
    assert magnitude_of_parts(parts[1:]) is None


def test_a_layer_that_is_whole_on_each_rank_sums_nothing() -> None:
    layer, expected = layer_with(), layer_with().dora_gains("qkv", weights(3))
    layer.shards_inputs, layer.sum_of_ranks = True, lambda part: 2 * part
    torch.testing.assert_close(layer.dora_gains("qkv", weights(3)), expected)
