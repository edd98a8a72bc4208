"""Adapters of other tools, read into ours by the table of their layouts."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from dora_vl.adapters.adapter import Adapter
from dora_vl.adapters.folder import PEFT_PREFIX
from dora_vl.adapters.foreign_layouts import KeptRows, Layout
from dora_vl.adapters.peft_config import new_config, own_recipe
from dora_vl.core.trainable import kept_rows
from dora_vl.errors import UserError


def split_layers(
    tensors: Mapping[str, Tensor], layout: Layout
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each adapted layer by what they are, and all the others."""
    endings = {
        **{ending: "A" for ending in layout.lora_A},
        **{ending: "B" for ending in layout.lora_B},
        **{ending: "magnitude" for ending in layout.magnitude},
        **{ending: "alpha" for ending in layout.alpha},
    }
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("module.").removeprefix(PEFT_PREFIX)
        ending = next((e for e in endings if name.endswith(f".{e}")), None)
        if ending is None:
            others[name] = tensor
        else:
            layers.setdefault(name.removesuffix(f".{ending}"), {})[endings[ending]] = tensor
    return layers, others


def to_adapter(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    *,
    config: Mapping[str, Any],
    alpha: float | None = None,
    renames: tuple[tuple[str, str], ...] = (),
    base_model: str = "",
    source: str = "adapter",
) -> Adapter:
    """Turns one tool's dictionary into an adapter under PEFT's keys.

    Args:
        tensors: The tool's dictionary, its keys as they are in the file.
        layout: Where the tool puts what.
        config: The tool's own `adapter_config.json`; empty where it writes none.
        alpha: Numerator of the scale, where the files do not state it; wins over what they state.
        renames: Further (old beginning, new beginning) of names, after the layout's own.
        base_model: For the new configuration.
        source: For messages.

    Raises:
        UserError: no adapter in the dictionary, half a pair, some magnitudes missing, or no way to know the scale.
    """
    found, others = split_layers(tensors, layout)
    layers = {_renamed(name, (*layout.renames, *renames)): layer for name, layer in found.items()}
    if not layers:
        raise UserError(f"{source}: no key ends in {', '.join(layout.lora_A)}; is it another format (--from)?")
    _check_layers(layers, source)
    own, scales, input_axis = _convert_layers(layers, layout, config=config, alpha=alpha, source=source)
    ranks = {name: len(own[f"{PEFT_PREFIX}{name}.lora_A.weight"]) for name in scales}
    extras = _trained_extras(others, layout, renames, source)
    new = new_config(
        ranks=ranks,
        scales=scales,
        use_dora=bool(ranks) and any("magnitude" in layer for layer in layers.values()),
        whole_modules={name.rpartition(".")[0] for name in extras if name.endswith(".weight")},
        base_model=base_model,
        dropout=float(config.get("lora_dropout", 0.0)),
    )
    own.update({f"{PEFT_PREFIX}{name}": tensor for name, tensor in extras.items()})
    kept = [layout.kept.own] if layout.kept is not None and layout.kept.own in extras else []
    alone = layers.keys() - ranks.keys()
    recipe = own_recipe(new, extras, kept, alone) if extras or alone else {}
    return Adapter(own, new, recipe, source, input_axis)


def _convert_layers(
    layers: Mapping[str, Mapping[str, Tensor]],
    layout: Layout,
    *,
    config: Mapping[str, Any],
    alpha: float | None,
    source: str,
) -> tuple[dict[str, Tensor], dict[str, float], frozenset[str]]:
    """All layers' tensors under PEFT's keys, each low-rank pair's scale, and where the norm was an input's."""
    own: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    input_axis: set[str] = set()
    for name, layer in layers.items():
        converted, axis = _own_tensors(layer, layout, f"{source}: {name}")
        own.update({f"{PEFT_PREFIX}{name}.{leaf}": tensor for leaf, tensor in converted.items()})
        input_axis.update({name} if axis == "input" else ())
        if "A" in layer:
            scales[name] = _scale(layer, len(converted["lora_A.weight"]), layout, config, alpha, source)
    return own, scales, frozenset(input_axis)


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for old, new in renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _check_layers(layers: Mapping[str, Mapping[str, Tensor]], source: str) -> None:
    half = sorted(name for name, layer in layers.items() if ("A" in layer) != ("B" in layer))
    if half:
        raise UserError(f"{source}: {len(half)} layers have one of A and B without the other, first {half[0]}")
    bare = sorted(name for name, layer in layers.items() if "magnitude" not in layer)
    if bare and len(bare) < len(layers):
        raise UserError(
            f"{source}: {len(bare)} of {len(layers)} layers have no magnitude, first {bare[0]}; LLaVA's own script "
            "puts them into non_lora_trainables.bin, give the folder that holds both files"
        )


def _own_tensors(layer: Mapping[str, Tensor], layout: Layout, where: str) -> tuple[dict[str, Tensor], str]:
    """A, B and magnitude of one layer under PEFT's leaves and in PEFT's shapes, and the magnitude's axis."""
    a, b, magnitude = layer.get("A"), layer.get("B"), layer.get("magnitude")
    if layout.transposed and a is not None and b is not None:
        a, b = a.t().contiguous(), b.t().contiguous()
    own: dict[str, Tensor] = {}
    if a is not None and b is not None:
        own = {"lora_A.weight": a, "lora_B.weight": b}
    if magnitude is None:
        return own, "output"
    rows = magnitude.numel() if b is None else len(b)
    columns = -1 if a is None else a.shape[1]
    axis = _magnitude_axis(magnitude, rows, columns, where)
    if axis == "input" and a is not None and a.ndim > 2:
        raise UserError(f"{where}: a convolution's magnitude per input channel is not read; train with wd_on_output")
    kernel_axes = 0 if a is None or axis == "input" else a.ndim - 2
    own["lora_magnitude_vector"] = magnitude.reshape(1, -1, *[1] * kernel_axes) if kernel_axes else magnitude.flatten()
    return own, axis


def _magnitude_axis(magnitude: Tensor, rows: int, columns: int, where: str) -> str:
    """Which way the norm was taken, from the shape: [out, 1...] or [out] is a row's, [1, in...] a column's."""
    if magnitude.numel() == rows and magnitude.shape[0] == rows:
        return "output"
    if magnitude.numel() == columns and magnitude.shape[0] == 1:
        return "input"
    raise UserError(
        f"{where}: magnitude {list(magnitude.shape)} fits neither {rows} output rows nor {columns} input columns"
    )


def _scale(
    layer: Mapping[str, Tensor],
    rank: int,
    layout: Layout,
    config: Mapping[str, Any],
    alpha: float | None,
    source: str,
) -> float:
    if alpha is not None:
        return alpha / rank
    if layout.alpha:
        return float(layer["alpha"]) / rank if "alpha" in layer else 1.0
    stated = layout.scale(config, rank)
    if stated is None:
        raise UserError(f"{source}: nothing states the scale (no adapter_config.json beside it?); add --alpha ALPHA")
    return stated


def _trained_extras(
    others: Mapping[str, Tensor], layout: Layout, renames: tuple[tuple[str, str], ...], source: str
) -> dict[str, Tensor]:
    aliases = () if layout.kept is None else layout.kept.names
    extras = {name: one for name, one in others.items() if _matches(name, layout.extras) and name not in aliases}
    strangers = sorted(set(others) - set(extras))
    if strangers and not layout.whole_model:
        raise UserError(
            f"{source}: {len(strangers)} tensors are no LoRA or DoRA factor, first {strangers[:3]}; this converter "
            "would lose them (LoHa, LoKr, Tucker factors and trained norms are not read)"
        )
    trained = {_renamed(name, (*layout.renames, *renames)): tensor for name, tensor in extras.items()}
    return {**trained, **_rows_kept(others, trained, layout.kept, source)}


def _rows_kept(
    others: Mapping[str, Tensor], trained: Mapping[str, Tensor], kept: KeptRows | None, source: str
) -> dict[str, Tensor]:
    """The rows of a layout that keeps some, as tensors of their own: the whole one is the base's, and large."""
    if kept is None:
        return {}
    found = {name: kept_rows(kept.own, others[name]).clone() for name in kept.names if name in others}
    if not found and any(fnmatchcase(name, kept.needed_by) for name in trained):
        raise UserError(
            f"{source}: none of {', '.join(kept.names)} is there, whose last rows the pictures' tokens need"
        )
    first = next(iter(found), "")
    if other := next((name for name, rows in found.items() if not torch.equal(rows, found[first])), None):
        raise UserError(f"{source}: the last rows of {first} and of {other} differ; they are one tensor in a VL-BART")
    return {kept.own: found[first]} if found else {}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
