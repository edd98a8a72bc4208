"""Which moments of a video are looked at: n of them, one every so often, or the ones named. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from dora_vl.errors import BadSample, UserError

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


def moments(sampling: Sampling, *, start: float, end: float) -> list[float]:
    """The moments to look at, in seconds, in order; all lie between `start` and `end`.

    Raises:
        ValueError: a named moment lies outside; it says which.
    """
    if isinstance(sampling, AtSeconds):
        outside = [seconds for seconds in sampling.seconds if not start <= seconds <= end]
        if outside:
            raise ValueError(f"there is nothing at {outside[0]:.2f} s; it can be read from {start:.2f} to {end:.2f} s")
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
    """The part of a video that a clip means: its own times, as far as the video goes.

    Raises:
        BadSample: nothing of it is in the video.
    """
    first, last = max(0.0, start or 0.0), duration if end is None else min(end, duration)
    if first >= last and not (start is None and end is None):
        stated = f"{first:.2f} to {'its end' if end is None else f'{end:.2f} s'}"
        raise BadSample(path, f"video {path} lasts {duration:.2f} s; it has no part from {stated}")
    return first, last
