"""Small whole pictures and videos of every format that is read."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, features

from tests.data.video_files import write_clip

CLIPS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "plain.mp4": ("libx264", {}),
    "plain.webm": ("libvpx", {}),
    "plain.avi": ("mpeg4", {}),
    "clip.gif": ("gif", {}),
    "plain.flv": ("flv1", {}),
    "plain.mxf": ("mpeg2video", {}),
    "parts.mp4": ("libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "live.webm": ("libvpx", {"live": "1"}),
    "plain.ts": ("libx264", {}),
    "plain.mpg": ("mpeg2video", {}),
}


def pictures() -> dict[str, bytes]:
    """Content by name; the same bytes every time, as far as the encoders' versions are."""
    rgb, rgba = _noise(3), _noise(4)
    exif = Image.Exif()
    exif[0x0112] = 6
    moving = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    deep = Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13)
    saved: list[tuple[str, Image.Image, str, dict[str, object]]] = [
        ("rgb.png", rgb, "PNG", {}),
        ("rgba.png", rgba, "PNG", {}),
        ("palette.png", rgb.quantize(32), "PNG", {"transparency": 3}),
        ("deep.png", deep, "PNG", {}),
        ("plain.jpg", rgb, "JPEG", {"exif": exif}),
        ("progressive.jpg", rgb, "JPEG", {"progressive": True}),
        ("several.jpg", rgb, "MPO", moving),
        ("lossy.webp", rgb, "WEBP", {}),
        ("moving.webp", rgb, "WEBP", moving),
        ("moving.gif", rgb, "GIF", moving),
        ("rgb.bmp", rgb, "BMP", {}),
        ("raw.tiff", rgb, "TIFF", {}),
        ("jpeg.tiff", rgb, "TIFF", {"compression": "jpeg"}),
        ("plain.jp2", rgb, "JPEG2000", {}),
        *([("plain.avif", rgb, "AVIF", {})] if features.check("avif") else []),
    ]
    content = {}
    for name, image, form, options in saved:
        stream = io.BytesIO()
        image.copy().save(stream, form, **copy.deepcopy(options))  # what a save sets on a picture stays on it
        content[name] = stream.getvalue()
    return content


def _noise(channels: int) -> Image.Image:
    pixels = np.random.default_rng(channels).integers(0, 256, (15, 20, channels), np.uint8)
    return Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC)


def videos() -> dict[str, bytes]:
    """Likewise."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: write_clip(Path(folder) / name, codec, frames=24, options=dict(options)).read_bytes()
            for name, (codec, options) in CLIPS.items()
        }
