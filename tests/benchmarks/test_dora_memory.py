"""The memory benchmark counts what is alive, whoever keeps it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.contenders import contender
from benchmarks.dora_memory import LiveBytes, memory_of
from benchmarks.dora_step import Tokens

BATCH, LENGTH, LAYERS, HIDDEN, MIDDLE = 6, 40, 4, 32, 48


def test_live_bytes_follows_what_is_made_until_it_dies():
    older = torch.ones(50)
    with LiveBytes() as live:
        older.add_(1)
        assert (live.now, live.peak) == (0, 0), "made before, changed in place"
        tensor = torch.ones(1000)
        view = tensor.view(10, 100)
        del tensor
        assert live.now == 4000, "its view keeps it"
        view = view.half()
        assert (live.now, live.peak) == (2000, 6000)
        live.restart_peak()
        del view
        assert (live.now, live.peak) == (0, 2000)


@pytest.mark.slow
def test_checkpointing_keeps_less_and_the_step_holds_more_than_its_forward_pass() -> None:
    """Dropout so frequent that what it keeps is no small part of the whole."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = LlamaForCausalLM(config)
    tokens = Tokens.random(60, batch=BATCH, length=LENGTH, labels=3)
    names = ("frozen", "peft_lora", "peft_dora", "ours")
    measured = {name: memory_of(contender(name, base, rank=4, dropout=0.4), tokens) for name in names}
    for name, memory in measured.items():
        stored, *checkpointed = memory.steps.values()
        assert all(step.alive < 0.6 * stored.alive for step in checkpointed), name
        assert all(step.peak > step.alive for step in memory.steps.values()), name
