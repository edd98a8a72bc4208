"""One base in memory and the adapters over it: each sequence of a batch has its own, asked as it was trained to be."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from dora_vl.adapters.adapter import content_hash, local_folder
from dora_vl.adapters.base_weights import replaced_by, shared_tensors
from dora_vl.adapters.folder import load_adapter
from dora_vl.backbones.base import Backbone, decoder_of
from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.families.table import LLAVA
from dora_vl.core.adapter_slots import ActiveAdapters, Axis, SlotChange, SlotLayer
from dora_vl.core.inject import replace_module
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.linear import ProductLayer
from dora_vl.core.other_layers import AdaptedExperts
from dora_vl.core.quantised import QuantisedLinear
from dora_vl.core.strength import AppliedAdapter
from dora_vl.data.turns import Turn
from dora_vl.errors import UserError, short_repr
from dora_vl.evaluation.assistant import Assistant, prompt_batch, prompt_sample
from dora_vl.evaluation.open_model import (
    ModelRequest,
    ModelSource,
    adapter_recipe,
    find_source,
    load_decoder,
    prompt_encoder,
)
from dora_vl.evaluation.predictor import PromptMedia


@dataclass(frozen=True)
class Layers:
    """Names of modules by what the first axis of their inputs counts."""

    by_sequence: frozenset[str]
    """The inputs of these modules are sequences of tokens as the batch has them."""
    decoder: frozenset[str]
    """All modules of the language model; a module in none of the sets belongs to the vision part."""
    by_picture: frozenset[str] = frozenset()
    """The inputs of these modules have one entry per picture, in the sequences' order."""


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter that is ready to be put into the model."""

    layers: Mapping[str, SlotChange | nn.Module]
    """Maps each changed layer's full name to its replacement."""
    alone: bool
    """The adapter changes the vision part, so pictures of a batch must all be its own."""


class AdapterSlots:
    """The adapters of one model by name; each sequence of a batch uses one of them, or none for the base.

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
        vision = [name for name in changed if name not in self._layers.by_sequence]
        return ReadAdapter(changed, alone=any(name not in self._layers.by_picture for name in vision))

    def put(self, name: str, adapter: ReadAdapter) -> None:
        """Makes a read adapter available to sequences."""
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
        by_sequence, vision = name in self._layers.by_sequence, name not in self._layers.decoder
        is_single = isinstance(module, AdaptedLayer) or not any(True for _ in module.children())
        if isinstance(module, AdaptedExperts):
            reason = "experts see tokens that a router sent them, from any sequence"
        elif by_sequence and not is_single:
            reason = "it belongs to a module with others inside, which cannot run on only some sequences"
        elif by_sequence or vision:
            return
        else:
            reason = "that layer is not given the sequences of a batch"
        raise UserError(
            f"{source}: {f'{name}.{parameter}'.lstrip('.')} cannot be served beside other adapters: {reason}; merge it "
            "(dora-vl merge) and serve the merged folder with --model"
        )

    def _slot_layer(self, name: str) -> SlotLayer:
        layer = self.model.get_submodule(name)
        if isinstance(layer, SlotLayer):
            return layer
        axis: Axis = "sequences" if name in self._layers.by_sequence else "pictures"
        slot_layer = SlotLayer(layer, self.batch, axis)
        replace_module(self.model, layer, slot_layer)
        return slot_layer


def sequences_seen(model: nn.Module, run: Callable[[], object], *, sequences: int, tokens: int) -> frozenset[str]:
    """Names the modules that always receive `[sequences, tokens, ...]` or each sequence's last token.

    `run` puts a batch through the model, of several sequences and of another number of tokens than of sequences.
    """
    seen: dict[str, bool] = {}
    shapes = ((sequences, tokens), (sequences, 1))

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


LLAVA_PROJECTOR = "model.multi_modal_projector"
"""This module of a LLaVA-1.5 gets one entry a picture, so each picture can have its own request's projector."""
PROBE_SEQUENCES, PROBE_TOKENS = 2, 2  # a prompt, and a token after it


class UnknownModel(UserError):
    """There is no adapter of this name, and it is not the base's."""


@dataclass(frozen=True)
class ServedEntry:
    """Says how an adapter (or the base) is asked, and what its sequences need of a batch.

    Attributes:
        name: of the adapter; None is the base.
        alone: True where the pictures of a batch must all be its own.
    """

    name: str | None
    encoder: Encoder
    alone: bool = False

    def applied(self, strength: float) -> AppliedAdapter | None:
        """Returns the adapter as a sequence has it at this strength; None is the base."""
        return None if self.name is None or strength == 0 else AppliedAdapter(self.name, strength)


class ServedModel:
    """A base, loaded once, whose sequences may each have another adapter.

    Args:
        source: of the base, and of how it is asked: by itself, or as an adapter on it was trained to be.
        base_name: what the base is called among the adapters.
    """

    def __init__(self, source: ModelSource, base_name: str) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.source = source
        encoder = prompt_encoder(source)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backbone: Backbone[Any] = load_decoder(source).to(device).eval()
        self.assistant = Assistant(self.backbone, encoder)
        self.adapters = AdapterSlots(self.backbone.model, self._layers())
        self._entries: dict[str, ServedEntry] = {base_name: ServedEntry(None, encoder)}

    @property
    def names(self) -> tuple[str, ...]:
        """Names what can be asked, the base first."""
        return tuple(self._entries)

    def entry(self, name: str) -> ServedEntry:
        """Tells how a model of this name is asked. Raises UnknownModel: there is none."""
        if name not in self._entries:
            raise UnknownModel(f"no model {short_repr(name)} is served; there are {', '.join(self._entries)}")
        return self._entries[name]

    def add(self, name: str, folder: Path, source: ModelSource) -> None:
        """Reads an adapter and serves it, before any request."""
        read = self.adapters.read(folder)
        self.adapters.put(name, read)
        self._entries[name] = ServedEntry(name, prompt_encoder(source), read.alone)

    def holding(
        self, entries: Sequence[ServedEntry], pictures: Sequence[int], strengths: Sequence[float] = ()
    ) -> AbstractContextManager[None]:
        """Gives each sequence of the batch, inside the block, its own adapter, number of pictures and strength."""
        strengths = strengths or [1.0] * len(entries)
        applied = [entry.applied(strength) for entry, strength in zip(entries, strengths, strict=True)]
        each = list(zip(entries, applied, pictures, strict=True))
        alone = [adapter for entry, adapter, count in each if count and entry.alone and adapter]
        if alone or not self.by_picture:
            shown_by: list[AppliedAdapter | None] = [alone[0] if alone else None]
        else:
            shown_by = [adapter for _, adapter, count in each for _ in range(count)] or [None]
        return self.adapters.batch.holding(applied, shown_by)

    @property
    def by_picture(self) -> bool:
        """Tells whether each picture of a batch can have the projector of its own sequence's adapter."""
        config: Any = self.backbone.model.config
        return config.model_type == LLAVA

    def _layers(self) -> Layers:
        model = self.backbone.model
        sample = prompt_sample(self.assistant.encoder, [Turn("user", "a")], PromptMedia())
        batch = prompt_batch(self.assistant.encoder, [sample] * PROBE_SEQUENCES)
        options = {"min_new_tokens": PROBE_TOKENS, "num_beams": 1}
        run = partial(self.assistant.new_ids, batch, max_new_tokens=PROBE_TOKENS, options=options)
        seen = sequences_seen(model, run, sequences=PROBE_SEQUENCES, tokens=batch["input_ids"].shape[1])
        by_picture = _inside(model, model.get_submodule(LLAVA_PROJECTOR)) if self.by_picture else frozenset()
        return Layers(by_sequence=seen, by_picture=by_picture, decoder=_inside(model, decoder_of(model)))


def _inside(model: nn.Module, part: nn.Module) -> frozenset[str]:
    inside = set(part.modules())
    return frozenset(name for name, module in model.named_modules() if module in inside)


def open_served(
    model: str | None,
    adapters: Mapping[str, Path],
    *,
    base_name: str | None = None,
    template: str | None = None,
    any_base: bool = False,
) -> ServedModel:
    """Returns a base, else the first adapter's, with its adapters, all checked before the weights are read."""
    first = next(iter(adapters.values()), None)
    if first is None:
        request = ModelRequest(model=model, template=template)
    else:
        request = ModelRequest(adapter=first, base=model, any_base=any_base, template=_template_of(first, template))
    source = find_source(request)
    base_name = base_name or Path(source.base).absolute().name
    if base_name in adapters:
        raise UserError(
            f"the base is called {short_repr(base_name)} too; choose another name, or the base's with --base-name"
        )
    sources = [source_on(source, folder, template=template, any_base=any_base) for folder in adapters.values()]
    served = ServedModel(source, base_name)
    for (name, folder), adapter_source in zip(adapters.items(), sources, strict=True):
        served.add(name, folder, adapter_source)
    return served


def source_on(served: ModelSource, folder: Path, *, template: str | None, any_base: bool) -> ModelSource:
    """Returns an adapter over the base that is served; no weight is read."""
    request = ModelRequest(adapter=folder, base=served.base, any_base=True, template=_template_of(folder, template))
    source = find_source(request)
    expected = str(source.recipe.get("base_sha256") or "")
    sha256 = None if any_base or not expected else _sha256_of(served.base, served.revision)
    if sha256 and sha256 != expected:
        raise UserError(
            f"{folder} was trained on a base with sha256 {expected[:12]}…, the served one has {sha256[:12]}…; serve it "
            "with its own base, or start with --any-base to try it"
        )
    if source.kind != served.kind:
        raise UserError(f"{folder} is an adapter of a {source.kind}, and {served.base} is {served.kind}")
    trained, now = (recipe.get("quantisation") for recipe in (source.recipe, served.recipe))
    if source.recipe and trained != now and not any_base:
        raise UserError(
            f"{folder} was trained on a base with quantisation {trained}, the served one has {now}; serve it apart, "
            "or start with --any-base"
        )
    return source


@cache
def _sha256_of(base: str, revision: str | None) -> str | None:
    """Returns the hash of a base's content; None of one on the hub that is not here yet."""
    try:
        return content_hash(local_folder(base, revision))
    except OSError:
        return None


def _template_of(adapter: Path, template: str | None) -> str | None:
    """Returns a prompt format for a folder that does not say its own."""
    return None if "base" in adapter_recipe(adapter) else template
