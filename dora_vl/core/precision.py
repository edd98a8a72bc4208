"""Trained parameters in float32 over a half-precision base, outside the adapted layers.

A projector at a learning rate of 2e-5 makes steps that bfloat16 rounds away. So what trains is float32, the rest
of the model stays as it is, and the modules in between cast at their doors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dora_vl.core.functional import accumulation_dtype
from dora_vl.core.layer import AdaptedLayer

Gather = Callable[[Iterable[nn.Parameter]], AbstractContextManager[Any]]
"""Makes sharded parameters whole inside a `with` block; ZeRO-3 passes `deepspeed.zero.GatheredParameters`."""


def no_gather(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """The `Gather` of a model whose parameters are whole already."""
    return nullcontext()


def train_in_float32(model: nn.Module, names: Iterable[str], gather: Gather) -> None:
    """Makes the named parameters float32; their modules compute in float32 and return the dtype of before.

    A module computes in one dtype, so its frozen parameters follow; an adapted layer casts a trained bias itself,
    and only that bias changes. Parameters are replaced, not converted: a sharded one cannot change its dtype.
    """
    trained_by_owner: dict[str, list[str]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        trained_by_owner.setdefault(owner, []).append(leaf)
    for owner, leaves in trained_by_owner.items():
        module = model.get_submodule(owner)
        own_casts = isinstance(module, AdaptedLayer)
        parameters = dict(module.named_parameters(recurse=False))
        half = next(iter(parameters.values())).dtype
        if half == accumulation_dtype(half):
            continue
        for leaf in leaves if own_casts else parameters:
            _replace(model, parameters[leaf], gather)
        if not own_casts:
            module.register_forward_pre_hook(_enter, with_kwargs=True)
            module.register_forward_hook(partial(_leave, dtype=half))


def _replace(model: nn.Module, old: nn.Parameter, gather: Gather) -> None:
    with gather([old]):
        new = nn.Parameter(old.detach().to(accumulation_dtype(old.dtype)).clone(), old.requires_grad)
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
