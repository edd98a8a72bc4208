"""Trained parameters in float32 over a half-precision base, outside the adapted layers.

A projector at a learning rate of 2e-5 makes steps that bfloat16 rounds away. So what trains is float32, the rest
of the model stays as it is, and the modules in between cast at their doors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dora_vl.core.functional import accumulation_dtype
from dora_vl.core.layer import AdaptedLayer

Gather = Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]
"""Makes sharded parameters whole inside a `with` block; ZeRO-3 passes `deepspeed.zero.GatheredParameters`."""
_BEFORE = "_dora_vl_before_float32"
"""Attribute of a module that `train_in_float32` changed: its `_Before`."""


@dataclass(frozen=True)
class _Before:
    """What undoing takes: the dtypes that a module's parameters had, by their names in it, and the hooks that cast."""

    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)


def no_gather(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """The `Gather` of a model whose parameters are whole already."""
    return nullcontext()


def train_in_float32(model: nn.Module, names: Iterable[str], gather: Gather) -> None:
    """Makes the named parameters float32; their modules compute in float32 and return the dtype of before.

    A module computes in one dtype, so its frozen parameters follow, and so does whatever else holds a parameter tied
    to a trained one; an adapted layer casts a trained bias itself, and only that bias changes. A module with modules
    inside casts at its output alone: what is inside has its own doors. Parameters are replaced, not converted: a
    sharded one cannot change its dtype.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    affected, leaves = _affected(model, {id(parameters[name]) for name in names})
    halves = {module: next(module.parameters(recurse=False)).dtype for module in affected}
    for module in affected:
        own = dict(module.named_parameters(recurse=False))
        for leaf in leaves[module]:
            half, wide = own[leaf].dtype, accumulation_dtype(own[leaf].dtype)
            if half != wide:
                _replace(model, own[leaf], wide, gather)
                _before(module).dtypes[leaf] = half
    for module, half in halves.items():
        if isinstance(module, AdaptedLayer) or half == accumulation_dtype(half):
            continue
        hooks = _before(module).hooks
        if _is_leaf(module):
            hooks.append(module.register_forward_pre_hook(_enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(partial(_leave, dtype=half)))


def train_in_own_dtype(model: nn.Module) -> None:
    """Undoes `train_in_float32`: its parameters are rounded to the dtypes of before, and nothing casts any more.

    Shards of ZeRO-3 have no values here to round; modules that hold some stay as they are.
    """
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if any(parameter.numel() == 0 for parameter in own.values()):
            continue
        before: _Before = vars(module).pop(_BEFORE, _Before())
        for leaf, half in before.dtypes.items():
            _replace(model, own[leaf], half, no_gather)
        for hook in before.hooks:
            hook.remove()


def _before(module: nn.Module) -> _Before:
    return vars(module).setdefault(_BEFORE, _Before())


def _affected(model: nn.Module, wanted: set[int]) -> tuple[list[nn.Module], dict[nn.Module, list[str]]]:
    """The modules that hold a wanted parameter, by sharing too, and which of their parameters turn float32."""
    while True:
        leaves: dict[nn.Module, list[str]] = {}
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False))
            if any(id(parameter) in wanted for parameter in own.values()):
                follow = _is_leaf(module) and not isinstance(module, AdaptedLayer)
                leaves[module] = [leaf for leaf, parameter in own.items() if follow or id(parameter) in wanted]
        named = {id(module._parameters[leaf]) for module, own in leaves.items() for leaf in own}
        if named <= wanted:
            return list(leaves), leaves
        wanted = wanted | named


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


def _replace(model: nn.Module, old: nn.Parameter, dtype: torch.dtype, gather: Gather) -> None:
    with gather([old]):
        new = nn.Parameter(old.detach().to(dtype).clone(), old.requires_grad)
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter is old:
                module.register_parameter(leaf, new)


def _enter(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(_cast(value, torch.float32) for value in inputs), {
        k: _cast(v, torch.float32) for k, v in named.items()
    }


def _leave(module: nn.Module, inputs: tuple[Any, ...], output: Any, *, dtype: torch.dtype) -> Any:
    return _cast(output, dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
