"""Writes a GGUF file tensor by tensor: one is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from dora_vl.errors import UserError

KINDS = ("f16", "f32", "q8_0")
"""Number types of the matrices; vectors are float32 in each."""
BLOCK = 32
"""Numbers of a row that Q8_0 holds with one scale."""


def check_package() -> None:
    """Raises a `UserError` where the package that writes the format is not installed."""
    if find_spec("gguf") is None:
        raise UserError("GGUF is written by the package gguf: pip install gguf (or 'dora-vl[gguf]')")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor of the file.

    Attributes:
        shape: as torch has it.
        kind: one of `KINDS`.
        read: gives the values.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], Tensor]


def kind_for(shape: Sequence[int], wanted: str) -> str:
    """How a tensor of this shape is stored: vectors whole, and as F16 what Q8_0 has no blocks for."""
    if len(shape) < 2:
        return "f32"
    blocks = len(shape) == 2 and shape[-1] % BLOCK == 0
    return "f16" if wanted == "q8_0" and not blocks else wanted


def write_gguf(
    path: Path, architecture: str, kind: str, pieces: Sequence[Piece], add_fields: Callable[[Any], None]
) -> int:
    """Writes one file and returns its size in bytes.

    Args:
        architecture: llama.cpp's name.
        kind: the number type that the file says most of it has.
        add_fields: writes the file's settings.
    """
    import gguf

    types = {one: gguf.GGMLQuantizationType[one.upper()] for one in KINDS}
    files = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_file_type(files[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_fields(writer)
        for piece in pieces:
            shape = (
                gguf.quant_shape_to_byte_shape(piece.shape, types[piece.kind]) if piece.kind == "q8_0" else piece.shape
            )
            dtype = np.dtype({"f32": np.float32, "f16": np.float16, "q8_0": np.uint8}[piece.kind])
            size = int(np.prod(shape)) * dtype.itemsize
            writer.add_tensor_info(piece.name, shape, dtype, size, raw_dtype=types[piece.kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece in tqdm(pieces, desc=f"writing {path.name}", unit="tensor", disable=None):
            values = piece.read().detach().float().contiguous().numpy()
            if values.shape != piece.shape:
                raise ValueError(f"announced {piece.name} {piece.shape}, got {values.shape}")
            writer.write_tensor_data(gguf.quants.quantize(values, types[piece.kind]))
    finally:
        writer.close()
    return path.stat().st_size
