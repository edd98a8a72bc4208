"""Which model types are trained, and which are refused by name before anything is loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from dora_vl.backbones.encoder import load_processor
from dora_vl.backbones.families import NOT_TRAINED, check_trained, model_type_of
from dora_vl.backbones.loading import load_tokenizer
from dora_vl.backbones.model import open_backbone, skeleton_of
from dora_vl.errors import UserError
from tests.backbones.tiny_image_text import write_tiny


@pytest.mark.parametrize("model_type", [*NOT_TRAINED, "no_such_model"])
def test_what_cannot_be_trained_is_named_with_what_can(model_type: str) -> None:
    with pytest.raises(UserError, match=f"'{model_type}'.*cannot be trained.*qwen2_5_vl") as raised:
        check_trained("folder", model_type)
    assert len(str(raised.value)) <= 490


@pytest.mark.parametrize("loads", [model_type_of, load_processor, load_tokenizer, skeleton_of, open_backbone])
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
    for base in (str(tmp_path / "nowhere"), "runs/demo/base"):
        with pytest.raises(UserError, match=f"{re.escape(repr(base))}: no such folder in {re.escape(str(Path.cwd()))}"):
            model_type_of(base)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_tiny("qwen2_5_vl", folder := tmp_path_factory.mktemp("whole"))
    return folder


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 5_000, '{"a": 1' + "0" * 5_000 + "}", "", "[]"], ids=lambda text: text[:6]
)
@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_what_is_no_json_object_is_one_line(whole: Path, tmp_path: Path, file: str, text: str) -> None:
    base = shutil.copytree(whole, tmp_path / "base")
    (base / file).write_text(text)
    with pytest.raises(UserError) as error:
        load_processor(str(base))
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("image_token_id", "x"), ("text_config", [1]), ("vision_config", 3), ("dtype", [1]), ("text_config", "x")],
)
def test_a_config_of_wrong_types_is_one_line(whole: Path, tmp_path: Path, field: str, value: object) -> None:
    base = shutil.copytree(whole, tmp_path / "base")
    config = base / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    for loads in (load_processor, skeleton_of):
        with pytest.raises(UserError, match=re.escape(str(base))) as error:
            loads(str(base))
        assert len(str(error.value)) < 500
