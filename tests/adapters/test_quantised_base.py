"""Bases that are quantised for a run: which layers, the values that they have then, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dora_vl.adapters import base_weights
from dora_vl.adapters.base_weights import (
    SCHEMES,
    BaseWeights,
    QuantisedWeights,
    Scheme,
    as_trained,
    check_runs_here,
    kept_whole,
    quantised_layers,
    quantised_values,
)
from dora_vl.core import DoRAConfig, adapted_layers, apply_dora
from dora_vl.core.quantised import dequantised
from dora_vl.errors import MissingExtra, UserError
from dora_vl.training.parts import adapt
from tests.backbones.tiny_image_text import write_tiny
from tests.backbones.tiny_language import write_tiny_language
from tests.core.dense_dora import passed

KINDS = sorted(SCHEMES)
WIDE = {"hidden_size": 64, "intermediate_size": 128}
PARTS = {
    "qwen2_5_vl": ["lm_head", "model.visual"],
    "internvl": ["lm_head", "model.multi_modal_projector", "model.vision_tower"],
    "idefics3": ["lm_head", "model.connector", "model.vision_model"],
}


def needs(kind: str) -> None:
    pytest.importorskip(SCHEMES[kind].package)


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", sorted(PARTS))
def test_only_the_language_models_linears_are_quantised(tmp_path: Path, family: str) -> None:
    config = config_of(write_tiny(family, tmp_path))
    layers = quantised_layers(config, "int8", "base").quantised
    assert len(layers) == 2 * 7
    assert all("language_model.layers" in name or "text_model.layers" in name for name in layers)
    assert sorted(kept_whole(config, layers, "base")) == PARTS[family]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_what_the_layer_multiplies_by(kind: str, dtype: torch.dtype) -> None:
    """One-hot rows, which even LLM.int8 passes exactly, read the weight out of the layer's own forward."""
    needs(kind)
    torch.manual_seed(0)
    linear = nn.Linear(192, 64, bias=False)
    with torch.no_grad():
        linear.weight[3] *= 40
        layer = SCHEMES[kind].layer(linear, dtype, torch.device("cpu"))
        seen = layer(torch.eye(192, dtype=dtype)).t().float()
    values = quantised_values(linear.weight.detach(), kind, dtype)
    torch.testing.assert_close(seen, values, rtol=1e-2 if kind == "int8" else 1e-6, atol=1e-6)
    error = ((values - linear.weight.detach()).norm(dim=1) / linear.weight.detach().norm(dim=1)).tolist()
    assert all(1e-3 < value < 0.15 for value in error)


def test_a_folder_is_read_with_the_trained_values(tmp_path: Path) -> None:
    needs("nf4")
    write_tiny_language(tmp_path, **WIDE)
    name, head = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"
    with BaseWeights(tmp_path) as stored, QuantisedWeights(tmp_path, "nf4", torch.float32) as trained:
        assert torch.equal(trained.read(name), quantised_values(stored.read(name), "nf4", torch.float32))
        assert not torch.equal(trained.read(name), stored.read(name))
        assert torch.equal(trained.read(head), stored.read(head))


def test_adapters_that_saw_other_values_do_not_merge_together(tmp_path: Path) -> None:
    needs("nf4")
    write_tiny_language(tmp_path, **WIDE)
    four = {"quantisation": "nf4", "dtype": "float32"}
    assert type(as_trained(tmp_path, {"a": {"dtype": "float32"}, "b": {"quantisation": None}})) is BaseWeights
    assert type(as_trained(tmp_path, {"a": four, "b": four})) is QuantisedWeights
    for other in ({"dtype": "float32"}, {**four, "dtype": "bfloat16"}, {**four, "quantisation": "int8"}):
        with pytest.raises(UserError):
            as_trained(tmp_path, {"a": four, "b": other})
    with pytest.raises(UserError):
        as_trained(tmp_path, {"a": {**four, "quantisation": "fp3"}})


def test_a_missing_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("nf4")
    check_runs_here("nf4", torch.float32)
    monkeypatch.setattr(base_weights, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as refused:
        check_runs_here("nf4", torch.float32)
    assert refused.value.extra == "quantised"


def test_a_device_that_cannot_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> nn.Module:
        raise NotImplementedError("no kernel\nfor this device")

    monkeypatch.setattr(base_weights, "SCHEMES", {"int8": Scheme("torch", fails)})
    with pytest.raises(UserError) as error:
        check_runs_here("int8", torch.bfloat16)
    assert isinstance(error.value.__cause__, NotImplementedError)


def test_what_is_quantised_already_is_refused() -> None:
    for config in ({"quantization_config": {"bits": 4}}, {"architectures": ["NobodysModel"]}):
        with pytest.raises(UserError):
            quantised_layers(config, "nf4", "base")


def test_layers_too_narrow_for_nf4_stay_whole(tmp_path: Path) -> None:
    write_tiny_language(tmp_path, hidden_size=32, intermediate_size=64)
    layers = quantised_layers(config_of(tmp_path), "nf4", "base")
    assert layers.quantised == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    assert len(layers.too_narrow) == 12
    assert sorted(kept_whole(config_of(tmp_path), layers.quantised, "base"))[1:3] == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
    ]
    write_tiny_language(tmp_path / "narrow")
    with pytest.raises(UserError):
        quantised_layers(config_of(tmp_path / "narrow"), "nf4", "base")


CONFIG = DoRAConfig(targets=("0", "2"), rank=3, alpha=7.0, dropout=0.0)
"""Of three layers the first and the last, so that gradients pass one that is not adapted."""


def three_layers(kind: str) -> tuple[nn.Sequential, nn.Sequential]:
    """Quantised ones, and plain ones of the same values."""
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    model = nn.Sequential(*(SCHEMES[kind].layer(nn.Linear(128, 128), torch.float32, cpu) for _ in range(3)))
    plain = nn.Sequential(*(nn.Linear(128, 128) for _ in range(3)))
    with torch.no_grad():
        for ours, theirs in zip(model, plain, strict=True):
            theirs.weight.copy_(dequantised(ours))
            theirs.bias.copy_(ours.bias)
    return model, plain


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_after_an_evaluation_gradients_are_the_dequantised_layers(kind: str, training: bool) -> None:
    """Whichever mode the model is adapted in; bitsandbytes packs 4-bit weights at a pass in eval mode on some CPUs."""
    needs(kind)
    model, plain = three_layers(kind)
    biases, x = [layer.bias.detach().clone() for layer in model], torch.randn(5, 128)
    apply_dora(model.train(training), CONFIG)
    apply_dora(plain, CONFIG)
    with torch.no_grad():
        for (_, ours), (_, theirs) in zip(adapted_layers(model), adapted_layers(plain), strict=True):
            torch.testing.assert_close(ours.magnitude, theirs.magnitude, rtol=1e-6, atol=0)
            theirs.lora_B.normal_(std=0.2)
            theirs.magnitude.mul_(1.3)
            for leaf in ("lora_A", "lora_B", "magnitude"):
                getattr(ours, leaf).copy_(getattr(theirs, leaf))
        model.eval()(x)
    gradients, expected = passed(model.train(), x), passed(plain.train(), x)
    assert gradients.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((gradients[name] - tensor).norm() / tensor.norm()) < 1e-5, name
    inside = [getattr(layer, "base", layer) for layer in model]
    assert all(torch.equal(layer.bias, bias) for layer, bias in zip(inside, biases, strict=True))


def test_a_weight_that_is_packed_for_inference_already_is_refused() -> None:
    needs("nf4")
    model, _ = three_layers("nf4")
    model[1].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError):
        apply_dora(model, CONFIG)
    assert not any(adapted_layers(model))


@pytest.mark.parametrize("wrong", [lambda layer, x: layer(x.detach()), lambda layer, x: layer(x) + 0.2 * x])
def test_a_run_does_not_start_with_wrong_gradients(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    needs("nf4")
    model, _ = three_layers("nf4")
    adapt(model, CONFIG)
    model, _ = three_layers("nf4")
    forward = model[0].forward
    monkeypatch.setattr(model[0], "forward", lambda x: wrong(forward, x))
    with pytest.raises(UserError):
        adapt(model, CONFIG)
