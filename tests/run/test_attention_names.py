"""transformers runs code from the hub for an attention kernel called `owner/kernel`: no base may name one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from dora_vl.adapters.base_weights import skeleton
from dora_vl.backbones.loading import read_language_model
from dora_vl.backbones.model import open_backbone, skeleton_of
from dora_vl.backbones.specs import TowerSpec
from dora_vl.backbones.tower_sources import load_transformers
from dora_vl.errors import UserError
from dora_vl.files import KERNELS, check_attention, check_model_folder, read_json

EVIL = "evil/kernel"
STATED: Mapping[str, dict[str, Any]] = {
    "own": {"_attn_implementation": EVIL},
    "public": {"attn_implementation": EVIL},
    "paged": {"_attn_implementation": f"paged|{EVIL}@main:attention"},
    "by part": {"attn_implementation": {"": "sdpa", "text_config": EVIL}},
    "nested": {"text_config": {"_attn_implementation": EVIL}},
    "in a list": {"backbones": [{"config": {"attn_implementation": EVIL}}]},
}
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=32)).save_pretrained(folder)
    return folder


def state(folder: Path, entries: dict[str, Any], target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps({**read_json(folder / "config.json"), **entries}))
    return target


OPENED: Mapping[str, Callable[[str], object]] = {
    "base": open_backbone,
    "estimate": skeleton_of,
    "merge": lambda folder: skeleton(read_json(Path(folder, "config.json"))),
    "composed": read_language_model,
}


@pytest.mark.parametrize(
    ("opened", "stated"), [*(("base", stated) for stated in STATED), *((opened, "own") for opened in OPENED)]
)
def test_a_base_that_names_a_kernel_of_the_hub_is_refused(
    base: Path, tmp_path: Path, stated: str, opened: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dora_vl.backbones.loading.load_tokenizer", lambda *words, **named: None)
    folder = state(base, STATED[stated], tmp_path / "evil")
    with pytest.raises(UserError, match=EVIL):
        OPENED[opened](str(folder))


def test_a_tower_that_names_one_is_refused(tmp_path: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)).save_pretrained(tmp_path / "tower")
    folder = state(tmp_path / "tower", STATED["own"], tmp_path / "evil")
    with pytest.raises(UserError, match=EVIL):
        load_transformers(TowerSpec(library="transformers", name=str(folder)))


def test_a_hub_id_that_names_one_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = state(base, STATED["nested"], tmp_path / "evil")
    cached = mock.Mock(side_effect=lambda name, file, **_: str(folder / file))
    monkeypatch.setattr("transformers.configuration_utils.cached_file", cached)
    with pytest.raises(UserError, match=EVIL):
        check_model_folder("owner/model", "abc")
    assert cached.call_args.kwargs["revision"] == "abc"


def test_known_names_open_and_none_is_none(base: Path, tmp_path: Path) -> None:
    for number, name in enumerate((*KERNELS, None)):
        check_attention("config.json", {"text_config": {"attn_implementation": {"": name}}})
        if name in ("sdpa", "eager", None):
            folder = state(base, {"_attn_implementation": name}, tmp_path / str(number))
            assert torch.isfinite(open_backbone(str(folder)).model.lm_head.weight).all()
