"""Frames of a video file as pictures, whatever the file does to its decoder.

PyAV, with FFmpeg in its wheel, decodes it in a process of its own, because decoders hang, crash and leak on files from
the wild: a file that takes too long or takes the decoder with it is one `BadSample`, and the next file is read by a
fresh process.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dora_vl.data.example import Clip
from dora_vl.data.picture_files import (
    FRAME_PIXELS,
    VIDEO_FRAMES,
    VIDEO_MEMORY,
    VIDEO_SECONDS,
    Trouble,
    parts_of,
    picture_of,
)
from dora_vl.data.pictures import MediaFolder, path_inside
from dora_vl.errors import BadSample, UserError, install_command, one_line
from dora_vl.files import open_regular
from dora_vl.limited_process import Budget, JobFailed, LimitedProcess, Part, one_process


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
        period: in seconds; 0.5 is two frames a second. The default is that of VALUE's features (`fps=1/1.5`).
        least: a clip too short for so many is cut into that many equal parts.
        most: so is a clip too long for that many; None takes all.
    """

    period: float = 1.5
    least: int = 2
    most: int | None = None

    def __post_init__(self) -> None:
        if not self.period > 0:
            raise UserError(f"the time between two frames must be more than 0 s, got {self.period}")
        if self.least < 1 or (self.most is not None and self.most < self.least):
            raise UserError(f"at least {self.least} and at most {self.most} frames cannot both hold")


FrameSampling: TypeAlias = Uniform | EverySeconds


class NoVideo(ValueError):
    """What stands behind "video X": it cannot be read, has no such part, or is over a limit."""


def moments(sampling: FrameSampling, *, start: float, end: float) -> list[float]:
    """Returns the moments to look at, in seconds, in order; all lie between `start` and `end`."""
    if isinstance(sampling, Uniform):
        return _middles(start, end, sampling.frames)
    count = round((end - start) / sampling.period)
    most = count if sampling.most is None else sampling.most
    if not sampling.least <= count <= most:
        return _middles(start, end, max(sampling.least, min(count, most)))
    return [start + (number + 0.5) * sampling.period for number in range(count)]


def _middles(start: float, end: float, parts: int) -> list[float]:
    return [start + (number + 0.5) * (end - start) / parts for number in range(parts)]


def clip_span(start: float | None, end: float | None, *, duration: float) -> tuple[float, float]:
    """Returns the part of a video that a clip means: its own times, as far as the video goes."""
    first, last = max(0.0, start or 0.0), duration if end is None else min(end, duration)
    if first >= last and not (start is None and end is None):
        stated = f"{first:.2f} to {'its end' if end is None else f'{end:.2f} s'}"
        raise NoVideo(f"lasts {duration:.2f} s; it has no part from {stated}")
    return first, last


Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Frames(Generic[Kept]):
    """Frames in the order they are shown.

    Attributes:
        seconds: when each begins, from the file's first frame.
        span: the part of the file that was meant, in seconds from its first frame.
    """

    pictures: tuple[Kept, ...]
    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    backend: str
    duration: float
    count: int = 0
    span: tuple[float, float] = (0.0, 0.0)


def clip_path(root: Path | MediaFolder, clip: Clip) -> Path:
    """Returns the clip's file, inside `root`, there, and not empty."""
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


FORMATS = "mov,matroska,avi,gif,flv,asf,mxf,mpeg,mpegts"
"""FFmpeg opens these formats alone; it knows playlists too, which name more files and addresses."""


class NoDecoder(UserError):
    """PyAV cannot be imported here."""


def import_av() -> Any:
    """Imports PyAV, which can take seconds, before anything is timed."""
    try:
        return import_module("av")
    except (ImportError, OSError, RuntimeError) as error:  # as of a build that does not fit this machine
        raise NoDecoder(
            f"PyAV, which decodes videos, cannot be used ({one_line(str(error), 160)}). "
            f"Install it: {install_command('av')}"
        ) from None


def refuse_size(width: int, height: int) -> None:
    """Refuses frames that are too large."""
    if width * height > FRAME_PIXELS:
        raise NoVideo(f"has frames of {width:,} x {height:,} pixels; at most {FRAME_PIXELS:,} are read")


class OpenVideo:
    """One video that FFmpeg has opened; times are in seconds from the first frame.

    Attributes:
        begins: when each frame begins.
        duration: when the last frame ends.
    """

    def __init__(self, path: str) -> None:
        self._av = import_av()
        self._path = path
        self._keys: list[int] = []
        self._open()
        shown = sorted(self._read_packets())
        self._keys.sort()
        if self._container.format.name == "mpeg":  # entered elsewhere, several frames in a packet get wrong times
            del self._keys[1:]
        self._pts = [pts for pts, _ in shown]
        self._tick = float(self._stream.time_base)
        self.begins = [(pts - self._pts[0]) * self._tick for pts in self._pts]
        last_seconds = shown[-1][1] * self._tick
        if not last_seconds and len(shown) > 1:  # the file does not say: as long as the one before
            last_seconds = self.begins[-1] - self.begins[-2]
        self.duration = self.begins[-1] + last_seconds

    def _read_packets(self) -> list[tuple[int, int]]:
        """When each frame is shown and for how long, in ticks; the packets themselves are the whole file."""
        shown: list[tuple[int, int]] = []
        first, last, is_cut = math.inf, -math.inf, False
        with self._readable():
            for packet in self._container.demux():
                is_cut = is_cut or packet.is_corrupt
                if packet.pts is None:
                    continue
                begin = float(packet.pts * packet.time_base)
                first, last = min(first, begin), max(last, begin + float((packet.duration or 0) * packet.time_base))
                if packet.stream.index != self._stream.index:
                    continue
                if packet.is_keyframe:
                    self._keys.append(packet.pts)
                if not packet.is_discard:
                    shown.append((packet.pts, packet.duration or 0))
                    if len(shown) > VIDEO_FRAMES:
                        raise NoVideo(f"has more than {VIDEO_FRAMES:,} frames, and no video of so many is read")
        if not shown:
            raise NoVideo("cannot be read: it holds no frame")
        if self._container.format.name == "gif":  # it states no length, and ends with a mark
            is_cut = not Path(self._path).read_bytes().rstrip(b"\0").endswith(b";")
        stated = (self._container.duration or 0) / self._av.time_base
        if is_cut or last - first < stated - 0.5:  # a whole one may end so much earlier than its header says
            raise NoVideo(
                f"is cut off or damaged: it has {last - first:.2f} s, and {stated:.2f} s by its header; copy it again, "
                "or remux a recording that ended so (ffmpeg -i FILE -c copy FILE.mp4)"
            )
        return shown

    def _open(self) -> None:
        allowed = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        with self._readable():
            self._container = self._av.open(self._path, options=allowed)
            if not self._container.streams.video:
                raise NoVideo("cannot be read: it has no video stream")
        self._stream = self._container.streams.video[0]
        refuse_size(self._stream.codec_context.width, self._stream.codec_context.height)
        self._stream.thread_type = "NONE"  # FFmpeg's threads inside data workers are known to lock each other

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except NoVideo:
            raise
        except (self._av.error.FFmpegError, ValueError, EOFError) as error:
            raise NoVideo(f"cannot be read: {type(error).__name__}: {one_line(str(error), 160)}") from None

    def locate(self, seconds: Sequence[float]) -> list[int]:
        """Returns the frames that are shown at these moments, by their place in showing order, without repeats."""
        # A moment that rounding has put just before a frame is that frame's.
        places = (bisect_right(self.begins, moment + 1e-4) - 1 for moment in seconds)
        return list(dict.fromkeys(max(0, index) for index in places))

    def frames(self, indices: Sequence[int]) -> Iterator[tuple[float, UInt8[np.ndarray, "height width 3"]]]:
        """When each of these frames begins, and its RGB pixels; for ascending indices without repeats."""
        decoded: Iterator[Any] = iter(())
        position = None
        for index in indices:
            pts = self._pts[index]
            key = self._keys[max(0, bisect_right(self._keys, pts) - 1)] if self._keys else pts
            if position is None or key > position:
                decoded = self._decoded_from(key)
            yield self.begins[index], self._next(decoded, pts)
            position = pts

    def _decoded_from(self, key: int) -> Iterator[Any]:
        """Frames from one at or before `key` on; from the very first where the container's seeking overshoots."""
        with self._readable():
            self._container.seek(key, stream=self._stream)
            decoded = self._container.decode(self._stream)
            first = next(decoded, None)
        if first is not None and first.pts is not None and first.pts <= key:
            return chain([first], decoded)
        self.close()
        self._open()
        return self._container.decode(self._stream)

    def _next(self, decoded: Iterator[Any], pts: int) -> UInt8[np.ndarray, "height width 3"]:
        with self._readable():
            for frame in decoded:
                if frame.pts == pts:
                    return np.ascontiguousarray(_upright(frame.to_ndarray(format="rgb24"), frame.side_data))
        raise NoVideo(f"cannot be read: its frame at {(pts - self._pts[0]) * self._tick:.2f} s cannot be decoded")

    def close(self) -> None:
        """Gives its memory and file back."""
        self._container.close()


def _upright(pixels: UInt8[np.ndarray, "_ _ 3"], side_data: Any) -> UInt8[np.ndarray, "_ _ 3"]:
    """Returns a frame as its file says to show it: turned by quarters, as phones write, or mirrored.

    The matrix takes (x, y) to (a x + c y, b x + d y); a rotation alone, as PyAV gives it, says nothing of a mirror.
    """
    matrix = side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = (int(number) for number in np.frombuffer(matrix, np.int32)[:5])
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def read_video(
    content: bytes, path: str, start: float | None, end: float | None, sampling: tuple[str, Mapping[str, Any]] | None
) -> Iterator[Part]:
    """Yields a job of `limited_process`: sends the facts of a video, then the wanted frames.

    Without `sampling` the facts alone are sent: the file can be opened, and is whole.
    """
    with closing(OpenVideo(path)) as video:
        span = clip_span(start, end, duration=video.duration)
        yield {"backend": "pyav", "duration": video.duration, "count": len(video.begins), "span": span}, b""
        if sampling is None:
            return
        wanted = {kind.__name__: kind for kind in (Uniform, EverySeconds)}[sampling[0]](**sampling[1])
        indices = video.locate(moments(wanted, start=span[0], end=span[1]))
        for index, (seconds, pixels) in zip(indices, video.frames(indices), strict=True):
            refuse_size(pixels.shape[1], pixels.shape[0])
            yield from parts_of(Image.fromarray(pixels), index=index, seconds=seconds)


def why_no_video(path: Path) -> Trouble | None:
    """Returns what is wrong with a video file, of which no frame is decoded; None where nothing is."""
    wanted = {"path": str(path.absolute()), "start": None, "end": None, "sampling": None}
    try:
        list(one_process().run("read_video", wanted, budget=Budget(VIDEO_SECONDS, VIDEO_MEMORY)))
    except JobFailed as error:
        if error.kind == NoDecoder.__name__:
            raise UserError(str(error)) from None
        return Trouble.of(error)
    return None


class VideoReader:
    """Reads videos in a process of its own, which is replaced when it hangs or dies. Use it from one thread.

    It can be sent to data workers; each starts its own process, at its first file.

    Args:
        limit_seconds: of the processor for one file; then the process is killed and the file given up.
    """

    def __init__(self, *, limit_seconds: float = VIDEO_SECONDS) -> None:
        self._limit = limit_seconds
        self._process = LimitedProcess("read_video")
        self._kept: tuple[object, Frames[Image.Image]] | None = None

    def read(self, root: Path | MediaFolder, clip: Clip, sampling: FrameSampling) -> Frames[Image.Image]:
        """Returns the frames as RGB pictures; see `read_prepared`. The last are kept: a row asks several questions."""
        path = clip_path(root, clip)
        key = path, path.stat().st_mtime_ns, clip, sampling
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.read_prepared(root, clip, sampling, lambda picture: picture)
        return self._kept[1]

    def read_prepared(
        self, root: Path | MediaFolder, clip: Clip, sampling: FrameSampling, prepare: Callable[[Image.Image], Kept]
    ) -> Frames[Kept]:
        """Returns the frames, each made smaller as it comes, so that a long clip need not fit in memory."""
        budget = Budget(self._limit, VIDEO_MEMORY)
        try:
            return read_frames(self._process, clip_path(root, clip), clip, sampling, prepare, budget)
        except JobFailed as error:
            if error.kind == NoDecoder.__name__:
                raise UserError(str(error)) from None
            raise BadSample(clip.path, f"video {clip.path} {error}") from None

    def close(self) -> None:
        """Ends the process; the next file starts another."""
        self._process.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def read_frames(
    process: LimitedProcess,
    path: Path,
    clip: Clip,
    sampling: FrameSampling,
    prepare: Callable[[Image.Image], Kept],
    budget: Budget,
) -> Frames[Kept]:
    """Returns a clip's frames, decoded there. Raises JobFailed: they cannot be read, or cost more than the budget."""
    wanted = {
        "path": str(path.absolute()),
        "start": clip.start_seconds,
        "end": clip.end_seconds,
        "sampling": (type(sampling).__name__, dataclasses.asdict(sampling)),
    }
    frames: list[tuple[Kept, int, float]] = []
    with closing(process.run("read_video", wanted, budget=budget)) as parts:
        facts, _ = next(parts)
        for part in parts:
            frames.append((prepare(picture_of(part, parts, budget)), part[0]["index"], part[0]["seconds"]))
    pictures, indices, seconds = zip(*frames, strict=True)
    return Frames(pictures, indices, seconds, **{**facts, "span": tuple(facts["span"])})
