"""The nearest LoRA of a DoRA adapter: the SVD's error is the error, and a bound is a bound."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from dora_vl.adapters.adapter import read_adapter, write_adapter
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.exports import as_lora, export_layers, truncated
from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.errors import UserError
from tests.adapters.foreign_files import saved, tiny_llama
from tests.adapters.peft_folders import moved_peft
from tests.core.dense_dora import move


@pytest.fixture
def base_and_adapter(tmp_path):
    model = tiny_llama()
    base = saved(model, tmp_path / "base")
    wrapped = moved_peft(model).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter", wrapped


def test_full_rank_is_exact_and_peft_serves_it(tmp_path, base_and_adapter):
    base, adapter, wrapped = base_and_adapter
    with BaseWeights(base) as opened:
        exports = list(export_layers(read_adapter(adapter), opened, 16))
    assert max(export.relative_error for export in exports) < 1e-5
    write_adapter(as_lora(read_adapter(adapter), exports, 1e-5), tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["r"], config["lora_alpha"]) == (False, 16, 16.0)
    ids = torch.randint(32, (2, 7))
    served = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, wrapped(ids).logits, rtol=1e-5, atol=1e-5)


def test_error_is_the_tail_of_the_spectrum_and_is_refused_above_the_bound(base_and_adapter):
    base, adapter, wrapped = base_and_adapter
    found = read_adapter(adapter)
    merged = dict(wrapped.merge_and_unload().named_parameters())
    start = dict(tiny_llama().named_parameters())
    with BaseWeights(base) as opened:
        exports = list(export_layers(found, opened, 4))
    for export in exports:
        change = (merged[f"{export.layer}.weight"] - start[f"{export.layer}.weight"]).detach()
        spectrum = torch.linalg.svdvals(change).square()
        expected = float((spectrum[4:].sum() / spectrum.sum()).sqrt())
        assert export.relative_error == pytest.approx(expected, rel=1e-3)
        assert expected > 0.05
    worst = max(exports, key=lambda export: export.relative_error)
    with pytest.raises(UserError, match=rf"4 of 4 layers lose more than 0.01 .* most {worst.layer}.*nothing written"):
        as_lora(found, exports, 0.01)


def test_large_matrices_take_the_leading_part_without_touching_the_generator():
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(1300, 8)).Q, torch.linalg.qr(torch.randn(1100, 8)).Q
    change = left @ torch.diag(torch.logspace(0, -4, 8)) @ right.t()
    state = torch.get_rng_state()
    a, b = truncated(change, 5)
    assert torch.equal(state, torch.get_rng_state())
    assert float((change - b @ a).norm()) == pytest.approx(float(torch.logspace(0, -4, 8)[5:].norm()), rel=0.02)


def test_other_tensors_come_along(tmp_path):
    """An adapter with trained norms, of layers whose ranks differ, exported and loaded again by the core."""
    model = tiny_llama()
    base = saved(model, tmp_path / "base")
    apply_dora(model, DoRAConfig(targets=("*.q_proj",), rank=2, also_train={"norms": ("*.input_layernorm.weight",)}))
    move(model)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(1.4)
    save_adapter(model, tmp_path / "adapter", recipe={"task": "x"})
    ids = torch.randint(32, (2, 7))
    expected = model.eval()(ids).logits
    with BaseWeights(base) as opened:
        adapter = read_adapter(tmp_path / "adapter")
        write_adapter(as_lora(adapter, list(export_layers(adapter, opened, 16)), 1e-5), tmp_path / "lora")
    again = tiny_llama()
    load_adapter(again, tmp_path / "lora")
    torch.testing.assert_close(again.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert read_adapter(tmp_path / "lora").recipe["task"] == "x"
