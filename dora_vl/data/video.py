"""Frames of a video file as pictures, whatever the file does to its decoder.

`read_frames` decodes in this process. `VideoReader` has a process of its own do it, because decoders hang, crash and
leak on files from the wild: a file that takes too long or takes the decoder with it is one `BadSample`, and the next
file is read by a fresh process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from PIL import Image

from dora_vl.data.example import Clip
from dora_vl.data.pictures import VIDEO_MEMORY, VIDEO_SECONDS, MediaFolder, path_inside
from dora_vl.data.video_backends import (
    BACKENDS,
    BackendMissing,
    OverLimit,
    Unreadable,
    import_backend,
    open_video,
    refuse_size,
)
from dora_vl.data.video_containers import NotWhole, NoVideoFormat, check_whole_video
from dora_vl.errors import BadSample, UserError, install_command

VALUE_PERIOD_SECONDS = 1.5
"""The VALUE benchmark's video features: ffmpeg's `fps=1/1.5`."""


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
        least: a clip too short for so many is cut into that many equal parts.
        most: so is a clip too long for that many; None takes all.
    """

    period: float = VALUE_PERIOD_SECONDS
    least: int = 2
    most: int | None = None

    def __post_init__(self) -> None:
        if not self.period > 0:
            raise UserError(f"the time between two frames must be more than 0 s, got {self.period}")
        if self.least < 1 or (self.most is not None and self.most < self.least):
            raise UserError(f"at least {self.least} and at most {self.most} frames cannot both hold")


@dataclass(frozen=True)
class AtSeconds:
    """The frames shown at these moments, in seconds from the video's first frame."""

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise UserError("no moment is named, so there is no frame to read")


Sampling: TypeAlias = Uniform | EverySeconds | AtSeconds


class OutsideClip(ValueError):
    """A named moment that is not in the clip; the message says which."""


def moments(sampling: Sampling, *, start: float, end: float) -> list[float]:
    """The moments to look at, in seconds, in order; all lie between `start` and `end`.

    Raises:
        OutsideClip: a named moment lies outside.
    """
    if isinstance(sampling, AtSeconds):
        outside = [seconds for seconds in sampling.seconds if not start <= seconds <= end]
        if outside:
            raise OutsideClip(f"has nothing at {outside[0]:.2f} s; it can be read from {start:.2f} to {end:.2f} s")
        return sorted(sampling.seconds)
    if isinstance(sampling, Uniform):
        return _middles(start, end, sampling.frames)
    count = round((end - start) / sampling.period)
    most = count if sampling.most is None else sampling.most
    if not sampling.least <= count <= most:
        return _middles(start, end, max(sampling.least, min(count, most)))
    return [start + (number + 0.5) * sampling.period for number in range(count)]


def _middles(start: float, end: float, parts: int) -> list[float]:
    return [start + (number + 0.5) * (end - start) / parts for number in range(parts)]


def clip_span(path: str, start: float | None, end: float | None, *, duration: float) -> tuple[float, float]:
    """The part of a video that a clip means: its own times, as far as the video goes."""
    first, last = max(0.0, start or 0.0), duration if end is None else min(end, duration)
    if first >= last and not (start is None and end is None):
        stated = f"{first:.2f} to {'its end' if end is None else f'{end:.2f} s'}"
        raise BadSample(path, f"video {path} lasts {duration:.2f} s; it has no part from {stated}")
    return first, last


READY = "ready"
"""What a decoding process answers when it has its library, before the first frame."""
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


Request: TypeAlias = tuple[str, Clip, Sampling]
"""A file, the part of it, and which frames."""
Decoded: TypeAlias = Iterator[Any]
"""What comes from a decoder: `Frames` without any, then the index, the seconds and the pixels of each."""


def clip_path(root: Path | MediaFolder, clip: Clip) -> Path:
    """The clip's file, inside `root`, there, of a format that is read, and not cut off."""
    path = path_inside(root, clip.path, kind="video")
    try:
        check_whole_video(path)
        return path
    except FileNotFoundError:
        reason = f"is missing in {root}"
    except NotWhole as error:
        reason = f"{error}; copy it again"
    except NoVideoFormat as error:
        reason = str(error)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    raise BadSample(clip.path, f"video {clip.path} {reason}")


def decode(request: Request, backend: str) -> Decoded:
    """The wanted frames of one file, one at a time.

    Raises:
        BackendMissing, Unreadable: the backend cannot; another one might.
        BadSample: the file has no such part, or is over a limit, whoever reads it.
    """
    path, clip, sampling = request
    try:
        with open_video(backend, path) as video:
            start, end = clip_span(clip.path, clip.start_seconds, clip.end_seconds, duration=video.duration)
            indices = video.locate(moments(sampling, start=start, end=end))
            yield Frames((), (), (), backend, video.duration, video.count, (start, end))
            for index, (seconds, pixels) in zip(indices, video.frames(indices), strict=True):
                refuse_size(pixels.shape[1], pixels.shape[0])
                yield index, seconds, pixels
    except (OutsideClip, OverLimit) as error:
        raise BadSample(clip.path, f"video {clip.path} {error}") from None
    except NotWhole as error:
        again = "copy it again, or remux a recording that ended so (ffmpeg -i FILE -c copy FILE.mp4)"
        raise BadSample(clip.path, f"video {clip.path} {error}; {again}") from None


def gathered(decoded: Decoded, prepare: Callable[[Image.Image], Kept]) -> Frames[Kept]:
    """The frames together, each turned into what is kept of it as it comes."""
    empty: Frames[Kept] = next(decoded)
    frames = [(prepare(Image.fromarray(pixels)), index, seconds) for index, seconds, pixels in decoded]
    pictures, indices, seconds = zip(*frames, strict=True)
    return replace(empty, pictures=pictures, indices=indices, seconds=seconds)


def first_reading(
    clip: Clip, backends: Sequence[str], missing: dict[str, Exception], read: Callable[[str], Frames[Kept]]
) -> Frames[Kept]:
    """What the first backend gives that can read the clip; those that cannot be imported go into `missing`."""
    reasons: dict[str, Exception] = dict(missing)
    for backend in backends:
        if backend in missing:
            continue
        try:
            return read(backend)
        except BackendMissing as error:
            log.info("videos are read without %s: %s", backend, error)
            reasons[backend] = missing[backend] = error
        except Unreadable as error:
            reasons[backend] = error
    raise no_backend_reads(clip, reasons)


def no_backend_reads(clip: Clip, reasons: Mapping[str, Exception]) -> UserError:
    """What to raise when every backend has given its reason: the file's fault, or that none is installed."""
    listed = "; ".join(f"{backend}: {error}" for backend, error in reasons.items())
    if all(isinstance(error, BackendMissing) for error in reasons.values()):
        return UserError(
            f"no library that decodes videos can be used: {listed}. Install one: {install_command('av', 'decord2')}"
        )
    return BadSample(clip.path, f"video {clip.path} cannot be read: {listed}")


log = logging.getLogger(__name__)

START_SECONDS = 300.0  # for the process and its library: torch alone takes a minute on a busy machine


def read_frames(
    root: Path | MediaFolder, clip: Clip, sampling: Sampling, *, backends: Sequence[str] = tuple(BACKENDS)
) -> Frames[Image.Image]:
    """Decodes in this process: for files that are known to be sound. `VideoReader` is for all others."""
    request = str(clip_path(root, clip)), clip, sampling
    return first_reading(clip, backends, {}, lambda name: gathered(decode(request, name), lambda picture: picture))


class VideoReader:
    """Reads videos in a process of its own, which is replaced when it hangs or dies. Use it from one thread.

    It can be sent to data workers; each starts its own process, at its first file.

    Args:
        backends: which libraries to try, in this order.
        limit_seconds: longest time for one file in one backend; then the process is killed and the file given up.
    """

    def __init__(self, *, backends: Sequence[str] = tuple(BACKENDS), limit_seconds: float = VIDEO_SECONDS) -> None:
        unknown = [name for name in backends if name not in BACKENDS]
        if unknown or not backends:
            raise UserError(f"video backends {list(backends)}: there are {', '.join(BACKENDS)}")
        self._backends = tuple(backends)
        self._limit = limit_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._missing: dict[str, Exception] = {}
        self._kept: tuple[object, Frames[Image.Image]] | None = None

    def read(self, root: Path | MediaFolder, clip: Clip, sampling: Sampling) -> Frames[Image.Image]:
        """The frames as RGB pictures; see `read_prepared`. The last are kept: a row asks several questions."""
        path = clip_path(root, clip)
        key = path, path.stat().st_mtime_ns, clip, sampling
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._decoded((str(path), clip, sampling), lambda picture: picture)
        return self._kept[1]

    def read_prepared(
        self, root: Path | MediaFolder, clip: Clip, sampling: Sampling, prepare: Callable[[Image.Image], Kept]
    ) -> Frames[Kept]:
        """The frames, each turned into something smaller as it comes, so that a long clip need not fit in memory."""
        return self._decoded((str(clip_path(root, clip)), clip, sampling), prepare)

    def _decoded(self, request: Request, prepare: Callable[[Image.Image], Kept]) -> Frames[Kept]:
        return first_reading(
            request[1], self._backends, self._missing, lambda backend: gathered(self._ask(request, backend), prepare)
        )

    def _ask(self, request: Request, backend: str) -> Decoded:
        """The frames as they come; the clock starts when the process has the backend's library."""
        connection = self._connected()
        deadline = time.monotonic() + START_SECONDS
        finished = False
        try:
            connection.send((request, backend, self._limit))
            while not finished:
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    late = f"was not read within {self._limit:g} s ({backend}); it is left out"
                    raise BadSample(request[1].path, f"video {request[1].path} {late}")
                answer = connection.recv()
                finished = answer is None or isinstance(answer, Exception)
                if isinstance(answer, Exception):
                    raise answer
                if answer == READY:
                    deadline = time.monotonic() + self._limit
                elif answer is not None:
                    yield answer
        except (EOFError, OSError):
            raise Unreadable(self._last_words()) from None
        finally:
            if not finished:  # what is still in the pipe belongs to this file
                self.close()

    def _connected(self) -> Connection:
        if self._process is None or self._process.poll() is not None or self._connection is None:
            self.close()
            self._connection, theirs = Pipe()
            command = [sys.executable, "-c", CHILD, str(theirs.fileno())]
            packages = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # FFmpeg writes a line for every damaged block
                env={**os.environ, "PYTHONPATH": packages},
            )
            theirs.close()
        return self._connection

    def _last_words(self) -> str:
        """Why the process died, as far as its exit status tells; it is replaced at the next file."""
        try:
            status = None if self._process is None else self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            status = None
        if status is None:
            return "the decoder's process no longer answers"
        return f"the decoder crashed (signal {-status})" if status < 0 else f"the decoder ended with status {status}"

    def close(self) -> None:
        """Ends the process; the next file starts another."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self.__dict__.get("_process") is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None, "_connection": None, "_kept": None}


# Not `python -m`: under the name `__main__` the classes would be others than those that the parent sends.
CHILD = "import sys; from dora_vl.data.video import serve_descriptor; serve_descriptor(int(sys.argv[1]))"
SPARE_SECONDS = 5.0  # the parent's own clock comes first
STATM = Path("/proc/self/statm")  # its sixth number: pages of data (proc(5))


def serve(connection: Connection) -> None:
    """Decodes one file after the other and sends the frames back, until the other end is closed.

    The process ends with its parent, and by itself when a file takes too long, even where the decoder's C code hangs.
    """
    while True:
        try:
            request, backend, seconds = connection.recv()
        except EOFError:
            return
        try:
            import_backend(backend)
            connection.send(READY)
            limit_memory(VIDEO_MEMORY)
            signal.setitimer(signal.ITIMER_REAL, seconds + SPARE_SECONDS)  # its default action ends the process
            for frame in decode(request, backend):
                connection.send(frame)
            answer = None
        except (BackendMissing, Unreadable, BadSample) as error:
            answer = error
        except MemoryError:
            answer = Unreadable(f"it takes more than {VIDEO_MEMORY / 2**30:.0f} GiB to decode")
        connection.send(answer)
        signal.setitimer(signal.ITIMER_REAL, 0)


def limit_memory(more: int) -> None:
    """Lets this process take so many bytes more than it has; only where the system tells how many that are."""
    try:
        pages = int(STATM.read_text(encoding="ascii").split()[5])
    except (OSError, ValueError, IndexError):
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def serve_descriptor(descriptor: int) -> None:
    """Serves at one end of a pipe; the other may be closed at any time."""
    with contextlib.suppress(BrokenPipeError):
        serve(Connection(descriptor))
