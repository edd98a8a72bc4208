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
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable
from uuid import uuid4

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dora_vl.backbones.towers import ImagePreparation
from dora_vl.data.example import Clip, Example, whole_file
from dora_vl.data.pictures import MediaFolder, open_image
from dora_vl.data.video import Sampling, VideoReader
from dora_vl.errors import BadSample, UserError
from dora_vl.files import check_whole

Part = tuple[float, float | None]
"""From so many seconds to so many; None is the video's end."""


@dataclass(frozen=True)
class Stored:
    """What a picture's or a video's stored features are."""

    tokens: int
    width: int
    """Numbers of a token."""
    frames: int
    """How many frames they are of, each of equally many tokens."""


@runtime_checkable
class Held(Protocol):
    """One picture's or video's stored features; both methods raise `BadSample` where they are damaged."""

    @property
    def part(self) -> Part | None:
        """Of the video; None where nothing says it."""
        ...

    def stored(self) -> Stored:
        """What they are, without reading them; where nothing says it, each token is a frame."""
        ...

    def read(self) -> Float[Tensor, "tokens width"]:
        """All of them, in the dtype they are stored in."""
        ...


@dataclass(frozen=True)
class FeatureStore:
    """Stored features by the name of their picture or video, in whatever form; worker processes may have it."""

    folder: Path
    held: Mapping[str, Held]

    def __contains__(self, name: str) -> bool:
        return name in self.held

    def __getitem__(self, name: str) -> Held:
        """Raises `BadSample` where there are none."""
        if name not in self.held:
            reason = f"{self.folder} holds no features of {name}; python -m data_prep.features computes them"
            raise BadSample(name, reason)
        return self.held[name]

    def read(self, name: str) -> Float[Tensor, "tokens width"]:
        """One picture's or video's features; raises `BadSample` where there are none, or they cannot be read."""
        return self[name].read()


@dataclass(frozen=True)
class FeatureReader:
    """Features by an example's path: the file's name without folder and ending counts."""

    source: FeatureStore
    tokens: int
    width: int

    def read(self, path: str) -> Float[Tensor, "tokens channels"]:
        """The features of one file, in float32."""
        features = self.source.read(Path(path).stem).float()
        self._refuse_other_width(path, features.shape[1])
        if not bool(torch.isfinite(features).all()):
            raise BadSample(path, f"its features in {self.source.folder} hold NaN or infinity; compute them again")
        return features

    def stored(self, path: str) -> Stored:
        """What they are, without reading them."""
        found = self.source[Path(path).stem].stored()
        self._refuse_other_width(path, found.width)
        return found

    def part(self, path: str) -> Part | None:
        """The part of a video that they are of; None where nothing says it."""
        return self.source[Path(path).stem].part

    def _refuse_other_width(self, path: str, width: int) -> None:
        if width != self.width:
            reason = f"its features in {self.source.folder} have {width} numbers a token; the model takes {self.width}"
            raise BadSample(path, reason)


def features_of(example: Example, reader: FeatureReader) -> Float[Tensor, "images tokens channels"]:
    """Features of an example's pictures, or of its video."""
    paths = feature_paths(example)
    read = [reader.read(path) for path in paths]
    _check(example, reader, [len(features) for features in read])
    fitted: list[Tensor] = []
    try:
        for path, features in zip(paths, read, strict=True):
            # What is stored is asked only where frames count: a file of its own is looked into again.
            frames = reader.stored(path).frames if len(features) > reader.tokens else 1
            fitted.append(fixed_length(features, reader.tokens, frames=frames))
    except UserError as error:
        raise BadSample(example.id, str(error)) from None
    return torch.stack(fitted)


def check_features(example: Example, reader: FeatureReader) -> None:
    """Refuses what `features_of` would, as far as it can be known without reading features."""
    stored = [reader.stored(path) for path in feature_paths(example)]
    _check(example, reader, [features.tokens for features in stored])
    try:
        for one in stored:
            pooled_frames(one.tokens, reader.tokens, frames=one.frames)
    except UserError as error:
        raise BadSample(example.id, str(error)) from None


def feature_paths(example: Example) -> tuple[str, ...]:
    """The paths by which a reader knows the features of an example's pictures, or of its video."""
    clip = clip_of_features(example)
    paths = example.images or (() if clip is None else (clip[0],))
    if not paths:
        raise BadSample(example.id, "it has neither pictures nor a video")
    return tuple(paths)


def part_of(clip: Clip) -> Part:
    """Where a clip begins and ends."""
    return clip.start_seconds or 0.0, clip.end_seconds


def _check(example: Example, reader: FeatureReader, tokens: Sequence[int]) -> None:
    """Refuses another number of a picture's tokens, and features of another part of a video than the example means."""
    clip = clip_of_features(example)
    if clip is None and any(count != reader.tokens for count in tokens):
        counts = " and ".join(str(count) for count in dict.fromkeys(tokens))
        raise BadSample(example.id, f"its pictures have {counts} tokens; data.feature_tokens is {reader.tokens}")
    if example.images or clip is None:
        return
    stored, meant = reader.part(clip[0]), part_of(clip[1])
    if stored is not None and stored != meant:  # they were found by their name alone
        raise BadSample(
            example.id,
            f"it is about {in_words(meant)} of {clip[1].path}, and its features are of {in_words(stored)}; compute "
            "them with python -m data_prep.features --records, in a folder of their own",
        )


def in_words(part: Part) -> str:
    """As a message says it."""
    start, end = part
    if end is None:
        return f"all from {start:g} s on" if start else "the whole"
    return f"{start:g} to {end:g} s"


def clip_of_features(example: Example) -> tuple[str, Clip] | None:
    """The name of a video's features, as a path whose stem counts, and the part of the file that they are of.

    A span that the prompt states (`extra["ts"]`: TVQA, How2QA, TVC) leaves the features those of the whole file, as
    VALUE's are; any other span is all that the features see. `extra["vid_name"]` is the name of such a part, where
    one file has several (YouCook2's segments).
    """
    if len(example.videos) > 1:
        raise BadSample(example.id, f"it has {len(example.videos)} videos; this task reads one")
    video = example.video
    if video is None:
        return None
    path = PurePosixPath(video.path)
    name = str(path.with_stem(str(example.extra.get("vid_name", path.stem))))
    return name, Clip(path=video.path) if "ts" in example.extra else video


def fixed_length(
    features: Float[Tensor, "frame_tokens channels"], length: int, *, frames: int
) -> Float[Tensor, "length channels"]:
    """As many tokens as every input has: fewer are followed by zeros, more are max-pooled over time.

    Each place in a frame is pooled by itself, so that a grid stays a grid. In float32, since pooling float16 fails on
    a CPU.

    Args:
        features: the tokens of one frame after the other's.
        frames: how many frames those are.
    """
    tokens = features.float()
    if len(tokens) <= length:
        return functional.pad(tokens, (0, 0, 0, length - len(tokens)))
    by_time = tokens.view(frames, -1).t()[None]  # [1, places x channels, frames]
    pooled = functional.adaptive_max_pool1d(by_time, pooled_frames(len(tokens), length, frames=frames))
    return pooled[0].t().reshape(length, -1)


def pooled_frames(tokens: int, length: int, *, frames: int) -> int:
    """How many frames are left where so many tokens of so many frames have to become `length`, at most all of them."""
    places = tokens // frames  # of a frame
    if tokens <= length:
        return frames
    if length % places:
        raise UserError(
            f"{frames} frames of {places} tokens have to become {length} tokens (data.feature_tokens), which is no "
            f"multiple of {places}"
        )
    return length // places


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
    """Collects rows and writes a shard whenever there are enough; as a context manager, what is left at its end too."""

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
        """Takes one row; it is on disk when its shard is full, or at `flush`."""
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
        """Writes what has been collected as one shard under a name of its pictures: computed again they replace it."""
        if not self._rows:
            return
        named = hashlib.sha256("\n".join(row.name for row in self._rows).encode()).hexdigest()[:20]
        rows: list[dict[str, Any]] = []
        start = 0
        for row in self._rows:
            count = 0 if row.features is None else len(row.features)
            described = {name: value for name, value in vars(row).items() if name != FEATURES}
            rows.append({**described, "start": start, "tokens": count})
            start += count
        index = json.dumps({"written": time.time_ns(), "rows": rows}).encode()
        tokens = [row.features for row in self._rows if row.features is not None]
        tensors = {
            FEATURES: torch.cat(tokens) if tokens else torch.zeros(0, 1),
            INDEX: torch.frombuffer(bytearray(index), dtype=torch.uint8),
        }
        save_whole(self._folder / f"features-{named}{SHARD_SUFFIX}", tensors)
        self._rows, self._bytes = [], 0


def save_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a shard under a temporary name and renames it; nothing half-written is left."""
    unfinished = path.with_name(f".{path.name}.{uuid4().hex[:12]}")
    try:
        save_file(tensors, unfinished, metadata)
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
    """What the folder's shards hold by now, by name; of two that have a name the one written last counts."""
    indexes = [_read_index(path) for path in sorted(folder.glob(f"*{SHARD_SUFFIX}"))]
    newest = {row.name: row for _, rows in sorted(indexes, key=lambda index: index[0]) for row in rows}
    # In the order of the shards' names, which is the same whichever process was done first.
    return {row.name: newest[row.name] for _, rows in indexes for row in rows}


def _read_index(path: Path) -> tuple[int, list[ShardRow]]:
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
            index = json.loads(bytes(opened.get_tensor(INDEX).numpy()))
        shard = Shard(path)
        return int(index["written"]), [_shard_row(row, shard, shape[-1]) for row in index["rows"]]
    except (SafetensorError, ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(
            f"{path} holds no features that can be read ({type(error).__name__}: {error}); it is a cache: delete this "
            "file, and what it held is computed anew by the next run, or by python -m data_prep.features"
        ) from error


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
    """What the features of a folder were made with; None where nothing says it."""
    path = folder / SETTINGS_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); python -m data_prep.features writes it") from None


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first name, in their order, whose values differ; None where all are equal."""
    return min((name for name in {*one, *other} if one.get(name) != other.get(name)), default=None)


log = logging.getLogger(__name__)

PICTURE_BACKEND = "pillow"


@dataclass(frozen=True)
class Medium:
    """A picture's path or a clip, and the name of its features."""

    name: str
    path: str
    clip: Clip | None = None

    @property
    def part(self) -> Part:
        """Of the video; a picture is whole."""
        return WHOLE if self.clip is None else part_of(self.clip)


@dataclass(frozen=True, kw_only=True)
class Media(Dataset[tuple[FeatureRow, Tensor | None]]):
    """Reads and prepares media: a row yet without features, and `[frames, 3, height, width]`; None where it is broken.

    Attributes:
        root: the folder of their paths.
        sampling: which frames of a clip; `reader` decodes it.
    """

    media: Sequence[Medium]
    root: MediaFolder
    preparation: ImagePreparation
    sampling: Sampling | None = None
    reader: VideoReader | None = None

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, index: int) -> tuple[FeatureRow, Tensor | None]:
        medium = self.media[index]
        row = FeatureRow(medium.name, None, part=medium.part, state=file_state(self.root.root, medium.path))
        prepare = self.preparation.prepare
        try:
            if medium.clip is None:
                picture = prepare(open_image(self.root, medium.path))
                return replace(row, backend=PICTURE_BACKEND), picture[None]
            if self.reader is None or self.sampling is None:
                raise ValueError("clips need a reader and a sampling")
            frames = self.reader.read_prepared(self.root, medium.clip, self.sampling, prepare)
            row = replace(row, backend=frames.backend, indices=frames.indices, seconds=frames.seconds)
            return row, torch.stack(frames.pictures)
        except BadSample as error:
            return replace(row, broken=error.reason), None


def computed(
    media: Media, encode: Callable[[list[Tensor]], Iterable[Tensor]], *, at_once: int, workers: int, progress: bool
) -> Iterator[FeatureRow]:
    """The media's rows in their order, those that could not be read without features."""
    loader: Iterable[Any] = DataLoader(media, batch_size=at_once, num_workers=workers, collate_fn=list)
    with tqdm(total=len(media), unit="file", desc="features", disable=not progress) as bar:
        for batch in loader:
            pixels = [one for _, one in batch if one is not None]
            features = iter(encode(pixels) if pixels else ())
            for row, one in batch:
                yield row if one is None else replace(row, features=next(features))
            bar.update(len(batch))
