"""What a rank holds is arithmetic: a model of known size, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.training.memory import Activations, engine_of, held_by, rough_table

FROZEN = 100 * 200 * 2  # a bfloat16 weight
TRAINED = 100 * 4 + 200 * 4 + 200  # A, B and the magnitude, in float32


def adapted() -> nn.Module:
    model = nn.Sequential(nn.Linear(100, 200, bias=False, dtype=torch.bfloat16))
    apply_dora(model, DoRAConfig(targets=("0",), rank=4))
    return model


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer"),
    [
        (None, FROZEN + 4 * TRAINED, 4 * TRAINED, 8 * TRAINED),
        ({"stage": 2}, FROZEN + 4 * TRAINED, 2 * TRAINED, 6 * TRAINED),
        ({"stage": 3, "stage3_param_persistence_threshold": 0}, (FROZEN + 4 * TRAINED) // 2, 2 * TRAINED, 6 * TRAINED),
        ("fsdp", (FROZEN + 4 * TRAINED) // 2, 2 * TRAINED, 4 * TRAINED),
    ],
)
def test_each_engine_splits_what_it_splits(
    zero: dict[str, int] | str | None, weights: int, gradients: int, optimizer: int
) -> None:
    deepspeed = {"zero_optimization": zero} if isinstance(zero, dict) else None
    engine = engine_of(deepspeed, ranks=2, hidden_width=8, fsdp=zero == "fsdp")
    memory = held_by(adapted(), engine)
    assert ("FSDP2" in str(engine)) is (zero == "fsdp")
    if zero == "fsdp":  # what stands in no layer is whole while the step runs: here all of it
        assert memory.gathered == FROZEN + 4 * TRAINED
    assert sum(memory.weights.values()) + memory.trained == weights
    assert (memory.gradients, memory.optimizer + memory.masters) == (gradients, optimizer)


def test_offloading_moves_bytes_to_the_host_and_the_table_holds_the_activations() -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    zero |= {"stage3_param_persistence_threshold": 0}
    engine = engine_of({"zero_optimization": zero}, ranks=1, hidden_width=8)
    memory = held_by(adapted(), engine)
    assert memory.on_host == FROZEN + 4 * TRAINED + 12 * TRAINED
    activations = Activations(tokens=2**22, layers=2, hidden_width=8, element_bytes=2, recomputed=False)
    rows = dict(rough_table(memory, engine, activations).rows)
    assert activations.bytes == 2**22 * 8 * 2 * 2 * 17
    assert rows["activations (rough)"] == f"{activations.bytes / 2**30:.2f}"
