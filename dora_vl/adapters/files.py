"""Files of adapter folders and checkpoints: tensors of any tool, JSON, folders that appear whole or not at all; and
whether an adapter's tensors mean the same in a model, by their names and the settings on both sides.

No pickled code is run. Folders come from anywhere, so a field of the wrong type is refused by name before it is used.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from os.path import lexists
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dora_vl.core.config import AdapterSettings, DoRAConfig, is_of_type
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.trainable import adapted_layers
from dora_vl.errors import UserError, short_repr
from dora_vl.files import UNFINISHED, check_whole, clear_leftovers, read_json

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
TRAINED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a file to the CPU, by key; a pickle is only read with `weights_only=True`."""
    if not path.is_file():
        files = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else "no such folder"
        raise UserError(f"{path} does not exist ({files}); give the folder or file that holds the adapter")
    if path.suffix not in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES):
        raise UserError(f"{path} is not a weights file; {SAFETENSORS_SUFFIX}, {', '.join(PICKLE_SUFFIXES)} are read")
    check_whole(path)
    try:
        if path.suffix == SAFETENSORS_SUFFIX:
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as plain tensors ({reason}); nothing in it was run") from error
    for wrapper in ("state_dict", "model"):  # whole networks are wrapped so
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    others = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(f"{path}: {others[:3]} are not tensors; save only the state dictionary")
    return {str(key): tensor.detach() for key, tensor in content.items()}


def read_trained(path: Path) -> dict[str, Tensor]:
    """Reads an adapter's tensors; refuses NaN, infinity and dtypes that nothing trains in."""
    tensors = read_tensors(path)
    for key, tensor in tensors.items():
        if tensor.dtype not in (*TRAINED_IN, torch.int64, torch.bool):  # whole modules carry positions and counts
            raise not_trained_in(str(path), key, tensor)
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{path}: {len(broken)} tensors hold NaN or infinity, first {broken[:3]}; use another save")
    return tensors


def not_trained_in(source: str, key: str, tensor: Tensor) -> UserError:
    """Makes the error for a tensor of a type that nothing trains in, since it would be rounded."""
    return UserError(
        f"{source}: {key} holds {str(tensor.dtype).removeprefix('torch.')}, in which no adapter trains; save it in "
        "float32, float16 or bfloat16"
    )


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def byte_size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Returns a tensor's bytes in the file."""
    return math.prod(shape) * dtype.itemsize


def write_safetensors(
    path: Path, entries: Mapping[str, tuple[tuple[int, ...], torch.dtype]], read: Callable[[str], Tensor]
) -> None:
    """Writes a file of announced shapes and dtypes, tensor by tensor; `read` returns a tensor by its name.

    The format: eight bytes of header length, little-endian; a JSON object of name -> dtype, shape and byte range; then
    the bytes, in the order of the ranges, without gaps.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in entries.items():
        end = offset + byte_size(shape, dtype)
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (shape, dtype) in entries.items():
            tensor = read(name).detach().cpu().contiguous()
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"announced {name} {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
            if tensor.numel():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


WEIGHTS_FILE, CONFIG_FILE, RECIPE_FILE = FILES = "adapter_model.safetensors", "adapter_config.json", "recipe.json"

COUNTS = frozenset(("r", "rank", "rank_pattern", "max_tokens"))
"""Numbers in these fields of the two JSON files are at least 1."""


PEFT_KINDS: Mapping[str, Any] = {
    "peft_type": str,
    "r": int,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "modules_to_save": list[str] | None,
    "target_modules": str | list[str] | None,
    **dict.fromkeys(("lora_alpha", "lora_dropout"), float),
    **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out"), bool),
    **dict.fromkeys(("base_model_name_or_path", "revision"), str | None),
}
"""Maps fields of PEFT's `adapter_config.json` that something here is computed from to their types."""
ADAPTER_KINDS: Mapping[str, Any] = {
    **get_type_hints(AdapterSettings),
    **dict.fromkeys(("parts", "adapted_parts"), dict[str, list[str]]),
    **dict.fromkeys(("experts", "kept"), list[str]),
}
"""Maps fields of `adapter` in our `recipe.json` to their types."""
RECIPE_KINDS: Mapping[str, Any] = {
    "dtype": Literal["float32", "bfloat16", "float16"],
    "max_tokens": int,
    "thinking": bool | None,
    "as_published": bool,
    "adapter": dict,
    **dict.fromkeys(("task", "base"), str),
    **dict.fromkeys(("revision", "base_sha256", "quantisation", "template", "image_aspect"), str | None),
}
"""Maps fields of our `recipe.json`, by which the model is asked again, to their types."""


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Reads PEFT's fields of an adapter folder."""
    content = read_json(folder / CONFIG_FILE)
    _check_fields(folder / CONFIG_FILE, content, PEFT_KINDS)
    return content


def read_recipe(folder: Path) -> dict[str, Any]:
    """Reads our `recipe.json`; empty for a folder that was not made here."""
    path = folder / RECIPE_FILE
    if not path.is_file():
        return {}
    content = read_json(path)
    _check_fields(path, content, RECIPE_KINDS)
    _check_fields(path, content.get("adapter", {}), ADAPTER_KINDS)
    return content


def _check_fields(path: Path, content: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Refuses a field of another type, a count below 1, and what no number or path is: NaN, infinity, a NUL."""
    for name, kind in kinds.items():
        if name not in content:
            continue
        value = content[name]
        values = value.values() if isinstance(value, dict) else (value,)
        if not is_of_type(value, kind):
            problem = f"it must be {kind.__name__ if isinstance(kind, type) else kind}"
        elif any(isinstance(number, float) and not math.isfinite(number) for number in values):
            problem = "it must be finite"
        elif name in COUNTS and any(number is not None and number < 1 for number in values):
            problem = "it must be 1 or more"
        elif isinstance(value, str) and "\0" in value:
            problem = "it holds a NUL character, which no path or name has"
        else:
            continue
        raise UserError(f"{path}: {name} is {short_repr(value)}; {problem}")


def refuse_to_replace(target: Path, written: Collection[str]) -> None:
    """Refuses a target that exists, unless it is a folder that only holds files named in `written`."""
    clear_leftovers(target.parent, target.name)
    if not lexists(target):
        return
    if not target.is_dir():
        raise UserError(f"{target} is there already and is not a folder; name another one, or move it away")
    clear_leftovers(target)  # of a check that was being written
    foreign = sorted(path.name for path in target.iterdir() if path.name not in written or path.is_dir())
    if foreign:
        raise UserError(
            f"{target} is there already and holds {foreign[0]} ({len(foreign)} files or folders that were not written "
            "by this), which replacing it would delete; name another folder, or move it away"
        )


_NAME = re.compile(r"checkpoint-(\d+)")
WRITING = f".checkpoints.{UNFINISHED}-now"
"""A checkpoint is written into this folder of the run and then renamed."""
STATE_FILE = "trainer_state.json"
LAST = "last"
"""This value of `resume` means the newest whole checkpoint."""


def step_of(checkpoint: Path) -> int:
    """Reads the optimizer step from a checkpoint folder's name."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise UserError(f"{checkpoint} is not a checkpoint folder (checkpoint-<step>)")
    return int(match[1])


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """Lists a run's whole checkpoints, oldest first; a folder gets its name only once everything is in it."""
    if not run_folder.is_dir():
        return []
    named = [path for path in run_folder.iterdir() if _NAME.fullmatch(path.name) and (path / STATE_FILE).is_file()]
    return sorted(named, key=step_of)


def checkpoint_to_resume(resume: str | None, run_folder: Path) -> Path | None:
    """Finds the folder that `resume` means: null, `last`, or a path."""
    if resume is None:
        return None
    if resume != LAST:
        path = Path(resume)
        if not (path / STATE_FILE).is_file():
            raise UserError(f"resume: {path} is not a complete checkpoint (no {STATE_FILE} in it)")
        step_of(path)
        return path
    checkpoints = complete_checkpoints(run_folder)
    if not checkpoints:
        raise UserError(f"resume: no complete checkpoint in {run_folder}; start without resume")
    return checkpoints[-1]


def rename_later_checkpoints(run_folder: Path, checkpoint: Path) -> list[tuple[Path, Path]]:
    """Renames a run's checkpoints after `checkpoint` (all of them if it is elsewhere), so that they no longer count."""
    checkpoints = complete_checkpoints(run_folder)
    since = next((step_of(path) for path in checkpoints if path.samefile(checkpoint)), -1)
    renamed = []
    for later in (path for path in checkpoints if step_of(path) > since):
        target, number = later.with_name(f"superseded-{later.name}"), 1
        while lexists(target):
            number += 1
            target = later.with_name(f"superseded-{later.name}-{number}")
        renamed.append((later, later.rename(target)))
    return renamed


def drop_old_checkpoints(run_folder: Path, *, keep: int | None, also_keep: Iterable[Path] = ()) -> None:
    """Removes all checkpoints but the `keep` newest (None keeps all) and `also_keep`."""
    if keep is None or keep <= 0:
        return
    kept = {path.resolve() for path in also_keep}
    for old in complete_checkpoints(run_folder)[:-keep]:
        if old.resolve() not in kept:
            removed = old.with_name(f".{old.name}.{UNFINISHED}-removed")  # half of it must not count as a checkpoint
            old.rename(removed)
            shutil.rmtree(removed)


def refuse_to_replace_adapter(target: Path) -> None:
    """Refuses a target that exists, unless it is an adapter folder with nothing more in it."""
    refuse_to_replace(target, FILES if (target / CONFIG_FILE).is_file() else ())


PEFT_PREFIX = "base_model.model."
FILE_TO_LEAF = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "vera_lambda_d": "lambda_d",
    "vera_lambda_b": "lambda_b",
}
"""Maps every spelling that a file may have of an adapter's tensor to the layer's own name of it."""
LEAVES = frozenset(FILE_TO_LEAF.values())
_FACTOR = re.compile(rf"(.+)\.({'|'.join(map(re.escape, FILE_TO_LEAF))})")


def split_key(key: str) -> tuple[str, str | None]:
    """Splits a PEFT key into the layer's full name and the tensor's own; (key, None) for a tensor of no adapter."""
    match = _FACTOR.fullmatch(key.removeprefix(PEFT_PREFIX))
    return (key, None) if match is None else (match[1], FILE_TO_LEAF[match[2]])


def own_name(key: str) -> str:
    """Returns the model's own name of a tensor in an adapter file."""
    name = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    layer, leaf = split_key(name)
    return name if leaf is None else f"{layer}.{leaf}"


def by_own_name(source: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns an adapter file's tensors by the model's own names, and apart from them PEFT's copies of weights.

    PEFT saves `lm_head.base_layer.weight`, which did not train, beside the factors of an embedding or output head.
    """
    adapted = {owner for owner, _, leaf in (own_name(key).rpartition(".") for key in tensors) if leaf in LEAVES}
    own: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = own_name(key)
        owner, _, leaf = name.rpartition(".")
        if leaf in LEAVES and tensor.dtype not in TRAINED_IN:
            raise not_trained_in(source, name, tensor)
        group = copies if key.endswith(".base_layer.weight") and owner in adapted else own
        if name in group:
            raise UserError(f"{source} holds {name} twice, the second time as {key}; save the adapter again")
        group[name] = tensor
    return own, copies


def refuse_other_copy(source: str, name: str, copy: Tensor, weight: Tensor) -> None:
    """Raises a `UserError` unless PEFT's copy of an adapted layer's weight is the base's own, rounding left aside."""
    narrow = min(copy.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    if copy.shape != weight.shape or not torch.equal(copy.to(narrow), weight.detach().to(copy.device, narrow)):
        raise UserError(
            f"{source} has another {name} ({list(copy.shape)}) than the base ({list(weight.shape)}), of which "
            "PEFT saved a copy beside A and B; give the base that it was trained on, tokens added and weights trained"
        )


def tied_names(model: nn.Module) -> list[frozenset[str]]:
    """Lists all names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [frozenset(group) for group in names.values() if len(group) > 1]


def untied(source: str, name: str, others: Iterable[str], change: str) -> UserError:
    """Makes the error for a change of one of several tied tensors, which would change the others too."""
    return UserError(
        f"{source} {change} {name}, which in this base is one tensor with {', '.join(sorted(others))}, and that would "
        "change too; give a base that stores both (tie_word_embeddings: false in its config.json)"
    )


def refuse_untied_values(source: str, model: nn.Module, names: Iterable[str]) -> None:
    """Raises a `UserError` if PEFT trained one of several tied tensors, which it holds apart from the others."""
    tied = {name: group - {name} for group in tied_names(model) for name in group}
    for name in names:
        if name in tied:
            raise untied(source, name, tied[name], "trained")


def file_name(model: nn.Module, name: str) -> str:
    """Returns the name under which a tensor of the model is saved."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, AdaptedLayer):
        leaf = module.FILE_LEAVES.get(leaf, leaf)
    return f"{PEFT_PREFIX}{owner}.{leaf}" if owner else f"{PEFT_PREFIX}{leaf}"


def whole_change(config: DoRAConfig) -> DoRAConfig:
    """Rewrites a PiSSA folder's configuration as PEFT reads it: a change of the original weight, at twice the rank."""
    if config.init != "pissa":
        return config
    factor = 2 if config.rank_scaling == "linear" else 2**0.5
    return replace(
        config,
        init="kaiming",
        rank=2 * config.rank,
        alpha=factor * config.alpha,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: factor * alpha for name, alpha in config.alpha_pattern.items()},
    )


def fields_of_the_change(expected: DoRAConfig, own: DoRAConfig) -> list[str]:
    """Names the settings of a layer that say what its A and B mean."""
    return [*(["init"] if "pissa" in (expected.init, own.init) else ()), "rank", "alpha", "rank_scaling"]


def first_difference(expected: DoRAConfig, own: DoRAConfig, fields: Sequence[str]) -> tuple[str, object, object] | None:
    """Returns the first field in which two layers' settings differ, with both values."""
    pairs = ((field, getattr(expected, field), getattr(own, field)) for field in fields)
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def refuse_other_settings(source: str, model: nn.Module, config: DoRAConfig, *, dropout_mode_is_stated: bool) -> None:
    """Raises a `UserError` if a folder's tensors would mean something else with a model's own settings.

    The probability of dropout is the model's own; where both drop, they must drop from the same path.
    """
    advice = "; load it into a fresh base model, or adapt the model as the folder says"
    layers = dict(adapted_layers(model))
    if (config.method == "full") != (not layers):
        raise UserError(f"{source}: method is {config.method!r}, this model has {len(layers)} adapted layers{advice}")
    for name, layer in layers.items():
        expected, own = config.for_layer(name, magnitude_only=name in config.magnitude_targets), layer.adapter
        fields = ["method"]
        if own.method in ("dora", "lora"):
            fields += fields_of_the_change(expected, own)
            if dropout_mode_is_stated and expected.dropout and own.dropout:
                fields.append("dropout_mode")
        if (difference := first_difference(expected, own, fields)) is not None:
            field, theirs, ours = difference
            raise UserError(f"{source}: {name} has {field} {theirs!r} there, and {ours!r} in this model{advice}")


def layers_beyond_peft(layers: Mapping[str, AdaptedLayer]) -> dict[str, str]:
    """Maps layers to the setting which PEFT's low-rank path leaves out."""
    settings = {name: layer.setting_beyond_peft() for name, layer in layers.items() if layer.lora_A is not None}
    return {name: setting for name, setting in settings.items() if setting is not None}


def refuse_geometry_that_peft_ignored(
    source: str, model: nn.Module, peft: Mapping[str, Any], own: Mapping[str, Any]
) -> None:
    """Raises a `UserError` if PEFT trained A and B of a layer under another geometry than its weight's.

    `peft` is the folder's `adapter_config.json`. With `own` settings beside it the folder is this package's, whose A
    and B go through the layer's own geometry, whatever version wrote it.
    """
    if own or peft.get("peft_type", "LORA") != "LORA":
        return
    for name, setting in layers_beyond_peft(dict(adapted_layers(model))).items():
        raise UserError(
            f"{source}: {name} has {setting}, which PEFT leaves out of its low-rank path, so that its A and B mean "
            "another change there; train without such layers in target_modules, or train them here"
        )
