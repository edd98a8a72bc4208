"""A base loaded quantised is the model whose weights are the dequantised ones, and takes less memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_vl.adapters.quantised_base import SCHEMES, quantised_layers, quantised_values
from dora_vl.backbones import loading
from dora_vl.backbones.model import language_targets, open_backbone
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.core.quantised import is_quantised
from dora_vl.errors import UserError
from dora_vl.training.memory import weight_count
from tests.backbones.tiny_image_text import write_tiny
from tests.backbones.tiny_language import write_tiny_language
from tests.training.tiny_run import write_tiny_llava


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose layers are wide enough for every scheme."""
    return write_tiny("qwen2_5_vl", tmp_path_factory.mktemp("wide") / "base", width=64)


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


@pytest.mark.parametrize("kind", sorted(SCHEMES))
def test_the_same_layers_are_adapted(wide: Path, kind: str) -> None:
    pytest.importorskip(SCHEMES[kind].package)
    plain = open_backbone(str(wide)).model
    model = open_backbone(str(wide), quantisation=kind).model  # pyright: ignore[reportArgumentType]
    assert language_targets(model) == language_targets(plain)
    config = DoRAConfig(targets=language_targets(model), rank=2)
    before = logits_of(model)
    assert apply_dora(model, config) == apply_dora(plain, config)
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=1e-5)
    assert weight_count(model) == weight_count(plain)


def test_packed_weights_do_not_train_themselves(wide: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = open_backbone(str(wide), quantisation="nf4").model
    with pytest.raises(UserError, match=r"full: model\.language_model\.layers\.0"):
        apply_dora(model, DoRAConfig(method="full", targets=("model.language_model*",)))
    assert apply_dora(model, DoRAConfig(method="full", targets=("lm_head",))) == ["lm_head"]


def test_other_layers_than_meant_are_not_taken_silently(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(loading, "kept_whole", lambda *args: [])
    with pytest.raises(UserError):
        open_backbone(str(wide), quantisation="nf4")


def test_asking_does_not_pack_the_weights_anew(tmp_path: Path) -> None:
    """As bitsandbytes would on a CPU with AVX512-BF16, at the first pass in eval mode."""
    pytest.importorskip("bitsandbytes")
    write_tiny_language(tmp_path, hidden_size=64, intermediate_size=128)
    model = open_backbone(str(tmp_path), quantisation="nf4").model.eval()
    layer: Any = model.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.support_avx512bf16_for_cpu is False
    before = layer.weight.detach().clone()
    logits_of(model)
    assert torch.equal(layer.weight, before)
    assert layer.weight.quant_state.nested
