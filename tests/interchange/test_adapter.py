"""PEFT folders in and out: bit by bit, every field kept, and what PEFT would compute otherwise refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dora_vl.core import load_adapter, save_adapter
from dora_vl.errors import UserError
from dora_vl.interchange.adapter import read_adapter, write_adapter
from tests.interchange.foreign_files import tiny_llama
from tests.interchange.peft_folders import moved_peft


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


def test_through_a_model_and_back_into_peft(tmp_path):
    """PEFT -> load_adapter -> save_adapter -> PEFT: the same tensors, the same logits."""
    wrapped = moved_peft(tiny_llama()).eval()
    expected = wrapped(ids()).logits
    wrapped.save_pretrained(tmp_path / "peft")
    model = tiny_llama()
    load_adapter(model, tmp_path / "peft")
    torch.testing.assert_close(model.eval()(ids()).logits, expected, rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    before, after = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("peft", "ours"))
    assert {k: v.tolist() for k, v in before.items()} == {k: v.tolist() for k, v in after.items()}
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(ids()).logits, expected)


def test_both_spellings_and_pickles(tmp_path):
    moved_peft(tiny_llama()).save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    spelled = {key.replace("magnitude_vector", "magnitude_vector.weight"): tensor for key, tensor in tensors.items()}
    file.unlink()
    torch.save(spelled, file.with_suffix(".bin"))
    adapter = read_adapter(tmp_path / "peft")
    assert all(factors.magnitude is not None for factors in adapter.factors.values())
    write_adapter(adapter, tmp_path / "back")
    assert load_file(tmp_path / "back" / "adapter_model.safetensors").keys() == spelled.keys()


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


def test_lost_magnitude_and_broken_values_are_named(tmp_path):
    moved_peft(tiny_llama()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    magnitude = next(key for key in whole if "magnitude" in key)
    save_file({key: tensor for key, tensor in whole.items() if key != magnitude}, file)
    with pytest.raises(UserError, match="has no magnitude, yet use_dora is true"):
        read_adapter(tmp_path)
    save_file(whole | {magnitude: whole[magnitude] * float("inf")}, file)
    with pytest.raises(UserError, match="NaN or infinity"):
        read_adapter(tmp_path)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_adapter(tmp_path)
