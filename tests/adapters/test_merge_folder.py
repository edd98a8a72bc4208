"""The merged folder: opens with plain transformers, answers as the unmerged model does, and is written in one go."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.folder import save_adapter
from dora_vl.adapters.merge import merge_to_folder
from dora_vl.adapters.read import ReadOptions, read_any
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.errors import UserError
from tests.adapters.foreign_files import saved, tiny_llama
from tests.adapters.peft_folders import moved_peft
from tests.core.dense_dora import move

IMAGE_TOKEN = 31


def tiny_llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config).eval()


def llava_batch() -> dict[str, torch.Tensor]:
    ids = torch.cat([torch.full((2, 4), IMAGE_TOKEN), torch.randint(30, (2, 5))], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 8, 8)}


@torch.no_grad()
def adapted_llava(tmp_path):
    """A base folder, an adapter folder with a trained projector, the unmerged logits and their batch."""
    model = tiny_llava()
    base = saved(model, tmp_path / "base")
    (base / "tokenizer_config.json").write_text("{}")
    targets = ("*language_model*_proj",)
    apply_dora(
        model,
        DoRAConfig(targets=targets, rank=3, alpha=7.0, also_train={"projector": ("model.multi_modal_projector.*",)}),
    )
    move(model)
    model.model.multi_modal_projector.linear_1.weight.mul_(1.3)
    save_adapter(model.eval(), tmp_path / "adapter", base_model=str(base))
    batch = llava_batch()
    return base, tmp_path / "adapter", model(**batch).logits, batch


@pytest.mark.parametrize("shard_bytes", [10_000, 5_000_000_000])
def test_llava_merges_into_plain_weights(tmp_path, shard_bytes):
    base, adapter, expected, batch = adapted_llava(tmp_path)
    merged = merge_to_folder(read_adapter(adapter), base, tmp_path / "merged", shard_bytes=shard_bytes)
    assert (merged.layers, merged.replaced) == (14, 4)
    assert (merged.files > 1) == (shard_bytes == 10_000)
    plain, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer_config.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "merged"]
    if shard_bytes == 10_000:
        index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
        sizes = [p.stat().st_size for p in (tmp_path / "merged").glob("*.safetensors")]
        assert len(sizes) == merged.files
        assert index["metadata"]["total_size"] == merged.bytes < sum(sizes)


def test_files_merge_whatever_their_names_are(tmp_path):
    """transformers writes `language_model.model.layers` for what its class calls `model.language_model.layers`."""
    base, adapter, expected, batch = adapted_llava(tmp_path)
    written = load_file(base / "model.safetensors")
    names = dict(LlavaForConditionalGeneration.from_pretrained(base).named_parameters())
    assert written.keys() != names.keys()
    for kind, tensors in (("as-written", written), ("as-named", {k: v.detach().clone() for k, v in names.items()})):
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        merge_to_folder(read_adapter(adapter), base, tmp_path / kind)
        found = load_file(tmp_path / kind / "model.safetensors").keys()
        assert {key.replace(".vision_model.", ".") for key in found} == written.keys()
        plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / kind).eval()
        with torch.no_grad():
            torch.testing.assert_close(plain(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_rounds_once(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    base = saved(model, tmp_path / "base")
    wrapped = moved_peft(model)
    wrapped.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    merge_to_folder(adapter, base, tmp_path / "merged")
    merge_to_folder(adapter, base, tmp_path / "wide", dtype=torch.float32)
    narrow, wide = (load_file(tmp_path / side / "model.safetensors") for side in ("merged", "wide"))
    for key, tensor in narrow.items():
        assert (tensor.dtype, wide[key].dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(tensor, wide[key].to(torch.bfloat16)), key
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto").dtype == torch.float32


def test_transposed_layers_and_embeddings(tmp_path):
    """transformers' Conv1D stores [in, out]; PEFT takes an embedding's norm over the vocabulary."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=12, n_layer=1, n_head=2, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config).eval()
    base = saved(model, tmp_path / "base")
    for target, transposed in (("c_proj", True), ("wte", False)):
        wrapped = moved_peft(GPT2LMHeadModel.from_pretrained(base), target_modules=[target], fan_in_fan_out=transposed)
        wrapped.save_pretrained(tmp_path / target)
        ids = torch.randint(20, (2, 5))
        with torch.no_grad():
            expected = wrapped.eval()(ids).logits
            assert (expected - model(ids).logits).abs().max() > 0.01
            merge_to_folder(read_adapter(tmp_path / target), base, tmp_path / f"merged-{target}")
            plain = GPT2LMHeadModel.from_pretrained(tmp_path / f"merged-{target}").eval()
            torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    base, adapter, _, _ = adapted_llava(tmp_path)
    found = read_adapter(adapter)
    other = saved(tiny_llama(), tmp_path / "other")
    with pytest.raises(UserError, match="other"):
        merge_to_folder(found, other, tmp_path / "merged")
    quantised = load_file(base / "model.safetensors")
    key = next(key for key in quantised if key.endswith("q_proj.weight") and "language" in key)
    save_file(quantised | {key: quantised[key].to(torch.int8)}, base / "model.safetensors")
    with pytest.raises(UserError, match=r"torch\.int8"):
        merge_to_folder(found, base, tmp_path / "merged")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        merge_to_folder(found, tmp_path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_only_an_earlier_merge_is_replaced(tmp_path):
    base, adapter, _, _ = adapted_llava(tmp_path)
    found, target = read_adapter(adapter), tmp_path / "merged"
    merge_to_folder(found, base, target, shard_bytes=10_000)
    merge_to_folder(found, base, target)
    assert sorted(p.name for p in target.glob("*.safetensors")) == ["model.safetensors"]
    (target / "notes.txt").write_text("x")
    for folder, first in ((target, r"notes\.txt"), (base, "the base itself"), (adapter, r"adapter_config\.json")):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match=first):
            merge_to_folder(found, base, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (target / "notes.txt").unlink()
    again = saved(tiny_llama(), tmp_path / "again")
    with pytest.raises(UserError, match=r"again.*config\.json"):
        merge_to_folder(found, target, again)
    merge_to_folder(found, target, tmp_path / "twice")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "again", "base", "merged", "twice"]


@pytest.mark.parametrize("shard_bytes", [1_000, 5_000_000_000])
def test_a_diffusers_folder_keeps_its_names(tmp_path, shard_bytes):
    base = tmp_path / "unet"
    base.mkdir()
    (base / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    weights = {f"down_blocks.{i}.to_q.weight": torch.randn(6, 8) for i in range(8)}
    save_file(weights, base / "diffusion_pytorch_model.safetensors")
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    keys = {"lora_down.weight": a, "lora_up.weight": b}
    save_file({f"lora_unet_down_blocks_3_to_q.{k}": v for k, v in keys.items()}, tmp_path / "style.safetensors")
    for folder in (base, tmp_path / "merged"):
        adapter = read_any(tmp_path / "style.safetensors", ReadOptions(base=folder))
        merged = merge_to_folder(adapter, folder, tmp_path / f"{folder.name}-merged", shard_bytes=shard_bytes)
        merge_to_folder(adapter, base, tmp_path / "merged", shard_bytes=shard_bytes)
        names = {p.name for p in (tmp_path / f"{folder.name}-merged").glob("diffusion_pytorch_model*")}
        assert len(names) == merged.files + (merged.files > 1)
    (tmp_path / "wrong").mkdir()
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors"):
        merge_to_folder(adapter, tmp_path / "wrong", tmp_path / "x")
    with BaseWeights(tmp_path / "unet-merged") as found:
        expected = weights["down_blocks.3.to_q.weight"] + b @ a
        torch.testing.assert_close(found.read("down_blocks.3.to_q.weight"), expected)


MEASURE = """
import sys, threading, time
from pathlib import Path
from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.merge import merge_to_folder
from dora_vl.adapters.read import ReadOptions, read_any

def anonymous() -> int:
    # Not the resident size: pages of a memory-mapped file count there, and the system takes them back at will.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch() -> None:
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

base, adapter, target = map(Path, sys.argv[1:])
found = read_adapter(adapter)
with BaseWeights(base) as opened:
    found.factors["l0"].merged(opened.read("l0.weight"))
start = anonymous()
peak = [start]
threading.Thread(target=watch, daemon=True).start()
merge_to_folder(found, base, target)
print(peak[0] - start)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_layer_not_of_the_model(tmp_path):
    """12 layers of 16 MB, 192 MB in all, merged within the memory of a few."""
    side, layers = 2048, 12
    (tmp_path / "base").mkdir()
    weights = {f"l{i}.weight": torch.randn(side, side) * 0.02 for i in range(layers)}
    save_file(weights, tmp_path / "base" / "model.safetensors")
    (tmp_path / "adapter").mkdir()
    prefix = "base_model.model."
    tensors = {}
    for i in range(layers):
        tensors[f"{prefix}l{i}.lora_A.weight"] = torch.randn(4, side)
        tensors[f"{prefix}l{i}.lora_B.weight"] = torch.randn(side, 4)
        tensors[f"{prefix}l{i}.lora_magnitude_vector"] = torch.rand(side) + 0.5
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("base", "adapter", "merged"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    layer_bytes = side * side * 4
    # V, B A and V squared are in memory at once; the model would be 12 layers.
    assert int(run.stdout.split()[-1]) < 5 * layer_bytes
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        assert len(file.keys()) == layers
