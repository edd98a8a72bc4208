"""A run's base is made and loaded as its model section says, and not with a kernel that the machine has not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import Phi3Config, TrainingArguments

from dora_vl.backbones.loading import written_base
from dora_vl.backbones.specs import LanguageSource
from dora_vl.errors import SettingError, UserError
from dora_vl.run.base import check_window, load_base, make_base
from dora_vl.run.settings import ModelConfig


def test_flash_attention_without_a_card_is_refused_before_loading(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingError) as error:
        load_base(pytest.fail, ModelConfig(base="folder", attn_implementation="flash_attention_2"))
    assert error.value.key == "model.attn_implementation"


def test_a_base_is_made_once_and_only_by_the_settings_that_it_has(tmp_path: Path):
    written: list[LanguageSource] = []

    def make(spec: LanguageSource, folder: Path) -> None:
        with written_base(folder, spec) as unfinished:
            written.append(spec)
            (unfinished / "model.safetensors").write_bytes(b"1")

    arguments, base = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True), str(tmp_path / "new" / "base")
    spec = LanguageSource(folder="here", gguf_file="a.gguf", dtype="bfloat16")
    make_base(make, None, base, arguments)
    for _ in range(2):
        make_base(make, spec, base, arguments)
    assert written == [spec]
    other = LanguageSource(folder="here", gguf_file="b.gguf", dtype="bfloat16")
    with pytest.raises(UserError):
        make_base(make, other, base, arguments)
    (tmp_path / "downloaded").mkdir()  # says nothing of its settings
    make_base(make, other, str(tmp_path / "downloaded"), arguments)


def test_a_base_that_was_not_finished_is_not_there(tmp_path: Path):
    with pytest.raises(RuntimeError), written_base(tmp_path / "base", LanguageSource(folder="here")):
        raise RuntimeError("disk full")
    assert not (tmp_path / "base").exists()


def test_a_sample_that_would_change_its_neighbours_positions_is_refused(tmp_path: Path):
    """Beyond the window transformers turns every position of a batch by other factors."""
    window = 16
    rope = {"rope_type": "longrope", "short_factor": [1.0, 1.2], "long_factor": [4.0, 8.0], "factor": 4.0}
    places = {"max_position_embeddings": 4 * window, "original_max_position_embeddings": window}
    Phi3Config(hidden_size=32, num_attention_heads=8, rope_parameters=rope, **places).save_pretrained(tmp_path)
    check_window(str(tmp_path), cast(Any, SimpleNamespace(max_tokens=window)))
    with pytest.raises(SettingError) as error:
        check_window(str(tmp_path), cast(Any, SimpleNamespace(max_tokens=window + 1)))
    assert error.value.key == "data.max_tokens"
