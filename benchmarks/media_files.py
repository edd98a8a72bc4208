"""Small whole pictures and videos of every format that is read, which `fuzz_media` damages.

`streams` are containers that need state no length: of those a cut cannot always be told.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, features

PICTURES, VIDEOS, STREAMS = "pictures", "videos", "streams"


@dataclass(frozen=True)
class MediaFile:
    """A whole file."""

    kind: str
    name: str
    content: bytes


def whole_files() -> list[MediaFile]:
    """All of them; the same bytes every time, as far as the encoders' versions are."""
    return [*_pictures(), *_videos()]


def _noise(width: int, height: int, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(channels).integers(0, 256, (height // 4, width // 4, channels), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def _pictures() -> list[MediaFile]:
    rgb, rgba = _noise(80, 60), _noise(80, 60, 4)
    exif = Image.Exif()
    exif[0x0112] = 6
    moving = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    deep = Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13)
    saved: list[tuple[str, Image.Image, str, dict[str, object]]] = [
        ("rgb.png", rgb, "PNG", {}),
        ("rgba.png", rgba, "PNG", {}),
        ("palette.png", rgb.quantize(32), "PNG", {"transparency": 3}),
        ("deep.png", deep, "PNG", {}),
        ("moving.png", rgb, "PNG", moving),
        ("plain.jpg", rgb, "JPEG", {"exif": exif}),
        ("progressive.jpg", rgb, "JPEG", {"progressive": True}),
        ("cmyk.jpg", rgb.convert("CMYK"), "JPEG", {}),
        ("several.jpg", rgb, "MPO", moving),
        ("lossy.webp", rgb, "WEBP", {}),
        ("lossless.webp", rgba, "WEBP", {"lossless": True}),
        ("moving.webp", rgb, "WEBP", moving),
        ("still.gif", rgb, "GIF", {}),
        ("moving.gif", rgb, "GIF", moving),
        ("rgb.bmp", rgb, "BMP", {}),
        ("palette.bmp", rgb.quantize(16), "BMP", {}),
        ("raw.tiff", rgb, "TIFF", {}),
        ("lzw.tiff", rgba, "TIFF", {"compression": "tiff_lzw"}),
        ("jpeg.tiff", rgb, "TIFF", {"compression": "jpeg"}),
        ("several.tiff", rgb, "TIFF", moving),
        ("colours.tiff", rgb.convert("YCbCr"), "TIFF", {}),
        ("noted.png", rgb, "PNG", {"icc_profile": bytes(2**21)}),
        ("plain.jp2", rgb, "JPEG2000", {}),
        *([("plain.avif", rgb, "AVIF", {})] if features.check("avif") else []),
    ]
    made = []
    for name, image, form, options in saved:
        stream = io.BytesIO()
        # Copies: what a save sets on a picture stays on it.
        fresh = {
            key: [one.copy() for one in value] if isinstance(value, list) else value for key, value in options.items()
        }
        image.copy().save(stream, form, **fresh)
        made.append(MediaFile(PICTURES, name, stream.getvalue()))
    return made


CLIPS: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "plain.mp4": (VIDEOS, "libx264", {}),
    "index_first.mp4": (VIDEOS, "libx264", {"movflags": "faststart"}),
    "plain.mov": (VIDEOS, "libx264", {}),
    "plain.webm": (VIDEOS, "libvpx", {}),
    "plain.mkv": (VIDEOS, "libx264", {}),
    "plain.avi": (VIDEOS, "mpeg4", {}),
    "frames.avi": (VIDEOS, "mjpeg", {}),
    "clip.gif": (VIDEOS, "gif", {}),
    "plain.flv": (VIDEOS, "flv1", {}),
    "parts.mp4": (STREAMS, "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "live.webm": (STREAMS, "libvpx", {"live": "1"}),
    "plain.ts": (STREAMS, "libx264", {}),
    "plain.mpg": (STREAMS, "mpeg2video", {}),
    "plain.wmv": (VIDEOS, "wmv2", {}),
    "plain.mxf": (VIDEOS, "mpeg2video", {}),
}
PIXELS = {"gif": "rgb8", "mjpeg": "yuvj420p"}


def _videos() -> list[MediaFile]:
    with tempfile.TemporaryDirectory() as folder:
        return [
            MediaFile(kind, name, written_clip(Path(folder) / name, codec, options).read_bytes())
            for name, (kind, codec, options) in CLIPS.items()
        ]


def written_clip(
    path: Path, codec: str, options: Mapping[str, str], *, size: tuple[int, int] = (64, 48), frames: int = 24
) -> Path:
    """A clip of coloured noise that brightens."""
    import av

    with av.open(str(path), "w", options=dict(options)) as container:
        video = container.add_stream(codec, rate=25)
        video.width, video.height, video.pix_fmt = *size, PIXELS.get(codec, "yuv420p")
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), number * 10 % 256, np.uint8)
            pixels[:, :8] = np.random.default_rng(number).integers(0, 256, (size[1], 8, 3), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
    return path
