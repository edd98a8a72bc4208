"""The reference by exchange is a second frozen model's, wherever a run began, and the model comes back bit by bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.core import DoRAConfig, apply_dora, trained_parts
from dora_vl.training.reference import Reference
from tests.backbones.tiny_language import tiny_language

TARGETS = ("model.layers.*.self_attn.*_proj", "model.layers.*.mlp.down_proj")
IDS = torch.arange(2, 20).view(2, 9)
STARTS: dict[str, dict[str, Any]] = {
    "dora": {"method": "dora"},
    "lora": {"method": "lora"},
    "magnitude": {"method": "magnitude"},
    "pissa": {"method": "dora", "init": "pissa"},
    "norms beside it": {"method": "dora", "also_train": {"norms": ("model.norm.weight",)}},
    "an initial adapter": {"method": "dora"},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model: Any, steps: int = 3) -> None:
    weights = [weight for part in trained_parts(model) for weight in part.parameters.values()]
    optimizer = torch.optim.AdamW(weights, lr=0.05)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("start", STARTS)
def test_reference_is_the_model_that_training_began_with(start: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    model: Any = tiny_language().train()
    apply_dora(model, DoRAConfig(rank=2, alpha=6.0, dropout=0.0, targets=TARGETS, **STARTS[start]))
    if start == "an initial adapter":
        trained = copy.deepcopy(model)
        train(trained)
        save_adapter(trained, tmp_path / "adapter")
        load_adapter(model, tmp_path / "adapter")
    second, reference = copy.deepcopy(model), Reference(model)
    train(model)
    learned = logits(model)
    assert float((learned - logits(second)).abs().max()) > 0.01
    for _ in range(2):
        with reference.in_place():
            torch.testing.assert_close(logits(model), logits(second), rtol=0, atol=0)
        torch.testing.assert_close(logits(model), learned, rtol=0, atol=0)


def test_training_goes_on_as_if_nothing_had_been_exchanged() -> None:
    torch.manual_seed(4)
    model: Any = tiny_language().train()
    apply_dora(model, DoRAConfig(rank=2, alpha=6.0, dropout=0.0, targets=TARGETS))
    alone, reference = copy.deepcopy(model), Reference(model)
    train(alone)
    for _ in range(3):
        with reference.in_place():
            logits(model)
    train(model)
    torch.testing.assert_close(logits(model), logits(alone), rtol=0, atol=0)


def test_an_error_inside_leaves_the_trained_model() -> None:
    model: Any = tiny_language().train()
    apply_dora(model, DoRAConfig(rank=2, alpha=6.0, dropout=0.0, targets=TARGETS))
    reference = Reference(model)
    train(model)
    learned = logits(model)
    with pytest.raises(KeyError), reference.in_place():
        raise KeyError
    torch.testing.assert_close(logits(model), learned, rtol=0, atol=0)
