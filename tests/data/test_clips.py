"""Videos of a row: a path or an object with times, one or several; anything else is named."""

from __future__ import annotations

import pytest

from dora_vl.data.turns import Clip, row_clips
from dora_vl.errors import BadSample

LATE = Clip(path="a.mp4", start_seconds=1.5)
PART = Clip(path="a.mp4", start_seconds=1.5, end_seconds=3.0)


@pytest.mark.parametrize(
    ("row", "clips"),
    [
        ({}, ()),
        ({"videos": None}, ()),
        ({"videos": []}, ()),
        ({"videos": "a.mp4"}, (Clip(path="a.mp4"),)),
        ({"videos": ["a.mp4", "b.mp4"]}, (Clip(path="a.mp4"), Clip(path="b.mp4"))),
        ({"videos": {"path": "a.mp4", "start_seconds": 1.5, "end_seconds": 3}}, (PART,)),
        ({"videos": [{"path": "a.mp4", "start_seconds": 1.5, "end_seconds": None}]}, (LATE,)),
        ({"videos": {"type": "video", "video": "file://a.mp4", "video_start": 1.5, "video_end": 3.0}}, (PART,)),
        ({"videos": {"video_url": {"url": "a.mp4"}}}, (Clip(path="a.mp4"),)),
    ],
)  # fmt: skip
def test_the_forms_that_people_write(row: dict[str, object], clips: tuple[Clip, ...]) -> None:
    assert row_clips(row, "sample 7") == clips


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (7, "'videos' must be a path or a list of paths, got 7"),
        ([["1.png", "2.png"]], "'videos' must be a path or a list of paths, got ['1.png', '2.png']"),
        ({"bytes": b"x", "path": "a.mp4"}, "holds a video's bytes; write it to a file"),
        ({"start_seconds": 1}, "must be a path or a list of paths, got None"),
        ("https://a.b/c.mp4", "is no file, 'https://a.b/c.mp4'; fetch it"),
        ({"path": "a.mp4", "start_seconds": "1"}, "'start_seconds' of a video must be a number of seconds, got '1'"),
        ({"path": "a.mp4", "video_end": True}, "'video_end' of a video must be a number"),
        ({"path": "a.mp4", "video_end": 10**400}, "'video_end' of a video must be a number"),
        ({"path": "a.mp4", "video_end": float("nan")}, "'video_end' of a video must be a number"),
    ],
)
def test_what_is_wrong_is_named(value: object, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        row_clips({"videos": value}, "sample 7")
    assert caught.value.sample_id == "sample 7"
    assert reason in caught.value.reason
