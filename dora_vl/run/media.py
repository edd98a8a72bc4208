"""How a run's pictures and videos are read: their folders, the frames of a clip, stored features of a frozen tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dora_vl.backbones.video_inputs import Video, repeated
from dora_vl.data.pictures import MediaFolder
from dora_vl.data.turns import Clip
from dora_vl.data.video import EverySeconds, Sampling, Uniform, VideoReader, no_backend_reads
from dora_vl.data.video_backends import BACKENDS, BackendMissing, import_backend
from dora_vl.errors import SettingError
from dora_vl.run.settings import DataConfig

LEAST_FRAMES = 2
"""With `data.video_fps`: what moves needs two, and families that join frames in pairs take no less."""


@dataclass(frozen=True, kw_only=True)
class VideoReading:
    """Reads clips as frames; worker processes may have it, each starts a decoder of its own at its first video.

    Attributes:
        folder: the root of the videos' paths.
        sampling: which frames.
        frames: a video that has fewer shows some of them again, for families that take videos of one length only.
    """

    folder: Path | MediaFolder
    sampling: Sampling
    frames: int | None = None
    reader: VideoReader = field(default_factory=VideoReader, repr=False)

    def read(self, clips: Sequence[Clip]) -> list[Video]:
        """The frames of each."""
        videos = [self.reader.read(self.folder, clip, self.sampling) for clip in clips]
        return videos if self.frames is None else [repeated(video, self.frames) for video in videos]


def image_folder(data: DataConfig, root: str | None = None) -> MediaFolder:
    """Where the pictures' paths start, `data.image_folder` unless another `root` is given, and how they are read."""
    return MediaFolder(Path(root or data.image_folder), data.follow_links, data.as_published)


def video_folder(data: DataConfig) -> MediaFolder:
    """The root of the videos' paths."""
    return image_folder(data, data.video_folder)


def video_sampling(data: DataConfig) -> Sampling:
    """Which frames `data.video_frames` and `data.video_fps` mean."""
    if data.video_frames < 1:
        raise SettingError("data.video_frames", f" is {data.video_frames}; at least 1 frame of a video is needed")
    if data.video_fps is None:
        return Uniform(data.video_frames)
    if not 0 < data.video_fps < float("inf"):
        raise SettingError("data.video_fps", f" is {data.video_fps}; it must be above 0")
    least = min(LEAST_FRAMES, data.video_frames)
    return EverySeconds(period=1 / data.video_fps, least=least, most=data.video_frames)


def check_videos(data: DataConfig) -> None:
    """Refuses what would make every video a bad sample."""
    video_sampling(data)
    if not video_folder(data).root.is_dir():
        raise SettingError("data.video_folder", f": video folder {video_folder(data)} does not exist")
    reasons: dict[str, Exception] = {}
    for backend in BACKENDS:
        try:
            import_backend(backend)
        except BackendMissing as error:
            reasons[backend] = error
        else:
            return
    raise no_backend_reads(Clip(path=""), reasons)
