"""What vLLM serves stays an adapter, the rest is in the base beside it, and together they are the trained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.adapters.merge import export_for_vllm
from dora_vl.backbones.families.targets import resolved_layers
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.core.config import AdaptedPart
from dora_vl.errors import UserError
from tests.adapters.foreign_files import saved, tiny_llama
from tests.adapters.test_hub_names import logits, one_batch, published_llava
from tests.core.dense_dora import move, move_trained

LANGUAGE = ("*language_model*_proj",)


@torch.no_grad()
def trained(tmp_path: Path, **settings: object) -> tuple[Path, Path]:
    """A base with a transformers 5 save's names, and the adapter of a run on it."""
    base = saved(published_llava(), tmp_path / "base")
    model = LlavaForConditionalGeneration.from_pretrained(base)
    apply_dora(model, DoRAConfig(**{"targets": LANGUAGE, "rank": 4, "alpha": 7.0, **settings}))  # pyright: ignore
    move_trained(model)
    save_adapter(model, tmp_path / "adapter", base_model=str(base), recipe={"base": str(base), "template": "plain"})
    return base, tmp_path / "adapter"


def language_of(base: Path) -> frozenset[str]:
    return resolved_layers(AutoModelForImageTextToText.from_pretrained(base), "language")


@torch.no_grad()
def by_peft(folder: Path) -> torch.Tensor:
    base = LlavaForConditionalGeneration.from_pretrained(folder / "base").eval()
    model = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    return model(**one_batch(base)).logits


PROJECTOR = {"projector": ("model.multi_modal_projector.*",)}
RUNS = {
    "projector, other ranks and scales": {
        "also_train": PROJECTOR,
        "rank_pattern": {"*v_proj": 2},
        "alpha_pattern": {"*o_proj": 3.0},
    },
    "vision tower too": {"targets": (*LANGUAGE, "*vision_tower*q_proj"), "also_train": PROJECTOR},
    "LoRA": {"method": "lora", "also_train": PROJECTOR},
    "PiSSA": {"init": "pissa"},
    "parts": {"parts": {"vision": AdaptedPart(targets=("*vision_tower*fc1",), rank=3, alpha=5.0)}},
}


@pytest.mark.parametrize("run", RUNS)
def test_base_and_adapter_are_the_trained_model(tmp_path: Path, run: str) -> None:
    base, adapter = trained(tmp_path, **RUNS[run])
    expected, before = logits(base, adapter), logits(base)
    exported = export_for_vllm(read_adapter(adapter), base, tmp_path / "to", language_of(base))
    assert exported.layers == 14
    assert exported.use_dora == (run != "LoRA")
    folder = tmp_path / "to"
    torch.testing.assert_close(by_peft(folder), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(folder / "base", folder / "adapter"), expected, rtol=1e-4, atol=1e-4)
    alone = logits(folder / "base")
    assert (alone - expected).abs().max() > 0.01
    assert bool((alone - before).abs().max() < 1e-5) == (run == "PiSSA")  # nothing to fold in
    assert all(key.startswith(("vision_tower.vision_model.", "language_model.", "multi_modal_projector.")) for key in
               load_file(folder / "base" / "model.safetensors"))  # fmt: skip
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert config["peft_type"] == "LORA"
    served = read_adapter(folder / "adapter")
    scales = {factors.scale for factors in served.factors.values()}
    assert scales == {config["lora_alpha"] / config["r"]}  # all that vLLM reads
    assert exported.max_lora_rank == 8
    assert served.recipe["base"] == str(folder / "base")
    assert served.recipe["template"] == "plain"


def test_a_base_that_needs_nothing_is_not_copied(tmp_path: Path) -> None:
    model = tiny_llama()
    base = saved(model, tmp_path / "base")
    names = apply_dora(model, DoRAConfig(targets=("*.q_proj",), rank=2, alpha=3.0))
    move(model)
    save_adapter(model, tmp_path / "adapter", base_model=str(base))
    exported = export_for_vllm(read_adapter(tmp_path / "adapter"), base, tmp_path / "to", frozenset(names))
    assert exported.base == base
    assert exported.folded is None
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["adapter"]
    again = tiny_llama()
    load_adapter(again, tmp_path / "to" / "adapter")
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize(
    ("settings", "head"),
    [
        ({"targets": ("*language_model*_proj", "*patch_embedding"), "kinds": ("linear", "conv")}, None),
        ({"targets": ("*language_model*_proj", "*embed_tokens"), "kinds": ("linear", "embedding")}, None),
        ({"magnitude_targets": ("*vision_tower*q_proj",)}, None),
        ({"targets": ("*vision_tower*q_proj",)}, None),
        ({"method": "full"}, None),
        ({"targets": (*LANGUAGE, "lm_head")}, "lm_head"),
    ],
)
def test_what_vllm_cannot_serve_is_refused(tmp_path: Path, settings: dict, head: str | None) -> None:
    base, adapter = trained(tmp_path, **settings)
    with pytest.raises(UserError):
        export_for_vllm(read_adapter(adapter), base, tmp_path / "to", language_of(base), head=head)
    assert not (tmp_path / "to").exists()


def test_a_grid_tower_and_a_target_that_is_there_are_refused(tmp_path: Path) -> None:
    base, folder = trained(tmp_path)
    adapter, language = read_adapter(folder), language_of(base)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    with pytest.raises(UserError):
        export_for_vllm(adapter, base, tmp_path / "there", language)
    config = json.loads((base / "config.json").read_text())
    config["architectures"] = ["Unknown"]
    config["vision_config"] = {"model_type": "dora_grid_tower", "library": "timm", "architecture": "tf_efficientnet"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        export_for_vllm(adapter, base, tmp_path / "to", language)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "there"]
