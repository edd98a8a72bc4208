"""The estimate is arithmetic: a model of known size, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.training.memory import Activations, estimate_memory

ACTIVATIONS = Activations(tokens=10, layers=2, hidden_width=8, element_bytes=2, recomputed=False)
FROZEN_BYTES = 100 * 200 * 2  # a bfloat16 weight
TRAINED = 100 * 4 + 200 * 4 + 200  # A, B and the magnitude, in float32


def adapted() -> nn.Module:
    model = nn.Sequential(nn.Linear(100, 200, bias=False, dtype=torch.bfloat16))
    apply_dora(model, DoRAConfig(targets=("0",), rank=4))
    return model


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer"),
    [
        (None, FROZEN_BYTES + 4 * TRAINED, 4 * TRAINED, 8 * TRAINED),
        ({"stage": 2}, FROZEN_BYTES + 4 * TRAINED, 2 * TRAINED, 6 * TRAINED),
        ({"stage": 3}, (FROZEN_BYTES + 4 * TRAINED) // 2, 2 * TRAINED, 6 * TRAINED),
    ],
)
def test_each_stage_splits_what_it_splits(
    zero: dict[str, int] | None, weights: int, gradients: int, optimizer: int
) -> None:
    estimate = estimate_memory(adapted(), ACTIVATIONS, zero=zero, world_size=2)
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (weights, gradients, optimizer)
    assert estimate.activations == 10 * 8 * 2 * 2 * 17


def test_offloading_moves_bytes_to_the_host() -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    estimate = estimate_memory(adapted(), ACTIVATIONS, zero=zero, world_size=1)
    assert (estimate.weights, estimate.optimizer) == (0, 0)
    assert estimate.on_host == FROZEN_BYTES + 4 * TRAINED + 12 * TRAINED
