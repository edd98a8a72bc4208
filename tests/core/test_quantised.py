"""Linear layers that are only ever called: the norm through their own forward equals the dequantised one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.core import DoRAConfig, apply_dora, merge_dora
from dora_vl.core.gain import Snapshot
from dora_vl.core.inject import loftq
from dora_vl.core.quantised import QUANTISED_KINDS, QuantisedLinear
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


def assert_equals_dense(layer: QuantisedLinear, weight: torch.Tensor, x: torch.Tensor, tolerance: float) -> None:
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
    assert isinstance(layer, QuantisedLinear)
    assert torch.equal(layer(x), before)
    assert_equals_dense(layer, sealed.secret, x, 1e-5)
    torch.testing.assert_close(layer.dense_weight(), sealed.secret, rtol=1e-5, atol=1e-5)


def test_a_mix_is_refused_before_anything_is_merged():
    plain = nn.Linear(300, 7)
    model = nn.ModuleDict({"plain": plain, "sealed": Sealed()})
    apply_dora(model, DoRAConfig(targets=("*",), rank=2, dropout=0.0, opaque_layers=(PATH,)))
    before = plain.weight.detach().clone()
    with pytest.raises(UserError, match=r"^sealed: "):
        merge_dora(model)
    assert torch.equal(plain.weight, before)
    assert not model["plain"].merged


def test_pissa_is_refused_before_anything_changes():
    model = nn.ModuleDict({"q": Sealed(), "plain": nn.Linear(6, 6)})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"targets": ("*",), "rank": 2, "init": "pissa", "opaque_layers": (PATH,)}
    with pytest.raises(UserError, match=r"pissa.*q.*Sealed"):
        apply_dora(model, DoRAConfig(**settings))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_pissa_folder_is_refused_over_an_opaque_layer(tmp_path):
    source = nn.ModuleDict({"q": nn.Linear(300, 7)})
    apply_dora(source, DoRAConfig(targets=("q",), rank=2, init="pissa", opaque_layers=(PATH,)))
    save_adapter(source, tmp_path / "a")
    model = nn.ModuleDict({"q": Sealed()})
    with pytest.raises(UserError, match=r"pissa.*q"):
        load_adapter(model, tmp_path / "a")
    assert type(model["q"]) is Sealed


def test_an_edit_of_the_layer_inside_is_seen():
    sealed = Sealed()
    layer = adapted(sealed)["q"].eval()
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
        layer.norms()
        sealed.secret.mul_(2)
    expected = (sealed.secret + layer.scale() * layer.lora_B @ layer.lora_A).norm(dim=1)
    torch.testing.assert_close(layer.norms(), expected.detach(), rtol=1e-5, atol=0)


def test_a_bias_that_trains_costs_no_pass_over_the_weight(monkeypatch):
    model = adapted(Sealed(), also_train={"bias": ("q*bias",)})
    passes, columns = [], QuantisedLinear._columns
    monkeypatch.setattr(QuantisedLinear, "_columns", lambda layer: passes.append(1) or columns(layer))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model["q"](torch.randn(2, 300)).square().mean().backward()
        optimizer.step()
    assert model["q"].base.bias.grad is not None
    assert not passes


def test_loftq_brings_the_layer_nearer_to_the_original():
    original = torch.randn(7, 300, generator=torch.Generator().manual_seed(1))
    sealed = Sealed()
    with torch.no_grad():
        sealed.secret.copy_((original * 2).round() / 2)
    model, x = adapted(sealed), torch.randn(400, 300)
    target = x @ original.t() + sealed.bias
    before = (model["q"](x) - target).norm()
    loftq(model, lambda name: original)
    assert float((model["q"](x) - target).norm()) < 0.8 * float(before)


def test_torchao_int8():
    torchao = pytest.importorskip("torchao.quantization", reason="optional quantisation: pip install torchao")
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(128, 64))
    torchao.quantize_(holder, torchao.Int8WeightOnlyConfig())
    weight, x = holder[0].weight.dequantize(), torch.randn(3, 128)
    layer = adapted(holder[0])["q"]
    assert isinstance(layer, QuantisedLinear)
    assert_equals_dense(layer, weight, x, 1e-5)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_4bit_trains(quant_type):
    """QDoRA: every gradient is that of the dequantised layer's dense DoRA, the input's too."""
    bnb = pytest.importorskip("bitsandbytes", reason="optional quantisation: pip install bitsandbytes")
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type=quant_type).to("cpu")
    weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
    assert_trains_as_dense(adapted(base)["q"], weight)


def test_bitsandbytes_8bit():
    """LLM.int8 rounds its input as well, so outputs are near; the norm, through one-hot rows, is exact."""
    bnb = pytest.importorskip("bitsandbytes", reason="optional quantisation: pip install bitsandbytes")
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
    hqq = pytest.importorskip("hqq.core.quantize", reason="optional quantisation: pip install hqq")
    torch.manual_seed(0)
    settings = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    base = hqq.HQQLinear(nn.Linear(128, 64), settings, compute_dtype=torch.float32, device="cpu")
    x = torch.randn(3, 128)
    before = base(x)
    layer = adapted(base)["q"]
    assert isinstance(layer, QuantisedLinear)
    assert torch.equal(layer(x), before)
    assert_equals_dense(layer, base.dequantize().float(), x, 1e-5)


def test_a_folder_over_an_hqq_layer_whose_bias_has_a_graph(tmp_path):
    hqq = pytest.importorskip("hqq.core.quantize", reason="optional quantisation: pip install hqq")
    torch.manual_seed(0)
    linear, settings = nn.Linear(128, 64), hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    made = {"compute_dtype": torch.float32, "device": "cpu", "del_orig": False}
    layers = [hqq.HQQLinear(linear, settings, **made) for _ in range(2)]
    assert layers[0].bias.grad_fn is not None
    model, x = adapted(layers[0]), torch.randn(3, 128)
    with torch.no_grad():
        model["q"].lora_B.normal_(std=0.3)
    save_adapter(model, tmp_path / "a")
    other = nn.ModuleDict({"q": layers[1]})
    load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(other["q"](x), model["q"](x))


class Scaled(nn.Module):
    """Keeps its scales as HQQ does: in a dictionary, one of them quantised itself, beside parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_features, self.out_features, self.compute_dtype = 30, 7, torch.float32
        self.bias = None
        self.W_q = nn.Parameter((torch.randn(7, 30) * 4).round(), requires_grad=False)
        self.meta = {"scale": torch.rand(7, 1) + 0.5, "nbits": 4, "meta_zero": {"scale": torch.rand(7, 1)}}

    def dequantize(self) -> torch.Tensor:
        return (self.W_q - self.meta["meta_zero"]["scale"]) * self.meta["scale"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantize())


def edit_scale(base: Scaled) -> None:
    base.meta["scale"].mul_(1.7)


def edit_inner_scale(base: Scaled) -> None:
    base.meta["meta_zero"]["scale"].add_(0.9)


def replace_scale(base: Scaled) -> None:
    base.meta["scale"] = base.meta["scale"] * 0.6


@pytest.mark.parametrize("edit", [edit_scale, edit_inner_scale, replace_scale])
def test_an_edit_of_the_quantisers_scales_is_noticed(edit: Callable[[Scaled], None]) -> None:
    base, x = Scaled(), torch.randn(4, 30)
    config = DoRAConfig(targets=("q",), rank=3, alpha=6.0, dropout=0.0)
    layer = QuantisedLinear(base, config, QUANTISED_KINDS["hqq.core.quantize.HQQLinear"])
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
        layer.magnitude.mul_(1.2)
    for _ in range(2):
        direction = (base.dequantize() + layer.scale() * layer.lora_B @ layer.lora_A).detach()
        norm = direction.norm(dim=1)
        expected = x @ ((layer.magnitude / norm).unsqueeze(1) * direction).t()
        torch.testing.assert_close(layer.norms(), norm, rtol=1e-5, atol=0)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert Snapshot(layer.frozen_tensors()).holds(layer.frozen_tensors())
        edit(base)


def assert_trains_as_dense(layer: QuantisedLinear, weight: torch.Tensor) -> None:
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
