"""Linear layers that are only ever called: the norm through their own forward equals the dequantised one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_vl.core import DoRAConfig, apply_dora, merge_dora
from dora_vl.core.inject import loftq
from dora_vl.core.opaque import OpaqueLinear
from dora_vl.errors import UserError


class Sealed(nn.Module):
    """A linear layer of a class that the core has never heard of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_features, self.out_features = 300, 7
        self.secret = nn.Parameter((torch.randn(7, 300) * 4).round() / 4, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(7), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.secret, self.bias)


PATH = f"{Sealed.__module__}.{Sealed.__qualname__}"


def adapted(layer: nn.Module, **changes) -> nn.ModuleDict:
    model = nn.ModuleDict({"q": layer})
    settings = {"targets": ("q",), "rank": 3, "alpha": 6.0, "dropout": 0.0, "opaque_layers": (PATH,), **changes}
    apply_dora(model, DoRAConfig(**settings))
    return model


def assert_equals_dense(layer: OpaqueLinear, weight: torch.Tensor, x: torch.Tensor, tolerance: float) -> None:
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
        layer.magnitude.mul_(1.2)
    direction = weight + layer.scale() * layer.lora_B @ layer.lora_A
    norm = direction.norm(dim=1)
    torch.testing.assert_close(layer.norms(), norm.detach(), rtol=tolerance, atol=0)
    expected = x @ ((layer.magnitude / norm.detach()).unsqueeze(1) * direction).t() + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_unknown_class_named_by_the_user():
    sealed, x = Sealed(), torch.randn(4, 300)
    before = sealed(x)
    layer = adapted(sealed)["q"]
    assert isinstance(layer, OpaqueLinear)
    assert torch.equal(layer(x), before)
    assert_equals_dense(layer, sealed.secret, x, 1e-5)
    torch.testing.assert_close(layer.dense_weight(), sealed.secret, rtol=1e-5, atol=1e-5)


def test_unknown_class_is_left_alone_otherwise():
    with pytest.raises(UserError, match="matches none"):
        adapted(Sealed(), opaque_layers=())


def test_merging_is_refused():
    with pytest.raises(UserError, match="cannot hold merged weights"):
        merge_dora(adapted(Sealed()))


def test_loftq_brings_the_layer_nearer_to_the_original():
    original = torch.randn(7, 300)
    sealed = Sealed()
    with torch.no_grad():
        sealed.secret.copy_((original * 2).round() / 2)
    model, x = adapted(sealed), torch.randn(4, 300)
    target = x @ original.t() + sealed.bias
    before = (model["q"](x) - target).norm()
    loftq(model, lambda name: original)
    assert float((model["q"](x) - target).norm()) < 0.8 * float(before)


def test_bitsandbytes_4bit():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    x = torch.randn(3, 128)
    before = base(x)
    weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
    layer = adapted(base)["q"]
    assert torch.equal(layer(x), before)
    assert_equals_dense(layer, weight, x, 1e-5)


def test_torchao_int8():
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(128, 64))
    torchao.quantize_(holder, torchao.Int8WeightOnlyConfig())
    weight, x = holder[0].weight.dequantize(), torch.randn(3, 128)
    layer = adapted(holder[0])["q"]
    assert isinstance(layer, OpaqueLinear)
    assert_equals_dense(layer, weight, x, 1e-5)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_4bit_trains(quant_type):
    """QDoRA: every gradient is that of the dequantised layer's dense DoRA, the input's too."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type=quant_type).to("cpu")
    weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
    assert_trains_as_dense(adapted(base)["q"], weight)


def test_bitsandbytes_8bit():
    """LLM.int8 rounds its input as well, so outputs are near; the norm, through one-hot rows, is exact."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(128, 64)
    base = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
    base.load_state_dict(plain.state_dict())
    base = base.to("cpu")
    x = torch.randn(3, 128, dtype=torch.float16)
    before = base(x)
    layer = adapted(base)["q"]
    assert torch.equal(layer(x), before)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
        layer.magnitude.mul_(1.2)
    weight = layer.dense_weight()
    torch.testing.assert_close(weight, plain.weight, rtol=0, atol=2e-3)
    direction = weight + layer.scale() * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.norms(), direction.norm(dim=1).detach(), rtol=1e-3, atol=0)
    expected = x.float() @ ((layer.magnitude / direction.norm(dim=1)).unsqueeze(1) * direction).t() + plain.bias
    torch.testing.assert_close(layer(x).float(), expected, rtol=5e-2, atol=5e-2)
    layer(x).float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (layer.lora_A, layer.lora_B, layer.magnitude))


def test_hqq():
    hqq = pytest.importorskip("hqq.core.quantize")
    torch.manual_seed(0)
    settings = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    base = hqq.HQQLinear(nn.Linear(128, 64), settings, compute_dtype=torch.float32, device="cpu")
    x = torch.randn(3, 128)
    before = base(x)
    layer = adapted(base)["q"]
    assert isinstance(layer, OpaqueLinear)
    assert torch.equal(layer(x), before)
    assert_equals_dense(layer, base.dequantize().float(), x, 1e-5)


def assert_trains_as_dense(layer: OpaqueLinear, weight: torch.Tensor) -> None:
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
        layer.magnitude.mul_(1.2)
    inputs = [torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    leaves = {n: getattr(layer, n).detach().clone().requires_grad_() for n in ("lora_A", "lora_B", "magnitude")}
    direction = weight + layer.scale() * leaves["lora_B"] @ leaves["lora_A"]
    gain = leaves["magnitude"] / direction.norm(dim=1).detach()
    expected = inputs[1] @ (gain.unsqueeze(1) * direction).t() + layer.bias
    layer(inputs[0]).square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-3)
    for name, leaf in leaves.items():
        torch.testing.assert_close(getattr(layer, name).grad, leaf.grad, rtol=1e-4, atol=1e-3, msg=name)
