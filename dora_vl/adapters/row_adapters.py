"""Many adapters of one model at once, for batches whose rows have different ones; loaded and dropped while it runs."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dora_vl.adapters.folder import load_adapter
from dora_vl.adapters.shared_copy import replaced_by, shared_tensors
from dora_vl.core.batch_at_hand import BatchAtHand, Place
from dora_vl.core.experts import AdaptedExperts
from dora_vl.core.inject import put_in_place
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.linear import ProductLayer
from dora_vl.core.opaque import OpaqueLinear
from dora_vl.core.rows import RowChange, RowLayer
from dora_vl.errors import UserError


@dataclass(frozen=True)
class Layers:
    """What the layers of a model count along the first axis of their inputs.

    Attributes:
        by_row: names of those that see rows of tokens as the batch has them, and nothing else.
        by_picture: names of those that see one entry a picture, in the rows' order.
        decoder: names of all modules of the language model; what else is in no list belongs to its eyes.
    """

    by_row: frozenset[str]
    decoder: frozenset[str]
    by_picture: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter that is ready to be put into the model."""

    layers: Mapping[str, RowChange | nn.Module]
    """What stands for it in each layer, by full name."""
    alone: bool
    """Whether pictures of a batch must all be this adapter's: it changes the model's eyes."""


class RowAdapters:
    """The adapters of one model by name; each row of a batch names one, or none for the base.

    Layers are replaced from outside, the first time that an adapter changes them. The base's tensors are never copied
    nor written to; an adapter costs its own.

    Args:
        model: the base, without any adapter.
        layers: where rows and pictures stand in it.
    """

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        self.model = model
        self.batch = BatchAtHand()
        self._layers = layers
        self._plain = copy.deepcopy(model, shared_tensors(model))
        self._held: dict[str, tuple[str, ...]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that rows may name."""
        return tuple(self._held)

    def read(self, folder: str | os.PathLike[str]) -> ReadAdapter:
        """Reads an adapter folder, ours or PEFT's, and computes its gains; the model is not touched.

        It may run beside a batch, in another thread.

        Raises:
            UserError: the folder does not fit the model, or changes something that rows cannot have each their own of;
                it names the parameter.
        """
        source = Path(folder)
        own = copy.deepcopy(self._plain, shared_tensors(self._plain, replaced_by(source)))
        load_adapter(own, source, change_base=False)
        found = dict(self._changed(own.eval(), source))
        eyes = [name for name in found if name not in self._layers.by_row]
        return ReadAdapter(found, alone=any(name not in self._layers.by_picture for name in eyes))

    def put(self, name: str, adapter: ReadAdapter) -> None:
        """Makes a read adapter one that rows may name; between batches only. Where a layer fails, none has it."""
        self._held[name] = tuple(adapter.layers)
        try:
            for layer, held in adapter.layers.items():
                self._row_layer(layer).put(name, held)
        except BaseException:
            self.drop(name)
            raise

    def drop(self, name: str) -> None:
        """Forgets an adapter, and puts the base's layer back where no other changes it; between batches only."""
        for layer in self._held.pop(name):
            held = self._row_layer(layer)
            held.drop(name)
            if not held.keys:
                put_in_place(self.model, held, held.base)

    # -- inside ----------------------------------------------------------------------------------------------

    def _changed(self, own: nn.Module, source: Path) -> Iterator[tuple[str, RowChange | nn.Module]]:
        """Every layer that an adapted copy of the model does not share with it, and what stands for it."""
        whole: list[str] = []
        known = {name for name, _ in self._plain.named_modules()}
        for name, module in own.named_modules():
            if name not in known or any(name.startswith(f"{outer}.") for outer in whole):  # what DVoRA's layers share
                continue
            parameter = self._own_parameter(name, module)
            if parameter is None:
                continue
            self._refuse(source, name, module, parameter)
            whole.append(name)
            yield name, self._change(name, module)

    def _own_parameter(self, name: str, module: nn.Module) -> str | None:
        """The first tensor of a module's own that the base has not; None where there is none."""
        if isinstance(module, AdaptedLayer | AdaptedExperts):
            return next((leaf for leaf, _ in module.named_parameters()), "weight")
        plain = self._plain.get_submodule(name)
        before = {**plain._parameters, **plain._buffers}
        now = {**module._parameters, **module._buffers}
        return next((leaf for leaf, tensor in now.items() if tensor is not before.get(leaf)), None)

    def _change(self, name: str, module: nn.Module) -> RowChange | nn.Module:
        if not isinstance(module, ProductLayer | OpaqueLinear) or module.bias is not self._bias_of(name):
            return module
        return RowChange.of(module, module.compute_dtype())

    def _bias_of(self, name: str) -> object:
        return vars(self._plain.get_submodule(name)).get("_parameters", {}).get("bias")

    def _refuse(self, source: Path, name: str, module: nn.Module, parameter: str) -> None:
        by_row, eyes = name in self._layers.by_row, name not in self._layers.decoder
        alone = isinstance(module, AdaptedLayer) or not any(True for _ in module.children())
        if isinstance(module, AdaptedExperts):
            reason = "experts see tokens that a router sent them, from any row"
        elif by_row and not alone:
            reason = "it belongs to a module with others inside, which cannot run on some rows alone"
        elif by_row or eyes:
            return
        else:
            reason = "that layer is not given the rows of a batch"
        raise UserError(
            f"{source}: {f'{name}.{parameter}'.lstrip('.')} cannot be served beside other adapters: {reason}; merge it "
            "(dora-vl merge) and serve the merged folder with --model"
        )

    def _row_layer(self, name: str) -> RowLayer:
        found = self.model.get_submodule(name)
        if not isinstance(found, RowLayer):
            place: Place = "rows" if name in self._layers.by_row else "pictures"
            base, found = found, RowLayer(found, self.batch, place)
            put_in_place(self.model, base, found)
        return found


Run = Callable[[], object]


def rows_seen(model: nn.Module, run: Run, *, rows: int, tokens: int) -> frozenset[str]:
    """Names of the modules that are given `[rows, tokens, ...]`, or a row's last token alone, whenever they are called.

    Args:
        model: any.
        run: puts a batch of so many rows of so many tokens through it.
        rows: more than one, and unlike `tokens`.
        tokens: of each row.
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
