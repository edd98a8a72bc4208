"""Tensors in files: read from any tool's, no pickled code run; written one tensor at a time.

The format of safetensors (github.com/huggingface/safetensors, README): eight bytes of header length, little-endian; a
JSON object of name -> dtype, shape and byte range; then the bytes, in the order of the ranges, without gaps.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
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


def refuse_not_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises a `UserError` that names the file (`source`) and the first tensors holding NaN or infinity."""
    floats = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    if packed := [key for key, tensor in floats.items() if tensor.dtype.itemsize < 2]:
        raise UserError(
            f"{source}: {len(packed)} tensors are {tensors[packed[0]].dtype}, first {packed[:3]}; give those of before "
            "quantisation"
        )
    broken = [key for key, tensor in floats.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(f"{source}: {len(broken)} tensors hold NaN or infinity, first {broken[:3]}; use another save")


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
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def byte_size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of one tensor in the file."""
    return math.prod(shape) * dtype.itemsize


class SafetensorsStream:
    """Writes a file's tensors in the order that was announced.

    Args:
        path: Of the file.
        entries: Name -> (shape, dtype), in writing order.
    """

    def __init__(self, path: Path, entries: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._entries = dict(entries)
        self._waiting = list(entries)
        self._file = path.open("wb")
        self._file.write(self._header())

    def _header(self) -> bytes:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (shape, dtype) in self._entries.items():
            end = offset + byte_size(shape, dtype)
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def write(self, name: str, tensor: Tensor) -> None:
        """Appends the next announced tensor."""
        expected = self._waiting.pop(0)
        shape, dtype = self._entries[expected]
        if name != expected or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"announced {expected} {shape} {dtype}, got {name} {tuple(tensor.shape)} {tensor.dtype}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            self._file.write(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None and self._waiting:
            raise ValueError(f"{len(self._waiting)} announced tensors were not written, first {self._waiting[0]}")
