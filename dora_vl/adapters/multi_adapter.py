"""Several adapters on one model in memory, each row of a batch with its own."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from dora_vl.adapters.base_weights import replaced_by, shared_tensors
from dora_vl.adapters.folder import load_adapter
from dora_vl.core.adapter_slots import ActiveAdapters, Axis, SlotChange, SlotLayer
from dora_vl.core.inject import replace_module
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.linear import ProductLayer
from dora_vl.core.other_layers import AdaptedExperts
from dora_vl.core.quantised import QuantisedLinear
from dora_vl.errors import UserError


@dataclass(frozen=True)
class Layers:
    """Names of modules by what the first axis of their inputs counts."""

    by_row: frozenset[str]
    """The inputs of these modules are rows of tokens as the batch has them."""
    decoder: frozenset[str]
    """All modules of the language model; a module in none of the sets belongs to the vision part."""
    by_picture: frozenset[str] = frozenset()
    """The inputs of these modules have one entry per picture, in the rows' order."""


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter that is ready to be put into the model."""

    layers: Mapping[str, SlotChange | nn.Module]
    """Maps each changed layer's full name to its replacement."""
    alone: bool
    """The adapter changes the vision part, so pictures of a batch must all be its own."""


class AdapterSlots:
    """The adapters of one model by name; each row of a batch uses one of them, or none for the base.

    A layer is wrapped the first time that an adapter changes it. The base's tensors are never copied or written to; an
    adapter costs its own.
    """

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        self.model = model
        self.batch = ActiveAdapters()
        self._layers = layers
        self._plain = copy.deepcopy(model, shared_tensors(model))

    def read(self, folder: str | os.PathLike[str]) -> ReadAdapter:
        """Reads an adapter folder, ours or PEFT's, and computes its gains; the model is not touched."""
        source = Path(folder)
        own = copy.deepcopy(self._plain, shared_tensors(self._plain, replaced_by(source)))
        load_adapter(own, source, change_base=False)
        changed = dict(self._changed(own.eval(), source))
        vision = [name for name in changed if name not in self._layers.by_row]
        return ReadAdapter(changed, alone=any(name not in self._layers.by_picture for name in vision))

    def put(self, name: str, adapter: ReadAdapter) -> None:
        """Makes a read adapter available to rows."""
        for layer, change in adapter.layers.items():
            self._slot_layer(layer).put(name, change)

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
        """Returns the first tensor of a module that the base lacks; None if there is none."""
        if isinstance(module, AdaptedLayer | AdaptedExperts):
            return next((leaf for leaf, _ in module.named_parameters()), "weight")
        plain = self._plain.get_submodule(name)
        before = {**plain._parameters, **plain._buffers}
        now = {**module._parameters, **module._buffers}
        return next((leaf for leaf, tensor in now.items() if tensor is not before.get(leaf)), None)

    def _refuse(self, source: Path, name: str, module: nn.Module, parameter: str) -> None:
        by_row, vision = name in self._layers.by_row, name not in self._layers.decoder
        is_single = isinstance(module, AdaptedLayer) or not any(True for _ in module.children())
        if isinstance(module, AdaptedExperts):
            reason = "experts see tokens that a router sent them, from any row"
        elif by_row and not is_single:
            reason = "it belongs to a module with others inside, which cannot run on only some rows"
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
        replace_module(self.model, layer, slot_layer)
        return slot_layer


def rows_seen(model: nn.Module, run: Callable[[], object], *, rows: int, tokens: int) -> frozenset[str]:
    """Names the modules that always receive `[rows, tokens, ...]` or each row's last token.

    `run` puts a batch through the model, of several rows and of another number of tokens than of rows.
    """
    seen: dict[str, bool] = {}
    shapes = ((rows, tokens), (rows, 1))

    def look(name: str, _: nn.Module, inputs: tuple[object, ...]) -> None:
        first = inputs[0] if inputs else None
        fits = isinstance(first, torch.Tensor) and tuple(first.shape[:2]) in shapes
        seen[name] = seen.get(name, True) and fits

    hooks = [module.register_forward_pre_hook(partial(look, name)) for name, module in model.named_modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(name for name, fits in seen.items() if fits)
