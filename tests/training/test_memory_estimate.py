"""What a rank holds and keeps is arithmetic: a model of known size counted by hand, and one whose step is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.dora_memory import LiveBytes
from dora_vl.backbones.base import Backbone
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.core.fast import cpu_step
from dora_vl.training.estimate import PlannedRun, Samples
from dora_vl.training.memory import Engine, Estimate, Held, activations_of, engine_of, held_by
from dora_vl.training.pipeline import LossModel

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


def test_offloading_moves_bytes_to_the_host() -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    zero |= {"stage3_param_persistence_threshold": 0}
    engine = engine_of({"zero_optimization": zero}, ranks=1, hidden_width=8)
    assert held_by(adapted(), engine).on_host == FROZEN + 4 * TRAINED + 12 * TRAINED


def test_the_fullest_moment_is_in_the_passes_or_in_the_optimizers_step() -> None:
    held = Held(
        {"bfloat16": 100}, trained=40, gradients=40, optimizer=80, masters=0, buckets=0, flattened=0, gathered=0
    )
    alone = Engine(None, 1)
    assert Estimate(alone, held, activations=500).total == 220 + 500  # gradients come as activations go
    assert Estimate(alone, held, activations=500, accumulates=True).total == 220 + 540
    assert Estimate(alone, held, activations=10).total == 220 + 40
    assert Estimate(alone, held, activations=500, others=1000).total == 1720


def tiny_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=6, vocab_size=64)).to(torch.bfloat16)
    apply_dora(model, DoRAConfig(targets=("*proj",), rank=8))
    return model.train()


def products_of(_: Any, left: Sequence[int], right: Sequence[int], *__: Any, **___: Any) -> int:
    """Operations of an `addmm_`, which torch does not count by itself."""
    return 2 * left[0] * left[1] * right[1]


def test_activations_and_products_are_those_of_a_real_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_step, "SMALLEST", 2**60)  # as a GPU has it
    model, ids = tiny_llama(), torch.randint(64, (4, 96))
    attention = 6 * ids.numel() * 96 * 128  # which torch counts as nothing on a CPU
    expected, kept = activations_of(model), dict[bool, int]()
    for recomputed in (False, True):
        if recomputed:
            backbone = Backbone()
            backbone.model = model
            LossModel(backbone, step_tokens=True).recompute_activations({"use_reentrant": False})
        with LiveBytes() as live:
            model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()  # the first fills caches
            before = live.restart_peak()
            with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: products_of}) as counter:
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
                kept[recomputed] = live.now - before
                hidden.float().square().mean().backward()
        planned = PlannedRun(model, {"gradient_checkpointing": recomputed}, False, Samples(4, 96, 0), expected)
        flop = counter.get_total_flops() + (18 if recomputed else 14) * attention
        assert planned.flop() == pytest.approx(flop, rel=0.05)
    whole, vectors = (expected.of(tokens=ids.numel(), labelled=0, recomputed=each) for each in (False, True))
    assert whole == pytest.approx(kept[False], rel=0.1)
    assert whole - (vectors - ids.numel() * expected.layer) == pytest.approx(kept[False] - kept[True], rel=0.1)
