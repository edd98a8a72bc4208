"""What is wanted of a video file, and its frames as they come from a decoder, in whatever process that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dora_vl.data.examples import Clip
from dora_vl.data.media import MediaFolder, path_inside
from dora_vl.errors import BadSample, UserError
from dora_vl.vision.frame_sampling import Sampling, clip_span, moments
from dora_vl.vision.video_backends import BackendMissing, OverLimit, Unreadable, open_video, refuse_size
from dora_vl.vision.video_containers import NotWhole, NoVideoFormat, check_whole_video

READY = "ready"
"""What a decoding process answers when it has its library, before the first frame."""
Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Frames(Generic[Kept]):
    """Frames in the order they are shown.

    Attributes:
        pictures: RGB pictures, or what was made of each.
        indices: each one's place among all frames of the file.
        seconds: when each begins, from the file's first frame.
        backend: which library decoded them.
        duration: of the file, in seconds.
        count: of all frames of the file.
        span: the part of the file that was meant, in seconds from its first frame.
    """

    pictures: tuple[Kept, ...]
    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    backend: str
    duration: float
    count: int = 0
    span: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Decoded:
    """One frame on its way from a decoder."""

    backend: str
    index: int
    seconds: float
    pixels: UInt8[np.ndarray, "height width 3"]
    duration: float
    count: int
    span: tuple[float, float]


@dataclass(frozen=True)
class Request:
    """What is wanted of one file."""

    path: str
    clip: Clip
    sampling: Sampling


def clip_path(root: Path | MediaFolder, clip: Clip) -> Path:
    """The clip's file, inside `root`, there, of a format that is read, and not cut off.

    Raises:
        BadSample: it is none of these.
    """
    path = path_inside(root, clip.path, kind="video")
    try:
        check_whole_video(path)
    except FileNotFoundError:
        raise BadSample(clip.path, f"video {clip.path} is missing in {root}") from None
    except NoVideoFormat as error:
        raise BadSample(clip.path, f"video {clip.path} {error}") from None
    except NotWhole as error:
        raise BadSample(clip.path, f"video {clip.path} {error}; copy it again") from None
    except OSError as error:
        raise BadSample(clip.path, f"video {clip.path} cannot be read: {error.strerror or error}") from None
    return path


def decode(request: Request, backend: str) -> Iterator[Decoded]:
    """The wanted frames of one file, one at a time.

    Raises:
        BackendMissing, Unreadable: the backend cannot; another one might.
        BadSample: the file has no such part, or is over a limit, whoever reads it.
    """
    try:
        yield from _decode(request, backend)
    except OverLimit as error:
        raise BadSample(request.clip.path, f"video {request.clip.path} {error}") from None
    except NotWhole as error:
        again = "copy it again, or remux a recording that ended so (ffmpeg -i FILE -c copy FILE.mp4)"
        raise BadSample(request.clip.path, f"video {request.clip.path} {error}; {again}") from None


def _decode(request: Request, backend: str) -> Iterator[Decoded]:
    clip = request.clip
    with open_video(backend, request.path) as video:
        start, end = clip_span(clip.path, clip.start_seconds, clip.end_seconds, duration=video.duration)
        try:
            wanted = moments(request.sampling, start=start, end=end)
        except ValueError as error:
            raise BadSample(clip.path, f"video {clip.path}: {error}") from None
        indices = video.locate(wanted)
        for index, (seconds, pixels) in zip(indices, video.frames(indices), strict=True):
            refuse_size(pixels.shape[1], pixels.shape[0])
            yield Decoded(backend, index, seconds, pixels, video.duration, video.count, (start, end))


def no_backend_reads(clip: Clip, reasons: Mapping[str, Exception]) -> UserError:
    """What to raise when every backend has given its reason: the file's fault, or that none is installed."""
    told = "; ".join(f"{backend}: {error}" for backend, error in reasons.items())
    if all(isinstance(error, BackendMissing) for error in reasons.values()):
        return UserError(
            f"no library that decodes videos can be used: {told}. Install one: pip install 'dora-vl[video]'"
        )
    return BadSample(clip.path, f"video {clip.path} cannot be read: {told}")


def gathered(frames: Iterable[Decoded], prepare: Callable[[Image.Image], Kept]) -> Frames[Kept]:
    """The frames together, each turned into what is kept of it as it comes."""
    kept: list[Kept] = []
    taken: list[tuple[int, float]] = []
    last: Decoded | None = None
    for frame in frames:
        kept.append(prepare(Image.fromarray(frame.pixels)))
        taken.append((frame.index, frame.seconds))
        last = frame
    if last is None:  # every sampling has a moment, and every moment a frame
        raise Unreadable("it gave no frame")
    return Frames(
        pictures=tuple(kept),
        indices=tuple(index for index, _ in taken),
        seconds=tuple(seconds for _, seconds in taken),
        backend=last.backend,
        duration=last.duration,
        count=last.count,
        span=last.span,
    )
