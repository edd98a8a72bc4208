"""Which model types are trained, and which are refused by name before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from dora_vl.backbones.causal_lm import load_causal_lm
from dora_vl.backbones.families import NOT_TRAINED, check_trained, model_type_of
from dora_vl.backbones.image_text import skeleton_of
from dora_vl.backbones.image_text_encode import load_processor
from dora_vl.backbones.language_source import load_tokenizer
from dora_vl.backbones.llava import load_llava
from dora_vl.errors import UserError


@pytest.mark.parametrize("family", ["vipllava", "llava_next", "llava_next_video"])
def test_no_other_family_is_loaded_as_a_llava(folders: dict[str, Path], family: str) -> None:
    with pytest.raises(UserError, match=f"is a '{family}'"):
        load_llava(str(folders[family]))


@pytest.mark.parametrize("model_type", [*NOT_TRAINED, "no_such_model"])
def test_what_cannot_be_trained_is_named_with_what_can(model_type: str) -> None:
    with pytest.raises(UserError, match=f"'{model_type}'.*cannot be trained.*qwen2_5_vl") as raised:
        check_trained("folder", model_type)
    assert len(str(raised.value)) <= 490


@pytest.mark.parametrize("loads", [model_type_of, load_processor, load_tokenizer, skeleton_of, load_causal_lm])
def test_a_model_s_own_code_is_never_run_and_nobody_is_asked(tmp_path: Path, monkeypatch, loads: Any) -> None:
    code = "from transformers import PretrainedConfig\nopen('ran', 'w')\nclass C(PretrainedConfig):\n    pass\n"
    (tmp_path / "own.py").write_text(code)
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoTokenizer")
    auto_map = {name: "own.C" for name in classes}
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(UserError, match=r"brings code of its own .*never run here; take a model that") as raised:
        loads(str(tmp_path))
    assert "trust_remote_code" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_the_type_is_read_from_the_config_alone(tmp_path: Path) -> None:
    AutoConfig.for_model("smolvlm").save_pretrained(tmp_path)
    assert model_type_of(str(tmp_path)) == "smolvlm"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="states no model_type"):
        model_type_of(str(tmp_path))
    with pytest.raises(UserError, match="no such folder; name a model's folder"):
        model_type_of(str(tmp_path / "nowhere"))
