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
from tests.backbones.tiny_families.family import why_not_here
from tests.backbones.tiny_image_text import CHATML, write_tiny

PICTURE_PART = "{% if part.type == 'image' %}PICTURE{% else %}"
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "+video"
"""Behind a family's name: with a place for videos in its template."""
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@dataclass(frozen=True)
class VideoFamily:
    """What differs from the family's set-up for pictures.

    `settings` are its video processor's: sizes that give few tokens.
    """

    picture: str = "<image>"
    video: str = "<video>"
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: str | None = None
    one_length: bool = False
    """Whether the videos of a batch must have equally many frames."""
    one_kind: bool = False
    """Whether its model cannot tell pictures from videos of one batch."""
    since: str = ""
    """The first version of transformers whose processor takes them rightly, where an older one is taken too."""


SQUARE: Mapping[str, Any] = {"size": {"height": 16, "width": 16}}
CROPPED: Mapping[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
VIDEO_FAMILIES: Mapping[str, VideoFamily] = {
    "qwen2_vl": VideoFamily(QWEN_PICTURE, QWEN_VIDEO, {"size": {"shortest_edge": 64, "longest_edge": 512}}),
    "qwen2_5_vl": VideoFamily(QWEN_PICTURE, QWEN_VIDEO, {"size": {"shortest_edge": 64, "longest_edge": 512}}),
    "qwen3_vl": VideoFamily(QWEN_PICTURE, "<|video_pad|>", {"size": {"shortest_edge": 64, "longest_edge": 4096}}),
    "qwen3_vl_moe": VideoFamily(QWEN_PICTURE, "<|video_pad|>", {"size": {"shortest_edge": 64, "longest_edge": 4096}}),
    "qwen3_5": VideoFamily(QWEN_PICTURE, "<|video_pad|>", {"size": {"shortest_edge": 64, "longest_edge": 4096}}),
    "glm4v": VideoFamily(
        "<|begin_of_image|><|image|><|end_of_image|>",
        "<|begin_of_video|><|video|><|end_of_video|>",
        {"size": {"shortest_edge": 64, "longest_edge": 4096}},
        one_kind=True,
    ),
    "internvl": VideoFamily("<IMG_CONTEXT>", "<video>", SQUARE),
    "smolvlm": VideoFamily(
        settings={"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}},
        needs="num2words",
        since="5.23",  # before, its processor takes the frames of a video for videos
    ),
    "llava_onevision": VideoFamily(settings=SQUARE, one_length=True),
    "llava_next_video": VideoFamily(settings=CROPPED, one_length=True),
    "video_llava": VideoFamily(one_length=True),
}


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
