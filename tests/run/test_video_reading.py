"""A run's videos: which frames its settings mean, the part that was meant, and what is refused at once."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from dora_vl.data.turns import Clip
from dora_vl.data.video import EverySeconds, Uniform
from dora_vl.data.video_backends import BackendMissing
from dora_vl.errors import SettingError, UserError
from dora_vl.run import base as run_base
from dora_vl.run.base import VideoReading, check_videos, video_folder, video_sampling
from dora_vl.run.settings import DataConfig
from tests.data.video_files import write_video

pytest.importorskip("av")
CLIP = Clip(path="a.mp4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of two seconds, 25 frames a second, and one of three frames."""
    root = tmp_path_factory.mktemp("clips")
    write_video(root / "a.mp4")
    write_video(root / "short.mp4", [0.0, 0.04, 0.08])
    (root / "cut.mp4").write_bytes((root / "a.mp4").read_bytes()[:-300])
    return root


def settings(folder: Path, **more: object) -> DataConfig:
    return DataConfig(train="train.json", image_folder=str(folder), **more)  # pyright: ignore[reportArgumentType]


def reading(folder: Path, **more: object) -> VideoReading:
    data = settings(folder, **more)
    return VideoReading(folder=video_folder(data), sampling=video_sampling(data))


def test_settings_choose_the_frames(folder: Path) -> None:
    assert video_sampling(settings(folder)) == Uniform(8)
    assert video_sampling(settings(folder, video_frames=12, video_fps=4.0)) == EverySeconds(0.25, least=2, most=12)
    assert reading(folder, video_frames=2).read([CLIP])[0].indices == (12, 37)
    assert len(reading(folder, video_frames=20, video_fps=4.0).read([CLIP])[0].indices) == 8
    assert len(reading(folder, video_frames=5, video_fps=4.0).read([CLIP])[0].indices) == 5


def test_short_videos_are_filled_up_where_all_must_have_one_length(folder: Path) -> None:
    clips = [Clip(path="short.mp4"), CLIP]
    assert [len(video.pictures) for video in reading(folder).read(clips)] == [3, 8]
    filled = VideoReading(folder=folder, sampling=Uniform(8), frames=8)
    assert [len(video.pictures) for video in filled.read(clips)] == [8, 8]


@pytest.mark.parametrize(
    ("name", "value"),
    [("video_frames", 0), ("video_fps", 0.0), ("video_fps", float("nan")), ("video_folder", "nowhere")],
)
def test_settings_that_mean_no_frame_are_refused(folder: Path, name: str, value: object) -> None:
    with pytest.raises(SettingError) as error:
        check_videos(settings(folder, **{name: value}))
    assert error.value.key == f"data.{name}"
    check_videos(settings(folder, video_folder=str(folder)))


def test_a_machine_without_a_decoder_is_told_before_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_base, "import_backend", mock.Mock(side_effect=BackendMissing("no module")))
    with pytest.raises(UserError):
        check_videos(settings(folder))
