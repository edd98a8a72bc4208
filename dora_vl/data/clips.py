"""Videos that a sample names: a file, or the part of it between two times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dora_vl.errors import BadSample, shown

VIDEO_KEYS = ("videos", "video")
"""Where videos stand in a row; the first of them that holds any counts."""
_PATHS = ("path", "video", "url", "video_url")
_STARTS = ("start_seconds", "video_start")
_ENDS = ("end_seconds", "video_end")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video, or the part of it between two times; None is its beginning or its end."""

    path: str
    start_seconds: float | None = None
    end_seconds: float | None = None


def row_clips(row: Mapping[str, object], sample_id: str, keys: Sequence[str] = VIDEO_KEYS) -> tuple[Clip, ...]:
    """The videos under the first of `keys` that holds any; one that is no list counts as a list of one.

    Raises:
        BadSample: see `read_clip`.
    """
    for key in keys:
        value = row.get(key)
        if value is None or value == "" or value == []:
            continue
        listed = value if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray) else [value]
        return tuple(read_clip(one, key, sample_id) for one in listed)
    return ()


def read_clip(value: object, key: str, sample_id: str) -> Clip:
    """A path, or an object with one and times: `start_seconds`, `end_seconds`, or Qwen's `video_start`, `video_end`.

    Raises:
        BadSample: anything else: bytes, frames in a list, an address on the web, times that are no numbers.
    """
    times: tuple[float | None, float | None] = (None, None)
    if isinstance(value, Mapping):
        times = _seconds(value, _STARTS, sample_id), _seconds(value, _ENDS, sample_id)
        if value.get("bytes") is not None:
            raise BadSample(sample_id, f"{key!r} holds a video's bytes; write it to a file and name that")
        value = next((one for name in _PATHS if (one := value.get(name)) is not None), None)
        value = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(value, str) or not value:
        raise BadSample(sample_id, f"{key!r} must be a path or a list of paths, got {shown(value)}")
    if value.startswith(("http://", "https://", "data:")):
        raise BadSample(sample_id, f"{key!r} is no file, {shown(value)}; fetch it and name the file")
    return Clip(path=value.removeprefix("file://"), start_seconds=times[0], end_seconds=times[1])


def _seconds(value: Mapping[str, object], names: Sequence[str], sample_id: str) -> float | None:
    name = next((one for one in names if value.get(one) is not None), None)
    found = None if name is None else value[name]
    if found is None:
        return None
    try:
        finite = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    except OverflowError:  # a whole number beyond every float
        finite = False
    if not finite or not isinstance(found, int | float):
        raise BadSample(sample_id, f"{name!r} of a video must be a number of seconds, got {shown(found)}")
    return float(found)
