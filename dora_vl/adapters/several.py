"""Several adapters on one model in memory: loads many, switches between them, combines them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dora_vl.adapters.adapter import Factors, read_adapter
from dora_vl.adapters.base_weights import replaced_by, shared_tensors
from dora_vl.adapters.combine import combine_factors
from dora_vl.adapters.folder import load_adapter
from dora_vl.core.adapter_slots import ActiveAdapters, Axis, SlotChange, SlotLayer
from dora_vl.core.config import DoRAConfig
from dora_vl.core.inject import put_in_place
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.linear import DoRALinear, ProductLayer
from dora_vl.core.other_layers import AdaptedExperts
from dora_vl.core.quantised import QuantisedLinear
from dora_vl.core.trainable import (
    TrainedList,
    adapted_layers,
    all_tensors,
    choose_trained,
    forget_trained,
    is_adapted,
    named_tensor,
    no_gather,
    split_rows,
    train_list,
    trained_list,
)
from dora_vl.errors import UserError


@dataclass
class _Loaded:
    layers: dict[str, nn.Module]
    extras: dict[str, Tensor]
    trained: TrainedList


class AdapterSet:
    """Adapters of one model by name; at most one is in the model at a time, the others wait beside it.

    Adapted layers share the base's weight, so an adapter costs its own tensors and switching costs none of the
    model's. With no adapter active the weights are the base's, bit by bit; what some adapter trains beside its layers
    stays float32 over a half-precision base. A PiSSA adapter comes in as the change of the original weight, at twice
    the rank, equal up to rounding.
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
        """Names the adapters that can be switched to."""
        return tuple(self._loaded)

    def load(self, name: str, folder: str | os.PathLike[str]) -> list[str]:
        """Loads an adapter folder under a name and makes it active; returns the adapted layers' names."""
        if name in self._loaded:
            raise UserError(f"an adapter {name!r} is loaded already; there are {list(self.names)}")
        adapter = read_adapter(folder)
        if adapter.method == "dvora":
            raise UserError(
                f"{folder} is a DVoRA adapter, one for a model, whose layers share matrices; use load_adapter"
            )
        if adapter.experts:
            raise UserError(f"{folder} adapts experts that are one tensor, which cannot be switched; use load_adapter")
        self.switch(None)
        modules, tensors = dict(self.model.named_modules()), all_tensors(self.model)
        for layer in adapter.layers:
            if layer in modules:
                self._base_layers.setdefault(layer, modules[layer])
        extras = [n for n in adapter.extras if split_rows(n)[0] in tensors and n not in self._base_values]
        self._base_values |= self._values(extras)
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
        """
        if name in self._loaded:
            raise UserError(f"an adapter {name!r} is loaded already; there are {list(self.names)}")
        unknown = sorted(set(shares) - set(self._loaded))
        if unknown or not any(shares.values()):
            raise UserError(f"cannot combine {dict(shares)}: there are {list(self.names)}, and one must not be 0")
        loaded = {key: self._loaded[key] for key, share in shares.items() if share != 0}
        # One of the layers may be refused, so this precedes any change of the model.
        factors: dict[str, list[tuple[float, Factors]]] = {}
        for key, adapter in loaded.items():
            for layer, module in adapter.layers.items():
                factors.setdefault(layer, []).append((shares[key], _factors(module, layer)))
        as_dora = any(part.magnitude is not None for parts in factors.values() for _, part in parts)
        self.switch(None)
        for layer, parts in sorted(factors.items()):
            base = self._base_layers[layer]
            assert isinstance(base, nn.Linear)
            self._put(layer, _layer_of(combine_factors(base.weight.detach(), parts, as_dora=as_dora), base))
        extras: dict[str, Tensor] = {}
        trained: dict[str, tuple[str, ...]] = {}
        for key, adapter in loaded.items():
            for extra, tensor in adapter.extras.items():
                start = self._base_values[extra].float()
                extras[extra] = extras.get(extra, start) + shares[key] * (tensor - start)
            for part in adapter.trained.parts:
                if not part.adapts:
                    trained[part.name] = tuple(dict.fromkeys((*trained.get(part.name, ()), *part.parameters)))
        kept = tuple(dict.fromkeys(name for adapter in loaded.values() for name in adapter.trained.also_keep))
        choose_trained(self.model, full_modules=(), also_train=trained, also_keep=kept, gather=no_gather)
        self._set_values(extras)
        self._keep(name)

    def switch(self, name: str | None) -> None:
        """Activates an adapter; None leaves the base alone."""
        if name is not None and name not in self._loaded:
            raise UserError(f"no adapter {name!r} is loaded; there are {list(self.names)}")
        if any(module.merged for _, module in adapted_layers(self.model)):
            raise UserError(f"adapter {self.active!r} is merged into the weights; unmerge_dora(model) before switching")
        if self.active is not None:
            # It may have been trained since; its layers are its own, its other tensors are the model's.
            active = self._loaded[self.active]
            active.extras = self._values(active.extras)
        self._to_base()
        if name is None:
            return
        chosen = self._loaded[name]
        for layer, module in chosen.layers.items():
            self._put(layer, module)
        train_list(self.model, chosen.trained)
        self._set_values(chosen.extras)
        self.active = name

    def _values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies tensors of the model, or rows of them."""
        tensors = all_tensors(self.model)
        return {name: named_tensor(tensors, name).detach().clone() for name in names}

    def _keep(self, name: str) -> None:
        trained = trained_list(self.model)
        extras = [name for part in trained.parts if not part.adapts for name in part.parameters]
        values = self._values((*extras, *trained.also_keep))
        self._loaded[name] = _Loaded(dict(adapted_layers(self.model)), values, trained)
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
        tensors = all_tensors(self.model)
        for name, value in values.items():
            named_tensor(tensors, name).copy_(value)

    def _put(self, layer: str, module: nn.Module) -> None:
        owner, _, leaf = layer.rpartition(".")
        module.train(self.model.training)
        # The weight is the model's own and has moved with it; a waiting adapter's tensors have not.
        device = next(self._base_layers[layer].parameters()).device
        setattr(self.model.get_submodule(owner), leaf, module.to(device))


def _factors(layer: nn.Module, name: str) -> Factors:
    if not isinstance(layer, DoRALinear):
        raise UserError(f"{name} is no linear layer; combine adapters of linear layers, or merge them one by one")
    a, b = layer.factors() or (None, None)
    return Factors(
        lora_A=None if a is None else a.detach(),
        lora_B=None if b is None else b.detach(),
        magnitude=None if layer.magnitude is None else layer.magnitude.detach(),
        scale=layer.adapter.scale,
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


@dataclass(frozen=True)
class Layers:
    """Names of modules by what the first axis of their inputs counts."""

    by_row: frozenset[str]
    """Modules whose inputs are rows of tokens as the batch has them."""
    decoder: frozenset[str]
    """All modules of the language model; what is in no set belongs to the vision part."""
    by_picture: frozenset[str] = frozenset()
    """Modules whose inputs have one entry a picture, in the rows' order."""


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter that is ready to be put into the model."""

    layers: Mapping[str, SlotChange | nn.Module]
    """Maps each changed layer's full name to its replacement."""
    alone: bool
    """The adapter changes the vision part, so pictures of a batch must all be its own."""


class AdapterSlots:
    """The adapters of one model by name; each row of a batch uses one of them, or none for the base.

    They are loaded and dropped while the model runs. A layer is wrapped the first time that an adapter changes it. The
    base's tensors are never copied or written to; an adapter costs its own.
    """

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        self.model = model
        self.batch = ActiveAdapters()
        self._layers = layers
        self._plain = copy.deepcopy(model, shared_tensors(model))
        self._loaded: dict[str, tuple[str, ...]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names the adapters that rows may use."""
        return tuple(self._loaded)

    def read(self, folder: str | os.PathLike[str]) -> ReadAdapter:
        """Reads an adapter folder, ours or PEFT's, and computes its gains; the model is not touched.

        It may run beside a batch, in another thread.
        """
        source = Path(folder)
        own = copy.deepcopy(self._plain, shared_tensors(self._plain, replaced_by(source)))
        load_adapter(own, source, change_base=False)
        changed = dict(self._changed(own.eval(), source))
        vision = [name for name in changed if name not in self._layers.by_row]
        return ReadAdapter(changed, alone=any(name not in self._layers.by_picture for name in vision))

    def put(self, name: str, adapter: ReadAdapter) -> None:
        """Makes a read adapter available to rows, between batches only. If a layer fails, no layer has it."""
        self._loaded[name] = tuple(adapter.layers)
        try:
            for layer, change in adapter.layers.items():
                self._slot_layer(layer).put(name, change)
        except BaseException:
            self.drop(name)
            raise

    def drop(self, name: str) -> None:
        """Drops an adapter and restores base layers that no other adapter changes, between batches only."""
        for layer_name in self._loaded.pop(name):
            layer = self._slot_layer(layer_name)
            layer.drop(name)
            if not layer.keys:
                put_in_place(self.model, layer, layer.base)

    def _changed(self, own: nn.Module, source: Path) -> Iterator[tuple[str, SlotChange | nn.Module]]:
        """Lists every layer that an adapted copy of the model does not share with it, with its replacement."""
        replaced: list[str] = []
        in_base = {name for name, _ in self._plain.named_modules()}
        for name, module in own.named_modules():
            # Names that the base lacks are what DVoRA's layers share.
            if name not in in_base or any(name.startswith(f"{outer}.") for outer in replaced):
                continue
            parameter = self._own_parameter(name, module)
            if parameter is None:
                continue
            self._refuse(source, name, module, parameter)
            replaced.append(name)
            plain_bias = vars(self._plain.get_submodule(name)).get("_parameters", {}).get("bias")
            if isinstance(module, ProductLayer | QuantisedLinear) and module.bias is plain_bias:
                yield name, SlotChange.of(module, module.compute_dtype())
            else:
                yield name, module

    def _own_parameter(self, name: str, module: nn.Module) -> str | None:
        """Returns the first tensor of a module that the base lacks; None where there is none."""
        if isinstance(module, AdaptedLayer | AdaptedExperts):
            return next((leaf for leaf, _ in module.named_parameters()), "weight")
        plain = self._plain.get_submodule(name)
        before = {**plain._parameters, **plain._buffers}
        now = {**module._parameters, **module._buffers}
        return next((leaf for leaf, tensor in now.items() if tensor is not before.get(leaf)), None)

    def _refuse(self, source: Path, name: str, module: nn.Module, parameter: str) -> None:
        by_row, vision = name in self._layers.by_row, name not in self._layers.decoder
        alone = isinstance(module, AdaptedLayer) or not any(True for _ in module.children())
        if isinstance(module, AdaptedExperts):
            reason = "experts see tokens that a router sent them, from any row"
        elif by_row and not alone:
            reason = "it belongs to a module with others inside, which cannot run on some rows alone"
        elif by_row or vision:
            return
        else:
            reason = "that layer is not given the rows of a batch"
        raise UserError(
            f"{source}: {f'{name}.{parameter}'.lstrip('.')} cannot be served beside other adapters: {reason}; merge it "
            "(dora-vl merge) and serve the merged folder with --model"
        )

    def _slot_layer(self, name: str) -> SlotLayer:
        layer = self.model.get_submodule(name)
        if isinstance(layer, SlotLayer):
            return layer
        axis: Axis = "rows" if name in self._layers.by_row else "pictures"
        slot_layer = SlotLayer(layer, self.batch, axis)
        put_in_place(self.model, layer, slot_layer)
        return slot_layer


def rows_seen(model: nn.Module, run: Callable[[], object], *, rows: int, tokens: int) -> frozenset[str]:
    """Names the modules that always receive `[rows, tokens, ...]` or each row's last token.

    Args:
        run: puts a batch of so many rows of so many tokens through the model; rows are several and unlike `tokens`.
    """
    seen: dict[str, bool] = {}
    shapes = ((rows, tokens), (rows, 1))

    def look(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[object, ...]) -> None:
            first = inputs[0] if inputs else None
            fits = isinstance(first, torch.Tensor) and tuple(first.shape[:2]) in shapes
            seen[name] = seen.get(name, True) and fits

        return hook

    hooks = [module.register_forward_pre_hook(look(name)) for name, module in model.named_modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(name for name, fits in seen.items() if fits)
