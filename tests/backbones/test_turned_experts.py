"""Experts that transformers would load transposed under ZeRO-3 are refused before any weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dora_vl.backbones.model import open_backbone, refuse_turned_experts
from dora_vl.errors import UserError
from tests.backbones.tiny_image_text import write_tiny


def test_a_folder_of_save_pretrained_is_refused_and_a_published_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_tiny("qwen3_vl_moe", tmp_path / "base")
    monkeypatch.setattr("dora_vl.backbones.model.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError):
        open_backbone(str(base))
    file = base / "model.safetensors"
    weights = load_file(file)
    named = [name for name in weights if name.endswith(("experts.down_proj", "experts.gate_up_proj"))]
    assert named
    for name in named:
        weights[name] = weights[name].transpose(1, 2).contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    shape = weights[next(name for name in named if name.endswith("down_proj"))].shape
    if shape[1] == shape[2]:
        pytest.fail("the tiny model's experts are square, so that this test could not tell")
    refuse_turned_experts(str(base))


def test_other_families_are_not_asked(tmp_path: Path) -> None:
    refuse_turned_experts(str(write_tiny("glm4v_moe", tmp_path / "base")))
