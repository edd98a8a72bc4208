"""Converts a video's frames to a processor's inputs: a video with frame times, or one picture per frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers.video_utils import VideoMetadata

from dora_vl.backbones.families.formats import VIDEO_MARK, Chat
from dora_vl.data.batches import stacked
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Turn
from dora_vl.data.video import Frames
from dora_vl.shapes import UInt8

Video: TypeAlias = Frames[Image.Image]
"""Holds the RGB frames of one video, as `VideoReader.read` returns them."""

CLOCK_RATE = 1000
ONE_LENGTH = "pixel_values_videos"
"""Families whose videos all have one length take this input: `[videos, frames, channels, height, width]`."""


def metadata(video: Video) -> VideoMetadata:
    """Returns what transformers' processors need to know of a video whose frames are already chosen.

    They take frame index / rate for a frame's time, and frames / all frames * rate for how densely they were taken. So
    the indices are the file's and the rate its mean rate; where frames do not come at a steady rate, both are of a
    clock of milliseconds. All frames are those of the part that was meant, and times count from the file's beginning.
    """
    rate = video.count / video.duration if video.duration > 0 else 0.0
    indices = list(video.indices)  # a fresh list each time: processors lengthen it in place
    # Frames farther than 0.01 s from where the mean rate puts them are timed by a clock.
    steady = rate > 0 and all(
        abs(index / rate - seconds) < 0.01 for index, seconds in zip(indices, video.seconds, strict=True)
    )
    if not steady:
        rate, indices = CLOCK_RATE, [round(seconds * CLOCK_RATE) for seconds in video.seconds]
    start, end = video.span
    return VideoMetadata(
        total_num_frames=max(round((end - start) * rate), len(indices)),
        fps=rate,
        width=video.pictures[0].width,
        height=video.pictures[0].height,
        duration=video.duration,
        video_backend=video.backend,
        frames_indices=indices,
    )


def pixels(video: Video) -> UInt8[np.ndarray, "frames height width 3"]:
    """Stacks the frames to one array."""
    return np.stack([np.asarray(picture) for picture in video.pictures])


def video_arguments(videos: Sequence[Video]) -> dict[str, Any]:
    """Returns a processor's arguments for videos whose frames are already chosen."""
    chosen = {"video_metadata": [metadata(video) for video in videos], "do_sample_frames": False}
    return {"videos": [pixels(video) for video in videos], "videos_kwargs": chosen}


def has_place_for_video(render: Callable[[Sequence[Turn]], Chat], token: str) -> bool:
    """Tells whether a chat writes a processor's `token` exactly once for a video."""
    query, reply = "Which colour is it?", Turn("assistant", "It is purple.")
    try:
        with_video, without = (render([Turn("user", text), reply]).text for text in (f"{VIDEO_MARK}\n{query}", query))
    except (ValueError, TypeError, TemplateError):
        return False
    return with_video.count(token) == 1 and token not in without


def marked(turns: Sequence[Turn]) -> list[Turn]:
    """Replaces each `<video>` in the turns by a mark that no text contains."""
    return [replace(turn, text=turn.text.replace(VIDEO_PLACEHOLDER, VIDEO_MARK)) for turn in turns]


def as_pictures(
    turns: Sequence[Turn], pictures: Sequence[Any], videos: Sequence[Video]
) -> tuple[list[Turn], list[Any]]:
    """Replaces each video by `<image>` a frame; returns turns and pictures. Raises ValueError: places do not match."""
    left, frames = iter(pictures), iter(videos)
    shown: list[Image.Image] = []
    written: list[Turn] = []
    for turn in turns:
        text = ""
        for number, piece in enumerate(turn.text.split(VIDEO_PLACEHOLDER)):
            if number:
                video_pictures = _next(frames).pictures
                shown += video_pictures
                text += "\n".join([IMAGE_PLACEHOLDER] * len(video_pictures))
            shown += [_next(left) for _ in range(piece.count(IMAGE_PLACEHOLDER))]
            text += piece
        written.append(replace(turn, text=text))
    if len(shown) != len(pictures) + sum(len(video.pictures) for video in videos):
        raise ValueError("its text has fewer places than it has pictures and videos")
    return written, shown


def _next(left: Any) -> Any:
    if (media := next(left, None)) is None:
        raise ValueError("its text has more places than it has pictures and videos")
    return media


def repeated(video: Video, frames: int) -> Video:
    """Repeats frames of a shorter video evenly, up to `frames`."""
    have = len(video.pictures)
    if have >= frames:
        return video
    positions = [number * have // frames for number in range(frames)]
    return replace(
        video,
        pictures=tuple(video.pictures[position] for position in positions),
        indices=tuple(video.indices[position] for position in positions),
        seconds=tuple(video.seconds[position] for position in positions),
    )


def grey_video(colour: tuple[int, int, int], side: int, frames: int = 2) -> Video:
    """Makes a still video of one colour, one frame per second."""
    return Frames(
        pictures=(Image.new("RGB", (side, side), colour),) * frames,
        indices=tuple(range(frames)),
        seconds=tuple(float(number) for number in range(frames)),
        backend="",
        duration=float(frames),
        count=frames,
        span=(0.0, float(frames)),
    )


def displaced_inputs(
    processor: Any, outputs: Mapping[str, Any], pictures: Sequence[Any], videos: Sequence[Video]
) -> dict[str, Tensor]:
    """Returns the picture inputs that videos displaced, where the processor uses one name for both (SmolVLM).

    The model reads them by the order of their tokens, so they are made one by one and joined in the order of the text,
    as `[1, tiles and frames, ...]`. `outputs` is what the processor returned for the whole sample.
    """
    names = set(processor.image_processor.model_input_names) & set(processor.video_processor.model_input_names)
    kinds = [replacement["type"] for replacement in (outputs.get("text_replacement_offsets") or [[]])[0]]
    left, frames = iter(pictures), iter(videos)
    inputs: list[Any] = []
    for kind in kinds if names else ():
        if kind == "image":
            inputs.append(processor.image_processor([[next(left)]], return_tensors="pt"))
        else:
            arguments = video_arguments([next(frames)])
            inputs.append(
                processor.video_processor(arguments["videos"], return_tensors="pt", **arguments["videos_kwargs"])
            )
    return {name: stacked([part[name][0] for part in inputs], 0)[None] for name in sorted(names)}


LEAST_PIXELS = 32 * 32
"""A picture of fewer pixels shows nothing, so a sample's share must be at least this."""


def within_pixels(
    pictures: Sequence[Image.Image], videos: Sequence[Video], limit: int
) -> tuple[list[Image.Image], list[Video], int]:
    """Shrinks a sample's pictures and videos to `limit` pixels in all; returns them and how many pixels they lost."""
    before = _pixels(pictures, videos)
    if before <= limit:
        return list(pictures), list(videos), 0
    factor = math.sqrt(limit / before)
    smaller = [_shrunk(picture, factor) for picture in pictures]
    clips = [replace(video, pictures=tuple(_shrunk(frame, factor) for frame in video.pictures)) for video in videos]
    return smaller, clips, before - _pixels(smaller, clips)


def _pixels(pictures: Sequence[Image.Image], videos: Sequence[Video]) -> int:
    shown = [*pictures, *(frame for video in videos for frame in video.pictures)]
    return sum(picture.width * picture.height for picture in shown)


def _shrunk(picture: Image.Image, factor: float) -> Image.Image:
    sides = (max(1, math.floor(picture.width * factor)), max(1, math.floor(picture.height * factor)))
    return picture.resize(sides, Image.Resampling.BICUBIC, reducing_gap=3.0)
