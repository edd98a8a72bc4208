"""What every kind of adapted layer owes: the dense equation, a start that changes no bit, merging, PEFT's results."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.core import DoRAConfig, DoRALinear, apply_dora, merge_dora, strip_adapters, unmerge_dora
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.linear import TransposedLinear
from dora_vl.core.other_layers import DoRAConv1d, DoRAConv2d, DoRAEmbedding
from dora_vl.core.quantised import QuantisedLinear
from dora_vl.errors import UserError
from tests.core.dense_dora import move_layer, unchanged


class Sealed(nn.Module):
    """A linear layer of a class that the core has never heard of."""

    def __init__(self, inside: int = 7, outside: int = 5) -> None:
        super().__init__()
        self.in_features, self.out_features = inside, outside
        self.secret = nn.Parameter(torch.randn(outside, inside), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(outside), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.secret.dtype), self.secret, self.bias)


PATH = f"{Sealed.__module__}.{Sealed.__qualname__}"


class Kind(NamedTuple):
    base: Callable[[], nn.Module]
    shape: tuple[int, ...] | None
    """Of an input; None: ids."""
    adapted: type[AdaptedLayer]


KINDS = {
    "linear": Kind(lambda: nn.Linear(7, 5), (2, 4, 7), DoRALinear),
    "linear without bias": Kind(lambda: nn.Linear(7, 5, bias=False), (3, 7), DoRALinear),
    "transposed": Kind(lambda: Conv1D(5, 7), (2, 4, 7), TransposedLinear),
    "conv2d": Kind(lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=1), (2, 3, 7, 6), DoRAConv2d),
    "conv2d without bias": Kind(lambda: nn.Conv2d(3, 5, 3, bias=False), (2, 3, 7, 6), DoRAConv2d),
    "conv1d": Kind(lambda: nn.Conv1d(3, 5, 3, stride=2), (2, 3, 9), DoRAConv1d),
    "embedding": Kind(lambda: nn.Embedding(13, 5, padding_idx=0), None, DoRAEmbedding),
    "scaled embedding": Kind(lambda: BartScaledWordEmbedding(13, 5, 0, embed_scale=3.0), None, DoRAEmbedding),
    "opaque": Kind(Sealed, (2, 4, 7), QuantisedLinear),
}
IN_PEFT = [name for name in KINDS if name not in ("scaled embedding", "opaque")]
MERGED = [name for name in KINDS if name != "opaque"]
methods = pytest.mark.parametrize("method", ["dora", "lora", "magnitude"])


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"layer": layer})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["layer"](x)


def base_of(kind: str, dtype: torch.dtype | None = None) -> One:
    torch.manual_seed(4)
    model = One(KINDS[kind].base()).to(dtype or dtype_of(kind))
    with torch.no_grad():
        if getattr(model.inner["layer"], "bias", None) is not None:
            model.inner["layer"].bias.normal_()
    return model


def dtype_of(kind: str) -> torch.dtype:
    """The norm of a layer that is only called is taken in float32."""
    return torch.float32 if kind == "opaque" else torch.float64


def input_of(kind: str, dtype: torch.dtype | None = None) -> Tensor:
    shape = KINDS[kind].shape
    ids = torch.tensor([[1, 3, 3], [2, 7, 12]])
    return ids if shape is None else torch.randn(shape, dtype=dtype or dtype_of(kind))


def config(**changes: Any) -> DoRAConfig:
    kinds, changes = ("linear", "conv", "embedding"), {"opaque_layers": (PATH,), **changes}
    return DoRAConfig(**{"targets": ("*layer",), "rank": 3, "alpha": 7.0, "dropout": 0.0, "kinds": kinds, **changes})


def moved(kind: str, **changes: Any) -> One:
    model = base_of(kind)
    apply_dora(model, config(**changes))
    layer = model.inner["layer"]
    assert type(layer) is KINDS[kind].adapted
    with torch.no_grad():
        if layer.lora_A is not None:
            layer.lora_A.normal_(std=0.5)
    move_layer(layer)
    return model


@pytest.mark.parametrize("kind", KINDS)
@methods
@pytest.mark.parametrize("detach_norm", [True, False])
def test_outputs_and_gradients_are_those_of_the_dense_form(kind, method, detach_norm):
    """Of the base with the weight m V / ||V||; biases train where the norm's gradient is taken."""
    model, twin = moved(kind, method=method, detach_norm=detach_norm).train(), base_of(kind).inner["layer"]
    tolerance = dict.fromkeys(("rtol", "atol"), 1e-9 if dtype_of(kind) == torch.float64 else 2e-4)
    layer, x = model.inner["layer"], input_of(kind)
    if layer.bias is not None:
        layer.bias.requires_grad_(not detach_norm)
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in trained.items()}
    direction = layer.frozen_matrix()
    if kind != "opaque":
        direction = layer.as_matrix(layer.weight.detach())
    if "lora_A" in leaves:
        direction = direction + 7 / 3 * leaves["lora_B"].flatten(1) @ leaves["lora_A"].flatten(1)
    if "magnitude" in leaves:
        norm = torch.linalg.vector_norm(direction, dim=1, keepdim=True)
        direction = leaves["magnitude"].unsqueeze(1) * direction / (norm.detach() if detach_norm else norm)
    weights = {"secret" if kind == "opaque" else "weight": layer.from_matrix(direction)}
    weights |= {name.rpartition(".")[2]: leaf for name, leaf in leaves.items() if name.endswith("bias")}
    y, expected = model(inputs[0]), functional_call(twin, weights, (inputs[1],))
    torch.testing.assert_close(y, expected, **tolerance)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **tolerance)
    for name, leaf in leaves.items():
        torch.testing.assert_close(trained[name].grad, leaf.grad, **tolerance, msg=name)
    for without_graph in (torch.no_grad(), torch.inference_mode()):
        with without_graph:
            torch.testing.assert_close(model.eval()(x), expected, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_injection_changes_no_bit(kind, method, dtype):
    model, x = base_of(kind, dtype), input_of(kind, dtype)
    with torch.no_grad():
        next(model.parameters())[1].zero_()
    expected = model(x)
    apply_dora(model, config(method=method))
    for training in (True, False):
        assert torch.equal(model.train(training)(x), expected)
        with torch.no_grad():
            assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", MERGED)
@methods
def test_merged_equals_unmerged_and_undoes_bitwise(kind, method):
    model, x = moved(kind, method=method).eval(), input_of(kind)
    layer = model.inner["layer"]
    expected, weight = model(x), layer.weight.clone()
    merge_dora(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    unmerge_dora(model)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(model(x), expected)
    merge_dora(model)
    with pytest.raises(RuntimeError):  # it would train nothing
        model.train()(x)
    strip_adapters(model)
    assert type(model.inner["layer"]) is type(base_of(kind).inner["layer"])
    assert model.state_dict().keys() == base_of(kind).state_dict().keys()
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", IN_PEFT)
@pytest.mark.parametrize(
    ("method", "changes"),
    [("dora", {}), ("dora", {"dropout": 0.4}), ("lora", {}), ("lora", {"rank_scaling": "sqrt"})],
    ids=["dora", "dropout", "lora", "rslora"],
)
def test_outputs_gradients_and_folders_are_pefts(kind, method, changes, tmp_path):
    model = moved(kind, method=method, dropout_mode="whole_change", **changes)
    layer, x = model.inner["layer"], input_of(kind)
    save_adapter(model, tmp_path / "ours")
    folder = tmp_path / "ours"
    peft = PeftModel.from_pretrained(base_of(kind), folder, is_trainable=True, autocast_adapter_dtype=False).train()
    inputs, outputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)], []
    for net, value in zip((model.train(), peft), inputs, strict=True):
        torch.manual_seed(11)  # one mask for both
        outputs.append(net(value))
        outputs[-1].backward(torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2)).double())
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-10)
    theirs = {key.replace(".default", ""): value for key, value in peft.named_parameters() if value.requires_grad}
    for leaf, key in type(layer).FILE_LEAVES.items():
        parameter, name = layer._parameters.get(leaf), f"base_model.model.inner.layer.{key}"
        if parameter is not None:
            other = theirs[name] if name in theirs else theirs[f"{name}.weight"]
            torch.testing.assert_close(parameter.grad.flatten(), other.grad.flatten(), rtol=1e-10, atol=1e-10, msg=leaf)
    peft.save_pretrained(tmp_path / "theirs")
    again = base_of(kind)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "opaque"])
@pytest.mark.parametrize("mode", ["low_rank", "whole_change"])
def test_dropout_is_unbiased_and_off_in_eval(kind, mode):
    model, x = moved(kind, dropout=0.4, dropout_mode=mode), input_of(kind)[:1]
    expected = model.eval()(x)
    model.train()
    with torch.no_grad():
        outputs = model(x.expand(3000, *x.shape[1:]))  # each row draws its own
    spread = outputs.std(dim=0) / 3000**0.5
    assert float(spread.max()) > 1e-4
    assert bool(((outputs.mean(dim=0) - expected[0]).abs() < 5 * spread + 1e-9).all())


def test_embeddings_and_convolutions_are_hit_only_on_request():
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "conv": nn.Conv1d(3, 4, 2), "q": nn.Linear(4, 4)})
    assert apply_dora(model, DoRAConfig(targets=("*",), rank=2)) == ["q"]


@pytest.mark.parametrize(
    "layer", [nn.Conv3d(3, 6, 2), nn.ConvTranspose2d(3, 6, 2), nn.ConvTranspose1d(3, 6, 2)], ids=str
)
def test_convolutions_of_other_kinds_are_named_with_their_class(layer):
    model = nn.ModuleDict({"layer": layer, "other": nn.Conv2d(3, 6, 3)})
    with unchanged(model), pytest.raises(UserError, match=f"layer is a {type(layer).__name__}"):
        apply_dora(model, config(targets=("layer",), kinds=("conv",)))


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 6, 3, groups=3), nn.Embedding(5, 4, max_norm=1.0)], ids=str)
def test_layers_without_an_adapted_form_are_refused(layer):
    model = One(layer)
    with pytest.raises(UserError):
        apply_dora(model, config())
    assert model.inner["layer"] is layer


def test_tied_embedding_is_not_merged():
    model = nn.ModuleDict({"layer": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["layer"].weight
    apply_dora(model, config())
    with pytest.raises(UserError):
        merge_dora(model)
    assert not model["layer"].merged
