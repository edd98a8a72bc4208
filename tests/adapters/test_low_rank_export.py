"""The nearest LoRA of a DoRA adapter: the SVD's error is the error, and a bound is a bound."""

from __future__ import annotations

import pytest
import torch

from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.exports import as_lora, export_layers, truncated
from dora_vl.errors import UserError
from tests.adapters.foreign_files import saved, tiny_llama
from tests.adapters.peft_folders import moved_peft


@pytest.fixture
def base_and_adapter(tmp_path):
    model = tiny_llama()
    base = saved(model, tmp_path / "base")
    wrapped = moved_peft(model).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter", wrapped


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
    as_lora(found, exports, 1.0)
    with pytest.raises(UserError):
        as_lora(found, exports, 0.01)


def test_large_matrices_take_the_leading_part_without_touching_the_generator():
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(1300, 8)).Q, torch.linalg.qr(torch.randn(1100, 8)).Q
    change = left @ torch.diag(torch.logspace(0, -4, 8)) @ right.t()
    state = torch.get_rng_state()
    a, b = truncated(change, 5)
    assert torch.equal(state, torch.get_rng_state())
    assert float((change - b @ a).norm()) == pytest.approx(float(torch.logspace(0, -4, 8)[5:].norm()), rel=0.02)
