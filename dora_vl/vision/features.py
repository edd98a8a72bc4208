"""What a frozen tower makes of each picture, computed once and read from memory-mapped files ever after.

One folder holds the features of one tower and one preparation (`store_key`); in it each shard is one safetensors file
that appears whole or not at all, with its pictures' names in its header. A run that was cut off loses the shard it
was writing and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dora_vl.data.media import StoredPictures
from dora_vl.errors import BadSample
from dora_vl.model_files import check_whole

SHARD_SUFFIX = ".safetensors"
FEATURES = "features"
INDEX = "pictures"
SHARD_BYTES = 128 * 2**20
NO_FILE = (-1, -1)


@dataclass(frozen=True)
class PictureEntry:
    """Where a picture's features are: a shard and a row of it, or why there are none.

    `size` (bytes) and `changed` (nanoseconds since 1970) are the file's when it was read; a file that differs is
    computed again.
    """

    picture: str
    size: int
    changed: int
    row: int
    broken: str = ""
    shard: str = ""


class FeatureStore:
    """Features by a picture's relative path. Holds no model and can be sent to worker processes.

    Args:
        folder: the folder of one tower and preparation.
        root: the folder that the pictures' paths are relative to.
        stored: pictures that the data file itself holds; they are named by their content, so they never change.
    """

    def __init__(self, folder: Path, *, root: Path, stored: StoredPictures | None = None) -> None:
        self.folder = folder
        self.root = root
        self.stored = stored
        self._entries: dict[str, PictureEntry] = {}
        self._open: dict[str, Any] = {}
        self.reload()

    def reload(self) -> None:
        """Reads which pictures the folder holds by now; other processes may have added some."""
        self._entries = {}
        for shard in sorted(self.folder.glob(f"*{SHARD_SUFFIX}")):
            check_whole(shard)
            with safe_open(shard, framework="pt") as opened:
                rows = json.loads(opened.metadata()[INDEX])
            for row in rows:
                # Shards are named by content, not by age: of two that hold a picture, the one that fits its file.
                if row["picture"] not in self._entries or not self._is_current(row["picture"]):
                    self._entries[row["picture"]] = PictureEntry(**row, shard=shard.name)

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, picture: str) -> Float[Tensor, "tokens width"]:
        """The tower's output for one picture, in the dtype it was computed in.

        Raises: BadSample if the picture could not be read when features were computed.
        """
        entry = self._entries.get(picture)
        if entry is None:
            raise KeyError(f"{self.folder} holds no features of {picture}; compute_features comes first")
        if entry.broken:
            raise BadSample(picture, entry.broken)
        if entry.shard not in self._open:
            self._open[entry.shard] = safe_open(self.folder / entry.shard, framework="pt").get_slice(FEATURES)
        return self._open[entry.shard][entry.row]

    def missing(self, pictures: Iterable[str]) -> list[str]:
        """Those without features, or whose file has changed since, each once and in order."""
        wanted = dict.fromkeys(pictures)
        return [picture for picture in wanted if not self._is_current(picture)]

    def _is_current(self, picture: str) -> bool:
        entry = self._entries.get(picture)
        return entry is not None and (entry.size, entry.changed) == file_state(self.root, picture)

    def add_shard(self, features: Float[Tensor, "pictures tokens width"], entries: Sequence[PictureEntry]) -> None:
        """Writes one shard under a name of its content, and makes it readable here."""
        rows = [{key: value for key, value in vars(entry).items() if key != "shard"} for entry in entries]
        index = json.dumps(rows)
        name = hashlib.sha256(index.encode()).hexdigest()[:20] + SHARD_SUFFIX
        unfinished = self.folder / f".{name}.{os.getpid()}"
        save_file({FEATURES: features.contiguous()}, unfinished, metadata={INDEX: index})
        unfinished.replace(self.folder / name)
        for row in rows:
            self._entries[row["picture"]] = PictureEntry(**row, shard=name)

    def __getstate__(self) -> dict[str, Any]:
        # Open maps do not travel; a worker opens its own.
        return {**self.__dict__, "_open": {}}


def file_state(root: Path, picture: str) -> tuple[int, int]:
    """A file's bytes and time of change; `NO_FILE` where there is none."""
    try:
        state = (root / picture).stat()
    except (OSError, ValueError):
        return NO_FILE
    return state.st_size, state.st_mtime_ns


def store_key(tower: torch.nn.Module, settings: dict[str, Any]) -> str:
    """A name for the features of exactly these weights, in this dtype, and these settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in sorted(tower.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:24]
