"""Reads an adapter of any tool: finds the files, recognises the format by its keys, and converts it to ours.

Sources of the layouts: NVlabs/DoRA (`peft/tuners/dora.py`, `VL-T5/src/trainer_base.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_vl.adapters.adapter import Adapter, names_adapter, read_adapter, write_adapter
from dora_vl.adapters.files import (
    CONFIG_FILE,
    PEFT_PREFIX,
    TRAINED_IN,
    WEIGHTS_FILE,
    not_trained_in,
    read_peft_config,
    read_trained,
    refuse_to_replace_adapter,
)
from dora_vl.adapters.folder import PICKLED_WEIGHTS_FILE, no_adapter
from dora_vl.adapters.settings import READ_TYPES, new_config, own_recipe
from dora_vl.core.trainable import kept_rows
from dora_vl.errors import UserError

EMBEDDING = "model.encoder.visual_embedding"
TOKENS = "model.shared.weight"
ALIASES = (
    TOKENS,
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    f"{EMBEDDING}.obj_order_embedding.weight",
    "lm_head.weight",
)
"""A VL-BART's token embedding is stored under any of these names."""
ADDED_ROWS = f"{TOKENS}[-200:]"
"""These frozen random rows of the token embedding, the picture tokens' orders, change a VL-BART's output."""


@dataclass(frozen=True, kw_only=True)
class KeyLayout:
    """Says how one tool names a layer's tensors: endings after the layer's name, alternatives in order."""

    lora_A: tuple[str, ...]
    lora_B: tuple[str, ...]
    magnitude: tuple[str, ...]
    scale: float | None = None
    """Fixes the scale s, whatever alpha the tool's options name; with None it is alpha over the rank."""
    extras: tuple[str, ...] = ("*",)
    """These full-name globs match the other tensors that were trained."""
    whole_vlbart: bool = False
    """The file also holds a VL-BART; otherwise a tensor that is neither adapter nor extra is refused."""
    renames: tuple[tuple[str, str], ...] = ()
    """Pairs a prefix of the tool's names with transformers' own."""


NVLABS = KeyLayout(
    lora_A=("lora_A.weight", "lora_A.default.weight"),
    lora_B=("lora_B.weight", "lora_B.default.weight"),
    magnitude=("weight_m_wdecomp.weight", "weight_m_wdecomp.default.weight"),
)
LLAVA_RENAMES = (
    ("model.layers.", "model.language_model.layers."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
)
"""Maps prefixes of LLaVA's own class to those of transformers' `LlavaForConditionalGeneration`."""
NVLABS_VLBART = KeyLayout(
    lora_A=("lora_A",),
    lora_B=("lora_B",),
    magnitude=("weight_m",),
    scale=1.0,  # B A is multiplied by one there
    extras=("*.bias", "*layer_norm.*", "*layernorm_embedding.*", "*.visual_embedding.*"),
    whole_vlbart=True,
)
LAYOUTS = {"nvlabs": NVLABS, "nvlabs-llava": replace(NVLABS, renames=LLAVA_RENAMES), "nvlabs-vlbart": NVLABS_VLBART}
"""Maps each name that `dora-vl convert --from` takes, beside `peft`, to its layout."""
FORMATS = ("peft", *LAYOUTS)
FORMAT_KEYS = (
    ("nvlabs-llava", ("model.mm_projector.0.weight",)),
    ("nvlabs", NVLABS.magnitude),
    ("nvlabs-vlbart", ("weight_v",)),
    ("peft", ("lora_A.weight", "lora_embedding_A", "lora_magnitude_vector", "lora_magnitude_vector.weight")),
)
"""Pairs each format with key endings that tell it from the others; the most specific come first."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Adds what the files of some formats do not say."""

    format: str | None = None
    """Chooses one of `FORMATS`; with None the keys tell the format."""
    base: Path | None = None
    """The result records this folder as the base that the adapter belongs to."""
    alpha: float | None = None
    """Gives the scale's numerator where no file states it."""
    renames: tuple[tuple[str, str], ...] = ()
    """Pairs old prefixes of layer names with new ones."""


def read_foreign_adapter(source: Path, options: ReadOptions) -> Adapter:
    """Reads an adapter of any known format."""
    name = options.format
    if name is not None and name not in FORMATS:
        raise UserError(f"no format {name!r}; there are {', '.join(FORMATS)}")
    folder = source if source.is_dir() else source.parent
    config = read_peft_config(folder) if name != "peft" and (folder / CONFIG_FILE).is_file() else {}
    # A folder of ours may hold what PEFT does not know, such as whole weights and no factors.
    is_own = names_adapter(source) and config.get("peft_type") in READ_TYPES - {"LORA"}
    tensors: dict[str, Tensor] = {}
    if name != "peft" and not is_own:
        tensors = _tensors(source)
        name = name or known_format(tensors, str(source))
    if name == "peft" or is_own:
        if options.alpha is not None or options.renames:
            raise UserError(f"{source} is of PEFT's format, which is read as it is: leave --alpha and --rename out")
        return read_adapter(source)
    assert name is not None
    return to_adapter(tensors, LAYOUTS[name], config=config, options=options, source=str(source))


def reading_options(arguments: argparse.Namespace) -> ReadOptions:
    """Turns the options into those of `read_foreign_adapter`."""
    pairs = [rename.partition("=") for rename in arguments.rename]
    if any(not old or not equals for old, equals, _ in pairs):
        raise UserError(f"--rename {arguments.rename}: write OLD=NEW, e.g. --rename model.=model.language_model.")
    return ReadOptions(
        format=arguments.format,
        base=arguments.base,
        alpha=arguments.alpha,
        renames=tuple((old, new) for old, _, new in pairs),
    )


def convert(arguments: argparse.Namespace) -> Iterator[str]:
    """Converts an adapter and yields the lines to print."""
    source, target = arguments.source, arguments.to
    if target.resolve() in (source.resolve(), source.resolve().parent):
        raise UserError(f"--to {target} is where the adapter is read from; name another folder")
    refuse_to_replace_adapter(target)
    adapter = read_foreign_adapter(source, reading_options(arguments))
    write_adapter(adapter, target)
    yield f"{target}: {len(adapter.layers)} layers, {len(adapter.extras)} other tensors"


def known_format(tensors: Mapping[str, Tensor], source: str) -> str:
    """Recognises the format by the keys."""
    for name, endings in FORMAT_KEYS:
        if any(key == ending or key.endswith(f".{ending}") for key in tensors for ending in endings):
            return name
    raise UserError(f"{source}: keys such as {sorted(tensors)[:3]} are of no known format; name it with --from")


def _tensors(source: Path) -> dict[str, Tensor]:
    # Tools give their weight files these names; all that a folder has are read together.
    names = (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE, "non_lora_trainables.bin")
    files = [source] if source.is_file() else [source / name for name in names if (source / name).is_file()]
    if not files:
        raise no_adapter(source)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_trained(file))
    return tensors


def to_adapter(
    tensors: Mapping[str, Tensor], layout: KeyLayout, *, config: Mapping[str, Any], options: ReadOptions, source: str
) -> Adapter:
    """Converts one tool's tensors to an adapter under PEFT's keys; `config` is the tool's own configuration."""
    renames = (*layout.renames, *options.renames)
    layers, others = _split_layers(tensors, layout, renames, source)
    converted: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    alpha = config.get("lora_alpha") if options.alpha is None else options.alpha
    for name, layer in layers.items():
        parts = _own_tensors(layer, f"{source}: {name}")
        converted.update({f"{PEFT_PREFIX}{name}.{leaf}": tensor for leaf, tensor in parts.items()})
        if "A" in layer:
            ranks[name] = rank = len(parts["lora_A.weight"])
            if layout.scale is not None and options.alpha is None:
                scales[name] = layout.scale
            elif alpha is None:
                raise UserError(f"{source}: nothing states the scale (no {CONFIG_FILE} beside it?); add --alpha ALPHA")
            else:
                scales[name] = float(alpha) / rank
    extras = _trained_extras(others, layout, renames, source)
    converted.update({f"{PEFT_PREFIX}{name}": tensor for name, tensor in extras.items()})
    fields = new_config(
        ranks,
        scales,
        lora_dropout=float(config.get("lora_dropout", 0.0)),
        base_model_name_or_path=str(config.get("base_model_name_or_path") or options.base or ""),
        modules_to_save=sorted({name.rpartition(".")[0] for name in extras if name.endswith(".weight")}) or None,
        use_dora=bool(ranks) and any("magnitude" in layer for layer in layers.values()),
    )
    kept = [ADDED_ROWS] if ADDED_ROWS in extras else []
    magnitude_only = layers.keys() - ranks.keys()
    recipe = own_recipe(fields, extras, kept, magnitude_only) if extras or magnitude_only else {}
    return Adapter(converted, fields, recipe, source)


def _split_layers(
    tensors: Mapping[str, Tensor], layout: KeyLayout, renames: tuple[tuple[str, str], ...], source: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Groups the tensors of each adapted layer by role (A, B, magnitude), and returns all the others."""
    kinds = {"A": layout.lora_A, "B": layout.lora_B, "magnitude": layout.magnitude}
    endings = {f".{ending}": kind for kind, spellings in kinds.items() for ending in spellings}
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("module.").removeprefix(PEFT_PREFIX)
        ending = next((ending for ending in endings if name.endswith(ending)), None)
        if ending is None:
            others[name] = tensor
        elif tensor.dtype not in TRAINED_IN:
            raise not_trained_in(source, key, tensor)
        else:
            layers.setdefault(_renamed(name.removesuffix(ending), renames), {})[endings[ending]] = tensor
    if not layers:
        raise UserError(f"{source}: no key ends in {', '.join(layout.lora_A)}; is it another format (--from)?")
    unpaired = sorted(name for name, layer in layers.items() if ("A" in layer) != ("B" in layer))
    if unpaired:
        raise UserError(f"{source}: {len(unpaired)} layers have one of A and B without the other, first {unpaired[0]}")
    without_magnitude = sorted(name for name, layer in layers.items() if "magnitude" not in layer)
    if without_magnitude and len(without_magnitude) < len(layers):
        raise UserError(
            f"{source}: {len(without_magnitude)} of {len(layers)} layers have no magnitude, first "
            f"{without_magnitude[0]}; LLaVA's own script puts them into non_lora_trainables.bin, give the "
            "folder that holds both files"
        )
    return layers, others


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    return next((new + name.removeprefix(old) for old, new in renames if name.startswith(old)), name)


def _own_tensors(layer: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Gives A, B and magnitude of one layer PEFT's names and shapes; a magnitude is [out] or [out, 1...]."""
    a, b, magnitude = layer.get("A"), layer.get("B"), layer.get("magnitude")
    own = {} if a is None or b is None else {"lora_A.weight": a, "lora_B.weight": b}
    if magnitude is None:
        return own
    rows = magnitude.numel() if b is None else len(b)
    if magnitude.numel() != rows or magnitude.shape[0] != rows:
        raise UserError(f"{where}: magnitude {list(magnitude.shape)} fits no {rows} output rows")
    return {**own, "lora_magnitude_vector": magnitude.flatten()}


def _trained_extras(
    others: Mapping[str, Tensor], layout: KeyLayout, renames: tuple[tuple[str, str], ...], source: str
) -> dict[str, Tensor]:
    aliases = ALIASES if layout.whole_vlbart else ()
    extras = {
        name: tensor
        for name, tensor in others.items()
        if name not in aliases and any(fnmatchcase(name, pattern) for pattern in layout.extras)
    }
    strangers = sorted(others.keys() - extras.keys())
    if strangers and not layout.whole_vlbart:
        raise UserError(
            f"{source}: {len(strangers)} tensors are not LoRA or DoRA factors, first {strangers[:3]}; this converter "
            "would lose them (LoHa, LoKr, Tucker factors and trained norms are not read)"
        )
    trained = {_renamed(name, renames): tensor for name, tensor in extras.items()}
    return {**trained, **_added_rows(others, trained, source)} if layout.whole_vlbart else trained


def _added_rows(others: Mapping[str, Tensor], trained: Iterable[str], source: str) -> dict[str, Tensor]:
    """Copies a VL-BART's added rows into a tensor of their own: the whole tensor is the base's, and large."""
    rows = {name: kept_rows(ADDED_ROWS, others[name]).clone() for name in ALIASES if name in others}
    if not rows and any(name.startswith(f"{EMBEDDING}.") for name in trained):
        raise UserError(f"{source}: none of {', '.join(ALIASES)} is there, whose last rows the pictures' tokens need")
    first = next(iter(rows), "")
    if other := next((name for name in rows if not torch.equal(rows[name], rows[first])), None):
        raise UserError(f"{source}: the last rows of {first} and of {other} differ; they are one tensor in a VL-BART")
    return {ADDED_ROWS: rows[first]} if rows else {}
