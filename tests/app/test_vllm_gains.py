"""The gains of layers as vLLM keeps them, packed, sharded, unreadable, against the equation written out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from dora_vl.serving.vllm.layer import FrozenLayer, Slice, frozen_layer, gains_minus_one

INPUTS, SIZES = 300, (12, 5, 7)
CPU = torch.device("cpu")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = draw(sum(SIZES), INPUTS, seed=1)


def adapter(number: int, rank: int) -> Slice:
    size = SIZES[number]
    return Slice(draw(rank, INPUTS, seed=10 + number), draw(size, rank, seed=20 + number), draw(size, seed=30 + number))


SLICES = [adapter(0, 3), None, adapter(2, 2)]


def written_out(weight: Tensor, slices: list[Slice | None]) -> Tensor:
    parts = []
    for rows, one in zip(weight.split(SIZES), slices, strict=True):
        if one is None:
            parts.append(torch.zeros(len(rows)))
            continue
        direction = rows.double() + one.lora_B.double() @ one.lora_A.double()
        parts.append((one.magnitude.double() / direction.norm(dim=1)).float() - 1)
    return torch.cat(parts)


def looked_at(weight: Tensor | None, product: Callable[[Tensor], Tensor] = lambda x: x @ WEIGHT.t()) -> FrozenLayer:
    return frozen_layer("layer", product, weight, INPUTS, torch.float32, CPU)


@pytest.mark.parametrize("kept", [WEIGHT, None, WEIGHT.to(torch.int8), torch.empty(0), WEIGHT.flip(0)])
def test_packed_slices_whatever_the_weight_is_kept_as(kept: Tensor | None) -> None:
    layer = looked_at(kept)
    assert (layer.weight is None) == (kept is not WEIGHT)
    found = gains_minus_one(layer, SLICES, SIZES)
    torch.testing.assert_close(found, written_out(WEIGHT, SLICES), rtol=1e-4, atol=1e-5)
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("kept", [WEIGHT, None])
def test_rows_that_cancel_come_from_the_dense_direction(kept: Tensor | None) -> None:
    factors = torch.linalg.svd(WEIGHT[: SIZES[0]], full_matrices=False)
    lora_A, lora_B = factors[2], -0.999 * factors[0] * factors[1]
    slices = [Slice(lora_A, lora_B, draw(SIZES[0], seed=3)), None, None]
    found = gains_minus_one(looked_at(kept), slices, SIZES)
    torch.testing.assert_close(found, written_out(WEIGHT, slices), rtol=1e-2, atol=1e-3)


def test_a_row_without_a_direction_keeps_gain_one() -> None:
    weight = WEIGHT.clone()
    weight[3] = 0
    slices = [Slice(draw(2, INPUTS, seed=4), torch.zeros(SIZES[0], 2), torch.full(SIZES[:1], 2.0)), None, None]
    found = gains_minus_one(looked_at(weight, lambda x: x @ weight.t()), slices, SIZES)
    assert found[3] == 0
    assert found.isfinite().all()
    assert (found[:3] != 0).all()


def test_no_magnitude_changes_nothing() -> None:
    assert torch.equal(gains_minus_one(looked_at(WEIGHT), [None] * 3, SIZES), torch.zeros(sum(SIZES)))


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

        slices = [None if one is None else one._replace(lora_A=one.lora_A[:, columns]) for one in SLICES]
        layer = frozen_layer(
            "layer",
            lambda x: x @ weight.t(),
            weight if kept else None,
            weight.shape[1],
            torch.float32,
            CPU,
            total,
        )
        return gains_minus_one(layer, slices, SIZES)

    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(rank, range(2)):
            torch.testing.assert_close(found, written_out(WEIGHT, SLICES), rtol=1e-4, atol=1e-5)


def test_weights_of_few_bits_are_recovered() -> None:
    steps = (WEIGHT * 4).round()
    layer = looked_at(steps.to(torch.int8), lambda x: (x @ steps.t()) / 4)
    expected = written_out(steps / 4, SLICES)
    torch.testing.assert_close(gains_minus_one(layer, SLICES, SIZES), expected, rtol=1e-4, atol=1e-5)


def in_eight_bits(rows: Tensor) -> Tensor:
    """Each row over its own scale as whole numbers, as W8A8 layers take it."""
    scale = rows.abs().amax(dim=1, keepdim=True) / 127
    return (rows / scale).round() * scale


def test_an_input_of_whole_numbers_is_exact_enough() -> None:
    layer = looked_at(None, lambda x: in_eight_bits(x) @ WEIGHT.t())
    torch.testing.assert_close(
        gains_minus_one(layer, SLICES, SIZES) + 1, written_out(WEIGHT, SLICES) + 1, rtol=2e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    "product",
    [
        lambda x: x.to(torch.float8_e4m3fn).float() @ WEIGHT.t(),
        lambda x: (x * 2).round() / 2 @ WEIGHT.t(),
        lambda x: x.clamp(-0.3, 0.3) @ WEIGHT.t(),  # an input scale that unit vectors exceed
        lambda x: torch.full((len(x), sum(SIZES)), torch.nan),
    ],
)
def test_a_product_of_no_weight_is_refused(product: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - no other is raised there
        looked_at(None, product)
