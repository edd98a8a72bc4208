"""Features that were computed before, by the name of their picture or video, whoever wrote them.

Four forms: sharded Parquet of ours (`feature_shards`), VL-Adapter's re-hosted Parquet shards, its tree of one HDF5 file
a picture, and VALUE's folder of one `.npz` a video. `open_features` tells them apart by what the folder holds.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dora_vl.data.feature_input import Part, Stored
from dora_vl.errors import BadSample, UserError
from dora_vl.vision.feature_parquet import FEATURES, ParquetFeatures, absent

_DAMAGE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)
"""What numpy and h5py raise on files that are damaged or hold something else."""
Taken = TypeVar("Taken")


@runtime_checkable
class FeatureSource(Protocol):
    """Features by name; can be sent to worker processes."""

    def __contains__(self, name: str) -> bool:
        """Whether there are features of this picture or video."""
        ...

    def names(self) -> Iterator[str]:
        """All that there are."""
        ...

    def read(self, name: str) -> Float[Tensor, "tokens width"]:
        """One picture's or video's features, in the dtype they are stored in.

        Raises:
            BadSample: there are none, or they cannot be read.
        """
        ...

    def stored(self, name: str) -> Stored:
        """What these features are, without reading them; where nothing says it, each token is one frame.

        Raises:
            BadSample: there are none, or what says it cannot be read.
        """
        ...

    def part(self, name: str) -> Part | None:
        """The part of a video that they are of; None where nothing says it, or there are none."""
        ...


def open_features(folder: Path) -> FeatureSource:
    """The features in a folder.

    Raises:
        UserError: no such folder, or nothing in it that is known; it says what was looked for.
    """
    forms: dict[str, Callable[[Path], FeatureSource]] = {
        ".parquet": ParquetFeatures,
        ".h5": hdf5_features,
        ".npz": npz_features,
    }
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of features; python -m data_prep.features makes one")
    for suffix, form in forms.items():
        if next(folder.glob(f"*{suffix}"), None) is not None:
            return form(folder)
    raise UserError(f"{folder} holds no features: no {', '.join(f'*{suffix}' for suffix in forms)} in it")


@dataclass(frozen=True)
class FilePerName:
    """A folder with one file for each picture or video, under its name.

    Attributes:
        suffix: of those files.
        load: what a file holds for a name; it may raise what `_DAMAGE` names.
        shape_of: its shape and dtype, from the file's header alone; likewise.
    """

    folder: Path
    suffix: str
    load: Callable[[Path, str], np.ndarray]
    shape_of: Callable[[Path, str], tuple[tuple[int, ...], np.dtype]]

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def names(self) -> Iterator[str]:
        """See `FeatureSource`."""
        return (path.stem for path in self.folder.glob(f"*{self.suffix}"))

    def read(self, name: str) -> Float[Tensor, "tokens width"]:
        """See `FeatureSource`."""
        values = self._of(name, self.load)
        _refuse_no_table(values.shape, values.dtype, name)
        return torch.from_numpy(values).flatten(0, -2)

    def stored(self, name: str) -> Stored:
        """See `FeatureSource`."""
        shape, dtype = self._of(name, self.shape_of)
        _refuse_no_table(shape, dtype, name)
        tokens = math.prod(shape[:-1])
        return Stored(tokens, shape[-1], tokens)

    def part(self, name: str) -> Part | None:
        """See `FeatureSource`."""
        return None

    def _of(self, name: str, take: Callable[[Path, str], Taken]) -> Taken:
        path = self._path(name)
        if not path.is_file():
            raise absent(name, self.folder)
        try:
            return take(path, name)
        except _DAMAGE as error:
            raise BadSample(name, f"features {path.name} in {self.folder} cannot be read: {error}") from None

    def _path(self, name: str) -> Path:
        if not name or "/" in name or "\\" in name or "\0" in name:
            raise BadSample(name, f"{name!r} cannot be a file's name, so {self.folder} has no features of it")
        return self.folder / f"{name}{self.suffix}"


def hdf5_features(folder: Path) -> FilePerName:
    """VL-Adapter's tree: `<name>.h5` for each picture, in it a group of that name with `features`. Needs h5py."""
    return FilePerName(folder, ".h5", _load_hdf5, _shape_in_hdf5)


def npz_features(folder: Path) -> FilePerName:
    """VALUE's folder: `<name>.npz` for each video, in it an array `features`."""
    return FilePerName(folder, ".npz", _load_npz, _shape_in_npz)


def _load_hdf5(path: Path, name: str) -> np.ndarray:
    import h5py

    with h5py.File(path, "r") as opened:
        stored: Any = opened[f"{name}/{FEATURES}"]
        return np.asarray(stored)


def _shape_in_hdf5(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    import h5py

    with h5py.File(path, "r") as opened:
        stored: Any = opened[f"{name}/{FEATURES}"]
        return tuple(stored.shape), stored.dtype


def _load_npz(path: Path, name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as opened:
        return opened[FEATURES]


def _shape_in_npz(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{FEATURES}.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(member)
        return shape, dtype


def _refuse_no_table(shape: tuple[int, ...], dtype: np.dtype, name: str) -> None:
    if len(shape) < 2 or not np.issubdtype(dtype, np.floating):
        raise BadSample(name, f"features of {name} are {dtype} of shape {tuple(shape)}, not a table of numbers")
