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

from dora_vl.adapters.agreement import PEFT_PREFIX as PEFT_PREFIX
from dora_vl.adapters.agreement import (
    by_own_name,
    file_name,
    refuse_other_copy,
    refuse_other_settings,
    refuse_pefts_other_result,
    refuse_untied_values,
    whole_change,
)
from dora_vl.adapters.agreement import own_name as own_name
from dora_vl.adapters.files import CONFIG_FILE as CONFIG_FILE
from dora_vl.adapters.files import RECIPE_FILE as RECIPE_FILE
from dora_vl.adapters.files import (
    complete_checkpoints,
    read_peft_config,
    read_recipe,
    read_tensors,
    refuse_not_finite,
    refuse_to_replace,
    write_json,
    written_whole,
)
from dora_vl.adapters.files import read_json as read_json
from dora_vl.adapters.settings import own_settings, peft_config, read_config
from dora_vl.core.config import DoRAConfig
from dora_vl.core.inject import apply_dora, refuse_unwritable
from dora_vl.core.layer import AdaptedLayer, take_from_weight
from dora_vl.core.quantised import loose_tensors
from dora_vl.core.trainable import (
    Gather,
    adapted_layers,
    is_adapted,
    kept_rows,
    kept_tensors,
    no_gather,
    trained_parts,
)
from dora_vl.errors import UserError, shown_names

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
FILES = (WEIGHTS_FILE, CONFIG_FILE, RECIPE_FILE)


# -- saving --------------------------------------------------------------------------------------------------


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
        with gather([tensor] if isinstance(tensor, nn.Parameter) else []):
            if write:
                # A clone: safetensors refuses tensors that share memory, and a sharded one is gone after the block.
                whole = kept_rows(name, tensor.detach()).to("cpu", copy=True)
                tensors[file_name(model, name)] = _in_file(model, name, whole)
    if not write:
        return
    refuse_to_replace_adapter(Path(folder))
    with written_whole(Path(folder)) as staging:
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(staging / CONFIG_FILE, peft_config(model, base_model))
        write_json(staging / RECIPE_FILE, {**(recipe or {}), "adapter": own_settings(model)})


def refuse_to_replace_adapter(target: Path) -> None:
    """Raises a `UserError` where a folder has the name already and is no adapter folder, or holds more than that."""
    refuse_to_replace(target, FILES if (target / CONFIG_FILE).is_file() else ())


def _in_file(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor in the file's shape; A and B of a PiSSA layer with their starts, as a change of the whole weight."""
    owner, _, leaf = name.rpartition(".")
    layer = model.get_submodule(owner)
    if isinstance(layer, AdaptedLayer) and leaf == "magnitude":
        return tensor.view(layer.magnitude_file_shape())
    if isinstance(layer, AdaptedLayer) and "start_A" in layer._buffers and leaf in ("lora_A", "lora_B"):
        start = layer.get_buffer(f"start_{leaf[-1]}").cpu()
        return torch.cat([tensor, start] if leaf == "lora_A" else [tensor, -start], dim=0 if leaf == "lora_A" else 1)
    return tensor.contiguous()


# -- loading -------------------------------------------------------------------------------------------------


def load_adapter(
    model: nn.Module, folder: str | PathLike[str], *, gather: Gather = no_gather, change_base: bool = True
) -> list[str]:
    """Loads an adapter folder, adapting the model first where it is not; returns the adapted layers' names.

    A PiSSA adapter takes its start out of the frozen weights, as in training, so that the outputs are the same bit by
    bit. Without `change_base` it becomes the change of the original weights that its file holds, at twice the rank:
    the same outputs up to rounding, and no frozen weight changes. A model that is adapted already must be adapted as
    the folder says; its dropout stays its own.
    """
    source = Path(folder)
    tensors, copies = by_own_name(str(source), read_weights(source))
    own, peft = read_recipe(source).get("adapter", {}), read_peft_config(source)
    refuse_untied_values(str(source), model, tensors, own)
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name in copies.keys() & weights.keys():
        with gather([weights[name]]):
            refuse_other_copy(str(source), name, copies[name], weights[name])
    config = read_config(str(source), peft, own, tensors)
    if is_adapted(model):
        refuse_other_settings(str(source), model, config, dropout_mode_is_stated="dropout_mode" in own)
        refuse_pefts_other_result(str(source), model, peft, own)
    else:
        config = config if change_base else whole_change(config)
        twin = _without_values(model)  # tried first, so that a folder that does not fit leaves the model alone
        _adapt(twin, config, no_gather)
        _check_fit(source, twin, tensors)
        refuse_pefts_other_result(str(source), twin, peft, own)
        _adapt(model, config, gather)
    _check_fit(source, model, tensors)
    _copy_values(source, model, tensors, gather)
    for _, layer in adapted_layers(model):
        layer.forget_norms()
    return [name for name, _ in adapted_layers(model)]


@torch.no_grad()
def _copy_values(source: Path, model: nn.Module, tensors: Mapping[str, Tensor], gather: Gather) -> None:
    for name, layer in adapted_layers(model):
        if layer.adapter.init == "pissa" and layer.lora_A is not None:
            _move_start(source, name, layer, tensors)
    for name, tensor in _expected(model).items():
        with gather([tensor] if isinstance(tensor, nn.Parameter) else []):
            own = kept_rows(name, tensor)
            own.copy_(_own_part(model, name, tensors[name]).view(own.shape))


def _adapt(model: nn.Module, config: DoRAConfig, gather: Gather) -> None:
    """Adapts the model without computing a start that the folder's tensors replace."""
    refuse_unwritable(model, config)
    apply_dora(model, replace(config, init="kaiming"), gather=gather)
    for _, layer in adapted_layers(model):
        layer.adapter = replace(layer.adapter, init=config.init)


def _move_start(source: Path, name: str, layer: AdaptedLayer, tensors: Mapping[str, Tensor]) -> None:
    """Takes the start of a PiSSA layer, which the file holds behind A and B, out of the frozen weight."""
    rank, like = layer.adapter.rank, layer.weight
    start_A = tensors[f"{name}.lora_A"][rank:].to(like.device)
    start_B = -tensors[f"{name}.lora_B"][:, rank:].to(like.device)
    if "start_A" not in layer._buffers:
        take_from_weight(layer, start_A, start_B)
    elif not (torch.equal(layer.get_buffer("start_A"), start_A) and torch.equal(layer.get_buffer("start_B"), start_B)):
        raise UserError(f"{source}: {name} started from other singular vectors; load it into a fresh base model")


def _own_part(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    layer = model.get_submodule(owner)
    if isinstance(layer, AdaptedLayer) and layer.adapter.init == "pissa" and leaf in ("lora_A", "lora_B"):
        return tensor[: layer.adapter.rank] if leaf == "lora_A" else tensor[:, : layer.adapter.rank]
    return tensor


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, safetensors only."""
    path = folder / WEIGHTS_FILE
    if not path.is_file() and (folder / PICKLED_WEIGHTS_FILE).is_file():
        raise pickled(folder)
    tensors = read_tensors(path)
    refuse_not_finite(tensors, str(path))
    return tensors


def pickled(folder: Path) -> UserError:
    """The error of a whole folder whose tensors are in PEFT's older form."""
    return UserError(
        f"{folder} holds its tensors as a pickle ({PICKLED_WEIGHTS_FILE}), and {WEIGHTS_FILE} is what is opened: "
        f"dora-vl convert {folder} --to NEW_FOLDER writes it, running nothing that is in the pickle"
    )


def _without_values(model: nn.Module) -> nn.Module:
    """A copy of the model's structure on the meta device; costs no memory worth naming."""
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
    owner, _, leaf = name.rpartition(".")
    layer, shape = model.get_submodule(owner), tuple(tensor.shape)
    if isinstance(layer, AdaptedLayer) and leaf == "magnitude":
        return (shape, layer.magnitude_file_shape(), (*shape, 1))
    if isinstance(layer, AdaptedLayer) and layer.adapter.init == "pissa" and leaf in ("lora_A", "lora_B"):
        axis = 0 if leaf == "lora_A" else 1
        return (tuple(size * 2 if number == axis else size for number, size in enumerate(shape)),)
    return (shape,)


def _expected(model: nn.Module) -> dict[str, Tensor]:
    trained = {name: p for part in trained_parts(model) for name, p in part.parameters.items()}
    return {**trained, **kept_tensors(model)}


# What a person has named instead of an adapter's folder, and which folder is meant.


INNER = "adapter"
"""Where a run and each of its checkpoints keep their adapter."""


def no_adapter(path: Path) -> UserError:
    """The error of a path that holds no adapter: what is there, and the next step."""
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
    if (path / CONFIG_FILE).is_file():
        return UserError(f"{path} has no {WEIGHTS_FILE}; the folder is incomplete, copy it again or train again")
    if (path / "config.json").is_file():
        return UserError(f"{path} is a model and has no {WEIGHTS_FILE}; give an adapter, or ask it as --model")
    files = shown_names(sorted(file.name for file in path.iterdir()))
    return UserError(f"{path} has no {WEIGHTS_FILE}, but {files}; an adapter is {', '.join(FILES)}")
