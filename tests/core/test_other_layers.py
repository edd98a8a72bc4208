"""Embeddings, convolutions and transposed linear layers: parity with PEFT, the dense equation, exact injection."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.core import DoRAConfig, apply_dora, merge_dora, strip_adapters, unmerge_dora
from dora_vl.core.conv import DoRAConv1d, DoRAConv2d
from dora_vl.core.embedding import DoRAEmbedding
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.linear import TransposedLinear
from dora_vl.errors import UserError


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"layer": layer})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["layer"](x)


def conv1d_weight(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.bias.normal_()
    return layer


MAKERS = {
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=1), (2, 3, 7, 6), DoRAConv2d),
    "conv2d_no_bias": (lambda: nn.Conv2d(3, 5, 3, bias=False), (2, 3, 7, 6), DoRAConv2d),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, stride=2), (2, 3, 9), DoRAConv1d),
    "transposed": (lambda: conv1d_weight(Conv1D(5, 7)), (2, 4, 7), TransposedLinear),
    "embedding": (lambda: nn.Embedding(13, 5, padding_idx=0), None, DoRAEmbedding),
}
KINDS = ("linear", "conv", "embedding")


def base_of(name: str, dtype: torch.dtype = torch.float64) -> One:
    torch.manual_seed(4)
    return One(MAKERS[name][0]()).to(dtype)


def input_of(name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    shape = MAKERS[name][1]
    return torch.tensor([[1, 3, 3], [0, 7, 12]]) if shape is None else torch.randn(shape, dtype=dtype)


def config(**changes) -> DoRAConfig:
    return DoRAConfig(**{"targets": ("*",), "rank": 3, "alpha": 7.0, "dropout": 0.0, "kinds": KINDS, **changes})


def moved(name: str, dtype: torch.dtype = torch.float64, **changes) -> One:
    model = base_of(name, dtype)
    apply_dora(model, config(**changes))
    layer = model.inner["layer"]
    with torch.no_grad():
        if layer.lora_B is not None:
            layer.lora_A.normal_(std=0.5)
            layer.lora_B.normal_(std=0.3)
        if layer.magnitude is not None:
            layer.magnitude.mul_(torch.linspace(0.5, 1.7, len(layer.magnitude)))
    layer.forget_norms()
    return model


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("method", "dropout"), [("dora", 0.0), ("dora", 0.4), ("lora", 0.0)])
def test_parity_with_peft(name, method, dropout, tmp_path):
    model = moved(name, method=method, dropout=dropout, dropout_mode="whole_change")
    layer = model.inner["layer"]
    assert type(layer) is MAKERS[name][2]
    save_adapter(model, tmp_path / "ours")
    peft = PeftModel.from_pretrained(
        base_of(name), tmp_path / "ours", is_trainable=True, autocast_adapter_dtype=False
    ).train()
    x = input_of(name)
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    torch.manual_seed(11)  # one mask for both
    found = model.train()(inputs[0])
    torch.manual_seed(11)
    expected = peft(inputs[1])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    expected.backward(upstream)
    if x.is_floating_point():
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-10)
    theirs = {key.replace(".default", ""): value for key, value in peft.named_parameters() if value.requires_grad}
    prefix = "base_model.model.inner.layer."
    for leaf, key in type(layer).FILE_LEAVES.items():
        parameter = layer._parameters.get(leaf)
        if parameter is not None:
            other = theirs[prefix + key] if prefix + key in theirs else theirs[f"{prefix}{key}.weight"]
            torch.testing.assert_close(parameter.grad.flatten(), other.grad.flatten(), rtol=1e-10, atol=1e-10, msg=leaf)
    peft.save_pretrained(tmp_path / "theirs")
    again = base_of(name)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
@pytest.mark.parametrize("detach_norm", [True, False])
def test_merged_equals_unmerged_and_undoes_bitwise(name, method, detach_norm):
    model = moved(name, method=method, detach_norm=detach_norm).eval()
    layer, x = model.inner["layer"], input_of(name)
    expected, weight = model(x), layer.weight.clone()
    merge_dora(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    unmerge_dora(model)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(model(x), expected)
    merge_dora(model)
    strip_adapters(model)
    assert type(model.inner["layer"]) is type(base_of(name).inner["layer"])
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])
def test_injection_changes_no_bit(name, dtype, method):
    model, x = base_of(name, dtype), input_of(name, dtype)
    with torch.no_grad():
        model.inner["layer"].weight[1].zero_()
    expected = model(x)
    apply_dora(model, config(method=method))
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), expected)


@pytest.mark.parametrize("name", MAKERS)
def test_gradient_through_the_norm(name):
    model = moved(name, detach_norm=False).train()
    layer, x = model.inner["layer"], input_of(name)
    if name == "embedding":
        # Id 0 is padding: torch gives its row no gradient at all, we (and PEFT) still give one to the gain.
        x = x.clamp_min(1)
    y = model(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters() if p.requires_grad}
    delta = leaves["lora_B"].flatten(1) @ leaves["lora_A"].flatten(1)
    direction = layer.as_matrix(layer.weight) + 7 / 3 * delta
    matrix = (leaves["magnitude"] / direction.norm(dim=1)).unsqueeze(1) * direction
    twin = base_of(name)
    call = {"weight": layer.from_matrix(matrix)}
    torch.func.functional_call(twin.inner["layer"], call, (x,)).backward(upstream)
    for leaf, value in leaves.items():
        torch.testing.assert_close(layer._parameters[leaf].grad, value.grad, rtol=1e-9, atol=1e-9, msg=leaf)


@pytest.mark.parametrize("name", ["conv2d", "conv1d"])
@pytest.mark.parametrize("mode", ["low_rank", "whole_change"])
def test_dropout_of_convolutions_is_unbiased_and_off_in_eval(name, mode):
    model, x = moved(name, dropout=0.4, dropout_mode=mode), input_of(name)
    expected = model.eval()(x)
    model.train()
    with torch.no_grad():
        mean = torch.stack([model(x) for _ in range(500)])
    spread = mean.std(dim=0) / 500**0.5
    assert bool(((mean.mean(dim=0) - expected).abs() < 5 * spread + 1e-9).all())


def test_depthwise_convolutions_are_refused():
    with pytest.raises(UserError, match="groups=3"):
        apply_dora(One(nn.Conv2d(3, 6, 3, groups=3)), config())


def test_embeddings_and_convolutions_are_hit_only_on_request():
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "conv": nn.Conv1d(3, 4, 2), "q": nn.Linear(4, 4)})
    assert apply_dora(model, DoRAConfig(targets=("*",), rank=2)) == ["q"]


def test_bart_scaled_embedding_keeps_its_factor():
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    model = One(BartScaledWordEmbedding(13, 5, 0, embed_scale=3.0)).double()
    x = input_of("embedding")
    expected = model(x)
    apply_dora(model, config())
    assert torch.equal(model(x), expected)
    layer = model.inner["layer"]
    assert isinstance(layer, AdaptedLayer)
    with torch.no_grad():
        layer.lora_B.normal_()
    moved_output = model.eval()(x)
    merge_dora(model)
    torch.testing.assert_close(model(x), moved_output, rtol=1e-10, atol=1e-10)


def test_tied_embedding_is_not_merged():
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["table"].weight
    apply_dora(model, config(targets=("table",)))
    with pytest.raises(UserError, match=r"head\.weight"):
        merge_dora(model)


def test_get_peft_model_default_is_our_default():
    """PEFT's rank, alpha and target semantics on an embedding and a convolution together."""
    base = nn.ModuleDict({"conv": nn.Conv2d(3, 5, 3), "table": nn.Embedding(7, 4)})
    peft = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=["conv", "table"], use_dora=True))
    assert peft.base_model.model["conv"].lora_magnitude_vector.default.weight.shape == (1, 5, 1, 1)
