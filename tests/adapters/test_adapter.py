"""PEFT folders in and out: bit by bit, every field kept, and what PEFT would compute otherwise refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from dora_vl.adapters.adapter import read_adapter, write_adapter
from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.adapters.several import AdapterSet
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.errors import UserError
from tests.adapters.foreign_files import tiny_llama
from tests.adapters.peft_folders import moved_peft
from tests.core.dense_dora import move


def ids() -> torch.Tensor:
    return torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(3))


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alhpa": 3}, r"unknown field 'lora_alhpa' \(nearest known: 'lora_alpha'\)"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"r": 4}, r"has A \[3, 20\] and B \[16, 3\], the configuration says rank 4"),
        ({"use_dora": False}, "has a magnitude, yet use_dora is false"),
    ],
)
def test_wrong_fields_are_named(tmp_path, fields, message):
    moved_peft(tiny_llama()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | fields))
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_changed_the_base_is_refused_everywhere(tmp_path, start):
    wrapped = moved_peft(tiny_llama(), init_lora_weights=start, use_dora=False)
    wrapped.save_pretrained(tmp_path / "peft")
    message = rf"init_lora_weights is '{start}'.*path_initial_model_for_weight_conversion"
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "peft")
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_adapter(model, tmp_path / "peft")
    with pytest.raises(UserError, match=message):
        AdapterSet(model).load("x", tmp_path / "peft")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


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
        expected = wrapped.eval()(ids()).logits
    wrapped.save_pretrained(tmp_path / "after", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    model = tiny_llama()
    load_adapter(model, tmp_path / "after")
    torch.testing.assert_close(model.eval()(ids()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_our_folders_are_read_whatever_stands_first(tmp_path, init):
    """The model's first layer has a magnitude alone; the folder's method is that of the others."""
    model = tiny_llama()
    settings = {"targets": ("*.down_proj",), "magnitude_targets": ("*.q_proj",), "rank": 2, "init": init}
    names = apply_dora(model, DoRAConfig(**settings))
    assert names[0].endswith("q_proj")
    move(model)
    save_adapter(model, tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    assert (adapter.config["use_dora"], adapter.config["lora_dropout"], adapter.method) == (True, 0.05, "dora")
    assert {name: found.rank > 0 for name, found in adapter.factors.items()} == {n: "down" in n for n in names}
    fresh = tiny_llama()
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh.eval()(ids()).logits, model.eval()(ids()).logits)
    write_adapter(adapter, tmp_path / "back")
    write_adapter(adapter, tmp_path / "back")
    (tmp_path / "back" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"notes\.txt"):
        write_adapter(adapter, tmp_path / "back")
    assert (tmp_path / "back" / "notes.txt").is_file()


def test_lost_magnitude_and_broken_values_are_named(tmp_path):
    moved_peft(tiny_llama()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    magnitude = next(key for key in whole if "magnitude" in key)
    save_file({key: tensor for key, tensor in whole.items() if key != magnitude}, file)
    with pytest.raises(UserError, match="use_dora"):
        read_adapter(tmp_path)
    save_file(whole | {magnitude: whole[magnitude] * float("inf")}, file)
    with pytest.raises(UserError, match=magnitude):
        read_adapter(tmp_path)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=file.name):
        read_adapter(tmp_path)


def changed_tensor(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in tensors if "lora_B" in key)
    save_file({**tensors, key: change(tensors[key])}, folder / "adapter_model.safetensors")


def changed_json(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **fields}))


def pickled(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (lambda folder: changed_tensor(folder, lambda one: one.to(torch.float8_e4m3fn)), "float8_e4m3fn"),
        (lambda folder: changed_tensor(folder, lambda one: one.to(torch.int8)), r"lora_B.*int8"),
        (lambda folder: changed_tensor(folder, lambda one: one.to(torch.complex64)), r"lora_B.*complex64"),
        (lambda folder: changed_json(folder, "recipe.json", base="a\0b"), r"recipe\.json: base"),
        (lambda folder: changed_json(folder, "adapter_config.json", base_model_name_or_path="a\0b"), "base_model_name"),
        (lambda folder: changed_json(folder, "adapter_config.json", lora_bias=True), "lora_bias.*merge_and_unload"),
        (pickled, r"adapter_model\.bin.*dora-vl convert"),
    ],
    ids=["float8", "int8", "complex", "NUL in the recipe", "NUL in the base", "lora_bias", "pickle"],
)
def test_odd_folders_are_one_line(tmp_path, damage, fact):
    moved_peft(tiny_llama()).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=fact):
        load_adapter(tiny_llama(), tmp_path)
