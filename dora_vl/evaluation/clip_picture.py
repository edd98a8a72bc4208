"""A clip as one picture: four of its frames, in reading order."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dora_vl.data.examples import Clip
from dora_vl.vision.frame_sampling import Uniform
from dora_vl.vision.video import VideoReader

SIDE = 2
GAP_PX = 2
PAPER = (255, 255, 255)


def clip_picture(reader: VideoReader, root: Path, clip: Clip) -> Image.Image:
    """Four frames, evenly over the clip, two by two; fewer where it has fewer.

    Raises:
        BadSample: the clip cannot be read.
    """
    frames = reader.read(root, clip, Uniform(SIDE**2)).pictures
    width, height = frames[0].size
    tile = Image.new("RGB", (SIDE * width + GAP_PX, SIDE * height + GAP_PX), PAPER)
    for number, frame in enumerate(frames):
        row, column = divmod(number, SIDE)
        tile.paste(frame, (column * (width + GAP_PX), row * (height + GAP_PX)))
    return tile
