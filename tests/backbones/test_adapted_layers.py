"""Presets stand for the layers of a place, LLaVA-7B has the paper's numbers, and quantised bases the same layers."""

import json
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from dora_vl.adapters.base_weights import SCHEMES, quantised_layers, quantised_values
from dora_vl.backbones.families.targets import language_targets, projector_patterns, resolved_targets, resolved_weights
from dora_vl.backbones.model import open_backbone
from dora_vl.core import DoRAConfig, apply_dora, trained_parts
from dora_vl.core.quantised import is_quantised
from dora_vl.errors import UserError
from tests.backbones.tiny_image_text import write_tiny
from tests.backbones.tiny_language import write_tiny_language
from tests.backbones.tiny_vlbart import tiny
from tests.training.tiny_run import write_tiny_llava

VISION = {
    "llava": ("model.vision_tower.", "model.multi_modal_projector."),
    "qwen2_5_vl": ("model.visual.blocks.", "model.visual.merger."),
    "idefics3": ("model.vision_model.", "model.connector."),
    "gemma3": ("model.vision_tower.", "model.multi_modal_projector."),
}
"""Where a family's vision encoder and its projector are."""
families = pytest.mark.parametrize("family", VISION)


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def hits(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


@families
def test_each_preset_is_the_linears_of_its_place(folders: Mapping[str, Path], family: str) -> None:
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


@families
def test_weights_of_a_place_are_all_of_it(folders: Mapping[str, Path], family: str) -> None:
    model = open_backbone(str(folders[family])).model
    names = [name for name, _ in model.named_parameters()]
    for preset, start in zip(("vision", "projector"), VISION[family], strict=True):
        matched = hits(names, resolved_weights(model, (preset,), "adapter.also_train.x"))
        expected = [name for name in names if name.startswith(start)]
        assert set(expected) <= set(matched)
        assert not [name for name in matched if "language_model" in name or "text_model" in name or "lm_head" in name]


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
    with pytest.raises(UserError, match=r"t: .*'vision'"):
        resolved_targets(model, ("vision",), "t")


def test_presets_and_patterns_mix_and_a_misspelt_preset_is_named(folders: Mapping[str, Path]) -> None:
    model = open_backbone(str(folders["llava"])).model
    mixed = resolved_targets(model, ("*.layers.0.*.q_proj", "projector"), "adapter.targets")
    assert mixed[0] == "*.layers.0.*.q_proj"
    assert len(hits(linears(model), mixed)) == 4  # q_proj of tower and language, and the projector's two
    with pytest.raises(UserError, match=r"adapter\.targets: 'langauge'.* language"):
        resolved_targets(model, ("langauge",), "adapter.targets")


PROJECTOR = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
LOW_RANK = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
MAGNITUDES = 32 * (4 * 4096 + 2 * 11008 + 4096)


@pytest.mark.parametrize(("method", "expected"), [("lora", 340_795_392), ("dora", 342_155_264)])
def test_llava_7b_at_rank_128(method: str, expected: int) -> None:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(vocab_size=32064),  # LlamaConfig's own defaults are LLaMA-7B's shapes
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    apply_dora(
        model,
        DoRAConfig(
            targets=language_targets(model),
            method=method,  # pyright: ignore
            rank=128,
            alpha=256.0,
            also_train={"projector": projector_patterns(model)},
        ),
    )
    counts: Counter[str] = Counter()
    for part in trained_parts(model):  # a part appears twice where only some of it has weight decay
        counts[part.name] += sum(weight.numel() for weight in part.parameters.values())
    part_names = {"dora.A", "dora.B", "projector"} | ({"dora.magnitude"} if method == "dora" else set())
    assert {name for name, count in counts.items() if count} == part_names
    assert counts["projector"] == PROJECTOR == 20_979_712
    assert counts["dora.A"] + counts["dora.B"] == LOW_RANK == 319_815_680
    assert counts["dora.magnitude"] == (MAGNITUDES if method == "dora" else 0)
    assert sum(counts.values()) == expected
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == expected


def write_base(family: str, folder: Path) -> Path:
    if family == "llama":
        write_tiny_language(folder, hidden_size=64, intermediate_size=128)
    elif family == "llava":
        write_tiny_llava(folder, width=64)
    else:
        write_tiny(family, folder, width=64)
    return folder


def logits_of(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    ids = torch.randint(60, 250, (2, 9))  # no special token
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("kind", sorted(SCHEMES))
@pytest.mark.parametrize("family", ["gemma3", "llama", "llava", "qwen2_5_vl"])
def test_it_computes_with_the_dequantised_weights(tmp_path: Path, family: str, kind: str) -> None:
    pytest.importorskip(SCHEMES[kind].package)
    base = write_base(family, tmp_path / "base")
    layers = quantised_layers(json.loads((base / "config.json").read_text()), kind, "base").quantised
    plain = open_backbone(str(base)).model
    before = logits_of(plain)
    with torch.no_grad():
        for name in layers:
            weight = plain.get_submodule(name).weight
            weight.copy_(quantised_values(weight.detach(), kind, torch.float32))
    model = open_backbone(str(base), quantisation=kind).model
    assert {name for name, module in model.named_modules() if is_quantised(module)} == set(layers)
    logits = logits_of(model)
    assert float((logits - before).abs().max()) > 1e-3
    # LLM.int8 rounds its inputs too, to 127 steps of each row's largest.
    tolerance = 0.05 * float(before.abs().max()) if kind == "int8" else 1e-4
    torch.testing.assert_close(logits, logits_of(plain), rtol=0, atol=tolerance)


def test_packed_weights_do_not_train_themselves(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    wide = write_tiny("qwen2_5_vl", tmp_path / "base", width=64)
    model = open_backbone(str(wide), quantisation="nf4").model
    with pytest.raises(UserError, match=r"full: model\.language_model\.layers\.0"):
        apply_dora(model, DoRAConfig(method="full", targets=("model.language_model*",)))
    assert apply_dora(model, DoRAConfig(method="full", targets=("lm_head",))) == ["lm_head"]
