"""Which model types are trained, which are refused by name before anything is loaded, and the page that says so."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from dora_vl.backbones.encoder import load_processor
from dora_vl.backbones.families import NOT_TRAINED, check_trained, model_type_of
from dora_vl.backbones.loading import load_tokenizer
from dora_vl.backbones.model import open_backbone, refuse_turned_experts, skeleton_of
from dora_vl.errors import UserError
from tests.backbones.model_table import PAGE, page
from tests.backbones.tiny_families.family import why_not_here
from tests.backbones.tiny_families.table import FAMILIES, families
from tests.backbones.tiny_image_text import tiny_tokenizer, write_tiny


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
    for base in (str(tmp_path / "nowhere"), "runs/nowhere/base"):
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


PAGE_OF = "5.24"


@pytest.mark.skipif(bool(why_not_here(PAGE_OF)), reason="the page lists a newer version's models too")
def test_the_page_is_written_from_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.backbones.model_table"


@families
def test_a_family_takes_videos_where_its_processor_has_a_part_for_them(family: str) -> None:
    row = FAMILIES[family]
    processor = row.processor(tiny_tokenizer(row.names))
    assert (vars(processor).get("video_processor") is not None) == row.video


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
