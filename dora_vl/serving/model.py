"""One base in memory and the adapters over it, each asked as it was trained to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from dora_vl.adapters.adapter import content_hash, local_folder
from dora_vl.adapters.multi_adapter import AdapterSlots, Layers, rows_seen
from dora_vl.backbones.base import Backbone, decoder_of
from dora_vl.backbones.families.table import LLAVA
from dora_vl.core.strength import AppliedAdapter
from dora_vl.data.turns import Turn
from dora_vl.errors import UserError, short_repr
from dora_vl.evaluation.assistant import Assistant, EncoderPrompts
from dora_vl.evaluation.open_model import (
    ModelRequest,
    ModelSource,
    adapter_recipe,
    find_source,
    load_decoder,
    prompts_of,
)
from dora_vl.evaluation.predictor import PromptMedia

LLAVA_PROJECTOR = "model.multi_modal_projector"
"""This module of a LLaVA-1.5 gets one entry a picture, so each picture can have its own request's projector."""
PROBE_ROWS, PROBE_TOKENS = 2, 2  # a prompt, and a token after it


class UnknownModel(UserError):
    """There is no adapter of this name, and it is not the base's."""


@dataclass(frozen=True)
class ServedEntry:
    """Says how an adapter (or the base) is asked, and what its rows need of a batch.

    Attributes:
        name: of the adapter; None is the base.
        alone: whether the pictures of a batch must all be its own.
    """

    name: str | None
    prompts: EncoderPrompts
    alone: bool = False

    def applied(self, strength: float) -> AppliedAdapter | None:
        """Returns the adapter as a row has it at this strength; None is the base."""
        return None if self.name is None or strength == 0 else AppliedAdapter(self.name, strength)


class ServedModel:
    """A base, loaded once, whose rows may each have another adapter.

    Args:
        source: of the base, and of how it is asked: by itself, or as an adapter on it was trained to be.
        base_name: what the base is called among the adapters.
    """

    def __init__(self, source: ModelSource, base_name: str) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.source = source
        prompts = prompts_of(source)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backbone: Backbone[Any] = load_decoder(source).to(device).eval()
        self.assistant = Assistant(self.backbone, prompts)
        self.adapters = AdapterSlots(self.backbone.model, self._layers())
        self._entries: dict[str, ServedEntry] = {base_name: ServedEntry(None, prompts)}

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
        self._entries[name] = ServedEntry(name, prompts_of(source), read.alone)

    def rows(
        self, entries: Sequence[ServedEntry], pictures: Sequence[int], strengths: Sequence[float] = ()
    ) -> AbstractContextManager[None]:
        """Gives each row of the batch, inside the block, its own adapter, number of pictures and strength (or 1)."""
        strengths = strengths or [1.0] * len(entries)
        applied = [entry.applied(strength) for entry, strength in zip(entries, strengths, strict=True)]
        rows = list(zip(entries, applied, pictures, strict=True))
        alone = [adapter for entry, adapter, count in rows if count and entry.alone and adapter]
        if alone or not self.by_picture:
            shown_by: list[AppliedAdapter | None] = [alone[0] if alone else None]
        else:
            shown_by = [adapter for _, adapter, count in rows for _ in range(count)] or [None]
        return self.adapters.batch.holding(applied, shown_by)

    @property
    def by_picture(self) -> bool:
        """Tells whether each picture of a batch can have the projector of its own row's adapter."""
        config: Any = self.backbone.model.config
        return config.model_type == LLAVA

    def _layers(self) -> Layers:
        model = self.backbone.model
        sample = self.assistant.prompts.sample([Turn("user", "a")], PromptMedia())
        batch = self.assistant.prompts.collate([sample] * PROBE_ROWS, "left")
        options = {"min_new_tokens": PROBE_TOKENS, "num_beams": 1}
        run = partial(self.assistant.new_ids, batch, max_new_tokens=PROBE_TOKENS, options=options)
        seen = rows_seen(model, run, rows=PROBE_ROWS, tokens=batch["input_ids"].shape[1])
        by_picture = _inside(model, model.get_submodule(LLAVA_PROJECTOR)) if self.by_picture else frozenset()
        return Layers(by_row=seen, by_picture=by_picture, decoder=_inside(model, decoder_of(model)))


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
