"""A layer's rows by their slots, gains of weights however they are kept, and magnitudes taken out of a file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.serving.vllm.layer import (
    DoRALayer,
    FrozenLayer,
    Slice,
    UnservableAdapter,
    frozen_layer,
    gains_minus_one,
    take_magnitudes,
)
from dora_vl.serving.vllm.plugin import compute_gains, magnitudes_of

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
    first, second = weights(3), weights(4, without=1)
    put(layer, 0, first)
    put(layer, 2, second)
    output = layer(x)
    base = F.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    assert torch.equal(output[[0, 3]], base[[0, 3]])
    torch.testing.assert_close(output[[1, 5]], written_out(layer, first, x[[1, 5]]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output[[2, 4]], written_out(layer, second, x[[2, 4]]), rtol=1e-4, atol=1e-4)
    assert (output[[1, 5]] - base[[1, 5]]).abs().max() > 0.1


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


@pytest.mark.parametrize(
    ("loras", "before"),
    [({"experts": weights(3)}, None), ({}, {"experts.1.w1": [torch.ones(3)]}), ({"qkv": weights(3)}, {})],
)
def test_a_magnitude_without_a_place_refuses_the_adapter(loras: dict, before: dict | None) -> None:
    adapter = adapter_of(**loras)
    magnitudes = magnitudes_of(adapter) if before is None else before
    with pytest.raises(UnservableAdapter):
        compute_gains({"qkv": layer_with()}, magnitudes, adapter.loras.get, max_rank=1)
    assert not any(hasattr(lora, "dora_minus_one") for lora in loras.values())


def test_an_adapter_of_another_base_is_refused() -> None:
    layer, wider, longer, single = layer_with(), weights(3), weights(3), weights(3)
    wider.lora_a[0] = torch.ones(2, INPUTS + 1)
    longer.lora_b[1] = torch.ones(SIZES[1] + 1, 2)
    single.lora_a, single.lora_b, single.magnitude = single.lora_a[0], single.lora_b[0], single.magnitude[0]
    for adapter in (wider, longer, single):
        with pytest.raises(UnservableAdapter):
            layer.dora_gains("qkv", adapter)


def test_a_layer_that_is_whole_on_each_rank_sums_nothing() -> None:
    layer, expected = layer_with(), layer_with().dora_gains("qkv", weights(3))
    layer.shards_inputs, layer.sum_of_ranks = True, lambda part: 2 * part
    torch.testing.assert_close(layer.dora_gains("qkv", weights(3)), expected)


# -- gains of layers as vLLM keeps them, packed, sharded, unreadable --------------------------------------------

COLUMNS, ROWS = 300, (12, 5, 7)
CPU = torch.device("cpu")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = draw(sum(ROWS), COLUMNS, seed=1)


def adapter(number: int, rank: int) -> Slice:
    size = ROWS[number]
    return Slice(
        draw(rank, COLUMNS, seed=10 + number), draw(size, rank, seed=20 + number), draw(size, seed=30 + number)
    )


SLICES = [adapter(0, 3), None, adapter(2, 2)]


def gains_written_out(weight: Tensor, slices: list[Slice | None]) -> Tensor:
    parts = []
    for rows, lora in zip(weight.split(ROWS), slices, strict=True):
        if lora is None:
            parts.append(torch.zeros(len(rows)))
            continue
        direction = rows.double() + lora.lora_B.double() @ lora.lora_A.double()
        parts.append((lora.magnitude.double() / direction.norm(dim=1)).float() - 1)
    return torch.cat(parts)


def looked_at(weight: Tensor | None, product: Callable[[Tensor], Tensor] = lambda x: x @ WEIGHT.t()) -> FrozenLayer:
    return frozen_layer("layer", product, weight, COLUMNS, torch.float32, CPU)


@pytest.mark.parametrize("kept", [WEIGHT, None, WEIGHT.to(torch.int8), torch.empty(0), WEIGHT.flip(0)])
def test_packed_slices_whatever_the_weight_is_kept_as(kept: Tensor | None) -> None:
    layer = looked_at(kept)
    assert (layer.weight is None) == (kept is not WEIGHT)
    gains = gains_minus_one(layer, SLICES, ROWS)
    torch.testing.assert_close(gains, gains_written_out(WEIGHT, SLICES), rtol=1e-4, atol=1e-5)
    assert gains.abs().max() > 0.1


@pytest.mark.parametrize("kept", [WEIGHT, None])
def test_rows_that_cancel_come_from_the_dense_direction(kept: Tensor | None) -> None:
    factors = torch.linalg.svd(WEIGHT[: ROWS[0]], full_matrices=False)
    lora_A, lora_B = factors[2], -0.999 * factors[0] * factors[1]
    slices = [Slice(lora_A, lora_B, draw(ROWS[0], seed=3)), None, None]
    gains = gains_minus_one(looked_at(kept), slices, ROWS)
    torch.testing.assert_close(gains, gains_written_out(WEIGHT, slices), rtol=1e-2, atol=1e-3)


def test_a_row_without_a_direction_keeps_gain_one() -> None:
    weight = WEIGHT.clone()
    weight[3] = 0
    slices = [Slice(draw(2, COLUMNS, seed=4), torch.zeros(ROWS[0], 2), torch.full(ROWS[:1], 2.0)), None, None]
    gains = gains_minus_one(looked_at(weight, lambda x: x @ weight.t()), slices, ROWS)
    assert gains[3] == 0
    assert gains.isfinite().all()
    assert (gains[:3] != 0).all()


@pytest.mark.parametrize("kept", [True, False])
def test_ranks_that_hold_columns_sum_their_norms(kept: bool) -> None:
    cut, meeting = 170, threading.Barrier(2)
    parts: dict[int, Tensor] = {}

    def rank(number: int) -> Tensor:
        columns = slice(0, cut) if number == 0 else slice(cut, None)
        weight = WEIGHT[:, columns].contiguous()

        def total(part: Tensor) -> Tensor:
            parts[number] = part
            meeting.wait(20)
            result = parts[0] + parts[1]
            meeting.wait(20)
            return result

        slices = [None if lora is None else lora._replace(lora_A=lora.lora_A[:, columns]) for lora in SLICES]
        layer = frozen_layer(
            "layer", lambda x: x @ weight.t(), weight if kept else None, weight.shape[1], torch.float32, CPU, total
        )
        return gains_minus_one(layer, slices, ROWS)

    with ThreadPoolExecutor(2) as threads:
        for gains in threads.map(rank, range(2)):
            torch.testing.assert_close(gains, gains_written_out(WEIGHT, SLICES), rtol=1e-4, atol=1e-5)


def test_weights_of_few_bits_are_recovered() -> None:
    steps = (WEIGHT * 4).round()
    layer = looked_at(steps.to(torch.int8), lambda x: (x @ steps.t()) / 4)
    expected = gains_written_out(steps / 4, SLICES)
    torch.testing.assert_close(gains_minus_one(layer, SLICES, ROWS), expected, rtol=1e-4, atol=1e-5)


def in_eight_bits(rows: Tensor) -> Tensor:
    """Each row over its own scale as whole numbers, as W8A8 layers take it."""
    scale = rows.abs().amax(dim=1, keepdim=True) / 127
    return (rows / scale).round() * scale


def test_an_input_of_whole_numbers_is_exact_enough() -> None:
    layer = looked_at(None, lambda x: in_eight_bits(x) @ WEIGHT.t())
    torch.testing.assert_close(
        gains_minus_one(layer, SLICES, ROWS) + 1, gains_written_out(WEIGHT, SLICES) + 1, rtol=2e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    "product",
    [
        lambda x: x.to(torch.float8_e4m3fn).float() @ WEIGHT.t(),
        lambda x: (x * 2).round() / 2 @ WEIGHT.t(),
        lambda x: x.clamp(-0.3, 0.3) @ WEIGHT.t(),  # an input scale that unit vectors exceed
        lambda x: torch.full((len(x), sum(ROWS)), torch.nan),
    ],
)
def test_a_product_of_no_weight_is_refused(product: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - no other is raised there
        looked_at(None, product)


# -- magnitudes taken out of an adapter's tensors ---------------------------------------------------------------

Q, V = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.self_attn.v_proj"


def tensors() -> dict[str, Tensor]:
    return {
        f"{Q}.lora_A.weight": torch.full((4, 6), 1.0),
        f"{Q}.lora_B.weight": torch.full((5, 4), 2.0),
        f"{Q}.lora_magnitude_vector": torch.arange(5).to(torch.bfloat16),
        f"{V}.lora_A.weight": torch.full((2, 6), 3.0),
        f"{V}.lora_B.weight": torch.full((7, 2), 4.0),
        f"{V}.lora_magnitude_vector.weight": torch.arange(7).float().view(7, 1),
    }


def test_magnitudes_go_out_and_factors_stay() -> None:
    file, before = tensors(), tensors()
    magnitudes = take_magnitudes(file, use_dora=True)
    assert magnitudes.keys() == {Q, V}
    assert torch.equal(magnitudes[Q], torch.arange(5.0))
    assert torch.equal(magnitudes[V], torch.arange(7.0))
    assert file.keys() == {name for name in before if "magnitude" not in name}
    assert all(torch.equal(file[name], before[name]) for name in file)


MAGNITUDES = [f"{Q}.lora_magnitude_vector", f"{V}.lora_magnitude_vector.weight"]
BROKEN: dict[str, tuple[bool, list[str], dict[str, Tensor]]] = {
    "a magnitude lost": (True, MAGNITUDES[:1], {}),
    "all magnitudes lost": (True, MAGNITUDES, {}),
    "magnitudes of no DoRA": (False, [], {}),
    "B lost": (True, [f"{Q}.lora_B.weight"], {}),
    "too short": (True, [], {f"{Q}.lora_magnitude_vector": torch.ones(4)}),
    "ranks differ": (True, [], {f"{Q}.lora_A.weight": torch.ones(3, 6)}),
    "no numbers": (True, [], {f"{Q}.lora_magnitude_vector": torch.full((5,), torch.inf)}),
    "an embedding": (True, [], {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 9)}),
}
"""Whether the config says DoRA, what of a file is taken away, and what is put in."""


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_belong_together_is_refused(case: str) -> None:
    use_dora, gone, changed = BROKEN[case]
    file = {name: tensor for name, tensor in {**tensors(), **changed}.items() if name not in gone}
    before = dict(file)
    with pytest.raises(UnservableAdapter):
        take_magnitudes(file, use_dora=use_dora)
    assert file == before
