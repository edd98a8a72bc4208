"""An adapter from wherever it lies: finds the files, knows the format by its keys, and reads it into ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_vl.adapters.adapter import Adapter, names_adapter, read_adapter
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.files import read_peft_config, read_tensors, refuse_not_finite
from dora_vl.adapters.folder import CONFIG_FILE, PICKLED_WEIGHTS_FILE, WEIGHTS_FILE, no_adapter, read_json
from dora_vl.adapters.foreign import LAYOUTS, from_kohya, from_torchtune, from_vl_adapter, to_adapter
from dora_vl.adapters.settings import READ_TYPES
from dora_vl.errors import UserError

FORMATS = ("peft", *LAYOUTS)
WEIGHT_FILES = (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE, "adapters.safetensors", "adapter_0.pt", "non_lora_trainables.bin")
"""What tools call their files; all that a folder has are read together."""

TELLING_KEYS = (
    ("nvlabs-llava", ("model.mm_projector.0.weight",)),
    ("nvlabs", ("weight_m_wdecomp.weight", "weight_m_wdecomp.default.weight")),
    ("nvlabs-vlbart", ("weight_v",)),
    ("torchtune", ("lora_a.weight",)),
    ("mlx", ("lora_a",)),
    ("kohya", ("lora_down.weight",)),
    ("peft", ("lora_A.weight", "lora_embedding_A", "lora_magnitude_vector", "lora_magnitude_vector.weight")),
)
"""Ends of keys that one format alone has, the most telling first."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What the files of some formats do not say."""

    format: str | None = None
    """One of `FORMATS`; None: known by the keys."""
    base: Path | None = None
    """The base model's folder: head counts for torchtune, names for kohya."""
    alpha: float | None = None
    """Numerator of the scale, where no file states it."""
    alpha_serves_result: bool = False
    """It is what is written, too: a source that states its own has its own, and the result this one."""
    task: str | None = None
    """Which of VL-Adapter's tasks."""
    renames: tuple[tuple[str, str], ...] = ()
    """(old beginning, new beginning) of layer names."""


def read_any(source: Path, options: ReadOptions) -> Adapter:
    """Reads an adapter of any known format."""
    if options.format is not None and options.format not in FORMATS:
        raise UserError(f"no format {options.format!r}; there are {', '.join(FORMATS)}")
    if options.format == "peft" or _is_own(source):
        return _as_it_stands(source, options)
    tensors = _tensors(source)
    name = options.format or known_format(tensors, str(source))
    if name == "peft":
        return _as_it_stands(source, options)
    config = _config_beside(source)
    return to_adapter(
        _under_our_names(name, tensors, options, str(source)),
        LAYOUTS[name],
        config=config,
        alpha=options.alpha,
        renames=options.renames,
        base_model=str(config.get("base_model_name_or_path") or options.base or ""),
        source=str(source),
    )


def _as_it_stands(source: Path, options: ReadOptions) -> Adapter:
    """A folder of PEFT's form, which says its scale and its layers' names itself."""
    if options.alpha is not None and not options.alpha_serves_result:
        raise UserError(
            f"{source}: --alpha is for files that do not state it; this one's {CONFIG_FILE} does: leave it out, or "
            "change lora_alpha in a copy of the folder"
        )
    if options.renames:
        raise UserError(
            f"{source}: --rename is for other tools' names; a folder of PEFT's form is read as it stands: leave the "
            "option out"
        )
    return read_adapter(source)


def _is_own(source: Path) -> bool:
    """Whether it is a folder of ours that holds what PEFT does not know, such as whole weights and no factors."""
    return names_adapter(source) and _config_beside(source).get("peft_type") in READ_TYPES - {"LORA"}


def known_format(tensors: Mapping[str, Tensor], source: str) -> str:
    """The format that the keys tell."""
    for name, endings in TELLING_KEYS:
        if any(key == ending or key.endswith(f".{ending}") for key in tensors for ending in endings):
            return name
    if any(key.rpartition(".")[0].endswith((".lora_As", ".lora_Bs")) for key in tensors):
        return "vl-adapter"
    raise UserError(f"{source}: keys such as {sorted(tensors)[:3]} are of no known format; name it with --from")


def _tensors(source: Path) -> dict[str, Tensor]:
    files = [source] if source.is_file() else [source / name for name in WEIGHT_FILES if (source / name).is_file()]
    if not files:
        raise no_adapter(source)
    tensors: dict[str, Tensor] = {}
    for file in files:
        read = read_tensors(file)
        refuse_not_finite(read, str(file))
        tensors.update(read)
    return tensors


def _config_beside(source: Path) -> dict[str, Any]:
    folder = source if source.is_dir() else source.parent
    return read_peft_config(folder) if (folder / CONFIG_FILE).is_file() else {}


def _under_our_names(name: str, tensors: dict[str, Tensor], options: ReadOptions, source: str) -> dict[str, Tensor]:
    if name == "vl-adapter":
        return from_vl_adapter(tensors, options.task, source)
    if name not in {"torchtune", "kohya"}:
        return tensors
    if options.base is None:
        raise UserError(f"{source} is of format {name}, whose layer names need the base model: add --base FOLDER")
    if name == "torchtune":
        return from_torchtune(tensors, read_json(options.base / "config.json"), source)
    with BaseWeights(options.base) as base:
        return from_kohya(tensors, base.module_names(), source)
