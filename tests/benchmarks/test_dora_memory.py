"""The memory benchmark's two counts: each right by itself, and the same where they look at the same thing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.contenders import contender
from benchmarks.dora_memory import LiveBytes, Memory, Saved, memory_of, saved_for_backward
from benchmarks.dora_step import Tokens

ROWS, WIDTH = 30, 10
BATCH, LENGTH, LAYERS, HIDDEN, MIDDLE = 6, 40, 4, 32, 48


@dataclass
class Aside:
    """What a node may keep where no hook looks."""

    positions: torch.Tensor


class Doubled(torch.autograd.Function):
    """Saves its input and five integers, and keeps two tensors as attributes, one of them the input again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, torch.zeros(5, dtype=torch.int64))
        ctx.kept = [Aside(torch.zeros(7, dtype=torch.int64)), {"again": x}]
        return 2 * x

    @staticmethod
    def backward(ctx, *grad_outputs):
        return 2 * grad_outputs[0]


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


def test_attributes_of_python_nodes_are_counted_and_each_storage_once():
    x = torch.ones(ROWS, WIDTH, requires_grad=True)
    loss, saved = saved_for_backward(lambda: Doubled.apply(x)[1:].sum(), nn.Identity())
    assert saved == Saved(total=ROWS * WIDTH * 4 + 5 * 8 + 7 * 8, outside_hooks=7 * 8)
    loss.backward()


def test_the_models_own_tensors_are_not_counted():
    linear, x = nn.Linear(WIDTH, 3), torch.ones(ROWS, WIDTH, requires_grad=True)
    loss, saved = saved_for_backward(lambda: linear(x).sum(), linear)
    assert saved == Saved(total=ROWS * WIDTH * 4, outside_hooks=0)
    loss.backward()


@pytest.mark.parametrize(("reentrant", "kept"), [(False, 7 * 8), (True, 0)])
def test_attributes_that_outlive_a_checkpoints_first_pass_are_alive(reentrant, kept):
    """Non-reentrant checkpointing takes away what a node saves, not its attributes."""
    x = torch.ones(ROWS, WIDTH, requires_grad=True)
    with LiveBytes() as live:
        y = checkpoint(lambda x: Doubled.apply(x).exp(), x, use_reentrant=reentrant, preserve_rng_state=False)
        assert live.now == y.nbytes + kept


@pytest.fixture(scope="module")
def measured() -> dict[str, Memory]:
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
    return {name: memory_of(contender(name, base, rank=4, dropout=0.4), tokens) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frozen", "peft_lora", "peft_dora", "ours"])
def test_the_two_counts_agree(measured, name):
    """Within what one alone sees: the input, the loss; gains and the last mask, which stand between steps."""
    saved, alive = measured[name].saved.total, measured[name].steps["stored"].alive
    assert saved == pytest.approx(alive, rel=0.025)


@pytest.mark.slow
def test_checkpointing_keeps_less_and_the_step_holds_more_than_its_forward_pass(measured):
    for name, memory in measured.items():
        stored, *checkpointed = memory.steps.values()
        assert all(step.alive < 0.6 * stored.alive for step in checkpointed), name
        assert all(step.peak > step.alive for step in memory.steps.values()), name
