"""Whether a file of tensors is whole, from its size and what it says of itself; no tensor is read."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

from dora_vl.errors import UserError

LENGTH_BYTES = 8
"""A safetensors file begins with its header's length, little-endian."""
ZIP_START = b"PK"
"""How torch's own files begin since 1.6; their table is at the end."""


def check_whole(path: Path) -> None:
    """Refuses a file that was cut, as a copy or a download leaves it when it stops; anything else passes.

    Raises:
        UserError: it is empty, shorter or longer than its header says, or has lost its end; it names the sizes.
    """
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        _check_safetensors(path, size)
        return
    if size == 0:
        raise UserError(f"{path} is empty (0 bytes); copy or fetch it again")
    with path.open("rb") as file:
        start = file.read(len(ZIP_START))
    if start == ZIP_START and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is cut short: its {size:,} bytes lack the table at its end; copy or fetch it again")


def _check_safetensors(path: Path, size: int) -> None:
    with path.open("rb") as file:
        start = file.read(LENGTH_BYTES)
        length = struct.unpack("<Q", start)[0] if len(start) == LENGTH_BYTES else LENGTH_BYTES
        header = file.read(length) if LENGTH_BYTES + length <= size else b""
    if len(start) < LENGTH_BYTES or not header:
        raise UserError(
            f"{path} is not a whole safetensors file: it has {size:,} bytes, and its header alone would end at "
            f"{LENGTH_BYTES + length:,}; copy or fetch it again"
        )
    try:
        ends = [_end(entry) for name, entry in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a whole safetensors file: its header is broken ({error})") from None
    whole = LENGTH_BYTES + length + max(ends, default=0)
    if whole != size:
        raise UserError(
            f"{path} is not a whole safetensors file: it has {size:,} bytes, and its header says {whole:,}; "
            "copy or fetch it again"
        )


def _end(entry: Any) -> int:
    return int(entry["data_offsets"][1])
