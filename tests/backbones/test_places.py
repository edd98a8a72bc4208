"""Presets stand for the layers of a place, and for no others, in models of several families."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from dora_vl.backbones.model import language_targets, open_backbone
from dora_vl.backbones.places import resolved_targets, resolved_weights
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.errors import UserError
from tests.backbones.tiny_image_text import write_tiny
from tests.backbones.tiny_vlbart import tiny

VISION = {
    "llava": ("model.vision_tower.", "model.multi_modal_projector."),
    "qwen2_5_vl": ("model.visual.blocks.", "model.visual.merger."),
    "idefics3": ("model.vision_model.", "model.connector."),
    "gemma3": ("model.vision_tower.", "model.multi_modal_projector."),
}
"""Where a family's vision encoder and its projector are."""
families = pytest.mark.parametrize("family", VISION)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("places")
    return {family: write_tiny(family, root / family) for family in VISION}


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def hits(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


@families
def test_each_preset_is_the_linears_of_its_place(folders: dict[str, Path], family: str) -> None:
    model = open_backbone(str(folders[family])).model
    names = linears(model)
    encoder, projector = VISION[family]
    layers = {
        preset: hits(names, resolved_targets(model, (preset,), "adapter.targets"))
        for preset in ("language", "vision", "all-linear")
    }
    assert layers["vision"] == [name for name in names if name.startswith(encoder)] != []
    beside = (encoder, projector)
    assert layers["language"] == [name for name in names if not name.startswith(beside) and name != "lm_head"] != []
    assert layers["all-linear"] == [name for name in names if name != "lm_head"]
    between = [name for name in names if name.startswith(projector)]
    if between:  # Gemma 3's projector is a bare matrix
        assert hits(names, resolved_targets(model, ("projector",), "adapter.targets")) == between


def test_layers_that_cannot_be_adapted_are_left_out_and_named(folders: dict[str, Path], caplog: Any) -> None:
    """SigLIP's pooling head is torch's attention, which uses its output layer's weight without calling it."""
    config = AutoConfig.from_pretrained(folders["gemma3"])
    config.vision_config.vision_use_head = True
    model = AutoModelForImageTextToText.from_config(config)
    (bypassed,) = [name for name in linears(model) if type(model.get_submodule(name)) is not nn.Linear]
    for preset in ("vision", "all-linear"):
        caplog.clear()
        adapted = copy.deepcopy(model)
        names = apply_dora(adapted, DoRAConfig(targets=resolved_targets(model, (preset,), "targets"), rank=2))
        prefix = VISION["gemma3"][0] if preset == "vision" else ""
        assert names == [n for n in linears(model) if n.startswith(prefix) and n not in (bypassed, "lm_head")]
        assert bypassed in caplog.text


@families
def test_weights_of_a_place_are_all_of_it(folders: dict[str, Path], family: str) -> None:
    model = open_backbone(str(folders[family])).model
    names = [name for name, _ in model.named_parameters()]
    for preset, start in zip(("vision", "projector"), VISION[family], strict=True):
        matched = hits(names, resolved_weights(model, (preset,), "adapter.also_train.x"))
        expected = [name for name in names if name.startswith(start)]
        assert set(expected) <= set(matched)
        assert not [name for name in matched if "language_model" in name or "text_model" in name or "lm_head" in name]


def test_llavas_default_places_are_its_language(folders: dict[str, Path]) -> None:
    model = open_backbone(str(folders["llava"])).model
    names = linears(model)
    resolved = resolved_targets(model, ("language",), "adapter.targets")
    assert hits(names, language_targets(model)) == hits(names, resolved)


def test_a_vlbart_has_language_and_a_projector_and_no_vision() -> None:
    model = tiny()
    names = linears(model)
    projector = [name for name in names if "visual_embedding" in name]
    assert hits(names, resolved_targets(model, ("projector",), "t")) == projector
    assert len(projector) == 2
    language = hits(names, resolved_targets(model, ("language",), "t"))
    assert language == [name for name in names if name not in projector and name != "lm_head"]
    weights = resolved_weights(model, ("projector",), "t")
    assert not any("obj_order" in name or name.startswith("model.shared") for name in weights)
    with pytest.raises(UserError, match="t: vision is no place in a VlBartForConditionalGeneration"):
        resolved_targets(model, ("vision",), "t")


def test_presets_and_patterns_mix_and_a_misspelt_preset_is_named(folders: dict[str, Path]) -> None:
    model = open_backbone(str(folders["llava"])).model
    mixed = resolved_targets(model, ("*.layers.0.*.q_proj", "projector"), "adapter.targets")
    assert mixed[0] == "*.layers.0.*.q_proj"
    assert len(hits(linears(model), mixed)) == 4  # q_proj of tower and language, and the projector's two
    with pytest.raises(UserError, match=r"adapter\.targets: 'langauge' is neither .* did you mean language"):
        resolved_targets(model, ("langauge",), "adapter.targets")
