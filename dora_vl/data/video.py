"""Reads a video file's frames as pictures, whatever the file does to its decoder.

`VideoReader` has a process of its own decode it, because decoders hang, crash and leak on untrusted files: one that
takes too long or crashes the decoder becomes a `BadSample`, and the next file is read by a fresh process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from PIL import Image

from dora_vl.data.example import Clip
from dora_vl.data.pictures import VIDEO_MEMORY, VIDEO_SECONDS, MediaFolder, Trouble, parts_of, path_inside, picture_of
from dora_vl.data.video_backends import BACKENDS, BackendMissing, NoVideo, Unreadable, refuse_size
from dora_vl.errors import BadSample, MissingExtra, UserError
from dora_vl.files import open_regular
from dora_vl.limited_process import Budget, JobFailed, LimitedProcess, Part, one_process

VALUE_PERIOD_SECONDS = 1.5  # of the VALUE benchmark's video features: ffmpeg's `fps=1/1.5`


@dataclass(frozen=True)
class Uniform:
    """`frames` moments, each in the middle of an equal part of the clip; fewer where the clip has fewer frames."""

    frames: int

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise UserError(f"a video needs at least 1 frame, got {self.frames}")


@dataclass(frozen=True)
class EverySeconds:
    """One moment a period, in its middle: the frames that ffmpeg's filter `fps=1/period` keeps.

    Attributes:
        period: in seconds; 0.5 is two frames a second.
        min_frames: a clip too short for this many frames is cut into as many equal parts.
        max_frames: so is a clip too long for that many; None takes all.
    """

    period: float = VALUE_PERIOD_SECONDS
    min_frames: int = 2
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if not self.period > 0:
            raise UserError(f"the time between two frames must be more than 0 s, got {self.period}")


FrameSampling: TypeAlias = Uniform | EverySeconds
SAMPLINGS: Mapping[str, type[FrameSampling]] = {kind.__name__: kind for kind in (Uniform, EverySeconds)}


def moments(sampling: FrameSampling, *, start: float, end: float) -> list[float]:
    """Returns the moments to look at, in seconds, in order; all lie between `start` and `end`."""
    if isinstance(sampling, Uniform):
        return _middles(start, end, sampling.frames)
    count = round((end - start) / sampling.period)
    most = count if sampling.max_frames is None else sampling.max_frames
    if not sampling.min_frames <= count <= most:
        return _middles(start, end, max(sampling.min_frames, min(count, most)))
    return [start + (number + 0.5) * sampling.period for number in range(count)]


def _middles(start: float, end: float, parts: int) -> list[float]:
    return [start + (number + 0.5) * (end - start) / parts for number in range(parts)]


def clip_span(start: float | None, end: float | None, *, duration: float) -> tuple[float, float]:
    """Returns the part of a video that a clip means: its own times, as far as the video goes."""
    first, last = max(0.0, start or 0.0), duration if end is None else min(end, duration)
    if first >= last and not (start is None and end is None):
        span = f"{first:.2f} to {'its end' if end is None else f'{end:.2f} s'}"
        raise NoVideo(f"lasts {duration:.2f} s; it has no part from {span}")
    return first, last


Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class Frames(Generic[Prepared]):
    """Frames in the order they are shown, and when each begins; `span` is the part of the file that was meant.

    Times are in seconds from the file's first frame.
    """

    pictures: tuple[Prepared, ...]
    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    backend: str
    duration: float
    count: int = 0
    span: tuple[float, float] = (0.0, 0.0)


def clip_path(root: Path | MediaFolder, clip: Clip) -> Path:
    """Returns the clip's file, which is inside `root`, there, and not empty."""
    path = path_inside(root, clip.path, kind="video")
    try:
        with open_regular(path) as file:
            if file.read(1):
                return path
            reason = "is empty"
    except FileNotFoundError:
        reason = f"is missing in {root}"
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    raise BadSample(clip.path, f"video {clip.path} {reason}")


def read_video(
    content: bytes,
    path: str,
    start: float | None,
    end: float | None,
    sampling: tuple[str, Mapping[str, Any]] | None,
    backends: Sequence[str],
) -> Iterator[Part]:
    """Runs as a job of `limited_process`: sends the wanted frames, by the first library that reads them all.

    Where one gives up after its first frames, the next one begins anew with the facts of the video. Without `sampling`
    only these are sent: the file can be opened, and is whole.
    """
    reasons: dict[str, Exception] = {}
    for backend in backends:
        try:
            with closing(BACKENDS[backend](path)) as video:
                span = clip_span(start, end, duration=video.duration)
                yield {"backend": backend, "duration": video.duration, "count": len(video.begins), "span": span}, b""
                if sampling is None:
                    return
                wanted = SAMPLINGS[sampling[0]](**sampling[1])
                indices = video.locate(moments(wanted, start=span[0], end=span[1]))
                for index, (seconds, pixels) in zip(indices, video.frames(indices), strict=True):
                    refuse_size(pixels.shape[1], pixels.shape[0])
                    yield from parts_of(Image.fromarray(pixels), index=index, seconds=seconds)
            return
        except (BackendMissing, Unreadable) as error:
            reasons[backend] = error
    raise none_reads(reasons)


def no_video_reason(path: Path) -> Trouble | None:
    """Says what is wrong with a video file, without decoding a frame; None if nothing is."""
    wanted = {"path": str(path.absolute()), "start": None, "end": None, "sampling": None, "backends": tuple(BACKENDS)}
    try:
        list(one_process().run("read_video", wanted, budget=Budget(VIDEO_SECONDS, VIDEO_MEMORY)))
    except JobFailed as error:
        if error.kind == BackendMissing.__name__:
            raise UserError(f"{path}: {error}, or leave this file out") from None
        return Trouble.of(error)
    return None


def none_reads(reasons: Mapping[str, Exception]) -> Exception:
    """Makes the error when no library could read a file: the file's fault, or that none is installed."""
    listed = "; ".join(f"{backend}: {error}" for backend, error in reasons.items())
    if all(isinstance(error, BackendMissing) for error in reasons.values()):
        return BackendMissing(str(MissingExtra(f"no library that decodes videos can be used ({listed})", "video")))
    return NoVideo(f"cannot be read: {listed}")


class VideoReader(AbstractContextManager["VideoReader"]):
    """Reads videos in a process of its own, which is replaced when it hangs or dies. Use it from one thread.

    It can be sent to data workers; each starts its own process, at its first file. The libraries are tried in order; a
    file that takes `limit_seconds` of the processor is given up.
    """

    def __init__(self, *, backends: Sequence[str] = tuple(BACKENDS), limit_seconds: float = VIDEO_SECONDS) -> None:
        self._backends = tuple(backends)
        self._limit = limit_seconds
        self._process = LimitedProcess("read_video")
        self._kept: tuple[object, Frames[Image.Image]] | None = None

    def read(self, root: Path | MediaFolder, clip: Clip, sampling: FrameSampling) -> Frames[Image.Image]:
        """Returns the frames as RGB pictures; see `read_prepared`. Keeps the last: questions share a video."""
        path = clip_path(root, clip)
        key = path, path.stat().st_mtime_ns, clip, sampling
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.read_prepared(root, clip, sampling, lambda picture: picture)
        return self._kept[1]

    def read_prepared(
        self, root: Path | MediaFolder, clip: Clip, sampling: FrameSampling, prepare: Callable[[Image.Image], Prepared]
    ) -> Frames[Prepared]:
        """Returns the frames, each made smaller as it comes, so that a long clip need not fit in memory."""
        budget = Budget(self._limit, VIDEO_MEMORY)
        try:
            return read_frames(self._process, clip_path(root, clip), clip, sampling, prepare, budget, self._backends)
        except JobFailed as error:
            if error.kind == BackendMissing.__name__:
                raise UserError(str(error)) from None
            raise BadSample(clip.path, f"video {clip.path} {error}") from None

    def close(self) -> None:
        """Ends the process; the next file starts another."""
        self._process.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def read_frames(
    process: LimitedProcess,
    path: Path,
    clip: Clip,
    sampling: FrameSampling,
    prepare: Callable[[Image.Image], Prepared],
    budget: Budget,
    backends: Sequence[str] = tuple(BACKENDS),
) -> Frames[Prepared]:
    """Returns a clip's frames, decoded in that process. Raises JobFailed: they cannot be read, or cost too much."""
    wanted = {
        "path": str(path.absolute()),
        "start": clip.start_seconds,
        "end": clip.end_seconds,
        "sampling": (type(sampling).__name__, dataclasses.asdict(sampling)),
        "backends": backends,
    }
    facts: dict[str, Any] = {}
    frames: list[tuple[Prepared, int, float]] = []
    with closing(process.run("read_video", wanted, budget=budget)) as parts:
        for part in parts:
            message, _ = part
            if "backend" in message:
                facts, frames = message, []
            else:
                frames.append((prepare(picture_of(part, parts, budget)), message["index"], message["seconds"]))
    pictures, indices, seconds = zip(*frames, strict=True)
    return Frames(pictures, indices, seconds, **{**facts, "span": tuple(facts["span"])})
