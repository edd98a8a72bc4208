"""A run starts from an adapter folder only where A and B mean the same in it: rank, alpha and scaling agree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_vl.adapters.folder import save_adapter
from dora_vl.core import DoRAConfig
from dora_vl.core.trainable import adapted_layers
from dora_vl.errors import SettingError, UserError
from dora_vl.training.parts import adapt

CONFIG = DoRAConfig(rank=4, alpha=6.0, targets=("first", "second"), alpha_pattern={"second": 10.0})


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.ModuleDict({"first": nn.Linear(8, 6), "second": nn.Linear(6, 5)}).eval()


def outputs(adapted: nn.Module, rows: Tensor) -> Tensor:
    parts: Any = adapted
    return parts["second"](torch.tanh(parts["first"](rows)))


def moved(config: DoRAConfig = CONFIG) -> nn.Module:
    """An adapted model whose every trained tensor is away from its start."""
    adapted = model()
    adapt(adapted, config)
    with torch.no_grad():
        for _, layer in adapted_layers(adapted):
            for parameter in layer._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            layer.forget_norms()
    return adapted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(moved(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_run_starts_where_the_folder_ended(folder: Path) -> None:
    started, rows = model(), torch.randn(7, 8)
    adapt(started, CONFIG, initial=str(folder))
    torch.testing.assert_close(outputs(started, rows), outputs(moved(), rows))


@pytest.mark.parametrize("with_recipe", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 8.0},
        {"alpha_pattern": {}},
        {"rank": 3},
        {"rank_scaling": "sqrt"},
        {"init": "pissa"},
        {"method": "lora"},
    ],
    ids=str,
)
def test_another_scale_is_refused_and_another_dropout_is_not(
    folder: Path, change: dict[str, Any], with_recipe: bool
) -> None:
    if not with_recipe:  # as PEFT writes it
        (folder / "recipe.json").unlink()
    with pytest.raises(SettingError) as error:
        adapt(model(), replace(CONFIG, **change), initial=str(folder))
    assert error.value.key.startswith("adapter.initial")
    adapt(model(), replace(CONFIG, dropout=0.2), initial=str(folder))


@pytest.mark.parametrize("leaf", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_what_is_no_number_is_no_start(folder: Path, leaf: str) -> None:
    """Training would go on from it, and every loss be NaN."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"base_model.model.second.{leaf}"
    tensors[name].view(-1)[1] = float("inf")
    save_file(tensors, file)
    with pytest.raises(UserError):
        adapt(model(), CONFIG, initial=str(folder))


def test_a_folder_without_factors_needs_no_configuration(tmp_path: Path) -> None:
    whole = DoRAConfig(method="full", targets=("second",))
    save_adapter(moved(whole), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "recipe.json").read_text())["adapter"]["method"] == "full"
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    config = replace(CONFIG, targets=("first",), alpha_pattern={}, also_train={"head": ("second.*",)})
    started, ended = model(), moved(whole)
    adapt(started, config, initial=str(tmp_path / "adapter"))
    assert torch.equal(started.get_parameter("second.weight"), ended.get_parameter("second.weight"))


KEPT = replace(CONFIG, targets=("first",), alpha_pattern={}, also_keep=("table.weight[-3:]",))


def with_table(seed: int) -> nn.Module:
    network = model()
    torch.manual_seed(seed)
    network.add_module("table", nn.Embedding(7, 4))
    return network


@pytest.mark.parametrize("trains", [False, True])
def test_rows_that_a_folder_carries_are_taken_over(tmp_path: Path, trains: bool) -> None:
    """As a VL-BART's picture tokens: random, frozen, and other ones in every base; the table may train now."""
    ended, started = with_table(1), with_table(2)
    adapt(ended, KEPT)
    save_adapter(ended, tmp_path / "adapter")
    base = started.get_parameter("table.weight").detach().clone()
    config = replace(KEPT, also_keep=(), also_train={"table": ("table.weight",)}) if trains else KEPT
    adapt(started, config, initial=str(tmp_path / "adapter"))
    expected = torch.cat([base[:-3], ended.get_parameter("table.weight")[-3:]])
    assert torch.equal(started.get_parameter("table.weight"), expected)


def test_frozen_tensors_of_a_folder_must_be_the_bases(tmp_path: Path) -> None:
    """They would not be in the run's own folder: the base alone can hold them."""
    ended = model()
    adapt(ended, replace(CONFIG, targets=("first",), alpha_pattern={}, also_train={"head": ("second.bias",)}))
    save_adapter(ended, tmp_path / "adapter")
    without = replace(CONFIG, targets=("first",), alpha_pattern={})
    adapt(model(), without, initial=str(tmp_path / "adapter"))  # untrained: as in the base
    with torch.no_grad():
        ended.get_parameter("second.bias")[2] += 0.5
    save_adapter(ended, tmp_path / "adapter")
    with pytest.raises(UserError):
        adapt(model(), without, initial=str(tmp_path / "adapter"))
