"""Several adapters on one model in memory: load many, switch between them, combine them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.combine import combine_factors
from dora_vl.adapters.factors import Factors
from dora_vl.adapters.folder import load_adapter
from dora_vl.core.config import DoRAConfig
from dora_vl.core.linear import DoRALinear
from dora_vl.core.precision import no_gather
from dora_vl.core.trainable import (
    adapted_layers,
    choose_trained,
    forget_trained,
    is_adapted,
    kept_tensors,
    named_tensor,
    trained_parts,
)
from dora_vl.errors import UserError


@dataclass
class _Loaded:
    """One adapter while another may be active."""

    layers: dict[str, nn.Module]
    extras: dict[str, Tensor]
    """Values of the other tensors that the adapter carries."""
    parts: dict[str, tuple[str, ...]]
    kept: tuple[str, ...]
    part_of: dict[str, str]
    """The part that each adapted layer belongs to."""


class AdapterSet:
    """Adapters of one model by name; at most one is in the model at a time, the others wait beside it.

    Adapted layers share the base's weight, so an adapter costs its own tensors and switching costs none of the
    model's. With no adapter active the weights are the base's, bit by bit; what some adapter trains beside its layers
    stays float32 over a half-precision base. A PiSSA adapter comes in as the change of the original weight, at twice
    the rank, equal up to rounding.

    Raises:
        UserError: the model is adapted already.
    """

    def __init__(self, model: nn.Module) -> None:
        if is_adapted(model):
            raise UserError("the model is adapted already; load the base again and give it to AdapterSet")
        self.model = model
        self.active: str | None = None
        self._loaded: dict[str, _Loaded] = {}
        self._base_layers: dict[str, nn.Module] = {}
        self._base_values: dict[str, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that can be switched to."""
        return tuple(self._loaded)

    def load(self, name: str, folder: str | os.PathLike[str]) -> list[str]:
        """Loads an adapter folder under a name and makes it active; returns the adapted layers' names.

        Raises:
            UserError: the name is taken, or the folder does not fit the model.
        """
        self._refuse_taken(name)
        adapter = read_adapter(folder)
        if adapter.method == "dvora":
            raise UserError(
                f"{folder} is a DVoRA adapter, one for a model: its layers share matrices; use load_adapter"
            )
        if adapter.experts:
            raise UserError(f"{folder} adapts experts that are one tensor, which cannot be switched; use load_adapter")
        self.switch(None)
        modules, tensors = dict(self.model.named_modules()), self._tensors()
        for layer in adapter.layers:
            if layer in modules:
                self._base_layers.setdefault(layer, modules[layer])
        for extra in adapter.extras:
            if extra in tensors:
                self._base_values.setdefault(extra, named_tensor(tensors, extra).detach().clone())
        try:
            names = load_adapter(self.model, folder, change_base=False)
        except UserError:
            self._to_base()
            raise
        self._keep(name)
        return names

    def combine(self, name: str, shares: Mapping[str, float]) -> None:
        """Adds W + sum of share * (W'_i - W) as an adapter of its own, exactly, and makes it active.

        Its rank is the sum of the ranks; `merge_dora` folds it into the weights, `save_adapter` writes it.

        Raises:
            UserError: the name is taken, an adapter is unknown, or one adapts other layers than linear ones. The
                active adapter is then what it was.
        """
        self._refuse_taken(name)
        unknown = sorted(set(shares) - set(self._loaded))
        if unknown or not any(shares.values()):
            raise UserError(f"cannot combine {dict(shares)}: there are {list(self.names)}, and one must not be 0")
        loaded = {key: self._loaded[key] for key, share in shares.items() if share != 0}
        # Before anything is put into the model, because one of the layers may be refused.
        found = {
            layer: [
                (shares[key], _factors(one.layers[layer], layer)) for key, one in loaded.items() if layer in one.layers
            ]
            for layer in sorted({layer for one in loaded.values() for layer in one.layers})
        }
        as_dora = any(factors.magnitude is not None for parts in found.values() for _, factors in parts)
        self.switch(None)
        for layer, parts in found.items():
            base = self._base_layers[layer]
            assert isinstance(base, nn.Linear)
            self._put(layer, _layer_of(combine_factors(base.weight.detach(), parts, as_dora=as_dora), base))
        values = self._combined_values(loaded, shares)
        trained = _union(one.parts for one in loaded.values())
        kept = tuple(dict.fromkeys(name for one in loaded.values() for name in one.kept))
        choose_trained(self.model, full_modules=(), also_train=trained, also_keep=kept, gather=no_gather)
        self._set_values(values)
        self._keep(name)

    def switch(self, name: str | None) -> None:
        """Makes an adapter active, or none: the model is then the base.

        Raises:
            UserError: there is no adapter of this name.
        """
        if name is not None and name not in self._loaded:
            raise UserError(f"no adapter {name!r} is loaded; there are {list(self.names)}")
        if any(module.merged for _, module in adapted_layers(self.model)):
            raise UserError(f"adapter {self.active!r} is merged into the weights; unmerge_dora(model) before switching")
        if self.active is not None:
            # It may have been trained since; its layers are its own, its other tensors are the model's.
            tensors, active = self._tensors(), self._loaded[self.active]
            active.extras = {extra: named_tensor(tensors, extra).detach().clone() for extra in active.extras}
        self._to_base()
        if name is None:
            return
        chosen = self._loaded[name]
        for layer, module in chosen.layers.items():
            self._put(layer, module)
        choose_trained(
            self.model,
            full_modules=(),
            also_train=chosen.parts,
            also_keep=chosen.kept,
            gather=no_gather,
            part_of=lambda layer: chosen.part_of[layer],
        )
        self._set_values(chosen.extras)
        self.active = name

    # -- inside ----------------------------------------------------------------------------------------------

    def _refuse_taken(self, name: str) -> None:
        if name in self._loaded:
            raise UserError(f"an adapter {name!r} is loaded already; there are {list(self.names)}")

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters(remove_duplicate=False)), **dict(self.model.named_buffers())}

    def _keep(self, name: str) -> None:
        parts: dict[str, tuple[str, ...]] = {}
        part_of: dict[str, str] = {}
        for part in trained_parts(self.model):
            if part.adapts:
                part_of |= {parameter.rpartition(".")[0]: part.part for parameter in part.parameters}
            else:
                parts[part.name] = (*parts.get(part.name, ()), *part.parameters)
        kept = tuple(kept_tensors(self.model))
        tensors = self._tensors()
        extras = {extra: named_tensor(tensors, extra).detach().clone() for extra in (*sum(parts.values(), ()), *kept)}
        self._loaded[name] = _Loaded(dict(adapted_layers(self.model)), extras, parts, kept, part_of)
        self.active = name

    def _to_base(self) -> None:
        for layer, module in self._base_layers.items():
            self._put(layer, module)
        self._set_values(self._base_values)
        self.model.requires_grad_(False)
        forget_trained(self.model)
        self.active = None

    @torch.no_grad()
    def _set_values(self, values: Mapping[str, Tensor]) -> None:
        tensors = self._tensors()
        for name, value in values.items():
            named_tensor(tensors, name).copy_(value)

    def _put(self, layer: str, module: nn.Module) -> None:
        owner, _, leaf = layer.rpartition(".")
        module.train(self.model.training)
        # The weight is the model's own and has moved with it; a waiting adapter's tensors have not.
        setattr(self.model.get_submodule(owner), leaf, module.to(self._device_of(layer)))

    def _device_of(self, layer: str) -> torch.device:
        return next(self._base_layers[layer].parameters()).device

    def _combined_values(self, loaded: Mapping[str, _Loaded], shares: Mapping[str, float]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for extra in {extra for one in loaded.values() for extra in one.extras}:
            base = self._base_values[extra].float()
            changes = (shares[key] * (one.extras[extra] - base) for key, one in loaded.items() if extra in one.extras)
            values[extra] = base + sum(changes, torch.zeros(()))
        return values


def _factors(layer: nn.Module, name: str) -> Factors:
    if not isinstance(layer, DoRALinear):
        raise UserError(f"{name} is no linear layer; combine adapters of linear layers, or merge them one by one")
    a, b = layer.factors() or (None, None)
    return Factors(
        lora_A=None if a is None else a.detach(),
        lora_B=None if b is None else b.detach(),
        magnitude=None if layer.magnitude is None else layer.magnitude.detach(),
        scale=layer.scale(),
    )


def _layer_of(factors: Factors, base: nn.Linear) -> DoRALinear:
    method = "magnitude" if factors.lora_A is None else "lora" if factors.magnitude is None else "dora"
    rank = max(factors.rank, 1)
    config = DoRAConfig(targets=("*",), method=method, rank=rank, alpha=factors.scale * rank, dropout=0.0)
    layer = DoRALinear(base, config)
    with torch.no_grad():
        for parameter, value in (
            (layer.lora_A, factors.lora_A),
            (layer.lora_B, factors.lora_B),
            (layer.magnitude, factors.magnitude),
        ):
            if parameter is not None and value is not None:
                parameter.copy_(value)
    layer.forget_norms()
    return layer


def _union(groups: Iterable[Mapping[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    union: dict[str, tuple[str, ...]] = {}
    for parts in groups:
        for name, parameters in parts.items():
            union[name] = tuple(dict.fromkeys((*union.get(name, ()), *parameters)))
    return union
