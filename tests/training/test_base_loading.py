"""A run's base is loaded as its model section says, and not with a kernel that the machine has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dora_vl.errors import UserError
from dora_vl.training.base_loading import load_base
from dora_vl.training.commonsense_recipe import LanguageModelConfig
from dora_vl.training.recipe import ModelConfig


@pytest.mark.parametrize("section", [ModelConfig, LanguageModelConfig])
def test_every_setting_reaches_the_loader(section):
    model = section(base="folder", revision="abc", dtype="float16", attn_implementation="eager")
    given: dict[str, Any] = load_base(lambda base, **settings: {"base": base, **settings}, model, beams=4)
    assert given == {
        "base": "folder",
        "revision": "abc",
        "dtype": torch.float16,
        "attn_implementation": "eager",
        "beams": 4,
    }


def test_flash_attention_without_a_card_is_refused_before_loading(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="flash_attention_2 needs CUDA; sdpa"):
        load_base(pytest.fail, ModelConfig(base="folder", attn_implementation="flash_attention_2"))
