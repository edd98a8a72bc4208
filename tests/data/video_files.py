"""Small video files of every kind that goes wrong, written with PyAV."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from dora_vl.data.example import Clip
from dora_vl.data.pictures import MediaFolder
from dora_vl.data.video import Frames, FrameSampling, VideoReader
from dora_vl.data.video_backends import BACKENDS

READERS: dict[tuple[str, ...], VideoReader] = {}
MILLISECOND = Fraction(1, 1000)
STEADY = [number / 25 for number in range(50)]
OPEN_GOPS = "open-gop=1:keyint=8:min-keyint=8:scenecut=0:bframes=3:b-adapt=0"
"""x264: key frames in whose wake come frames that are shown before them and need the GOP before."""


def read_frames(
    root: Path | MediaFolder, clip: Clip, sampling: FrameSampling, *, backends: Sequence[str] = tuple(BACKENDS)
) -> Frames[Image.Image]:
    """By one reader for all tests, since its process takes half a second to start."""
    return READERS.setdefault(tuple(backends), VideoReader(backends=backends)).read(root, clip, sampling)


def picture(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A frame that can be told from its neighbours: redder each time, with a green bar that moves on."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = number * 4 % 256
    left = number * 3 % (width - 8)
    pixels[: height // 2, left : left + 8, 1] = 255
    return pixels


def write_video(
    path: Path, seconds: Sequence[float] = STEADY, *, options: dict | None = None, x264: str = "keyint=20"
) -> Path:
    """An H.264 file whose frames begin at these times; without times, one without a picture."""
    import av

    with av.open(str(path), "w", options=options or {}) as container:
        video = container.add_stream("libx264", rate=25, options={"x264-params": x264}) if seconds else None
        if video is not None:
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            video.codec_context.time_base = MILLISECOND
            for number, begin in enumerate(seconds):
                frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
                frame.pts, frame.time_base = round(begin * 1000), MILLISECOND
                container.mux(video.encode(frame))
            container.mux(video.encode())
    return path


PIXEL_FORMATS = {"gif": "rgb8", "mjpeg": "yuvj420p"}
CODECS = {".mp4": "libx264", ".mkv": "libx264", ".webm": "libvpx", ".avi": "mpeg4", ".gif": "gif", ".ts": "libx264"}
"""One that each container holds."""


def write_clip(
    path: Path, codec: str = "", *, width: int = 64, height: int = 48, frames: int = 30, options: dict | None = None
) -> Path:
    import av

    codec = codec or CODECS[path.suffix]
    with av.open(str(path), "w", options=options or {}) as container:
        video = container.add_stream(codec, rate=25)
        video.width, video.height, video.pix_fmt = width, height, PIXEL_FORMATS.get(codec, "yuv420p")
        for number in range(frames):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture(number, width, height), format="rgb24")))
        container.mux(video.encode())
    return path


def turned(path: Path, to: Path, matrix: tuple[int, int, int, int] = (0, 1, -1, 0)) -> Path:
    """The MP4 file with a header that takes (x, y) to (a x + c y, b x + d y); by 90 degrees, as phones write."""
    data = bytearray(path.read_bytes())
    start = data.find(b"tkhd") + 4 + 40
    a, b, c, d = (entry << 16 for entry in matrix)
    for index, value in enumerate((a, b, 0, c, d, 0, 48 << 16, 0, 1 << 30)):
        data[start + 4 * index : start + 4 * index + 4] = value.to_bytes(4, "big", signed=True)
    to.write_bytes(data)
    return to
