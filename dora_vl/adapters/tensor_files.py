"""Tensors from a file of any tool: safetensors, or torch's pickle with nothing but tensors allowed in it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dora_vl.errors import UserError
from dora_vl.model_files import check_whole

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file on CPU, by key; a pickle is read with `weights_only=True` and no other way.

    Raises:
        UserError: the file is missing, cut short, of another kind, or holds something that is no tensor.
    """
    if not path.is_file():
        there = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else "no such folder"
        raise UserError(f"{path} does not exist ({there}); give the folder or file that holds the adapter")
    if path.suffix in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES):
        check_whole(path)
    if path.suffix == SAFETENSORS_SUFFIX:
        return _read_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(path)
    raise UserError(f"{path} is no weight file; these are read: {SAFETENSORS_SUFFIX}, {', '.join(PICKLE_SUFFIXES)}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy it again") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as plain tensors ({reason}); nothing in it was run") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    others = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(f"{path}: {others[:3]} are no tensors; save the state dictionary alone")
    return {str(key): tensor.detach() for key, tensor in content.items()}
