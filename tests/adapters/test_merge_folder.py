"""The merged folder: opens with plain transformers, answers as the unmerged model does, and is written in one go."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.folder import save_adapter
from dora_vl.adapters.merge import merge_to_folder
from dora_vl.adapters.read import ReadOptions, read_any
from dora_vl.core import DoRAConfig, adapted_layers, apply_dora
from dora_vl.errors import UserError
from tests.adapters.foreign_files import saved, tiny_llama
from tests.adapters.peft_folders import moved_peft
from tests.adapters.test_hub_names import adapter_on, published_llava


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


@torch.no_grad()
def test_layers_that_share_matrices_merge_as_the_model_computes(tmp_path):
    """DVoRA: the shared matrices are cut to each layer, as the model's own layers do it; here of three widths."""
    model, ids = tiny_llama(), torch.randint(32, (2, 7))
    base = saved(model, tmp_path / "base")
    apply_dora(model, DoRAConfig(targets=("*.q_proj", "*.down_proj", "*.up_proj"), rank=3, method="dvora"))
    for _, layer in adapted_layers(model):
        layer.lambda_b.normal_()
        layer.lambda_d.normal_()
        layer.magnitude.mul_(torch.linspace(0.5, 1.6, len(layer.magnitude)))
    save_adapter(model, tmp_path / "adapter")
    merge_to_folder(read_adapter(tmp_path / "adapter"), base, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(plain(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.fixture
def llava(tmp_path):
    """A base folder and an adapter that trained the projector too."""
    base = saved(published_llava(), tmp_path / "base")
    return base, read_adapter(adapter_on(base, tmp_path / "adapter"))


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, llava):
    base, adapter = llava
    whole = load_file(base / "model.safetensors")
    key = next(key for key in whole if key.endswith("q_proj.weight") and "language" in key)
    for wrong in (saved(tiny_llama(), tmp_path / "other"), tmp_path, base):
        save_file(whole | {key: whole[key].to(torch.int8)}, base / "model.safetensors")
        with pytest.raises(UserError):
            merge_to_folder(adapter, wrong, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


def test_only_an_earlier_merge_is_replaced(tmp_path, llava):
    (base, adapter), target = llava, tmp_path / "merged"
    merge_to_folder(adapter, base, target, shard_bytes=10_000)
    merge_to_folder(adapter, base, target)
    assert sorted(path.name for path in target.glob("*.safetensors")) == ["model.safetensors"]
    (target / "notes.txt").write_text("x")
    other = saved(tiny_llama(), tmp_path / "other")
    for folder in (target, base, tmp_path / "adapter", other):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError):
            merge_to_folder(adapter, base, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (target / "notes.txt").unlink()
    merge_to_folder(adapter, target, tmp_path / "twice")
    merge_to_folder(adapter, base, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged", "other", "twice"]


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
    with pytest.raises(UserError):
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

def anonymous() -> int:
    # Not the resident size: pages of a memory-mapped file count there, and the system takes them back at will.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch() -> None:
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

base, adapter, target = map(Path, sys.argv[1:])
read = read_adapter(adapter)
with BaseWeights(base) as opened:
    read.factors["l0"].merged(opened.read("l0.weight"))
start = anonymous()
peak = [start]
threading.Thread(target=watch, daemon=True).start()
merge_to_folder(read, base, target)
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
        tensors |= {
            f"{prefix}l{i}.lora_A.weight": torch.randn(4, side),
            f"{prefix}l{i}.lora_B.weight": torch.randn(side, 4),
        }
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
