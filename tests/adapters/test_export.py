"""Merged, composed and exported folders: names as published; what vLLM serves with its adapter is the trained model."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.base_weights import BaseWeights, save_under_hub_names
from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.adapters.merge import export_for_vllm, merge_to_folder
from dora_vl.backbones.families.targets import resolved_layers
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.core.config import AdaptedPart
from dora_vl.data.turns import Turn
from dora_vl.errors import UserError
from tests.adapters.foreign_files import saved, tiny_llama
from tests.backbones.conversations import encoder_of
from tests.backbones.tiny_families.table import FAMILIES
from tests.backbones.tiny_image_text import write_tiny, write_tiny_language
from tests.core.dense_dora import move, move_trained

PUBLISHED = {
    "llava": (
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "multi_modal_projector.linear_1.bias",
    ),
    "llava_next": ("image_newline", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"),
    "llava_onevision": ("image_newline", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"),
    "paligemma": (
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "multi_modal_projector.linear.weight",
    ),
    "gemma3": (
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "multi_modal_projector.mm_input_projection_weight",
    ),
    "qwen2_vl": ("model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight"),
    "qwen2_5_vl": ("model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight"),
    "qwen3_vl": ("model.language_model.layers.0.self_attn.q_proj.weight", "model.visual.blocks.0.attn.qkv.weight"),
    "smolvlm": ("model.text_model.layers.0.self_attn.q_proj.weight", "model.connector.modality_projection.proj.weight"),
    "internvl": (
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "vision_tower.encoder.layer.0.mlp.fc1.weight",
    ),
    "mllama": ("language_model.model.layers.0.self_attn.q_proj.weight", "multi_modal_projector.weight"),
}
"""Some names of the checkpoints that these families were published with."""


def published_llava(**vision: int) -> LlavaForConditionalGeneration:
    """A tiny LLaVA whose tower and decoder have two layers each."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = CLIPVisionConfig(**{**sizes, "image_size": 8, "patch_size": 4, **vision})
    text = LlamaConfig(vocab_size=32, **{**sizes, "num_attention_heads": 4})
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=text, image_token_index=31)
    ).eval()


@torch.no_grad()
def adapter_on(base: Path, folder: Path) -> Path:
    model = LlavaForConditionalGeneration.from_pretrained(base)
    also = {"projector": ("model.multi_modal_projector.*",)}
    targets = ("*language_model*_proj", "*vision_tower*fc1")
    apply_dora(model, DoRAConfig(targets=targets, rank=2, alpha=5.0, also_train=also))
    move(model)
    model.model.multi_modal_projector.linear_1.weight.mul_(1.3)
    save_adapter(model, folder, base_model=str(base))
    return folder


@torch.no_grad()
def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """Of a picture of 8 x 8 pixels and a few words."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    if adapter is not None:
        load_adapter(model, adapter)
    return model(**one_batch(model)).logits


def one_batch(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.cat([torch.full((1, 4), model.config.image_token_id), torch.arange(5, 12).unsqueeze(0)], dim=1)
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_a_llava_merges_into_plain_weights_of_published_names_from_any(tmp_path: Path) -> None:
    """Bases with the class's names, with those that transformers saves a fresh model with, and with published ones."""
    model = published_llava()
    fresh = saved(model, tmp_path / "fresh")
    save_under_hub_names(model)
    published = saved(model, tmp_path / "published")
    named = saved(model, tmp_path / "named")
    own = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(own, named / "model.safetensors", metadata={"format": "pt"})
    keys = [load_file(base / "model.safetensors").keys() for base in (fresh, published, named)]
    for prefix, names in zip(("vision_tower.", "vision_tower.vision_model.", "model.vision_tower."), keys, strict=True):
        assert f"{prefix}embeddings.class_embedding" in names
    adapter = adapter_on(fresh, tmp_path / "adapter")
    expected = logits(fresh, adapter)
    assert (expected - logits(fresh)).abs().max() > 0.01
    for base, shard_bytes in ((fresh, 9_000), (published, 5_000_000_000), (named, 9_000)):
        torch.testing.assert_close(logits(base, adapter), expected, rtol=1e-5, atol=1e-6)  # it fits them all
        (base / "tokenizer_config.json").write_text("{}")
        merged = tmp_path / "merged" / base.name
        result = merge_to_folder(read_adapter(adapter), base, merged, shard_bytes=shard_bytes)
        assert (result.layers, result.replaced) == (16, 4)
        with BaseWeights(merged) as weights:
            assert set(weights.hub_keys) == set(keys[1])
        torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
        assert (merged / "tokenizer_config.json").is_file()
        sizes = [path.stat().st_size for path in merged.glob("*.safetensors")]
        assert len(sizes) == result.files
        assert (result.files > 1) == (shard_bytes == 9_000)
        if result.files > 1:
            index = json.loads((merged / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == result.bytes < sum(sizes)
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == ["fresh", "named", "published"]


QUICK = ("llava", "qwen2_5_vl", "internvl", "smolvlm", "gemma3", "mllama", "deepseek_vl")


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in QUICK else pytest.mark.slow) for family in FAMILIES]
)
def test_every_family_is_named_as_published_and_read_alike(family: str, tmp_path: Path) -> None:
    base = write_tiny(family, tmp_path / family)
    with BaseWeights(base) as weights:
        keys = {tensor.key: weights.hub_keys[tensor.key] for tensor in weights.tensors.values()}
    assert len(set(keys.values())) == len(keys)
    assert set(PUBLISHED.get(family, ())) <= set(keys.values())
    if not FAMILIES[family].merges:
        return
    model = AutoModelForImageTextToText.from_pretrained(base)
    apply_dora(model, DoRAConfig(targets=tuple(resolved_layers(model, "language")), rank=2, alpha=5.0))
    move(model)
    save_adapter(model.eval(), tmp_path / "adapter", base_model=str(base))
    merge_to_folder(read_adapter(tmp_path / "adapter"), base, tmp_path / "merged")
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(keys.values())
    plain, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    saved(plain, tmp_path / "again")  # transformers saves what it loaded by the names that it had
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(keys.values())
    picture = Image.new("RGB", (33, 21), (10, 200, 30))
    prompt = encoder_of(base).encode_prompt([Turn("user", "<image>\nSay the colour.")], [picture])
    inputs = {"input_ids": prompt.input_ids[None], **prompt.inputs}
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_a_text_model_keeps_its_names(tmp_path: Path) -> None:
    """A prefix that would tell a text model that was cut out of a larger one is not made up."""
    base = write_tiny_language("qwen3", tmp_path / "base")
    with BaseWeights(base) as weights:
        assert all(key == name for key, name in weights.hub_keys.items())


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
