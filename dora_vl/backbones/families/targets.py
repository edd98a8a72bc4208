"""The layers that `targets` names: those adapted by default, full-name patterns, and presets for parts of a model.

A preset (`language`, `vision`, `projector`, `experts`, `all-linear`) is replaced by patterns found in the model, in
every setting that takes such patterns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import MappingProxyType

from torch import nn
from transformers import PreTrainedModel

from dora_vl.backbones.base import decoder_of, head_of
from dora_vl.backbones.families.table import BYPASSED, PROJECTORS
from dora_vl.core import DoRAConfig
from dora_vl.core.inject import find_adaptable
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.other_layers import expert_projections
from dora_vl.core.quantised import is_quantised
from dora_vl.errors import UserError

log = logging.getLogger(__name__)

NamesIn = Callable[[PreTrainedModel, str], list[str]]


def adapted_decoder(model: PreTrainedModel) -> nn.Module:
    """Returns the language model's layers; refuses a model that does not tell them from the rest."""
    decoder = decoder_of(model)
    if decoder is model or head_of(model) is None:
        raise UserError(f"{type(model).__name__} has no decoder of its own that could be adapted; take another model")
    return decoder


def language_targets(model: PreTrainedModel) -> tuple[str, ...]:
    """Returns full-name patterns of every linear in the decoder's layers, one for each place in a layer."""
    decoder = adapted_decoder(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    head = head_of(model)
    modules = decoder.named_modules(prefix=prefix)
    names = [name for name, module in modules if is_adaptable_linear(name, module) and module is not head]
    if not names:
        raise UserError(f"no linear layer was found in {prefix} of {type(model).__name__}; set adapter.targets")
    return tuple(dict.fromkeys(map(starred, names)))


def starred(name: str) -> str:
    """Returns a module's name with `*` for numbers."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def is_adaptable_linear(name: str, module: nn.Module) -> bool:
    """Tells whether an adapter in a linear layer takes effect.

    It does not in classes that use their weight without being called (Llama 4's router, the output of torch's
    attention), nor where a family's model does so.
    """
    if BYPASSED.search(name):
        return False
    if isinstance(module, AdaptedLayer) or is_quantised(module):
        return True
    return isinstance(module, nn.Linear) and find_adaptable(module, DoRAConfig(targets=("*",))) is not None


def projector_patterns(model: PreTrainedModel) -> tuple[str, ...]:
    """Returns full-name patterns of the module between vision and language; none where no such name is known."""
    decoder = set(adapted_decoder(model).modules())
    names = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in PROJECTORS and module not in decoder and any(True for _ in module.parameters())
    ]
    outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return tuple(f"{name}.*" for name in outer)


def resolved_targets(
    model: PreTrainedModel, patterns: Iterable[str], setting: str, *, any_module: bool = False
) -> tuple[str, ...]:
    """Replaces each preset among patterns, of layers to adapt or of `any_module`, by full-name patterns."""
    return _resolved(model, patterns, setting, _owners_in if any_module else _targets_in)


def resolved_weights(model: PreTrainedModel, patterns: Iterable[str], setting: str) -> tuple[str, ...]:
    """Replaces each preset among patterns of parameters to train whole."""
    return _resolved(model, patterns, setting, _parameters_in)


def resolved_layers(model: PreTrainedModel, preset: str) -> frozenset[str]:
    """Returns full names of a preset's linear layers."""
    return frozenset(_layers_in(PRESETS[preset](model)))


def names_experts(model: PreTrainedModel, patterns: Iterable[str]) -> bool:
    """Tells whether some pattern hits only experts that are one tensor, and no layer."""
    layers = [name for name, module in model.named_modules() if _is_linear(module)]
    experts = [f"{name}.{leaf}" for name, module in _experts(model).items() for leaf in expert_projections(module)]
    return any(_matches_any(experts, pattern) and not _matches_any(layers, pattern) for pattern in patterns)


def names_projector(model: PreTrainedModel, targets: Iterable[str]) -> bool:
    """Tells whether some of a full run's targets hold weights of the projector."""
    owners = _owners_in(model, "projector")
    patterns = resolved_targets(model, targets, "adapter.targets", any_module=True)
    return any(_matches_any(owners, pattern) for pattern in patterns)


def _matches_any(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _resolved(model: PreTrainedModel, patterns: Iterable[str], setting: str, names_in: NamesIn) -> tuple[str, ...]:
    resolved: list[str] = []
    for pattern in patterns:
        if pattern in PRESETS:
            names = names_in(model, pattern)
            if not names:
                raise UserError(
                    f"{setting}: a {type(model).__name__} has no part {pattern!r}; name its layers by patterns"
                )
            resolved += _as_patterns(names, [name for name, _ in (*model.named_modules(), *model.named_parameters())])
        elif any(sign in pattern for sign in "*?[.") or pattern in dict(model.named_modules()):
            resolved.append(pattern)
        else:
            close = get_close_matches(pattern, PRESETS, n=1, cutoff=0.0)[0]
            raise UserError(
                f"{setting}: {pattern!r} is neither a module nor one of {', '.join(PRESETS)}; did you mean {close}, or "
                f"a pattern such as '*.{pattern}'?"
            )
    return tuple(dict.fromkeys(resolved))


def _as_patterns(names: list[str], all_names: Iterable[str]) -> list[str]:
    """Abbreviates names to patterns with `*` for numbers; keeps the names where a pattern would hit more."""
    by_pattern: dict[str, list[str]] = {}
    for name in names:
        by_pattern.setdefault(starred(name), []).append(name)
    others = set(all_names) - set(names)
    patterns: list[str] = []
    for pattern, matches in by_pattern.items():
        patterns += matches if _matches_any(others, pattern) else [pattern]
    return patterns


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_quantised(module)


def _layers_in(modules: Mapping[str, nn.Module]) -> list[str]:
    """Lists linear layers, without those in which an adapter would be bypassed."""
    linears = {name: module for name, module in modules.items() if _is_linear(module)}
    names = [name for name, module in linears.items() if is_adaptable_linear(name, module)]
    if left := [name for name in linears if name not in names]:
        log.warning("%d linear layers cannot be adapted and are left out, first %s", len(left), left[0])
    return names


def _targets_in(model: PreTrainedModel, preset: str) -> list[str]:
    """Lists a preset's layers, and experts that are one tensor where it includes them."""
    modules = PRESETS[preset](model)
    names = _layers_in(modules)
    if preset in ("experts", "all-linear"):
        names += [f"{name}.{leaf}" for name, module in modules.items() for leaf in expert_projections(module)]
    return names


def _owners_in(model: PreTrainedModel, preset: str) -> list[str]:
    """Lists a preset's modules with weights of their own."""
    return [name for name, module in PRESETS[preset](model).items() if any(True for _ in module.parameters(False))]


def _parameters_in(model: PreTrainedModel, preset: str) -> list[str]:
    """Lists a preset's parameters, without those that a module outside of it shares (tied embeddings)."""
    modules = PRESETS[preset](model)
    outside = {
        id(weight)
        for name, module in model.named_modules()
        if name not in modules
        for weight in module.parameters(recurse=False)
    }
    return [
        f"{name}.{leaf}"
        for name, module in modules.items()
        for leaf, weight in module.named_parameters(recurse=False)
        if id(weight) not in outside
    ]


def _language(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Returns the decoder's layers, and an encoder-decoder's encoder; never the output head."""
    parts = [decoder_of(model), *([model.get_encoder()] if model.config.is_encoder_decoder else ())]
    inside = {id(module) for part in parts for module in part.modules()}
    head, beside = head_of(model), {*_vision(model), *_projector(model)}
    return {n: m for n, m in model.named_modules() if id(m) in inside and m is not head and n not in beside}


def _vision(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Returns the vision encoder, without a projector inside it."""
    if model.config.is_encoder_decoder:
        return {}
    encoder = model.get_encoder(modality="image")
    if encoder is model or encoder is model.base_model:
        return {}
    inside, projector = {id(module) for module in encoder.modules()}, _projector(model)
    return {name: module for name, module in model.named_modules() if id(module) in inside and name not in projector}


def _projector(model: PreTrainedModel) -> dict[str, nn.Module]:
    if decoder_of(model) is model:
        return {}
    outer = tuple(pattern.removesuffix("*") for pattern in projector_patterns(model))
    return {name: module for name, module in model.named_modules() if f"{name}.".startswith(outer)}


def _experts(model: PreTrainedModel) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if expert_projections(module)}


def _all_linear(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Returns every linear layer but the output heads, and experts that are one tensor."""
    closed = dict(model.named_children()).get("answer_heads", nn.Module())  # a VL-BART's
    heads = {head_of(model), *closed.modules()}
    linears = {name: module for name, module in model.named_modules() if _is_linear(module) and module not in heads}
    return {**linears, **_experts(model)}


PRESETS: Mapping[str, Callable[[PreTrainedModel], dict[str, nn.Module]]] = MappingProxyType(
    {"language": _language, "vision": _vision, "projector": _projector, "experts": _experts, "all-linear": _all_linear}
)
