"""The adapter folder: PEFT's two files plus `recipe.json`; written whole or not at all, loaded strictly.

`adapter_model.safetensors` holds every trained tensor under PEFT's names, and the frozen ones that the result
depends on. `adapter_config.json` is the stable subset of PEFT's fields. `recipe.json` holds what PEFT has no field
for, and whatever the caller needs to rebuild the run (base, template, picture settings).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_vl.core.config import DoRAConfig
from dora_vl.core.inject import apply_dora
from dora_vl.core.precision import Gather, no_gather
from dora_vl.core.trainable import adapted_layers, is_adapted, kept_tensors, trained_parts
from dora_vl.errors import UserError

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
RECIPE_FILE = "recipe.json"
PEFT_PREFIX = "base_model.model."
LEAF_TO_PEFT = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
PEFT_TO_LEAF = {**{peft: leaf for leaf, peft in LEAF_TO_PEFT.items()}, "lora_magnitude_vector.weight": "magnitude"}


# -- saving --------------------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str = "",
    recipe: Mapping[str, Any] | None = None,
    gather: Gather = no_gather,
    write: bool = True,
) -> None:
    """Writes the adapter folder under a temporary name and renames it, replacing an older one.

    With ZeRO-3 every rank calls this, with the `gather` that makes parameters whole; only the rank with `write`
    touches the disk.
    """
    tensors = adapter_tensors(model, gather=gather, copy=write)
    if not write:
        return
    target = Path(folder)
    staging = target.with_name(f".{target.name}.writing-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_json(staging / CONFIG_FILE, peft_config(model, base_model))
    _write_json(staging / RECIPE_FILE, {**(recipe or {}), "adapter": _own_settings(model)})
    replace_folder(staging, target)


def adapter_tensors(model: nn.Module, *, gather: Gather = no_gather, copy: bool = True) -> dict[str, Tensor]:
    """Every trained tensor and every kept one on CPU under PEFT's names; empty on ranks that only take part."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in _expected(model).items():
        with gather([tensor] if isinstance(tensor, nn.Parameter) else []):
            if copy:
                # A clone: safetensors refuses tensors that share memory, and a sharded one is gone after the block.
                tensors[_peft_name(model, name)] = tensor.detach().to("cpu", copy=True).contiguous()
    return tensors


def peft_config(model: nn.Module, base_model: str) -> dict[str, Any]:
    """The stable subset of PEFT 0.21's `adapter_config.json`, from the model as it is adapted now."""
    layers = dict(adapted_layers(model))
    parts = trained_parts(model)
    extras = {name for part in parts if not part.name.startswith("dora.") for name in part.parameters}
    common = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": whole_modules(model, extras) or None,
        "target_modules": sorted(layers),
        "task_type": None,
    }
    if not layers:
        return {"peft_type": "DORA_VL_FULL", **common}
    adapter = next(iter(layers.values())).adapter
    # PEFT knows no magnitude without A and B; an unknown type makes it refuse instead of loading half an adapter.
    return {
        "peft_type": "DORA_VL_MAGNITUDE" if adapter.method == "magnitude" else "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_dora": adapter.method == "dora",
        "use_rslora": adapter.rank_scaling == "sqrt",
        "init_lora_weights": True,
        **common,
    }


def whole_modules(model: nn.Module, parameters: set[str]) -> list[str]:
    """The topmost modules all of whose parameters are named; what PEFT calls `modules_to_save`."""
    chosen: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
        inside = any(name.startswith(f"{outer}.") for outer in chosen)
        if name and own and own <= parameters and not inside:
            chosen.append(name)
    return chosen


def replace_folder(staging: Path, target: Path) -> None:
    """Renames a finished folder into place; an older one steps aside first and is removed last."""
    if not target.exists():
        staging.rename(target)
        return
    previous = target.with_name(f".{target.name}.previous-{os.getpid()}")
    target.rename(previous)
    staging.rename(target)
    shutil.rmtree(previous)


def _own_settings(model: nn.Module) -> dict[str, Any]:
    layers = [layer for _, layer in adapted_layers(model)]
    settings = asdict(layers[0].adapter) if layers else {"method": "full"}
    for derived in ("targets", "also_train", "also_keep"):
        settings.pop(derived, None)
    parts: dict[str, list[str]] = {}
    for part in trained_parts(model):
        if not part.name.startswith("dora."):
            parts.setdefault(part.name, []).extend(part.parameters)
    return {**settings, "parts": parts, "kept": list(kept_tensors(model))}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


# -- loading -------------------------------------------------------------------------------------------------


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], *, gather: Gather = no_gather) -> list[str]:
    """Loads an adapter folder, adapting the model first where it is not; returns the adapted layers' names.

    Raises:
        UserError: a file is missing or broken, a tensor is missing, unexpected or of another shape. Nothing is
            changed in an adapted model then.
    """
    source = Path(folder)
    tensors = read_weights(source)
    if not is_adapted(model):
        apply_dora(model, _config_from(source, tensors, model), gather=gather)
    expected = {_peft_name(model, name): tensor for name, tensor in _expected(model).items()}
    found = {key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): t for key, t in tensors.items()}
    _check_fit(source, expected, found)
    with torch.no_grad():
        for key, tensor in expected.items():
            with gather([tensor] if isinstance(tensor, nn.Parameter) else []):
                tensor.copy_(found[key].view(tensor.shape))
    for _, layer in adapted_layers(model):
        layer.forget_norms()
    return [name for name, _ in adapted_layers(model)]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, safetensors only.

    Raises:
        UserError: the folder or a file is missing, or the file is cut short.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
        raise UserError(f"{path} does not exist ({there}); give the folder that save_adapter or PEFT wrote")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object of an adapter folder.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; an adapter folder holds it beside {WEIGHTS_FILE}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _config_from(folder: Path, tensors: Mapping[str, Tensor], model: nn.Module) -> DoRAConfig:
    """The configuration that the folder was written with; layers and parts are read from the tensors' names."""
    peft = read_json(folder / CONFIG_FILE)
    own = read_json(folder / RECIPE_FILE).get("adapter", {}) if (folder / RECIPE_FILE).is_file() else {}
    layers = {name.rpartition(".")[0] for name in map(own_name, tensors) if name.rpartition(".")[2] in LEAF_TO_PEFT}
    extras = tuple(name for name in map(own_name, tensors) if name.rpartition(".")[2] not in LEAF_TO_PEFT)
    kept = tuple(own.get("kept", ()))
    parts = {part: tuple(names) for part, names in own.get("parts", {}).items()}
    unnamed = tuple(name for name in extras if name not in kept and all(name not in p for p in parts.values()))
    if unnamed:
        parts["extra"] = unnamed
    full = tuple(parts.pop("full", ()))
    method = own.get("method") or ("dora" if peft.get("use_dora") else "lora")
    targets = {name.rpartition(".")[0] for name in full} if method == "full" else layers
    if not targets:
        raise UserError(f"{folder / WEIGHTS_FILE} holds no adapter tensor (lora_A, lora_B, lora_magnitude_vector)")
    return DoRAConfig(
        targets=tuple(sorted(targets)),
        method=method,
        rank=int(peft.get("r", 1)),
        alpha=float(peft.get("lora_alpha", 1.0)),
        dropout=float(peft.get("lora_dropout", 0.0)),
        dropout_mode=own.get("dropout_mode", "whole_change"),
        detach_norm=own.get("detach_norm", True),
        rank_scaling="sqrt" if peft.get("use_rslora") else "linear",
        also_train=parts,
        also_keep=kept,
    )


def _check_fit(source: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    if missing or unexpected:
        raise UserError(
            f"{source} does not fit this model: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}; is it the base that the adapter was trained on?"
        )
    for key, tensor in expected.items():
        # A sharded parameter shows no shape here; its copy checks it.
        if tensor.numel() and found[key].numel() != tensor.numel():
            raise UserError(f"{source}: {key} is {list(found[key].shape)}, this model needs {list(tensor.shape)}")


# -- names ---------------------------------------------------------------------------------------------------


def _expected(model: nn.Module) -> dict[str, Tensor]:
    trained = {name: p for part in trained_parts(model) for name, p in part.parameters.items()}
    return {**trained, **kept_tensors(model)}


def _peft_name(model: nn.Module, name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    return f"{PEFT_PREFIX}{owner}.{LEAF_TO_PEFT.get(leaf, leaf)}" if owner else PEFT_PREFIX + leaf


def own_name(key: str) -> str:
    """The model's own name of a tensor in the adapter folder."""
    name = key.removeprefix(PEFT_PREFIX)
    for peft, leaf in PEFT_TO_LEAF.items():
        if name.endswith(f".{peft}"):
            return f"{name.removesuffix(peft)}{leaf}"
    return name
