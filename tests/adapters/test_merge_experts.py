"""Bases whose files hold each expert by itself, and whose models hold them as one tensor, merge row by row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dora_vl import DoRAConfig, apply_dora, save_adapter
from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.merge import merge_to_folder
from dora_vl.errors import UserError
from tests.core.test_experts import moved, tiny_mixtral, tiny_qwen

LINEAR = DoRAConfig(targets=("*.q_proj",), rank=3, alpha=7.0)
EXPERTS = DoRAConfig(
    targets=("*.q_proj", "*.mlp.experts.*"), kinds=("linear", "experts"), rank=3, alpha=7.0,
    rank_pattern={"*.1.mlp.experts.down_proj": 2},
)  # fmt: skip
IDS = torch.arange(24).view(2, 12) % 40


@pytest.mark.parametrize("tiny", [tiny_mixtral, tiny_qwen])
@pytest.mark.parametrize("config", [LINEAR, EXPERTS], ids=["linear", "experts"])
@torch.no_grad()
def test_the_merged_folder_answers_as_the_adapted_model(
    tiny: Callable[[], Any], config: DoRAConfig, tmp_path: Path
) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert sum(".experts." in key for key in stored) == 2 * 4 * 3
    apply_dora(model, config)
    moved(model, 0.1)
    save_adapter(model, tmp_path / "adapter")
    merged = merge_to_folder(read_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "merged")
    assert merged.layers == len(config.targets) * 2 + (2 if config is EXPERTS else 0)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert written.keys() == stored.keys()
    moved_keys = {key for key in stored if not torch.equal(written[key], stored[key])}
    assert sum(".experts." in key for key in moved_keys) == (24 if config is EXPERTS else 0)
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_experts_are_refused_by_what_takes_matrices_alone_and_by_another_base(tmp_path: Path) -> None:
    model = tiny_qwen()
    apply_dora(model, EXPERTS)
    save_adapter(model, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.experts
    with pytest.raises(UserError):
        _ = adapter.factors
    tiny_mixtral().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError):
        merge_to_folder(adapter, tmp_path / "other", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
