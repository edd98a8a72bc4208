"""PEFT's own folders in and out, bit by bit; and what a base's hash is of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from dora_vl.adapters.adapter import content_hash, read_adapter, write_adapter
from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.errors import UserError
from dora_vl.files import weight_files
from tests.adapters.foreign_files import tiny_llama
from tests.adapters.peft_folders import moved_peft
from tests.backbones.tiny_language import tiny_language
from tests.core.dense_dora import move

IDS = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitwise_and_keeps_every_field(tmp_path, dtype):
    wrapped = moved_peft(
        tiny_llama(), rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 5}, init_lora_weights=True
    )
    wrapped.to(dtype).save_pretrained(tmp_path / "peft")
    write_adapter(read_adapter(tmp_path / "peft"), tmp_path / "back")
    before, after = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("peft", "back"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key
    configs = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("peft", "back")]
    assert configs[0] == configs[1]


def test_the_way_that_the_refusal_names_works(tmp_path):
    """Saved before training and again after it with the conversion, PEFT's PiSSA loads over the original base."""
    wrapped = get_peft_model(
        tiny_llama(), LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    wrapped.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
        expected = wrapped.eval()(IDS).logits
    wrapped.save_pretrained(tmp_path / "after", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    model = tiny_llama()
    load_adapter(model, tmp_path / "after")
    torch.testing.assert_close(model.eval()(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_our_folders_are_read_whatever_stands_first(tmp_path, init):
    """The model's first layer has only a magnitude; the folder's method is that of the others."""
    model = tiny_llama()
    settings = {"targets": ("*.down_proj",), "magnitude_targets": ("*.q_proj",), "rank": 2, "init": init}
    names = apply_dora(model, DoRAConfig(**settings))
    assert names[0].endswith("q_proj")
    move(model)
    save_adapter(model, tmp_path)
    adapter = read_adapter(tmp_path)
    assert (adapter.config["use_dora"], adapter.config["lora_dropout"], adapter.method) == (True, 0.05, "dora")
    assert {name: layer.rank > 0 for name, layer in adapter.factors.items()} == {n: "down" in n for n in names}
    fresh = tiny_llama()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.eval()(IDS).logits, model.eval()(IDS).logits)


def test_half_a_dvora_folder_is_refused(tmp_path):
    model = tiny_llama()
    apply_dora(model, DoRAConfig(targets=("*.q_proj", "*.down_proj"), rank=3, method="dvora"))
    save_adapter(model, tmp_path)
    assert read_adapter(tmp_path).factors
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "random_A" not in key}, file)
    with pytest.raises(UserError):
        read_adapter(tmp_path)


def base(folder: Path, **options: str) -> Path:
    tiny_language().save_pretrained(folder, **options)
    return folder


def test_the_hash_of_a_folder_of_one_kind_is_over_its_config_and_weights(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    lines = [
        f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n"
        for name in ("config.json", "model.safetensors")
    ]
    assert content_hash(folder) == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "30KB"}])
def test_files_that_are_not_loaded_do_not_count_and_those_that_are_do(tmp_path: Path, shards: dict[str, str]) -> None:
    folder = base(tmp_path / "base", **shards)
    before = content_hash(folder)
    torch.save({"lm_head.weight": torch.ones(2, 3)}, folder / "pytorch_model.bin")
    torch.save({"rate": torch.ones(1)}, folder / "training_args.bin")
    assert content_hash(folder) == before
    loaded = weight_files(folder)
    assert len(loaded) == 1 if not shards else len(loaded) > 2
    assert all(path.name.startswith("model") and path.suffix == ".safetensors" for path in loaded)
    content = bytearray(loaded[-1].read_bytes())
    content[-1] ^= 1
    loaded[-1].write_bytes(content)
    assert content_hash(folder) != before


def test_a_folder_of_pickles_alone_is_hashed_by_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"one")
    before = content_hash(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"two")
    assert content_hash(tmp_path) != before
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "unknown.bin")
    (tmp_path / "folder.safetensors").mkdir()
    assert weight_files(tmp_path) == (tmp_path / "unknown.bin",)


@pytest.mark.parametrize("weight_map", ['{"a": "model-1.safetensors"}', "3", '{"a": "../other.safetensors"}'])
def test_a_broken_list_of_shards_is_refused(tmp_path: Path, weight_map: str) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (tmp_path / "other.safetensors").write_bytes(b"of somebody else")
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    with pytest.raises(UserError):
        content_hash(folder)
