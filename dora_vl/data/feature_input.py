"""Stored features of an example's pictures or video, as many tokens for each as the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from dora_vl.data.examples import Clip, Example
from dora_vl.errors import BadSample, UserError

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
    """Features by an example's path: the file's name without folder and ending counts.

    Attributes:
        tokens: how many every input gets.
        width: numbers of each, as the model takes them.
    """

    source: FeatureStore
    tokens: int
    width: int

    def read(self, path: str) -> Float[Tensor, "tokens channels"]:
        """The features of one file, in float32.

        Raises:
            BadSample: there are none, or of another width, or they are no numbers.
        """
        features = self.source.read(Path(path).stem).float()
        self._refuse_other_width(path, features.shape[1])
        if not bool(torch.isfinite(features).all()):
            raise BadSample(path, f"its features in {self.source.folder} hold NaN or infinity; compute them again")
        return features

    def stored(self, path: str) -> Stored:
        """What they are, without reading them.

        Raises:
            BadSample: there are none, or of another width.
        """
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
    """Features of an example's pictures, or of its video.

    Raises:
        BadSample: it has neither, or they are not there.
    """
    paths = feature_paths(example)
    read = [reader.read(path) for path in paths]
    _check_part(example, reader)
    _check_pictures(example, [len(one) for one in read], reader)
    try:
        return torch.stack([_fitted(one, path, reader) for one, path in zip(read, paths, strict=True)])
    except UserError as error:
        raise BadSample(example.id, str(error)) from None


def check_features(example: Example, reader: FeatureReader) -> None:
    """Refuses what `features_of` would, as far as it can be known without reading features.

    Raises:
        BadSample: as there.
    """
    found = [reader.stored(path) for path in feature_paths(example)]
    _check_part(example, reader)
    _check_pictures(example, [one.tokens for one in found], reader)
    try:
        for one in found:
            pooled_frames(one.tokens, reader.tokens, frames=one.frames)
    except UserError as error:
        raise BadSample(example.id, str(error)) from None


def feature_paths(example: Example) -> tuple[str, ...]:
    """The paths by which a reader knows the features of an example's pictures, or of its video.

    Raises:
        BadSample: it has neither.
    """
    clip = clip_of_features(example)
    paths = example.images or (() if clip is None else (clip[0],))
    if not paths:
        raise BadSample(example.id, "it has neither pictures nor a video")
    return tuple(paths)


def _check_pictures(example: Example, tokens: Sequence[int], reader: FeatureReader) -> None:
    """A picture must have exactly as many tokens as every input gets."""
    if example.video is None and any(one != reader.tokens for one in tokens):
        have = "its picture has" if len(tokens) == 1 else "its pictures have"
        counts = " and ".join(str(one) for one in dict.fromkeys(tokens))
        raise BadSample(example.id, f"{have} {counts} tokens; data.feature_tokens is {reader.tokens}")


def part_of(clip: Clip) -> Part:
    """Where a clip begins and ends."""
    return clip.start_seconds or 0.0, clip.end_seconds


def _check_part(example: Example, reader: FeatureReader) -> None:
    """Refuses features of another part of the video than the example means: they were found by their name alone."""
    clip = clip_of_features(example)
    if example.images or clip is None:
        return
    stored, meant = reader.part(clip[0]), part_of(clip[1])
    if stored is not None and stored != meant:
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


def _fitted(features: Tensor, path: str, reader: FeatureReader) -> Float[Tensor, "tokens channels"]:
    # What is stored is asked only where frames count: a file of its own is looked into again.
    frames = reader.stored(path).frames if len(features) > reader.tokens else 1
    return fixed_length(features, reader.tokens, frames=frames)


def clip_of_features(example: Example) -> tuple[str, Clip] | None:
    """The name of a video's features, as a path whose stem counts, and the part of the file that they are of.

    A span that the prompt states (`extra["ts"]`: TVQA, How2QA, TVC) leaves the features those of the whole file, as
    VALUE's are; any other span is all that the features see. `extra["vid_name"]` is the name of such a part, where
    one file has several (YouCook2's segments).
    """
    if example.videos:
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

    Raises:
        UserError: `length` holds no whole number of frames, where there are too many.
    """
    tokens = features.float()
    if len(tokens) <= length:
        return functional.pad(tokens, (0, 0, 0, length - len(tokens)))
    by_time = tokens.view(frames, -1).t()[None]  # [1, places x channels, frames]
    pooled = functional.adaptive_max_pool1d(by_time, pooled_frames(len(tokens), length, frames=frames))
    return pooled[0].t().reshape(length, -1)


def pooled_frames(tokens: int, length: int, *, frames: int) -> int:
    """How many frames are left where so many tokens of so many frames have to become `length`, at most all of them.

    Raises:
        UserError: `length` holds no whole number of frames, where there are too many.
    """
    places = tokens // frames  # of a frame
    if tokens <= length:
        return frames
    if length % places:
        raise UserError(
            f"{frames} frames of {places} tokens have to become {length} tokens (data.feature_tokens), which is no "
            f"multiple of {places}"
        )
    return length // places
