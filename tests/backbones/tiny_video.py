"""Tiny random models of the families that take videos, each a folder with its processor and chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor

from dora_vl.backbones.video_inputs import Video
from tests.backbones.tiny_families.family import TABLE, why_not_here
from tests.backbones.tiny_image_text import CHATML, write_tiny

PICTURE_PART = "{% if part.type == 'image' %}PICTURE{% else %}"
VIDEO = "+video"
"""Behind a family's name: with a place for videos in its template."""


@dataclass(frozen=True)
class VideoFamily:
    """What differs from the family's set-up for pictures."""

    picture: str = "<image>"
    video: str = "<video>"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its video processor: sizes that give few tokens."""
    one_length: bool = False
    """The videos of a batch must have equally many frames."""
    one_kind: bool = False
    """Its model cannot tell pictures from videos of one batch."""
    since: str = ""
    """The first version of transformers whose processor takes them rightly, where an older one is taken too."""


VIDEO_FAMILIES: Mapping[str, VideoFamily] = {name: VideoFamily(**row) for name, row in TABLE["videos"].items()}


def video_template(picture: str, video: str) -> str:
    """ChatML with a place for pictures and one for videos."""
    both = PICTURE_PART.replace("PICTURE", picture).replace(
        "{% else %}", "{% elif part.type == 'video' %}VIDEO{% else %}".replace("VIDEO", video)
    )
    assert PICTURE_PART in CHATML
    return CHATML.replace(PICTURE_PART, both)


def write_tiny_video(model_type: str, folder: Path) -> Path:
    """Model and processor of one family; the same weights at every call."""
    model_type = model_type.removesuffix(VIDEO)
    family = VIDEO_FAMILIES[model_type]
    if why := why_not_here(family.since):
        pytest.skip(why)
    template = video_template(family.picture, family.video)
    write_tiny(model_type, folder, template=template)
    processor = AutoProcessor.from_pretrained(folder)
    for name, value in family.settings.items():
        setattr(processor.video_processor, name, value)
    processor.save_pretrained(folder)
    return folder


def coloured_video(
    frames: int, *, step: int = 7, rate: float = 25.0, count: int = 100, size: tuple[int, int] = (30, 22)
) -> Video:
    """Frames that differ, taken from a file of steady rate; its first is the file's fourth."""
    indices = tuple(3 + step * number for number in range(frames))
    return Video(
        pictures=tuple(Image.new("RGB", size, (index * 2 % 256, 255 - index, 60 + index)) for index in indices),
        indices=indices,
        seconds=tuple(index / rate for index in indices),
        backend="pyav",
        duration=count / rate,
        count=count,
        span=(0.0, count / rate),
    )
