"""Quantises a base when it is loaded (QDoRA): which layers, how, and the values they then have.

Loading and merging share this, so that what is merged is what was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dora_vl.adapters.base_weights import BaseWeights, skeleton
from dora_vl.core.config import Quantisation
from dora_vl.core.quantised import class_path, dequantised, quantised_in, settle_quantised
from dora_vl.errors import MissingExtra, UserError, one_line, short_repr
from dora_vl.shapes import Float

TRIAL_WIDTH = 64
MOST_OFF = 0.05
"""A quantised layer may be off its dequantised weight by this relative error. LLM.int8 rounds its input to 127 steps,
which costs about 0.01; a lost gradient, or one of another block's scales, is off by far more."""
NEXT = "set model.quantisation to another kind, or null"


@dataclass(frozen=True)
class Scheme:
    """A way to quantise a linear layer."""

    package: str
    layer: Callable[[nn.Linear, torch.dtype, torch.device], nn.Module]
    """Quantises a linear layer's weight as loading in a dtype on a device does."""
    width: int = 1
    """A layer's inputs must be a multiple of this; other layers stay whole."""


def _nf4(linear: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    layers: Any = import_module("bitsandbytes.nn")  # pyright takes its parameters for modules
    width, height = linear.in_features, linear.out_features
    layer: Any = layers.Linear4bit(width, height, linear.bias is not None, dtype, quant_type="nf4", device="meta")
    layer.weight = layers.Params4bit(linear.weight.data.to(dtype), requires_grad=False, quant_type="nf4", module=layer)
    layer.bias = linear.bias
    return layer.to(device)


def _int8(linear: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    layers: Any = import_module("bitsandbytes.nn")  # pyright takes its parameters for modules
    width, height = linear.in_features, linear.out_features
    layer: Any = layers.Linear8bitLt(
        width, height, linear.bias is not None, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    layer.weight = layers.Int8Params(linear.weight.data.to(dtype), requires_grad=False, has_fp16_weights=False).to(
        device
    )
    layer.bias = linear.bias
    return layer


SCHEMES: Mapping[str, Scheme] = {
    # On a CPU bitsandbytes 0.50 gives weights back with other blocks' scales where a row ends inside a block of 64.
    "nf4": Scheme("bitsandbytes", _nf4, width=64),
    "int8": Scheme("bitsandbytes", _int8),
}


def here() -> torch.device:
    """Returns where quantised layers are made: this process's GPU, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def check_runs_here(kind: Quantisation, dtype: torch.dtype) -> None:
    """Tries one small layer, forward and backward."""
    scheme = SCHEMES[kind]
    if find_spec(scheme.package) is None:
        raise MissingExtra(f"model.quantisation: {kind} needs {scheme.package}", "quantised")
    try:
        layer = scheme.layer(nn.Linear(TRIAL_WIDTH, TRIAL_WIDTH, bias=False), dtype, here())
        settle_quantised(layer)
        off = share_off(layer, dtype)
    except (RuntimeError, NotImplementedError, ValueError, AttributeError, ImportError) as error:
        raise UserError(
            f"model.quantisation: {kind} does not run on this {here().type} in {str(dtype).removeprefix('torch.')} "
            f"({one_line(str(error), 200)}); take another kind, or null"
        ) from error
    if not off <= MOST_OFF:
        raise UserError(f"model.quantisation: {kind} multiplies wrongly on this {here().type} ({off:.1%} off); {NEXT}")


def check_gradients(model: nn.Module) -> None:
    """Checks that one quantised layer of each class and shape trains as its dequantised weight would."""
    checked: set[tuple[str, int, int]] = set()
    for name, layer, kind in quantised_in(model):
        alike = class_path(layer), layer.in_features, layer.out_features
        if alike in checked:
            continue
        checked.add(alike)
        off = share_off(layer, kind.dtype(layer) if layer.bias is None else layer.bias.dtype)
        if not off <= MOST_OFF:
            raise UserError(
                f"{name.removesuffix('.base')}: output or gradient of a {type(layer).__name__} is {off:.1%} off "
                f"that of its dequantised weight; {NEXT}"
            )


def share_off(layer: Any, dtype: torch.dtype) -> float:
    """Compares a quantised layer's product and input gradient with its dequantised weight's; returns a ratio of norms.

    It runs in training mode, after a pass in eval mode: packages prepare weights for inference there.
    """
    weight, was_training = dequantised(layer).float(), layer.training
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(4, width, generator=draw).to(weight.device, dtype) for width in weight.shape[::-1])
    with torch.no_grad():
        layer.eval()(x)
    y = layer.train()(x.requires_grad_())
    layer.train(was_training)
    dx = torch.autograd.grad(y, x, dy)[0] if y.requires_grad else torch.zeros_like(x)
    bias = None if layer.bias is None else layer.bias.detach().float()
    pairs = ((y.detach(), F.linear(x.detach().float(), weight, bias)), (dx, dy.float() @ weight))
    return max(float((quantised.float() - right).norm() / right.norm().clamp_min(1e-30)) for quantised, right in pairs)


@dataclass(frozen=True)
class QuantisedLayers:
    """Full names of a language model's linear layers: the quantised ones, and those too narrow for it."""

    quantised: tuple[str, ...]
    too_narrow: tuple[str, ...]


def quantised_layers(config: Mapping[str, Any], kind: str, source: str) -> QuantisedLayers:
    """Selects the layers to quantise: the language model's linears, not those of vision, projector or output head."""
    if config.get("quantization_config"):
        raise UserError(f"{source} is stored quantised; leave model.quantisation null, or take the weights before it")
    model = _language_skeleton(config, source)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    fits = {
        name: module.in_features % SCHEMES[kind].width == 0
        for name, module in decoder.named_modules(prefix=prefix)
        if type(module) is nn.Linear and module is not head
    }
    if not any(fits.values()):
        raise UserError(
            f"{source}: none of its language model's {len(fits)} linear layers can be quantised by {kind} (widths that "
            f"are multiples of {SCHEMES[kind].width}); set model.quantisation to another kind, or null"
        )
    names = {fit: tuple(name for name, layer_fits in fits.items() if layer_fits == fit) for fit in (True, False)}
    return QuantisedLayers(quantised=names[True], too_narrow=names[False])


def _language_skeleton(config: Mapping[str, Any], source: str) -> Any:
    model = skeleton(config)
    if model is None:
        raise UserError(
            f"{source}: transformers has no class {short_repr(config.get('architectures'))} that it could quantise"
        )
    return model


def kept_whole(config: Mapping[str, Any], layers: tuple[str, ...], source: str) -> list[str]:
    """Names the outermost modules that hold linear layers and no quantised one, as transformers asks for them."""
    from transformers.pytorch_utils import Conv1D

    parts = [name.split(".") for name in layers]
    above = {".".join(part[:count]) for part in parts for count in range(len(part) + 1)}
    return [
        name
        for name, module in _language_skeleton(config, source).named_modules()
        if name not in above
        and name.rpartition(".")[0] in above
        and any(isinstance(layer, nn.Linear | Conv1D) for layer in module.modules())
    ]


def quantised_values(weight: Float[Tensor, "out in_"], kind: str, dtype: torch.dtype) -> Float[Tensor, "out in_"]:
    """Returns a weight's float32 values on the CPU after it is loaded in `dtype` and quantised."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        return dequantised(SCHEMES[kind].layer(linear, dtype, here())).float().cpu()


class QuantisedWeights(BaseWeights):
    """Reads a base's folder with the values that its layers have under `model.quantisation`."""

    def __init__(self, folder: Path, kind: Quantisation, dtype: torch.dtype) -> None:
        check_runs_here(kind, dtype)
        super().__init__(folder)
        self._kind, self._dtype = kind, dtype
        self._quantised = {f"{name}.weight" for name in quantised_layers(self.config, kind, str(folder)).quantised}

    def read(self, name: str) -> Tensor:
        """Reads one tensor, quantised and back where its layer is; see `BaseWeights.read`."""
        tensor = super().read(name)
        return quantised_values(tensor, self._kind, self._dtype) if name in self._quantised else tensor


def as_trained(folder: Path, recipes: Mapping[str, Mapping[str, Any]]) -> BaseWeights:
    """Opens a base with the values that adapters were trained on: quantised and back if their recipes say so."""
    values = {name: (recipe.get("quantisation"), recipe.get("dtype")) for name, recipe in recipes.items()}
    kinds = {(kind, dtype if kind else None) for kind, dtype in values.values()}
    if len(kinds) > 1:
        raise UserError(
            f"these adapters were trained on different values of the base: {short_repr(values, 200)}; merge one at "
            "a time, or all into the stored values with --base-values stored"
        )
    kind, dtype = kinds.pop()
    if kind is None:
        return BaseWeights(folder)
    if kind not in SCHEMES or dtype is None:
        raise UserError(
            f"recipe.json says quantisation {short_repr(kind)} in {short_repr(dtype)}; known are {', '.join(SCHEMES)}"
        )
    return QuantisedWeights(folder, kind, getattr(torch, dtype))
