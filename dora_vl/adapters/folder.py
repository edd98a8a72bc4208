"""The adapter folder: PEFT's two files plus `recipe.json`; written whole or not at all, loaded strictly.

`adapter_model.safetensors` holds every trained tensor under PEFT's names, and the frozen ones that the result
depends on. `adapter_config.json` is the stable subset of PEFT's fields. `recipe.json` holds what PEFT has no field
for, and whatever the caller needs to rebuild the run (base, template, picture settings).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_vl.adapters.files import (
    CONFIG_FILE,
    FILES,
    RECIPE_FILE,
    WEIGHTS_FILE,
    by_own_name,
    complete_checkpoints,
    file_name,
    read_peft_config,
    read_recipe,
    read_trained,
    refuse_geometry_that_peft_ignored,
    refuse_other_copy,
    refuse_other_settings,
    refuse_to_replace_adapter,
    refuse_untied_values,
    whole_change,
)
from dora_vl.adapters.settings import own_settings, peft_config, read_config
from dora_vl.core.config import DoRAConfig
from dora_vl.core.inject import apply_dora, refuse_unwritable, subtract_start
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.quantised import loose_tensors
from dora_vl.core.trainable import Gather, adapted_layers, is_adapted, kept_rows, kept_tensors, no_gather, trained_parts
from dora_vl.errors import UserError, short_names
from dora_vl.files import whole_folder, write_json

PICKLED_WEIGHTS_FILE = "adapter_model.bin"
INNER = "adapter"
"""The adapter folder has this name in a run and in each of its checkpoints."""


def save_adapter(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    base_model: str = "",
    recipe: Mapping[str, Any] | None = None,
    gather: Gather = no_gather,
    write: bool = True,
) -> None:
    """Writes the adapter folder, whole or not at all, in place of an older one.

    With ZeRO-3 every rank calls this, with the `gather` that makes parameters whole; only the rank with `write`
    touches the disk.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in _expected(model).items():
        with gather([tensor]) as (gathered,):
            if write:
                # A clone: safetensors refuses tensors that share memory, and a sharded one is gone after the block.
                kept = kept_rows(name, gathered.detach()).to("cpu", copy=True)
                tensors[file_name(model, name)] = _in_file(model, name, kept)
    if write:
        own = {**(recipe or {}), "adapter": own_settings(model)}
        write_folder(Path(folder), tensors, peft_config(model, base_model), own)


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], recipe: Mapping[str, Any]
) -> None:
    """Writes an adapter folder's files, whole or not at all, in place of an older one."""
    refuse_to_replace_adapter(folder)
    with whole_folder(folder) as staging:
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, staging / WEIGHTS_FILE, {"format": "pt"}
        )
        write_json(staging / CONFIG_FILE, config)
        if recipe:
            write_json(staging / RECIPE_FILE, recipe)


def _layer_of(model: nn.Module, name: str) -> tuple[AdaptedLayer | None, str]:
    """Splits a tensor's name into its adapted layer, if it has one, and its name in that layer."""
    owner, _, leaf = name.rpartition(".")
    layer = model.get_submodule(owner)
    return (layer if isinstance(layer, AdaptedLayer) else None), leaf


def _in_file(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Gives a tensor its shape in the file; a PiSSA layer's A and B get their start appended, as a change of W."""
    layer, leaf = _layer_of(model, name)
    if layer is not None and leaf == "magnitude":
        return tensor.view(layer.magnitude_file_shape())
    if layer is not None and "start_A" in layer._buffers and leaf in ("lora_A", "lora_B"):
        start = layer.get_buffer(f"start_{leaf[-1]}").cpu()
        return torch.cat([tensor, start] if leaf == "lora_A" else [tensor, -start], dim=0 if leaf == "lora_A" else 1)
    return tensor.contiguous()


def load_adapter(
    model: nn.Module, folder: str | PathLike[str], *, gather: Gather = no_gather, change_base: bool = True
) -> list[str]:
    """Loads an adapter folder, adapting the model first if needed; returns the adapted layers' names.

    A PiSSA adapter takes its start out of the frozen weights, as in training, so outputs are equal bit by bit. With
    `change_base=False` it becomes the change of the original weights that its file holds, at twice the rank: outputs
    are equal up to rounding, and no frozen weight changes. A model that is adapted already must match the folder; it
    keeps its own dropout.
    """
    source = Path(folder)
    tensors, copies = by_own_name(str(source), read_weights(source))
    own, peft = read_recipe(source).get("adapter", {}), read_peft_config(source)
    if not own:  # this package trains tied tensors as one
        refuse_untied_values(str(source), model, tensors)
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name in copies.keys() & weights.keys():
        with gather([weights[name]]) as (weight,):
            refuse_other_copy(str(source), name, copies[name], weight)
    config = read_config(str(source), peft, own, tensors)
    if is_adapted(model):
        refuse_other_settings(str(source), model, config, dropout_mode_is_stated="dropout_mode" in own)
        refuse_geometry_that_peft_ignored(str(source), model, peft, own)
    else:
        config = config if change_base else whole_change(config)
        twin = _structure_of(model)  # tried first, so that a folder that does not fit leaves the model unchanged
        _adapt(twin, config, no_gather)
        _check_fit(source, twin, tensors)
        refuse_geometry_that_peft_ignored(str(source), twin, peft, own)
        _adapt(model, config, gather)
    _check_fit(source, model, tensors)
    layers = dict(adapted_layers(model))
    with torch.no_grad():
        for name, layer in layers.items():
            if layer.adapter.init == "pissa" and layer.lora_A is not None:
                _move_start(source, name, layer, tensors)
        for name, tensor in _expected(model).items():
            with gather([tensor]) as (gathered,):
                target, value = kept_rows(name, gathered), tensors[name]
                layer, leaf = _layer_of(model, name)
                if layer is not None and layer.adapter.init == "pissa" and leaf in ("lora_A", "lora_B"):
                    rank = layer.adapter.rank
                    value = value[:rank] if leaf == "lora_A" else value[:, :rank]
                target.copy_(value.view(target.shape))
    for layer in layers.values():
        layer.forget_norms()
    return list(layers)


def _adapt(model: nn.Module, config: DoRAConfig, gather: Gather) -> None:
    """Adapts the model without computing a start that the folder's tensors replace."""
    refuse_unwritable(model, config)
    apply_dora(model, replace(config, init="kaiming"), gather=gather)
    for _, layer in adapted_layers(model):
        layer.adapter = replace(layer.adapter, init=config.init)


def _move_start(source: Path, name: str, layer: AdaptedLayer, tensors: Mapping[str, Tensor]) -> None:
    """Subtracts a PiSSA layer's start, which the file holds after A and B, from the frozen weight."""
    rank, device = layer.adapter.rank, layer.weight.device
    start_A = tensors[f"{name}.lora_A"][rank:].to(device)
    start_B = -tensors[f"{name}.lora_B"][:, rank:].to(device)
    if "start_A" not in layer._buffers:
        subtract_start(layer, start_A, start_B)
    elif not (torch.equal(layer.get_buffer("start_A"), start_A) and torch.equal(layer.get_buffer("start_B"), start_B)):
        raise UserError(f"{source}: {name} started from other singular vectors; load it into a fresh base model")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads an adapter folder's tensors, from safetensors only."""
    path = folder / WEIGHTS_FILE
    if not path.is_file() and (folder / PICKLED_WEIGHTS_FILE).is_file():
        raise pickled(folder)
    return read_trained(path)


def pickled(folder: Path) -> UserError:
    """Makes the error for a folder with PEFT's older pickled weights."""
    return UserError(
        f"{folder} holds its tensors as a pickle ({PICKLED_WEIGHTS_FILE}), and {WEIGHTS_FILE} is what is opened: "
        f"dora-vl convert {folder} --to NEW_FOLDER writes it, running nothing that is in the pickle"
    )


def _structure_of(model: nn.Module) -> nn.Module:
    """Copies the model's structure to the meta device, which takes hardly any memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter.data, device="meta"), parameter.requires_grad)
    for tensor in (*model.buffers(), *loose_tensors(model)):
        memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    return copy.deepcopy(model, memo)


def _check_fit(source: Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = _expected(model)
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    if missing or unexpected:
        raise UserError(
            f"{source} does not fit this model: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}; is it the base that the adapter was trained on?"
        )
    for name, tensor in expected.items():
        shape, own = tuple(tensors[name].shape), kept_rows(name, tensor)
        # A sharded parameter shows no shape here; its copy checks it.
        if tensor.numel() and shape not in _shapes_in_file(model, name, own):
            raise UserError(f"{source}: {name} is {list(shape)}, this model needs {list(own.shape)}")


def _shapes_in_file(model: nn.Module, name: str, tensor: Tensor) -> tuple[tuple[int, ...], ...]:
    layer, leaf = _layer_of(model, name)
    shape = tuple(tensor.shape)
    if layer is not None and leaf == "magnitude":
        return (shape, layer.magnitude_file_shape(), (*shape, 1))
    if layer is not None and layer.adapter.init == "pissa" and leaf in ("lora_A", "lora_B"):
        return ((2 * shape[0], *shape[1:]) if leaf == "lora_A" else (shape[0], 2 * shape[1], *shape[2:]),)
    return (shape,)


def _expected(model: nn.Module) -> dict[str, Tensor]:
    trained = {name: p for part in trained_parts(model) for name, p in part.parameters.items()}
    return {**trained, **kept_tensors(model)}


def no_adapter(path: Path) -> UserError:
    """Makes the error for a path without an adapter: it says what is there, and what to do."""
    if not path.exists():
        return UserError(f"{path} holds no adapter: no such file or folder; give a run's adapter folder")
    if path.is_file():
        return UserError(f"{path} is not a folder; give the adapter folder of a run, such as runs/demo/adapter")
    if (path / INNER / WEIGHTS_FILE).is_file():
        return UserError(f"{path} is a run's folder or a checkpoint; its adapter is {path / INNER}")
    adapters = [folder / INNER for folder in complete_checkpoints(path) if (folder / INNER / WEIGHTS_FILE).is_file()]
    if adapters:
        return UserError(f"{path} is a run that has not ended; resume it, or take its last adapter, {adapters[-1]}")
    if (path / PICKLED_WEIGHTS_FILE).is_file():
        return pickled(path)
    if (path / "config.json").is_file():
        return UserError(f"{path} is a whole model, without an adapter; --model takes it")
    files = short_names(sorted(file.name for file in path.iterdir()))
    return UserError(f"{path} has no {WEIGHTS_FILE}, but {files}; an adapter is {', '.join(FILES)}")
