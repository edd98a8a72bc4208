"""Pictures and frames of a sample within a number of pixels: what is above it is shrunk, all by one factor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from dora_vl.backbones.video_inputs import Video

LEAST_PIXELS = 32 * 32
"""A sample's share must be at least that: a picture of fewer shows nothing."""


def within_pixels(
    pictures: Sequence[Image.Image], videos: Sequence[Video], most: int
) -> tuple[list[Image.Image], list[Video], int]:
    """The pictures and videos of a sample, shrunk where together they have more than `most` pixels.

    Returns: them, and how many pixels they lost; 0 where they fit.
    """
    before = _pixels(pictures, videos)
    if before <= most:
        return list(pictures), list(videos), 0
    factor = math.sqrt(most / before)
    smaller = [_shrunk(one, factor) for one in pictures]
    clips = [replace(one, pictures=tuple(_shrunk(frame, factor) for frame in one.pictures)) for one in videos]
    return smaller, clips, before - _pixels(smaller, clips)


def _pixels(pictures: Sequence[Image.Image], videos: Sequence[Video]) -> int:
    shown = [*pictures, *(frame for video in videos for frame in video.pictures)]
    return sum(one.width * one.height for one in shown)


def _shrunk(picture: Image.Image, factor: float) -> Image.Image:
    sides = (max(1, math.floor(picture.width * factor)), max(1, math.floor(picture.height * factor)))
    return picture.resize(sides, Image.Resampling.BICUBIC, reducing_gap=3.0)
