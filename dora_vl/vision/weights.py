"""Reads a weights file without running code from it, and fits it to a network exactly."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dora_vl.errors import UserError
from dora_vl.model_files import check_whole


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one `.safetensors` or `.pth` file; never unpickles code.

    Raises: UserError if there is no such file, it is cut, or it holds anything but tensors.
    """
    if not path.is_file():
        raise UserError(f"there is no weights file {path}; give an existing .pth or .safetensors file")
    check_whole(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as tensors alone ({path.stat().st_size:,} bytes): {reason}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not a plain table of tensors; save the network's state_dict() and give that")
    return dict(state)


def load_weights(network: nn.Module, state: Mapping[str, Tensor], *, in_order: bool, source: str) -> None:
    """Fills the network from a table of tensors, every name (or, `in_order`, every position) exactly once.

    Raises: UserError that lists the first names or shapes that do not fit.
    """
    target = network.state_dict()
    if in_order:
        state = renamed_in_order(state, target, source=source)
    missing, unexpected = sorted(target.keys() - state.keys()), sorted(state.keys() - target.keys())
    wrong = sorted(name for name in target.keys() & state.keys() if target[name].shape != state[name].shape)
    if missing or unexpected or wrong:
        raise UserError(
            f"{source} does not fit {type(network).__name__}: {len(missing)} names missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}; where the "
            "tensors stand in the same order under other names, set vision_weights_in_order"
        )
    network.load_state_dict(dict(state), strict=True)


def renamed_in_order(state: Mapping[str, Tensor], target: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The same tensors under the target's names, position by position, each shape checked.

    Raises: UserError at the first position whose shapes differ.
    """
    if len(state) != len(target):
        raise UserError(f"{source} holds {len(state)} tensors, the network {len(target)}: not the same order")
    renamed: dict[str, Tensor] = {}
    for place, ((theirs, value), (ours, wanted)) in enumerate(zip(state.items(), target.items(), strict=True)):
        if value.shape != wanted.shape:
            raise UserError(
                f"{source}: tensor {place} is {theirs} {tuple(value.shape)}, but the network has {ours} "
                f"{tuple(wanted.shape)} there: not the same order"
            )
        renamed[ours] = value
    return renamed
