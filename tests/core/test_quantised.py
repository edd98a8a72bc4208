"""Layers that are quantised or only ever called: norms, outputs and gradients are the dequantised layer's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.core import DoRAConfig, apply_dora, merge_dora
from dora_vl.core.gain import kept_norms
from dora_vl.core.layer import Snapshot
from dora_vl.core.quantised import QuantisedKind, QuantisedLinear
from dora_vl.errors import UserError
from tests.core.dense_dora import move_layer, unchanged
from tests.core.test_layers import PATH, Sealed

HOW = "optional quantisation: pip install bitsandbytes torchao"


def adapted(layer: nn.Module, **changes: Any) -> Any:
    model = nn.ModuleDict({"q": layer})
    settings = {"targets": ("q",), "rank": 3, "alpha": 6.0, "dropout": 0.0, "opaque_layers": (PATH,), **changes}
    apply_dora(model, DoRAConfig(**settings))
    assert isinstance(model["q"], QuantisedLinear)
    return model


def sealed() -> Sealed:
    torch.manual_seed(0)
    return Sealed(300, 7)


def torchao_int8() -> tuple[nn.Module, Tensor]:
    torchao = pytest.importorskip("torchao.quantization", reason=HOW)
    holder = nn.Sequential(nn.Linear(128, 64))
    torchao.quantize_(holder, torchao.Int8WeightOnlyConfig())
    return holder[0], holder[0].weight.dequantize()


def nf4() -> tuple[nn.Module, Tensor]:
    bnb = pytest.importorskip("bitsandbytes", reason=HOW)
    base = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    return base, bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()


def in_blocks() -> tuple[nn.Module, Tensor]:
    """Wider than what is read of an unknown weight at a time."""
    layer = Sealed(300, 7)
    return layer, layer.secret


QUANTISERS = {"unknown": in_blocks, "torchao": torchao_int8, "nf4": nf4}


@pytest.mark.parametrize("quantiser", QUANTISERS.values(), ids=QUANTISERS)
def test_it_trains_as_the_dense_layer(quantiser):
    torch.manual_seed(0)
    base, weight = quantiser()
    inputs = [torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    before = base(inputs[0])
    layer = adapted(base)["q"]
    assert torch.equal(layer(inputs[0]), before)
    torch.testing.assert_close(layer.frozen_matrix(), weight, rtol=1e-5, atol=1e-5)
    move_layer(layer)
    leaves = {n: getattr(layer, n).detach().clone().requires_grad_() for n in ("lora_A", "lora_B", "magnitude")}
    direction = weight + layer.adapter.scale * leaves["lora_B"] @ leaves["lora_A"]
    norms = direction.norm(dim=1).detach()
    torch.testing.assert_close(kept_norms(layer), norms, rtol=1e-5, atol=0)
    y = layer(inputs[0].requires_grad_())
    expected = inputs[1].requires_grad_() @ ((leaves["magnitude"] / norms).unsqueeze(1) * direction).t() + layer.bias
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-3)
    for name, leaf in leaves.items():
        torch.testing.assert_close(getattr(layer, name).grad, leaf.grad, rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_biases_of_quantised_layers_train_in_float32(kind, tmp_path):
    """Of an adapted layer and of one beside it; bitsandbytes would round them to bfloat16 in every pass."""
    bnb = pytest.importorskip("bitsandbytes", reason=HOW)

    def made() -> nn.Sequential:
        torch.manual_seed(0)
        if kind == "nf4":
            several = [bnb.nn.Linear4bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4") for _ in range(2)]
        else:
            several = [bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False) for _ in range(2)]
        return nn.Sequential(*several).to(torch.bfloat16).to("cpu")

    model, x = made(), torch.randn(5, 64, dtype=torch.bfloat16)
    before = model(x)
    apply_dora(model, DoRAConfig(targets=("0",), rank=4, dropout=0.0, also_train={"biases": ("*bias",)}))
    biases = {name: tensor for name, tensor in model.named_parameters() if name.endswith("bias")}
    assert [tensor.dtype for tensor in biases.values()] == [torch.float32] * 2
    torch.testing.assert_close(model(x), before, rtol=2e-2, atol=2e-2)
    optimizer = torch.optim.SGD(biases.values(), lr=1e-4)
    model(x).float().square().sum().backward()
    expected = {name: tensor.detach() - 1e-4 * tensor.grad for name, tensor in biases.items()}
    optimizer.step()
    after = model(x)
    for name, tensor in biases.items():
        assert tensor.grad.norm() > 0
        torch.testing.assert_close(tensor, expected[name])
        assert not torch.equal(tensor, tensor.bfloat16().float())
    save_adapter(model, tmp_path / "a")
    again = made()
    load_adapter(again, tmp_path / "a")
    assert torch.equal(again(x), after)


def test_a_mix_is_refused_before_anything_is_merged():
    plain = nn.Linear(300, 7)
    model: Any = nn.ModuleDict({"plain": plain, "sealed": sealed()})
    apply_dora(model, DoRAConfig(targets=("*",), rank=2, dropout=0.0, opaque_layers=(PATH,)))
    with unchanged(model), pytest.raises(UserError):
        merge_dora(model)
    assert not model["plain"].merged


def test_pissa_is_refused_before_anything_changes(tmp_path):
    """By `apply_dora`, and by a folder that was trained over a plain layer."""
    model = nn.ModuleDict({"q": sealed(), "plain": nn.Linear(6, 6)})
    settings = {"targets": ("*",), "rank": 2, "init": "pissa", "opaque_layers": (PATH,)}
    with unchanged(model), pytest.raises(UserError):
        apply_dora(model, DoRAConfig(**settings))
    source = nn.ModuleDict({"q": nn.Linear(300, 7)})
    apply_dora(source, DoRAConfig(**settings))
    save_adapter(source, tmp_path / "a")
    with unchanged(model), pytest.raises(UserError):
        load_adapter(model, tmp_path / "a")


class Scaled(nn.Module):
    """Keeps its scales in a dictionary, beside parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_features, self.out_features, self.compute_dtype = 30, 7, torch.float32
        self.bias = None
        self.W_q = nn.Parameter((torch.randn(7, 30) * 4).round(), requires_grad=False)
        self.meta = {"scale": torch.rand(7, 1) + 0.5, "nbits": 4, "meta_zero": {"scale": torch.rand(7, 1)}}

    def dequantize(self) -> Tensor:
        return (self.W_q - self.meta["meta_zero"]["scale"]) * self.meta["scale"]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantize())


EDITS: dict[str, Callable[[Scaled], object]] = {
    "weight": lambda base: base.W_q.mul_(2),
    "scale": lambda base: base.meta["scale"].mul_(1.7),
    "inner scale": lambda base: base.meta["meta_zero"]["scale"].add_(0.9),
    "another scale": lambda base: base.meta.update(scale=base.meta["scale"] * 0.6),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@torch.no_grad()
def test_an_edit_of_the_layer_inside_or_of_its_scales_is_noticed(edit):
    base, x = Scaled(), torch.randn(4, 30)
    config = DoRAConfig(targets=("q",), rank=3, alpha=6.0, dropout=0.0)
    scales = lambda layer: iter((layer.meta["scale"], layer.meta["meta_zero"]["scale"]))  # noqa: E731
    kind = QuantisedKind(lambda layer: torch.float32, Scaled.dequantize, loose_tensors=scales)
    layer = QuantisedLinear(base, config, kind)
    move_layer(layer)
    for _ in range(2):
        direction = base.dequantize() + layer.adapter.scale * layer.lora_B @ layer.lora_A
        norm = direction.norm(dim=1)
        torch.testing.assert_close(kept_norms(layer), norm, rtol=1e-5, atol=0)
        expected = x @ ((layer.magnitude / norm).unsqueeze(1) * direction).t()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert Snapshot(layer.frozen_tensors()).holds(layer.frozen_tensors())
        edit(base)
