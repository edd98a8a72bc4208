"""One small protocol over two libraries that decode videos, PyAV and decord2.

Neither is imported before it is used, and each can be missing or broken; then the next one is tried.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dora_vl.data.pictures import FRAME_PIXELS, VIDEO_FRAMES
from dora_vl.shapes import UInt8

FORMATS = "mov,matroska,avi,gif,flv,asf,mxf,mpeg,mpegts"
"""Only these of FFmpeg's formats are read: it knows playlists too, which name more files and addresses."""
MP4_BOXES, EBML = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"), b"\x1a\x45\xdf\xa3"
SPARE_SECONDS = 0.5  # a whole video may end so much earlier than its header says
SOURCE_LINE = re.compile(r"\[[\d:]+\] \S+: ")  # where in its C++ decord gave up
ROUNDING_SECONDS = 1e-4  # decord keeps times in single precision, and both must find the same frame

Frame: TypeAlias = tuple[float, UInt8[np.ndarray, "height width 3"]]
"""Pairs the time at which a frame begins, in seconds from the first, with its RGB pixels."""


class BackendMissing(Exception):
    """The library cannot be imported here."""


class Unreadable(Exception):
    """The library cannot read this file."""


class NoVideo(Exception):
    """A video is cut, over a limit, or lacks the part; the message follows "video X", whichever library reads it."""


def refuse_size(width: int, height: int) -> None:
    """Raises `NoVideo` for frames that are too large."""
    if width * height > FRAME_PIXELS:
        raise NoVideo(f"has frames of {width:,} x {height:,} pixels; at most {FRAME_PIXELS:,} are read")


def refuse_many(count: int) -> None:
    """Raises `NoVideo` for too many frames."""
    if count > VIDEO_FRAMES:
        raise NoVideo(f"has more than {VIDEO_FRAMES:,} frames, and no video of so many is read")


class OpenVideo(ABC):
    """One video that a library has opened; times are in seconds from the first frame."""

    duration: float
    """The last frame ends at this time."""
    begins: Sequence[float]
    """Lists the times at which the frames begin."""

    def locate(self, seconds: Sequence[float]) -> list[int]:
        """Returns the frames shown at these moments, by their place in the order of showing, without repeats."""
        indices = (bisect_right(self.begins, moment + ROUNDING_SECONDS) - 1 for moment in seconds)
        return list(dict.fromkeys(max(0, index) for index in indices))

    @abstractmethod
    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Yields the frames at ascending indices without repeats."""

    @abstractmethod
    def close(self) -> None:
        """Gives its memory and file back."""


class _DecordVideo(OpenVideo):
    """decord2, the maintained build of decord, read from the first frame on.

    It never seeks: decord takes a key frame's place in the file for its place in the order of showing, so that in
    H.264 with open GOPs it gives other frames than those asked for. Of a transport stream it loses the first ones.
    """

    def __init__(self, path: str) -> None:
        self._decord = import_backend("decord")
        self._errors = (self._decord.DECORDError, RuntimeError, AssertionError, IndexError, StopIteration)
        self._path = path
        with Path(path).open("rb") as file:
            beginning = file.read(8)
        if beginning[4:] not in MP4_BOXES and not beginning.startswith(EBML):
            raise Unreadable("it is not MP4, MOV, Matroska or WebM; only in these does decord find the first frame")
        self._open()
        refuse_many(len(self._reader))
        with _named(*self._errors):
            times = self._reader.get_frame_timestamp(list(range(len(self._reader))))
        self.begins = [float(begin) for begin in times[:, 0] - times[0, 0]]
        self.duration = _end_of(self.begins, end=float(times[-1, 1] - times[0, 0]))

    def _open(self) -> None:
        with _named(*self._errors):
            self._reader = self._decord.VideoReader(self._path, num_threads=1)
        self._position = 0  # of the frame that comes next

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
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
        del self._reader


class _PyavVideo(OpenVideo):
    def __init__(self, path: str) -> None:
        self._av = import_backend("pyav")
        self._errors = (self._av.error.FFmpegError, ValueError, EOFError)
        self._path = path
        self._open()
        shown: list[tuple[int, int]] = []  # only times and durations: the packets are the whole file
        self._keys: list[int] = []
        first, last, is_cut = math.inf, -math.inf, False
        with _named(*self._errors):
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
                    refuse_many(len(shown))
        if not shown:
            raise Unreadable("it holds no frame")
        if self._container.format.name == "gif":  # it states no length, and ends with a mark
            is_cut = not Path(self._path).read_bytes().rstrip(b"\0").endswith(b";")
        length = (self._container.duration or 0) / self._av.time_base
        if is_cut or last - first < length - SPARE_SECONDS:
            lengths = f"it has {last - first:.2f} s, and {length:.2f} s by its header"
            again = "copy it again, or remux a recording that ended so (ffmpeg -i FILE -c copy FILE.mp4)"
            raise NoVideo(f"is cut off or damaged: {lengths}; {again}")
        shown.sort()
        self._keys.sort()
        if self._container.format.name == "mpeg":
            del self._keys[1:]  # entered elsewhere, several frames in one packet get wrong times
        self._pts = [pts for pts, _ in shown]
        self._tick = float(self._stream.time_base)
        self.begins = [(pts - self._pts[0]) * self._tick for pts in self._pts]
        self.duration = _end_of(self.begins, end=self.begins[-1] + shown[-1][1] * self._tick)

    def _open(self) -> None:
        allowed = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        with _named(*self._errors):
            self._container = self._av.open(self._path, options=allowed)
            if not self._container.streams.video:
                raise Unreadable("it has no video stream")
        self._stream = self._container.streams.video[0]
        refuse_size(self._stream.codec_context.width, self._stream.codec_context.height)
        self._stream.thread_type = "NONE"  # FFmpeg's threads inside data workers are known to lock each other

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
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
        """Yields frames from one at or before `key`, or from the first where the container's seeking overshoots."""
        with _named(*self._errors):
            self._container.seek(key, stream=self._stream)
            decoded = self._container.decode(self._stream)
            first = next(decoded, None)
        if first is not None and first.pts is not None and first.pts <= key:
            return chain([first], decoded)
        self.close()
        self._open()
        return self._container.decode(self._stream)

    def _next(self, decoded: Iterator[Any], pts: int) -> UInt8[np.ndarray, "height width 3"]:
        with _named(*self._errors):
            for frame in decoded:
                if frame.pts == pts:
                    return np.ascontiguousarray(_upright(frame.to_ndarray(format="rgb24"), frame.side_data))
        raise Unreadable(f"its frame at {(pts - self._pts[0]) * self._tick:.2f} s cannot be decoded")

    def close(self) -> None:
        self._container.close()


def _upright(pixels: UInt8[np.ndarray, "_ _ 3"], side_data: Any) -> UInt8[np.ndarray, "_ _ 3"]:
    """Returns a frame as its file says to show it: turned by quarters, as phones write, or mirrored.

    The matrix takes (x, y) to (a x + c y, b x + d y); a rotation by itself, as PyAV gives it, says nothing of a mirror.
    """
    matrix = side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = (int(number) for number in np.frombuffer(matrix, np.int32)[:5])
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


BACKENDS: dict[str, Callable[[str], OpenVideo]] = {"pyav": _PyavVideo, "decord": _DecordVideo}
"""They are tried in this order: the one that seeks to the right frame before the one that must not seek."""
LIBRARIES = {"pyav": "av", "decord": "decord"}


def import_backend(backend: str) -> Any:
    """Imports a backend's library, which can take seconds, before anything is timed, or raises `BackendMissing`."""
    try:
        return import_module(LIBRARIES[backend])
    except (ImportError, OSError, RuntimeError) as error:  # as of a build that does not fit this machine
        raise BackendMissing(_one_line(error)) from None


@contextmanager
def _named(*errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise Unreadable(_one_line(error)) from None


def _one_line(error: Exception) -> str:
    words = SOURCE_LINE.sub("", " ".join(str(error).split()))
    return f"{type(error).__name__}: {words if len(words) <= 160 else words[:157] + '...'}"


def _end_of(begins: Sequence[float], *, end: float) -> float:
    """Returns when the last frame ends; where the file does not state it, it is shown as long as the one before."""
    if end > begins[-1]:
        return end
    return begins[-1] + (begins[-1] - begins[-2] if len(begins) > 1 else 0.0)
