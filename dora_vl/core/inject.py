"""Adapters go in from outside: `apply_dora` finds layers by full-name globs and puts adapted ones in their place."""

from __future__ import annotations

from typing import cast

from torch import nn

from dora_vl.core.config import DoRAConfig
from dora_vl.core.linear import DoRALinear
from dora_vl.core.precision import Gather, no_gather
from dora_vl.core.trainable import adapted_layers, choose_trained, is_adapted, matching
from dora_vl.errors import UserError


def apply_dora(model: nn.Module, config: DoRAConfig, *, gather: Gather = no_gather) -> list[str]:
    """Adapts the layers that `config.targets` names and decides what trains; returns the adapted layers' names.

    With `method="full"` no layer changes: the targets' own parameters train, and the names returned are theirs.
    On the meta device everything is counted and nothing has values. Under ZeRO-3 pass a `gather`, since the
    magnitude is the norm of the whole weight.

    Raises:
        UserError: a pattern matches nothing, or nothing adaptable, or the model is adapted already.
    """
    if is_adapted(model):
        raise UserError("the model is adapted already; load it again before applying another adapter")
    if config.method == "full":
        names = matching((name for name, _ in model.named_modules()), config.targets, "targets")
        full_modules = names
    else:
        names, full_modules = adaptable_names(model, config.targets), []
        for name in names:
            _adapt(model, name, config, gather)
    choose_trained(
        model,
        full_modules=full_modules,
        also_train=config.also_train,
        also_keep=config.also_keep,
        gather=gather,
    )
    return names


def adaptable_names(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers that the globs match; each glob must match at least one.

    Only plain `nn.Linear`: a subclass may use its weight without calling itself (torch's attention does), and an
    adapter there would be passed over in silence.
    """
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return matching(linear, patterns, "targets (linear layers)")


def merge_dora(model: nn.Module, *, keep_base: bool = True) -> None:
    """Folds every adapter into its layer's weight, in float32; forward then costs what the base costs.

    `keep_base` holds a copy of each base weight so that `unmerge_dora` restores it bit by bit; without it the
    merge needs no second copy of the model and cannot be undone.
    """
    for _, layer in adapted_layers(model):
        layer.merge(keep_base=keep_base)


def unmerge_dora(model: nn.Module) -> None:
    """Takes every adapter out of its layer's weight again, bit by bit."""
    for _, layer in adapted_layers(model):
        layer.unmerge()


def strip_adapters(model: nn.Module) -> None:
    """Puts plain `nn.Linear` layers back, with the weights as they are (merged or not), ready to be saved."""
    for name, layer in list(adapted_layers(model)):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        _put(model, name, plain.train(layer.training))


def _adapt(model: nn.Module, name: str, config: DoRAConfig, gather: Gather) -> None:
    base = model.get_submodule(name)
    assert isinstance(base, nn.Linear)
    with gather([cast(nn.Parameter, base.weight)]):
        _put(model, name, DoRALinear(base, config))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
