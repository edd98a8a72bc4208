"""Three libraries that decode videos, behind one small protocol: PyAV, torchcodec and decord2.

Nothing of them is imported before it is used, and each can be missing or broken (torchcodec needs FFmpeg's shared
libraries and a build that fits torch); that is said and the next one is tried.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt8

from dora_vl.data.pictures import FRAME_PIXELS, VIDEO_FRAMES
from dora_vl.data.video_containers import STREAMS, NotWhole, container_of

SOURCE_LINE = re.compile(r"\[[\d:]+\] \S+: |SingleStreamDecoder, \S+, ")  # where in its C++ a library gave up
ROUNDING_SECONDS = 1e-4  # decord keeps times in single precision; the same frame must be found by all


Frame: TypeAlias = tuple[float, UInt8[np.ndarray, "height width 3"]]
"""When it begins, in seconds from the first frame, and its RGB pixels."""


class BackendMissing(Exception):
    """The library cannot be imported here."""


class Unreadable(Exception):
    """The library cannot read this file."""


class OverLimit(Exception):
    """The file asks for more than the limits of `pictures` allow, whichever library reads it."""


def refuse_size(width: int, height: int) -> None:
    """Raises `OverLimit` for frames that are too large."""
    if width * height > FRAME_PIXELS:
        raise OverLimit(f"has frames of {width:,} x {height:,} pixels; at most {FRAME_PIXELS:,} are read")


def refuse_many(count: int) -> None:
    """Raises `OverLimit` for too many frames."""
    if count > VIDEO_FRAMES:
        raise OverLimit(f"has more than {VIDEO_FRAMES:,} frames, and no video of so many is read")


class OpenVideo(ABC):
    """One video that a library has opened; times are in seconds from the first frame."""

    duration: float
    """When the last frame ends."""
    count: int
    """How many frames it has."""
    begins: Sequence[float] = ()
    """When each of them begins, where the library tells."""

    def locate(self, seconds: Sequence[float]) -> list[int]:
        """The frames that are shown at these moments, by their place in the order of showing, without repeats."""
        return list(dict.fromkeys(max(0, self.shown_at(moment + ROUNDING_SECONDS)) for moment in seconds))

    def shown_at(self, moment: float) -> int:
        """The last frame that begins by then."""
        return bisect_right(self.begins, moment) - 1

    @abstractmethod
    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """These frames, for ascending indices without repeats."""

    @abstractmethod
    def close(self) -> None:
        """Gives its memory and file back."""


class DecordVideo(OpenVideo):
    """decord2, the maintained build of decord, read from the first frame on.

    It never seeks: decord takes a key frame's place in the file for its place in the order of showing, so that in
    H.264 with open GOPs it gives other frames than those asked for. Of a transport stream it loses the first ones.
    """

    def __init__(self, path: str) -> None:
        self._decord = import_backend("decord")
        self._errors = (self._decord.DECORDError, RuntimeError, AssertionError, IndexError, StopIteration)
        self._path = path
        if container_of(Path(path)) not in ("mov", "matroska"):
            raise Unreadable("it is no MP4, MOV, Matroska or WebM, in which alone decord finds the first frame")
        self._open()
        refuse_many(len(self._reader))
        with _named(*self._errors):
            times = self._reader.get_frame_timestamp(list(range(len(self._reader))))
        self.begins = [float(begin) for begin in times[:, 0] - times[0, 0]]
        self.count = len(self.begins)
        self.duration = _end_of(self.begins, stated=float(times[-1, 1] - times[0, 0]))

    def _open(self) -> None:
        with _named(*self._errors):
            self._reader = self._decord.VideoReader(self._path, num_threads=1)
        self._position = 0  # of the frame that comes next

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """See `OpenVideo`."""
        for index in indices:
            if index < self._position:
                self._open()
            while self._position < index:
                self._next()
            yield self.begins[index], self._next().asnumpy()

    def _next(self) -> Any:
        with _named(*self._errors):
            frame = self._reader.next()
        self._position += 1
        return frame

    def close(self) -> None:
        """See `OpenVideo`."""
        del self._reader


class TorchcodecVideo(OpenVideo):
    """torchcodec. It has no table of the frames' times, so places are guessed from the mean rate and corrected."""

    def __init__(self, path: str) -> None:
        decoders = import_backend("torchcodec")
        self._decoded: dict[int, Any] = {}
        with _named(RuntimeError, ValueError):
            self._decoder = decoders.VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
            stated = self._decoder.metadata
            self._first = float(stated.begin_stream_seconds)
            self.duration = float(stated.end_stream_seconds) - self._first
            self.count = len(self._decoder)
        refuse_many(self.count)
        refuse_size(int(stated.width or 0), int(stated.height or 0))
        if not self.count:
            raise Unreadable("it holds no frame")

    def shown_at(self, moment: float) -> int:
        """The last frame that begins by then."""
        guess = min(int(moment / self.duration * self.count), self.count - 1) if self.duration else 0
        if self._begin(guess) <= moment < self._begin(guess + 1):
            return guess
        low, high = (guess, self.count) if moment >= self._begin(guess + 1) else (0, guess)
        return bisect_right(range(self.count), moment, low, high, key=self._begin) - 1

    def _begin(self, index: int) -> float:
        return float("inf") if index >= self.count else self._frame(index).pts_seconds - self._first

    def _frame(self, index: int) -> Any:
        if index not in self._decoded:
            with _named(RuntimeError, ValueError, IndexError):
                self._decoded[index] = self._decoder.get_frame_at(index)
        return self._decoded[index]

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """See `OpenVideo`."""
        for index in indices:
            yield self._begin(index), self._frame(index).data.numpy()

    def close(self) -> None:
        """See `OpenVideo`."""
        self._decoded.clear()
        del self._decoder


class PyavVideo(OpenVideo):
    """PyAV, with FFmpeg in its wheel."""

    def __init__(self, path: str) -> None:
        self._av = import_backend("pyav")
        self._path = path
        self._open()
        shown: list[tuple[int, int]] = []  # times and durations alone: the packets are the whole file
        self._keys: list[int] = []
        with self._readable():
            for packet in self._container.demux(self._stream):
                if packet.pts is not None and packet.is_keyframe:
                    self._keys.append(packet.pts)
                if packet.pts is not None and not packet.is_discard:
                    shown.append((packet.pts, packet.duration or 0))
                    refuse_many(len(shown))
        if not shown:
            raise Unreadable("it holds no frame")
        shown.sort()
        self._keys.sort()
        if self._format in STREAMS and not self._ends_whole():
            raise NotWhole("is cut off: its last picture is not whole")
        if self._format == "mpeg":  # where it is entered elsewhere, several frames in one packet get wrong times
            del self._keys[1:]
        self._pts = [pts for pts, _ in shown]
        self._tick = float(self._stream.time_base)
        self.begins = [(pts - self._pts[0]) * self._tick for pts in self._pts]
        self.count = len(self.begins)
        self.duration = _end_of(self.begins, stated=self.begins[-1] + shown[-1][1] * self._tick)

    def _ends_whole(self) -> bool:
        """Whether the last picture can be decoded without a fault, from the last key frame but one on."""
        is_whole, has_begun = True, not self._keys
        with self._readable(), self._av.open(self._path, format=self._format) as container:
            stream = container.streams.video[0]
            stream.codec_context.options, stream.thread_type = {"err_detect": "explode"}, "NONE"
            for packet in container.demux(stream):  # no seeking: in streams it may land behind the key frame
                has_begun = has_begun or (packet.is_keyframe and packet.pts in self._keys[-2:])
                if has_begun and packet.size:
                    try:
                        is_whole = not any(frame.is_corrupt for frame in packet.decode())
                    except self._av.error.FFmpegError:
                        is_whole = False
        return is_whole

    def _open(self) -> None:
        self._format = container_of(Path(self._path))
        with self._readable():
            self._container = self._av.open(self._path, format=self._format)
            if not self._container.streams.video:
                raise Unreadable("it has no video stream")
        self._stream = self._container.streams.video[0]
        refuse_size(self._stream.codec_context.width, self._stream.codec_context.height)
        self._stream.thread_type = "NONE"  # FFmpeg's threads inside data workers are known to lock each other

    @contextmanager
    def _readable(self) -> Iterator[None]:
        with _named(self._av.error.FFmpegError, ValueError, EOFError):
            yield

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """See `OpenVideo`."""
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
        raise Unreadable(f"its frame at {(pts - self._pts[0]) * self._tick:.2f} s cannot be decoded")

    def close(self) -> None:
        """See `OpenVideo`."""
        self._container.close()


def _upright(pixels: UInt8[np.ndarray, "_ _ 3"], side_data: Any) -> UInt8[np.ndarray, "_ _ 3"]:
    """A frame as its file says to show it: turned by quarters, as phones write, or mirrored.

    The matrix takes (x, y) to (a x + c y, b x + d y); a rotation alone, as PyAV gives it, says nothing of a mirror.
    """
    matrix = side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = (int(number) for number in np.frombuffer(matrix, np.int32)[:5])
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


BACKENDS: dict[str, Callable[[str], OpenVideo]] = {
    "pyav": PyavVideo,
    "torchcodec": TorchcodecVideo,
    "decord": DecordVideo,
}
"""In the order in which they are tried: those that seek to the right frame before the one that must not seek."""

LIBRARIES = {"pyav": "av", "torchcodec": "torchcodec.decoders", "decord": "decord"}
"""The module to import for each."""


def import_backend(backend: str) -> Any:
    """Imports a backend's library, which can take seconds, before anything is timed.

    Raises:
        BackendMissing: it cannot be imported.
    """
    try:
        return import_module(LIBRARIES[backend])
    # torchcodec raises RuntimeError or OSError where FFmpeg's libraries are missing or its build does not fit torch.
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendMissing(_one_line(error)) from None


def open_video(backend: str, path: str) -> closing[OpenVideo]:
    """The video, opened with one library.

    Raises:
        BackendMissing: the library cannot be imported.
        Unreadable: it cannot read the file; here, or while frames are taken.
    """
    return closing(BACKENDS[backend](path))


@contextmanager
def _named(*errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise Unreadable(_one_line(error)) from None


def _one_line(error: Exception) -> str:
    words = SOURCE_LINE.sub("", " ".join(str(error).split()))
    return f"{type(error).__name__}: {words if len(words) <= 160 else words[:157] + '...'}"


def _end_of(begins: Sequence[float], *, stated: float) -> float:
    """When the last frame ends; where the file does not state it, it is shown as long as the one before."""
    if stated > begins[-1]:
        return stated
    return begins[-1] + (begins[-1] - begins[-2] if len(begins) > 1 else 0.0)
