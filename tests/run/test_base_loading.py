"""A run's base is made and loaded as its model section says, and not with a kernel that the machine has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from dora_vl.backbones.loading import written_base
from dora_vl.backbones.specs import LanguageSource
from dora_vl.errors import SettingError, UserError
from dora_vl.run import base as run_base
from dora_vl.run.base import load_base, make_base
from dora_vl.run.settings import LanguageModelConfig, ModelConfig


@pytest.mark.parametrize("section", [ModelConfig, LanguageModelConfig])
def test_every_setting_reaches_the_loader(section, monkeypatch):
    tried = []
    monkeypatch.setattr(run_base, "check_runs_here", lambda *args: tried.append(args))
    model = section(base="folder", revision="abc", dtype="float16", attn_implementation="eager", quantisation="int8")
    loaded: dict[str, Any] = load_base(lambda base, **settings: {"base": base, **settings}, model, beams=4)
    assert loaded == {
        "base": "folder",
        "revision": "abc",
        "dtype": torch.float16,
        "attn_implementation": "eager",
        "quantisation": "int8",
        "beams": 4,
    }
    assert tried == [("int8", torch.float16)]


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
