"""The store of a frozen tower's features: written once by the name of a picture or video, read memory-mapped.

A folder holds what one tower made in one way, and `settings.json` says which; other settings are refused. Each shard is
one safetensors file that appears whole or not at all: `features` are all its tokens, one picture's after the other's,
`index` is JSON in bytes and says whose they are and what they were made from. What was interrupted is resumed, and
several processes may fill one folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_vl.data.examples import whole_file
from dora_vl.data.feature_input import Part, Stored
from dora_vl.errors import BadSample, UserError
from dora_vl.model_files import check_whole

SHARD_SUFFIX = ".safetensors"
FEATURES, INDEX = "features", "index"
SETTINGS_FILE = "settings.json"
HASH = "sha256"
"""Which setting says what the weights were."""
SHARD_BYTES = 128 * 2**20
WHOLE: Part = (0.0, None)
NO_FILE = (-1, -1)


@dataclass(frozen=True)
class FeatureRow:
    """One picture's or video's features and what they were made from.

    Attributes:
        name: of the picture or video.
        features: of any shape, its last axis is the width; None where `broken` says why there are none.
        backend: the library that decoded it.
        indices: the frames, by their place in the video; empty for a picture.
        seconds: when they begin.
        part: of the video; all of it, or the picture, if nothing else is said.
        state: the file's, when it was read (`file_state`).
    """

    name: str
    features: Tensor | None
    backend: str = ""
    indices: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    part: Part = WHOLE
    state: tuple[int, int] = NO_FILE
    broken: str = ""


class FeatureWriter:
    """Collects rows and writes a shard whenever there are enough; as a context manager, what is left at its end too.

    Args:
        folder: gets the shards.
        settings: everything that decides the features.
        dtype: what is stored; None keeps the features' own.
        shard_bytes: of features and index in a shard.

    Raises:
        UserError: the folder holds features made with other settings; it names the first that differs.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        dtype: torch.dtype | None = torch.float16,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        keep_settings(folder, settings)
        self._folder = folder
        self._dtype = dtype
        self._shard_bytes = shard_bytes
        self._rows: list[FeatureRow] = []
        self._bytes = 0

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def add(self, row: FeatureRow) -> None:
        """Takes one row; it is on disk when its shard is full, or at `flush`.

        Raises:
            UserError: a number is too large for the stored dtype, or none at all.
        """
        if row.features is not None:
            tokens = row.features.detach().to("cpu", self._dtype or row.features.dtype)
            if self._dtype is not None and not bool(torch.isfinite(tokens).all()):
                named, largest = str(self._dtype).removeprefix("torch."), float(row.features.detach().abs().max())
                raise UserError(f"features of {row.name} do not fit into {named}: the largest is {largest:.4g}")
            row = replace(row, features=tokens.reshape(-1, tokens.shape[-1]))
            self._bytes += tokens.nbytes
        self._rows.append(row)
        self._bytes += len(row.name) + 32 * len(row.indices)
        if self._bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what has been collected as one shard under a name of its pictures: computed again they replace it.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        if not self._rows:
            return
        named = hashlib.sha256("\n".join(row.name for row in self._rows).encode()).hexdigest()[:20]
        index = json.dumps({"written": time.time_ns(), "rows": list(_index_rows(self._rows))}).encode()
        tokens = [row.features for row in self._rows if row.features is not None]
        tensors = {
            FEATURES: torch.cat(tokens) if tokens else torch.zeros(0, 1),
            INDEX: torch.frombuffer(bytearray(index), dtype=torch.uint8),
        }
        _save_whole(self._folder / f"features-{named}{SHARD_SUFFIX}", tensors)
        self._rows, self._bytes = [], 0


def _index_rows(rows: list[FeatureRow]) -> Iterator[dict[str, Any]]:
    start = 0
    for row in rows:
        tokens = 0 if row.features is None else len(row.features)
        said = {name: value for name, value in vars(row).items() if name != FEATURES}
        yield {**said, "start": start, "tokens": tokens}
        start += tokens


def _save_whole(path: Path, tensors: dict[str, Tensor]) -> None:
    unfinished = path.with_name(f".{path.name}.{uuid4().hex[:12]}")
    try:
        save_file(tensors, unfinished)
        unfinished.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError | SafetensorError):
            raise UserError(f"{path}: cannot be written ({error}); nothing half-written was left") from error
        raise


class Shard:
    """A shard's tokens, mapped into memory when they are first asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def tokens(self) -> Float[Tensor, "tokens width"]:
        """Of all its pictures."""
        with safe_open(self._path, framework="pt") as opened:
            return opened.get_tensor(FEATURES).flatten(0, -2)

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps do not travel; a worker opens its own.
        return {"_path": self._path}


@dataclass(frozen=True, slots=True)
class ShardRow:
    """Where one name's features are, and what they are; a `Held`."""

    name: str
    shard: Shard
    start: int
    shape: Stored
    part: Part | None
    state: tuple[int, int]
    broken: str

    def stored(self) -> Stored:
        """See `Held`."""
        if self.broken:
            raise BadSample(self.name, self.broken)
        return self.shape

    def read(self) -> Float[Tensor, "tokens width"]:
        """See `Held`; a view of the memory map."""
        return self.shard.tokens[self.start : self.start + self.stored().tokens]


def shard_rows(folder: Path) -> dict[str, ShardRow]:
    """What the folder's shards hold by now, by name; of two that have a name the one written last counts.

    Raises:
        UserError: a file was cut, or is no shard of features.
    """
    indexes = [_read_index(path) for path in sorted(folder.glob(f"*{SHARD_SUFFIX}"))]
    newest = {row.name: row for _, rows in sorted(indexes, key=lambda index: index[0]) for row in rows}
    # In the order of the shards' names, which is the same whichever process was done first.
    return {row.name: newest[row.name] for _, rows in indexes for row in rows}


def _read_index(path: Path) -> tuple[int, list[ShardRow]]:
    """When a shard was written, and what is in it."""
    try:
        check_whole(path)
    except UserError as error:
        said = str(error).removesuffix("; copy or fetch it again")
        raise UserError(
            f"{said}; it is a cache of features: delete this file, and what it held is computed anew by the next run, "
            "or by python -m data_prep.features with the same options"
        ) from None
    try:
        with safe_open(path, framework="pt") as opened:
            shape = opened.get_slice(FEATURES).get_shape()
            older = (opened.metadata() or {}).get("pictures")
            if older is None:
                index = json.loads(bytes(opened.get_tensor(INDEX).numpy()))
            else:
                index = {"written": 0, "rows": _rows_of_pictures(json.loads(older), tokens=shape[1])}
        shard = Shard(path)
        return int(index["written"]), [_shard_row(row, shard, shape[-1]) for row in index["rows"]]
    except (SafetensorError, ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(
            f"{path} holds no features that can be read ({type(error).__name__}: {error}); it is a cache: delete this "
            "file, and what it held is computed anew by the next run, or by python -m data_prep.features"
        ) from error


def _rows_of_pictures(rows: list[dict[str, Any]], *, tokens: int) -> Iterator[dict[str, Any]]:
    """From shards as they were before: pictures alone, each of equally many tokens, listed in the file's header."""
    for row in rows:
        at = {"start": row["row"] * tokens, "tokens": tokens, "indices": (), "part": WHOLE}
        yield {"name": row["picture"], "state": (row["size"], row["changed"]), "broken": row["broken"], **at}


def _shard_row(row: Mapping[str, Any], shard: Shard, width: int) -> ShardRow:
    (start, end), (size, changed) = row["part"], row["state"]
    shape = Stored(row["tokens"], width, max(1, len(row["indices"])))
    return ShardRow(row["name"], shard, row["start"], shape, (start, end), (size, changed), row["broken"])


def file_state(root: Path, path: str) -> tuple[int, int]:
    """A file's bytes and time of change in nanoseconds; `NO_FILE` where there is none."""
    try:
        state = (root / path).stat()
    except (OSError, ValueError):
        return NO_FILE
    return state.st_size, state.st_mtime_ns


def store_key(tower: nn.Module, settings: dict[str, Any]) -> str:
    """A name for the features of exactly these weights, in this dtype, and these settings."""
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
        with whole_file(folder / SETTINGS_FILE) as file:
            json.dump(plain, file, indent=1)
    elif (name := first_difference(plain, before)) is not None:
        raise UserError(
            f"{folder} holds features with {name} {before.get(name)!r}, and {plain.get(name)!r} is asked for; "
            "name another folder, or delete this one"
        )


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What the features of a folder were made with; None where nothing says it.

    Raises:
        UserError: what says it cannot be read.
    """
    path = folder / SETTINGS_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); python -m data_prep.features writes it") from None


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first name, in their order, whose values differ; None where all are equal."""
    return min((name for name in {*one, *other} if one.get(name) != other.get(name)), default=None)
