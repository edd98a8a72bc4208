"""`accelerate_peft`: PEFT's numbers on this core, with PEFT's parameters, and PEFT again after `restore_peft`."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from dora_vl.adapters.peft_model import AcceleratedLinear, accelerate_peft, restore_peft
from tests.adapters.foreign_files import tiny_llama
from tests.adapters.peft_folders import moved_peft

IDS = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(0))


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{}, {"use_dora": False}, {"use_rslora": True}], ids=["dora", "lora", "rslora"])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_pefts(settings, bias):
    model = tiny_llama()
    if bias:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.bias = nn.Parameter(torch.randn(module.out_features))
    wrapped = moved_peft(model, **settings)
    outputs, before = wrapped.eval()(IDS).logits, gradients(wrapped.train())
    done = accelerate_peft(wrapped)
    assert (len(done.layers), done.left) == (4, {})
    with torch.no_grad():
        torch.testing.assert_close(wrapped.eval()(IDS).logits, outputs, rtol=1e-6, atol=1e-6)
    after = gradients(wrapped.train())
    assert after.keys() == before.keys()
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_whole_change_dropout_is_pefts_with_the_same_mask():
    wrapped = moved_peft(tiny_llama(), lora_dropout=0.4).train()
    torch.manual_seed(7)
    before = gradients(wrapped)
    accelerate_peft(wrapped, dropout_mode="whole_change")
    torch.manual_seed(7)
    after = gradients(wrapped)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_low_rank_dropout_is_on_and_has_the_same_mean():
    """One layer alone, since a model's layers make the mean of its output another thing."""
    wrapped = moved_peft(nn.ModuleDict({"q_proj": nn.Linear(6, 5)}), target_modules=["q_proj"], lora_dropout=0.3)
    layer = wrapped.base_model.model["q_proj"]
    x = torch.randn(4, 6)
    expected = layer.eval()(x)
    accelerate_peft(wrapped)
    torch.manual_seed(0)
    draws = layer.train()(x.repeat(1500, 1, 1)).detach()
    assert draws.std(dim=0).min() > 0.01
    standard_error = draws.std(dim=0) / len(draws) ** 0.5
    assert ((draws.mean(dim=0) - expected).abs() < 5 * standard_error).all()


def test_parameters_state_and_saved_files_stay_pefts(tmp_path):
    wrapped = moved_peft(tiny_llama())
    state, parameters = wrapped.state_dict(), dict(wrapped.named_parameters())
    modules = [name for name, _ in wrapped.named_modules()]
    wrapped.save_pretrained(tmp_path / "before")
    accelerate_peft(wrapped)
    assert [name for name, _ in wrapped.named_modules()] == modules
    assert all(parameter is parameters[name] for name, parameter in wrapped.named_parameters())
    assert all(torch.equal(tensor, state[key]) for key, tensor in wrapped.state_dict().items())
    assert wrapped.state_dict().keys() == state.keys()
    wrapped.save_pretrained(tmp_path / "after")
    files = [(tmp_path / side / "adapter_model.safetensors").read_bytes() for side in ("before", "after")]
    assert files[0] == files[1]
    layer = next(module for module in wrapped.modules() if isinstance(module, PeftLinear))
    assert type(layer) is AcceleratedLinear
    assert restore_peft(wrapped) == 4
    assert type(layer) is PeftLinear
    assert not any(key.startswith("_dora_vl") for key in vars(layer))
    assert restore_peft(wrapped) == 0


@torch.no_grad()
def test_adapters_switch_scale_disable_and_merge_as_in_peft():
    wrapped = moved_peft(tiny_llama()).eval()
    wrapped.add_adapter("second", LoraConfig(r=2, lora_alpha=5, use_dora=True, target_modules=["q_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "second" in name and "lora_B" in name:
            parameter.normal_(std=0.4)

    def scenes() -> list[torch.Tensor]:
        found = [wrapped(IDS).logits]
        wrapped.set_adapter("second")
        found.append(wrapped(IDS).logits)
        with wrapped.disable_adapter():
            found.append(wrapped(IDS).logits)
        wrapped.base_model.set_adapter(["default", "second"])
        found.append(wrapped(IDS).logits)
        wrapped.set_adapter("default")
        for module in wrapped.modules():
            if isinstance(module, PeftLinear):
                module.set_scale("default", 0.5)
        found.append(wrapped(IDS).logits)
        wrapped.merge_adapter()
        found.append(wrapped(IDS).logits)
        wrapped.unmerge_adapter()
        for module in wrapped.modules():
            if isinstance(module, PeftLinear):
                module.set_scale("default", 1.0)
        found.append(wrapped(IDS).logits)
        return found

    expected = scenes()
    accelerate_peft(wrapped)
    for index, (found, wanted) in enumerate(zip(scenes(), expected, strict=True)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=f"scene {index}")


def test_layers_that_cannot_go_are_named_with_their_reason(caplog):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 6)
            self.q_proj = nn.Linear(6, 5)
            self.frozen_hook = nn.Linear(6, 5)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.q_proj(self.embed(ids)) + self.frozen_hook(self.embed(ids))

    model = Pair()
    model.frozen_hook.register_forward_hook(lambda module, inputs, output: output * 2)
    wrapped = moved_peft(model, target_modules=["embed", "q_proj", "frozen_hook"]).eval()
    ids = torch.arange(4)
    expected = wrapped(ids)
    done = accelerate_peft(wrapped)
    assert done.layers == ("base_model.model.q_proj",)
    assert set(done.left) == {"base_model.model.embed", "base_model.model.frozen_hook"}
    assert "hooks of its own" in done.left["base_model.model.frozen_hook"]
    assert "no plain linear LoRA layer" in done.left["base_model.model.embed"]
    assert "1 layers stay on PEFT's own forward pass" in caplog.text
    torch.testing.assert_close(wrapped(ids), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="PEFT"):
        accelerate_peft(nn.Linear(2, 2))


@torch.no_grad()
@pytest.mark.parametrize("float32_adapters", [True, False])
def test_bfloat16_is_as_near_to_the_truth_as_pefts(float32_adapters):
    """Logits of a bfloat16 model move by up to 1 of 33 under `accelerate_peft`: both sides round, neither is off.

    One layer against float64 (one rounding of the result alone would be 1.66e-3): PEFT 3.5e-3 with bfloat16 adapters
    and 2.3e-3 with float32 ones, whose whole low-rank path it computes in float32; here 2.9e-3 in either case.
    """
    torch.manual_seed(0)
    wrapped = get_peft_model(
        nn.Sequential(nn.Linear(576, 768)).to(torch.bfloat16),
        LoraConfig(r=16, lora_alpha=32, use_dora=True, target_modules=["0"]),
        autocast_adapter_dtype=float32_adapters,
    ).eval()
    layer = wrapped.base_model.model[0]
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    m = layer.lora_magnitude_vector.default.weight
    a.copy_(a.bfloat16())
    b.copy_((torch.randn(b.shape) * 0.02).bfloat16())
    m.copy_((m * (1 + 0.05 * torch.randn(m.shape))).bfloat16())
    x = torch.randn(256, 576).bfloat16()
    direction = layer.base_layer.weight.double() + 2 * b.double() @ a.double()
    gain = m.double() / direction.norm(dim=1)
    expected = gain * (x.double() @ direction.t()) + layer.base_layer.bias.double()
    theirs = wrapped(x).double() - expected
    accelerate_peft(wrapped)
    ours = wrapped(x).double() - expected
    assert float(ours.norm()) < (1.5 if float32_adapters else 1.0) * float(theirs.norm())
    assert float(ours.norm()) < 3.5e-3 * float(expected.norm())
    assert abs(float((ours * expected).sum())) < 2e-4 * float(expected.square().sum())  # no gain or loss of scale
