"""A DVoRA folder away from its model: the shared matrices are cut to each layer, as the model's own layers do it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.folder import save_adapter
from dora_vl.adapters.merge import merge_to_folder
from dora_vl.adapters.several import AdapterSet
from dora_vl.core import DoRAConfig, adapted_layers, apply_dora
from dora_vl.errors import UserError
from tests.adapters.foreign_files import saved, tiny_llama


@torch.no_grad()
def dvora_folder(tmp_path) -> torch.Tensor:
    """Writes `base` and `adapter`, layers of three widths; returns the adapted model's logits."""
    model = tiny_llama()
    saved(model, tmp_path / "base")
    apply_dora(model, DoRAConfig(targets=("*.q_proj", "*.down_proj", "*.up_proj"), rank=3, method="dvora"))
    for _, layer in adapted_layers(model):
        layer.lambda_b.normal_()
        layer.lambda_d.normal_()
        layer.magnitude.mul_(torch.linspace(0.5, 1.6, len(layer.magnitude)))
    save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    return model.eval()(ids()).logits


def ids() -> torch.Tensor:
    return torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(3))


def test_merges_as_the_model_computes(tmp_path):
    expected = dvora_folder(tmp_path)
    adapter = read_adapter(tmp_path / "adapter")
    assert (adapter.method, adapter.extras) == ("dvora", {})
    merge_to_folder(adapter, tmp_path / "base", tmp_path / "merged")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids()).logits, expected, rtol=1e-5, atol=1e-5)


def test_half_a_folder_and_a_set_of_adapters_are_refused(tmp_path):
    dvora_folder(tmp_path)
    with pytest.raises(UserError, match="adapter"):
        AdapterSet(tiny_llama()).load("one", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if "random_A" not in key}, file)
    with pytest.raises(UserError, match=r"dvora_shared.random_A"):
        read_adapter(tmp_path / "adapter")
