"""Which model types are trained, and which are refused by name before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from dora_vl.backbones.families import NOT_TRAINED, check_trained, model_type_of
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


def test_the_type_is_read_from_the_config_alone(tmp_path: Path) -> None:
    AutoConfig.for_model("smolvlm").save_pretrained(tmp_path)
    assert model_type_of(str(tmp_path)) == "smolvlm"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="states no model_type"):
        model_type_of(str(tmp_path))
    with pytest.raises(UserError, match="no such folder; name a model's folder"):
        model_type_of(str(tmp_path / "nowhere"))
