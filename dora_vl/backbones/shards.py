"""A store on disk: entries by key, each of tensors and facts, in files written whole or not at all.

A folder holds what was made with one set of settings, which its `settings.json` names; others are refused. What was
interrupted is resumed, several processes may fill one folder, and tensors are read memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_vl.errors import UserError
from dora_vl.files import read_json, unfinished, write_json

SHARD_GLOB = "shard-*.safetensors"
SHARD_BYTES = 128 * 2**20
"""A shard is written once it holds this many bytes."""
SETTINGS_FILE = "settings.json"
HASH = "sha256"
"""The settings hold the weights' hash under this name."""


class Entry(NamedTuple):
    """Says where an entry's tensors are, and holds its facts as plain JSON values."""

    shard: Path
    written: int
    first: int
    tensors: int
    facts: Any


class ShardStore:
    """Reads and writes a folder's entries; of two with one key the later counts. It can be sent to worker processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        """The entries follow the order of the shards' names, which does not depend on which process was first."""
        self._waiting: dict[str, tuple[Any, list[Tensor]]] = {}
        self._bytes = 0
        self._shards = set[Path]()
        self._opened: dict[Path, Any] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}  # memory maps do not travel; a worker opens its own

    def refresh(self) -> None:
        """Reads the index of each shard that is new in the folder, whichever process wrote it."""
        for path in sorted({*self.folder.glob(SHARD_GLOB)} - self._shards):
            try:
                with safe_open(path, framework="pt") as shard:
                    index = json.loads(shard.metadata()["index"])
                entries = {key: Entry(path, index["written"], *values) for key, values in index["entries"].items()}
            except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path} holds nothing that can be read ({type(error).__name__}: {error}); it is a cache: delete "
                    "this file, and the next run computes what it held anew"
                ) from error
            for key, entry in entries.items():
                if key not in self.entries or self.entries[key].written <= entry.written:
                    self.entries[key] = entry
            self._shards.add(path)

    def add(self, key: str, facts: Any, tensors: Sequence[Tensor]) -> None:
        """Takes an entry; it is on disk when its shard is full, or at `flush`."""
        copies = [tensor.detach().to("cpu", copy=True).contiguous() for tensor in tensors]
        self._waiting[key] = facts, copies
        self._bytes += len(json.dumps([key, facts])) + sum(copy.nbytes for copy in copies)
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what was added as one shard, named after its keys: computed again, they replace it."""
        if not self._waiting:
            return
        tensors: dict[str, Tensor] = {}
        entries: dict[str, tuple[int, int, Any]] = {}
        for key, (facts, copies) in self._waiting.items():
            entries[key] = len(tensors), len(copies), facts
            tensors |= {str(number): copy for number, copy in enumerate(copies, len(tensors))}
        index = json.dumps({"written": time.time_ns(), "entries": entries})
        digest = hashlib.sha256("\n".join(entries).encode()).hexdigest()[:20]
        path = self.folder / SHARD_GLOB.replace("*", digest)
        try:
            with unfinished(path, Path.touch) as staging:
                save_file(tensors, staging, {"index": index})
                staging.replace(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be written ({error}); nothing half-written was left") from error
        self._waiting, self._bytes = {}, 0
        self.refresh()

    def tensors(self, key: str) -> list[Tensor]:
        """Returns an entry's tensors, as views of the memory map."""
        entry = self.entries[key]
        if entry.shard not in self._opened:
            self._opened[entry.shard] = safe_open(entry.shard, framework="pt").__enter__()
        shard = self._opened[entry.shard]
        return [shard.get_tensor(str(number)) for number in range(entry.first, entry.first + entry.tensors)]


def store_key(tower: nn.Module, settings: dict[str, Any]) -> str:
    """Hashes weights, their dtype, and settings to a name."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in sorted(tower.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:24]


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes `settings.json`, or compares with the one that is there."""
    plain = json.loads(json.dumps(dict(settings)))
    before = read_settings(folder)
    if before is None:
        write_json(folder / SETTINGS_FILE, plain)
    elif (name := first_difference(plain, before)) is not None:
        raise UserError(
            f"{folder} was filled with {name} {before.get(name)!r}, and {plain.get(name)!r} is asked for; "
            "name another folder, or delete this one"
        )


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Reads a folder's settings; None if it has none."""
    path = folder / SETTINGS_FILE
    return read_json(path) if path.is_file() else None


def first_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """Returns the first name, alphabetically, whose values differ; None if all are equal."""
    return min((name for name in {*first, *second} if first.get(name) != second.get(name)), default=None)
