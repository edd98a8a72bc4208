"""Writes features as Parquet shards, each whole or not there, so that a run can be stopped and resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dora_vl.data.examples import whole_file
from dora_vl.data.feature_input import Part
from dora_vl.errors import UserError
from dora_vl.vision.feature_parquet import END, FEATURES, ID, INDICES, SHAPE, START, ParquetFeatures

BACKEND, TIMES = "backend", "timestamps"
SETTINGS_FILE = "settings.json"
SHARD_BYTES = 128 * 2**20
GROUP_BYTES = 2**19  # what is decompressed to read one row; smaller ones make a shard's list of groups slow to open


@dataclass(frozen=True)
class FeatureRow:
    """One picture's or video's features and what they were made from.

    Attributes:
        name: of the picture or video.
        features: of any shape; its last axis is the width. Stored as float16.
        backend: the library that decoded it.
        indices: the frames, by their place in the video; empty for a picture.
        seconds: when they begin.
        part: of the video; all of it, or the picture, if nothing else is said.
    """

    name: str
    features: Tensor
    backend: str
    indices: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    part: Part = (0.0, None)


class FeatureWriter:
    """Collects rows and writes a shard whenever there are enough; several processes may fill one folder.

    Args:
        folder: gets the shards.
        settings: everything that decides the features; a folder holds those of one setting.
        shard_bytes: of features in a shard.

    Raises:
        UserError: the folder holds features made with other settings; it names the first that differs.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, shard_bytes: int = SHARD_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        keep_settings(folder, settings)
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._rows: list[FeatureRow] = []
        self._bytes = 0

    def add(self, row: FeatureRow) -> None:
        """Takes one row; it is on disk when its shard is full, or at `flush`.

        Raises:
            UserError: a number is too large for float16, or none at all.
        """
        half = row.features.detach().to("cpu", torch.float16)
        if not bool(torch.isfinite(half).all()):
            largest = float(row.features.detach().abs().max())
            raise UserError(f"features of {row.name} do not fit into float16: the largest is {largest:.4g}")
        self._rows.append(replace(row, features=half))
        self._bytes += half.numel() * half.element_size()
        if self._bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what has been collected as one shard, under a name of its content."""
        if not self._rows:
            return
        names = "\n".join(row.name for row in self._rows)
        path = self._folder / f"features-{hashlib.sha256(names.encode()).hexdigest()[:20]}.parquet"
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        write_rows(scratch, self._rows)
        scratch.replace(path)
        self._rows, self._bytes = [], 0


def write_rows(path: Path, rows: Sequence[FeatureRow]) -> None:
    """One Parquet file of these rows."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    numbers = [row.features.contiguous().flatten().numpy() for row in rows]
    ends = np.cumsum([0, *map(len, numbers)], dtype=np.int32)
    table = pa.table(
        {
            ID: pa.array([row.name for row in rows], pa.string()),
            FEATURES: pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(numbers))),
            SHAPE: pa.array([list(row.features.shape) for row in rows], pa.list_(pa.int32())),
            BACKEND: pa.array([row.backend for row in rows], pa.string()),
            INDICES: pa.array([row.indices for row in rows], pa.list_(pa.int32())),
            TIMES: pa.array([row.seconds for row in rows], pa.list_(pa.float64())),
            START: pa.array([row.part[0] for row in rows], pa.float64()),
            END: pa.array([row.part[1] for row in rows], pa.float64()),
        }
    )
    group_rows = max(1, GROUP_BYTES * len(rows) // max(1, 2 * int(ends[-1])))
    parquet.write_table(
        table, path, compression="zstd", row_group_size=group_rows, use_dictionary=False, write_statistics=False
    )


def written(folder: Path) -> dict[str, Part | None]:
    """The names whose features are in the folder's shards, and the part of a video that each is of, if that is said."""
    if next(folder.glob("*.parquet"), None) is None:
        return {}
    source = ParquetFeatures(folder)
    return {name: source.part(name) for name in source.names()}


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes `settings.json`, or compares with the one that is there."""
    plain = json.loads(json.dumps(dict(settings)))
    path = folder / SETTINGS_FILE
    if not path.is_file():
        with whole_file(path) as file:
            json.dump(plain, file, indent=1)
        return
    before = read_settings(folder)
    if (name := first_difference(plain, before)) is not None:
        raise UserError(
            f"{folder} holds features with {name} {before.get(name)!r}, and {plain.get(name)!r} is asked for; "
            "name another folder, or delete this one"
        )


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first name, in their order, whose values differ; None where all are equal."""
    return min((name for name in {*one, *other} if one.get(name) != other.get(name)), default=None)


def read_settings(folder: Path) -> dict[str, Any]:
    """What the features of a folder were made with.

    Raises:
        UserError: nothing says it, or what does cannot be read.
    """
    path = folder / SETTINGS_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); python -m data_prep.features writes it") from None
