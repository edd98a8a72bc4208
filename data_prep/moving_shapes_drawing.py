"""Draws the shapes of `moving_shapes` frame by frame and encodes them with PyAV."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

SIDE = 128
RATE = 10
FRAMES = 32
CLIP_SECONDS = FRAMES / RATE
QUARTER = SIDE // 2
RADIUS = 15.0
TRAVEL = 30.0  # pixels from where a shape appears to where it is at the end
BACKGROUND = 28.0
NOISE = 6.0
LATEST_START = 0.56  # of the clip; what appears last still has time to move

COLORS = {
    "red": (222, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 215, 40),
    "white": (240, 240, 240),
    "purple": (170, 50, 200),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

Array = np.ndarray
Outline = Callable[[Array, Array], Array]


def _triangle(x: Array, y: Array) -> Array:
    half = math.sqrt(3) / 2
    return np.maximum(np.maximum(half * x - 0.5 * y, -half * x - 0.5 * y), y) - 0.55 * RADIUS


def _cross(x: Array, y: Array) -> Array:
    far, near = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    return np.maximum(far - RADIUS, near - 0.33 * RADIUS)


OUTLINES: dict[str, Outline] = {
    "circle": lambda x, y: np.hypot(x, y) - RADIUS,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.85 * RADIUS,
    "triangle": _triangle,
    "cross": _cross,
}
"""Maps each shape to how many pixels a point lies outside it; inside is negative."""

SHAPES = tuple(OUTLINES)


@dataclass(frozen=True)
class Mover:
    """A shape: its look, its path, and its place in the order of appearance.

    Attributes:
        quarter: quarter of the picture, row by row, that the shape stays in.
        index: order of appearance; 0 is there from the beginning.
    """

    shape: str
    color: str
    direction: str
    quarter: int
    index: int
    of: int

    @property
    def first_frame(self) -> int:
        """Returns the first frame that shows it."""
        return round(FRAMES * LATEST_START * self.index / max(1, self.of - 1)) if self.of > 1 else 0

    def centre(self, frame: int) -> tuple[float, float]:
        """Returns its position in pixels; it passes the middle of its quarter halfway through."""
        way = TRAVEL * ((frame - self.first_frame) / (FRAMES - 1 - self.first_frame) - 0.5)
        right, down = DIRECTIONS[self.direction]
        row, column = divmod(self.quarter, 2)
        return (column + 0.5) * QUARTER + way * right, (row + 0.5) * QUARTER + way * down


def draw(shown: Sequence[Mover], frame: int, noise: Array) -> Array:
    """Draws one RGB frame."""
    pixels = np.clip(BACKGROUND + noise, 0, 255)[..., None].repeat(3, axis=-1)
    for mover in shown:
        if frame < mover.first_frame:
            continue
        row, column = divmod(mover.quarter, 2)
        part = (slice(row * QUARTER, (row + 1) * QUARTER), slice(column * QUARTER, (column + 1) * QUARTER))
        x, y = mover.centre(frame)
        across = np.arange(column * QUARTER, (column + 1) * QUARTER) + 0.5 - x
        along = np.arange(row * QUARTER, (row + 1) * QUARTER)[:, None] + 0.5 - y
        cover = np.clip(0.5 - OUTLINES[mover.shape](across, along), 0, 1)[..., None]
        pixels[part] = pixels[part] * (1 - cover) + cover * np.array(COLORS[mover.color], dtype=float)
    return pixels.round().astype(np.uint8)


def write_clip(path: Path, shown: Sequence[Mover], *, noise: int) -> None:
    """Encodes one clip under a temporary name, then renames it; `noise` seeds the grain."""
    import av

    grain = np.random.default_rng(noise).normal(0.0, NOISE, (SIDE, SIDE))
    scratch = path.with_name(f".{path.name}.partial")
    with av.open(str(scratch), "w", format="mp4") as container:
        # One thread: the same bytes on every machine, and one clip a core anyway.
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "20", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE)
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(draw(shown, number, grain), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    scratch.replace(path)
