"""Stored features by the name of their picture or video, whoever wrote them.

Beside our own store these forms are read: VL-Adapter's re-hosted Parquet shards, its tree of one HDF5 file a picture,
VALUE's folder of one `.npz` a video. `open_features` tells them apart by what the folder holds.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModel

from dora_vl.backbones.specs import PRETRAINED, TowerSpec
from dora_vl.backbones.tower_sources import (
    load_from_file,
    load_open_clip,
    load_timm,
    load_tower,
    preparation_of,
    transformers_preparation,
)
from dora_vl.backbones.towers import Aspect, ImagePreparation, Preparation
from dora_vl.backbones.vision_store import (
    FEATURES,
    HASH,
    SHARD_SUFFIX,
    FeatureStore,
    Part,
    Stored,
    shard_rows,
    store_key,
)
from dora_vl.data.example import Clip
from dora_vl.data.video import EverySeconds, Frames, Sampling, Uniform, VideoReader
from dora_vl.errors import BadSample, UserError
from dora_vl.files import NO_OWN_CODE, check_model_folder, opening

CACHE_BYTES = 256 * 2**20
ID = "id"
OPEN_SHARDS = 64  # each keeps its list of groups, about a megabyte
_DAMAGE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)
"""What numpy and h5py raise on files that are damaged or hold something else."""
Taken = TypeVar("Taken")


def open_features(folder: Path) -> FeatureStore:
    """The features in a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of features; python -m data_prep.features makes one")
    forms = {
        SHARD_SUFFIX: shard_rows,
        PARQUET_SUFFIX: lambda folder: ParquetShards(folder).rows(),
        ".h5": lambda folder: _files(
            folder,
            ".h5",
            partial(_from_hdf5, take=np.asarray),
            partial(_from_hdf5, take=_shape_and_dtype),
        ),
        ".npz": lambda folder: _files(folder, ".npz", _load_npz, _shape_in_npz),
    }
    held = [suffix for suffix in forms if next(folder.glob(f"*{suffix}"), None) is not None]
    if not held:
        raise UserError(f"{folder} holds no features: no {', '.join(f'*{suffix}' for suffix in forms)} in it")
    if len(held) > 1:
        raise UserError(f"{folder} holds features as {' and '.join(held)}; lay each form into a folder of its own")
    return FeatureStore(folder, forms[held[0]](folder))


PARQUET_SUFFIX = ".parquet"


class ParquetShards:
    """VL-Adapter's re-hosted shards: Parquet with the columns `id` and `features`, nested lists of fixed sizes.

    Groups of rows that were read last stay in memory, up to `cache_bytes`; so do the shards used last.
    """

    def __init__(self, folder: Path, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._paths = sorted(folder.glob(f"*{PARQUET_SUFFIX}"))
        self._cache_bytes = cache_bytes
        self._groups: OrderedDict[tuple[Path, int], np.ndarray] = OrderedDict()
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def rows(self) -> dict[str, ParquetRow]:
        """What they hold, by name; the features themselves are not read."""
        rows: dict[str, ParquetRow] = {}
        for path in self._paths:
            try:
                with _parquet_file(path) as opened:
                    if missing := {ID, FEATURES} - set(opened.schema_arrow.names):
                        raise UserError(f"{path} has no column {min(missing)!r}, so it holds no features")
                    sizes = _fixed_sizes(opened.schema_arrow.field(FEATURES).type)
                    if len(sizes) < 2:
                        raise UserError(f"{path}: column {FEATURES!r} holds no tables of one size")
                    tokens = math.prod(sizes[:-1])
                    stored = Stored(tokens, sizes[-1], tokens)
                    for group in range(opened.num_row_groups):
                        names = opened.read_row_group(group, columns=[ID])[ID].to_pylist()
                        rows |= {str(name): ParquetRow(str(name), self, path, group, row, stored)
                                 for row, name in enumerate(names)}  # fmt: skip
            except (OSError, ValueError) as error:  # pyarrow's own errors are these
                raise UserError(f"{path} cannot be read ({_first_line(error)}); copy it again") from error
        return rows

    def group(self, path: Path, number: int) -> np.ndarray:
        """The numbers of a shard's group of rows, from memory or the file."""
        key = (path, number)
        if key not in self._groups:
            column = self._opened(path).read_row_group(number, columns=[FEATURES])[FEATURES].combine_chunks()
            for _ in _fixed_sizes(column.type):
                column = column.flatten()
            self._groups[key] = column.to_numpy(zero_copy_only=False)
            while len(self._groups) > 1 and sum(held.nbytes for held in self._groups.values()) > self._cache_bytes:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _opened(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = _parquet_file(path)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(path)
        return self._open[path]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": OrderedDict(), "_open": OrderedDict()}


@dataclass(frozen=True, slots=True)
class ParquetRow:
    """Where one name's features are, and what they are; a `Held`."""

    name: str
    shards: ParquetShards
    path: Path
    group: int
    row: int
    shape: Stored
    part: Part | None = None

    def stored(self) -> Stored:
        """See `Held`; nothing says which frames they are of."""
        return self.shape

    def read(self) -> Float[Tensor, "tokens width"]:
        """See `Held`."""
        try:
            numbers = self.shards.group(self.path, self.group)
        except (OSError, ValueError) as error:
            reason = f"features of {self.name} in {self.path} cannot be read: {_first_line(error)}"
            raise BadSample(self.name, reason) from None
        length = self.shape.tokens * self.shape.width
        own = numbers[self.row * length : (self.row + 1) * length].copy()
        return torch.from_numpy(own).view(self.shape.tokens, self.shape.width)


def _parquet_file(path: Path) -> Any:
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(path)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _fixed_sizes(kind: Any) -> list[int]:
    """Sizes of nested lists of fixed sizes, from the outside in; nothing where one is of any length."""
    import pyarrow as pa

    sizes = []
    while pa.types.is_nested(kind):
        if not pa.types.is_fixed_size_list(kind):
            return []
        sizes.append(kind.list_size)
        kind = kind.value_type
    return sizes


@dataclass(frozen=True, slots=True)
class FeatureFile:
    """One picture's or video's file, under its name; a `Held`."""

    path: Path
    load: Callable[[Path], np.ndarray]
    shape_of: Callable[[Path], tuple[tuple[int, ...], np.dtype]]
    part: Part | None = None

    def read(self) -> Float[Tensor, "tokens width"]:
        """See `Held`."""
        values = self._taken(self.load)
        self._refuse_no_table(values.shape, values.dtype)
        return torch.from_numpy(values).flatten(0, -2)

    def stored(self) -> Stored:
        """See `Held`."""
        shape, dtype = self._taken(self.shape_of)
        self._refuse_no_table(shape, dtype)
        tokens = math.prod(shape[:-1])
        return Stored(tokens, shape[-1], tokens)

    def _taken(self, take: Callable[[Path], Taken]) -> Taken:
        try:
            return take(self.path)
        except _DAMAGE as error:
            raise BadSample(
                self.path.stem, f"features {self.path.name} in {self.path.parent} cannot be read: {error}"
            ) from None

    def _refuse_no_table(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        name = self.path.stem
        if len(shape) < 2 or not np.issubdtype(dtype, np.floating):
            raise BadSample(name, f"features of {name} are {dtype} of shape {tuple(shape)}, not a table of numbers")


def _files(
    folder: Path,
    suffix: str,
    load: Callable[[Path], np.ndarray],
    shape_of: Callable[[Path], tuple[tuple[int, ...], np.dtype]],
) -> dict[str, FeatureFile]:
    """One file a picture or video: VL-Adapter's tree of HDF5 (needs h5py), VALUE's folder of `.npz`."""
    return {path.stem: FeatureFile(path, load, shape_of) for path in folder.glob(f"*{suffix}")}


def _from_hdf5(path: Path, take: Callable[[Any], Taken]) -> Taken:
    import h5py

    with h5py.File(path, "r") as opened:
        return take(opened[f"{path.stem}/{FEATURES}"])


def _shape_and_dtype(stored: Any) -> tuple[tuple[int, ...], np.dtype]:
    return tuple(stored.shape), stored.dtype


def _load_npz(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as opened:
        return opened[FEATURES]


def _shape_in_npz(path: Path) -> tuple[tuple[int, ...], np.dtype]:
    with zipfile.ZipFile(path) as archive, archive.open(f"{FEATURES}.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(member)
        return shape, dtype


def load_pooled(spec: TowerSpec) -> tuple[nn.Module, Preparation]:
    """The network and the preparation it expects; pixels in, [pictures, width] out.

    open_clip and transformers give CLIP's projected picture embedding, not normalised; timm the pooled output before
    its classifier (which in timm's CLIP models is the projection, so it is left out).
    """
    if spec.library == "transformers":
        with opening(f"transformers could not load {spec.name!r}"):
            whole = AutoConfig.from_pretrained(spec.name, **NO_OWN_CODE)
            if "vision_config" not in whole.sub_configs:
                raise UserError(f"{spec.name} is no two-tower model, so it has no picture embedding; keep its grid")
            if own := spec.weights == PRETRAINED:
                check_model_folder(spec.name)
            model: Any = AutoModel.from_pretrained(spec.name, **NO_OWN_CODE) if own else AutoModel.from_config(whole)
        load_from_file(model, spec)
        return PictureEmbedding(model), transformers_preparation(spec, whole.vision_config)
    network, config = {"timm": load_timm, "open_clip": load_open_clip}[spec.library](spec)
    return network, preparation_of(config)


class PictureEmbedding(nn.Module):
    """The picture side of a transformers two-tower model, its projection included."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Float[Tensor, "pictures 3 height width"]) -> Float[Tensor, "pictures channels"]:
        """Projected embeddings, not normalised."""
        made = self.model.get_image_features(pixel_values=pixels)
        return made if isinstance(made, Tensor) else made.pooler_output


Kept = Literal["grid", "pooled"]


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Everything that decides the features of a picture or a video.

    Attributes:
        tower: the vision network.
        kept: of each picture or frame: its `grid`, one token a cell; or the network's own `pooled` output (CLIP's
            projection), not normalised.
        merge: cells along a side of a block that becomes one token, their numbers side by side: nothing is averaged
            away, and a frame is few tokens.
        changes: beside its numbers each token holds how they differ from the frame before (0 in the first, and in
            pictures), so that one token says which way something moves.
        aspect: how a picture becomes a square.
        every_seconds: a video's time between two frames; VALUE's features have 1.5.
        frames: so many frames of a video instead, evenly.
    """

    tower: TowerSpec
    kept: Kept = "grid"
    merge: int = 1
    changes: bool = False
    aspect: Aspect = "squash"
    every_seconds: float | None = None
    frames: int | None = None

    @property
    def sampling(self) -> Sampling:
        """Which frames of a video."""
        if self.frames is not None and self.every_seconds is not None:
            raise UserError(f"every {self.every_seconds} s and {self.frames} frames: give one of the two")
        if self.frames is not None:
            return Uniform(self.frames)
        return EverySeconds() if self.every_seconds is None else EverySeconds(self.every_seconds)

    def to_record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> FeatureSettings:
        """From what `to_record` gave."""
        try:
            tower = dict(record["tower"])
            for name in ("image_mean", "image_std"):
                tower[name] = None if tower[name] is None else tuple(tower[name])
            return cls(**{**record, "tower": TowerSpec(**tower)})
        except (KeyError, TypeError) as error:
            raise UserError(f"these are not the settings of features: {error}") from None


class FeatureEncoder:
    """A frozen tower that turns pictures and frames into features."""

    def __init__(self, settings: FeatureSettings, *, device: torch.device | None = None) -> None:
        self.settings = settings
        if settings.kept == "pooled":
            network, preparation = load_pooled(settings.tower)
        else:
            loaded = load_tower(settings.tower)
            network, preparation = (
                GridNetwork(loaded.model, layer=loaded.layer, prefix=loaded.prefix_tokens),
                loaded.preparation,
            )
        self.device = device or torch.device("cpu")
        self.network: nn.Module = network.eval().requires_grad_(False).to(self.device)
        self.preparation = ImagePreparation(preparation, aspect=settings.aspect)

    def fingerprint(self) -> str:
        """A hash of the weights and of everything that changes the pixels."""
        return store_key(self.network, {"preparation": self.preparation.fingerprint()})

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "pictures 3 height width"]) -> Float[Tensor, "pictures tokens channels"]:
        """Prepared pictures as features, without changes; `pooled` is one token each."""
        made = self.network(pixels.to(self.device)).float()
        return made.unsqueeze(1) if self.settings.kept == "pooled" else merged(made, self.settings.merge)

    def pictures(self, pictures: Sequence[Image]) -> Float[Tensor, "pictures tokens channels"]:
        """Pictures as features, each by itself."""
        return torch.stack([self.frames([picture]) for picture in pictures])

    def frames(self, pictures: Sequence[Image]) -> Float[Tensor, "tokens channels"]:
        """Frames of one clip, in order, as its features."""
        return self.sequence(self.encode(torch.stack([self.preparation.prepare(picture) for picture in pictures])))

    def sequence(self, frames: Float[Tensor, "frames tokens channels"]) -> Float[Tensor, "all_tokens all_channels"]:
        """The features of a clip from what `encode` made of its frames in order: one frame after the other."""
        return (with_changes(frames) if self.settings.changes else frames).flatten(0, 1)

    def video(
        self, reader: VideoReader, root: Path, clip: Clip
    ) -> tuple[Float[Tensor, "tokens channels"], Frames[Tensor]]:
        """A clip's frames as features, one after the other, and which frames they are."""
        frames = reader.read_prepared(root, clip, self.settings.sampling, self.preparation.prepare)
        return self.sequence(self.encode(torch.stack(frames.pictures))), frames


def merged(
    grid: Float[Tensor, "pictures cells channels"], side: int
) -> Float[Tensor, "pictures blocks block_channels"]:
    """Blocks of `side` by `side` cells as one token each, row by row; what InternVL calls pixel unshuffling."""
    before = math.isqrt(grid.shape[1])
    if before**2 != grid.shape[1] or before % side:
        raise UserError(
            f"a grid of {grid.shape[1]} cells cannot be cut into blocks of {side}x{side}; set merge or grid_pool"
        )
    after = before // side
    blocks = grid.unflatten(1, (after, side, after, side)).transpose(2, 3)
    return blocks.flatten(3, 5).flatten(1, 2)


def with_changes(
    frames: Float[Tensor, "frames tokens channels"],
) -> Float[Tensor, "frames tokens twice_the_channels"]:
    """Each token's numbers, then how they differ from the same place's in the frame before; 0 in the first frame."""
    before = torch.cat([frames[:1], frames[:-1]])
    return torch.cat([frames, frames - before], dim=-1)


class GridNetwork(nn.Module):
    """A tower whose output is its grid and nothing else, whichever class it is of."""

    def __init__(self, model: nn.Module, *, layer: int, prefix: int) -> None:
        super().__init__()
        self.model = model
        self._layer = layer
        self._prefix = prefix

    def forward(self, pixels: Float[Tensor, "pictures 3 height width"]) -> Float[Tensor, "pictures tokens channels"]:
        """Grid tokens, row by row."""
        if self._layer == -1:
            return self.model(pixels).last_hidden_state[:, self._prefix :]
        return self.model(pixels, output_hidden_states=True).hidden_states[self._layer][:, self._prefix :]


def open_encoders(
    adapter: Path, recipe: Mapping[str, Any], *, device: torch.device, any_tower: bool = False
) -> dict[str, FeatureEncoder]:
    """An encoder for each task of the recipe whose features say how they were made; equal settings share one."""
    stated = {name: recipe["features"].get(name) for name in recipe["tasks"]}
    if not any(stated.values()):
        raise UserError(
            f"{adapter} does not say how the features of {', '.join(stated)} were computed (data_prep.features did "
            "not make them), so it cannot be asked about raw pictures"
        )
    opened: dict[str, FeatureEncoder] = {}
    encoders: dict[str, FeatureEncoder] = {}
    for name, record in stated.items():
        if record is None:
            continue
        key = json.dumps(record, sort_keys=True)
        if key not in opened:
            settings = FeatureSettings.from_record({key: value for key, value in record.items() if key != HASH})
            opened[key] = FeatureEncoder(settings, device=device)
            if not any_tower:
                check_tower(opened[key], record, f"{adapter}: {name}")
        encoders[name] = opened[key]
    return encoders


def check_tower(encoder: FeatureEncoder, record: Mapping[str, Any], trained: str) -> None:
    """Refuses a tower that is not the one that the record of a folder's features names."""
    found, tower = encoder.fingerprint(), encoder.settings.tower
    if found != record[HASH]:
        raise UserError(
            f"{trained} was trained on features of a vision tower with sha256 {record[HASH][:12]}…, {tower.library}'s "
            f"{tower.name} with weights {tower.weights!r} has {found[:12]}… here; put the same weights there, or add "
            "--any-base to try it all the same"
        )
