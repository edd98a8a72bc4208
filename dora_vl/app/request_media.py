"""A request's messages as turns, and the pictures and videos in them: decoded, limited, nothing left on the disk."""

from __future__ import annotations

import base64
import binascii
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from PIL import Image

from dora_vl.app.chat_request import Message, TextPart, VideoPart
from dora_vl.app.remote_media import FetchLimits, NotFetched, fetch
from dora_vl.backbones.video_inputs import Video
from dora_vl.data.picture_decoding import NOT_DECODED, NoPicture, decode_image, opened_picture
from dora_vl.data.readers.messages import ROLES
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Clip, Turn, placeholder_first
from dora_vl.errors import BadSample, UserError, shown
from dora_vl.run.samples import VideoReading
from dora_vl.vision.frame_sampling import Uniform
from dora_vl.vision.video import VideoReader


class TooLarge(UserError):
    """More, or larger, than is allowed."""


class BadRequest(UserError):
    """A part of the request cannot be used; `place` says which."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}")
        self.place = place


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What a request may show.

    Attributes:
        pictures: most of them in a request.
        videos: likewise.
        picture_pixels: most pixels of a picture.
        bytes: most bytes of one picture or video.
        frames: how many frames of a video the model sees.
        video_seconds: longest time that decoding a video may take.
        fetch_seconds: longest time that fetching one address may take.
        remote: whether http(s) addresses are fetched at all.
    """

    pictures: int = 8
    videos: int = 1
    picture_pixels: int = 40_000_000
    bytes: int = 32 * 2**20
    frames: int = 8
    video_seconds: float = 20.0
    fetch_seconds: float = 10.0
    remote: bool = False


@dataclass(frozen=True)
class Talk:
    """A request as it is put to a model."""

    turns: tuple[Turn, ...]
    pictures: tuple[Image.Image, ...] = ()
    videos: tuple[Video, ...] = ()


@dataclass
class _Seen:
    """What a request has shown so far."""

    go_on: Callable[[], object]
    shows_videos: bool
    pictures: list[Image.Image] = field(default_factory=list)
    videos: list[Video] = field(default_factory=list)


@dataclass
class RequestMedia:
    """Reads what requests show, from several threads; videos one after another, in a process that may be killed.

    Attributes:
        limits: what a request may show.
        same_length: whether the videos of a batch must have equally many frames.
    """

    limits: MediaLimits
    same_length: bool = False
    _reader: VideoReader = field(init=False)
    _decoding: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self._reader = VideoReader(limit_seconds=self.limits.video_seconds)

    def close(self) -> None:
        """Ends the decoder's process."""
        with self._decoding:
            self._reader.close()

    def read(self, messages: Sequence[Message], go_on: Callable[[], object] = lambda: None) -> Talk:
        """The talk of a request's messages.

        Args:
            go_on: is called before each picture and video, and raises what ends the reading.

        Raises:
            BadRequest: a picture or a video cannot be used or fetched, or words hold what stands for one.
            TooLarge: there are too many, or one is too large.
        """
        parts = [part for one in messages if not isinstance(one.content, str) for part in one.content]
        shown_videos = sum(isinstance(part, VideoPart) for part in parts)
        shown_pictures = sum(not isinstance(part, VideoPart | TextPart) for part in parts)
        self.refuse_many(shown_pictures, shown_videos, "the request shows")
        seen = _Seen(go_on, shown_videos > 0)
        turns = [
            Turn(ROLES[one.role], self._text(one, f"messages[{number}].content", seen))
            for number, one in enumerate(messages)
        ]
        pictures, videos = seen.pictures, seen.videos
        if len(pictures) == 1 and not videos:  # as in training
            turns = [Turn(turn.role, placeholder_first(turn.text)) for turn in turns]
        return Talk(tuple(turns), tuple(pictures), tuple(videos))

    def refuse_many(self, pictures: int, videos: int, who: str) -> None:
        """Refuses more pictures or videos than may be shown.

        Args:
            who: shows them, for the message, such as "the request shows".

        Raises:
            TooLarge: there are more.
        """
        for found, most, what in ((pictures, self.limits.pictures, "pictures"), (videos, self.limits.videos, "videos")):
            if found > most:
                raise TooLarge(f"{who} {found} {what}, and {most} are allowed here")

    def picture(self, content: bytes, where: str) -> Image.Image:
        """A picture's file as RGB, upright.

        Raises:
            BadRequest: it is none of `FORMATS`, or broken.
            TooLarge: it has too many pixels.
        """
        try:
            with opened_picture(BytesIO(content)) as image:
                width, height = image.size
        except NoPicture as error:
            raise BadRequest(where, f"it {error}") from None
        except NOT_DECODED as error:
            raise BadRequest(where, f"it cannot be read: {type(error).__name__}") from None
        if width * height > self.limits.picture_pixels:
            most = self.limits.picture_pixels
            raise TooLarge(f"{where}: a picture of {width} x {height} pixels; {most:,} are allowed here")
        try:
            return decode_image(BytesIO(content), "it", "the request")
        except BadSample as error:
            raise BadRequest(where, error.reason) from None

    def video(self, content: bytes, where: str) -> Video:
        """The frames of a video's file that a model sees.

        Raises:
            BadRequest: it cannot be decoded, or not in time.
        """
        limits = self.limits
        with tempfile.TemporaryDirectory(prefix="dora-vl-") as folder, self._decoding:
            (Path(folder) / "video").write_bytes(content)
            frames = limits.frames if self.same_length else None
            sampling = Uniform(limits.frames)
            reading = VideoReading(folder=Path(folder), sampling=sampling, frames=frames, reader=self._reader)
            try:
                (video,) = reading.read([Clip(path="video")])
            except BadSample as error:
                raise BadRequest(where, error.reason) from None
        return video

    # -- inside ----------------------------------------------------------------------------------------------

    def _text(self, message: Message, where: str, seen: _Seen) -> str:
        """A message's words, with a line for each picture and video, which are put into `seen`."""
        if isinstance(message.content, str):
            return words(message.content, where, shows_videos=seen.shows_videos)
        text = ""
        for place, part in enumerate(message.content):
            here = f"{where}[{place}]"
            if isinstance(part, TextPart):
                text += words(part.text, here, shows_videos=seen.shows_videos)
                continue
            seen.go_on()
            if isinstance(part, VideoPart):
                here += ".video_url"
                seen.videos.append(self.video(self._content(part.video_url.url, here), here))
                text += f"{VIDEO_PLACEHOLDER}\n"
            else:
                here += ".image_url"
                seen.pictures.append(self.picture(self._content(part.image_url.url, here), here))
                text += f"{IMAGE_PLACEHOLDER}\n"
        return text if isinstance(message.content[-1], TextPart) else text.removesuffix("\n")

    def _content(self, url: str, where: str) -> bytes:
        if url[:5].lower() == "data:":
            return _from_data_url(url, where, self.limits.bytes)
        if not self.limits.remote:
            raise BadRequest(where, f"{shown(url)}: this server takes data: URLs alone (--allow-remote-media)")
        try:
            return fetch(url, FetchLimits(bytes=self.limits.bytes, seconds=self.limits.fetch_seconds))
        except NotFetched as error:
            raise BadRequest(where, str(error)) from None


def words(text: str, where: str, *, shows_videos: bool) -> str:
    """A person's words, which may not hold what stands for a picture or a video.

    Raises:
        BadRequest: they do.
    """
    for placeholder in (IMAGE_PLACEHOLDER, *([VIDEO_PLACEHOLDER] if shows_videos else [])):
        if placeholder in text:
            raise BadRequest(where, f"the text holds {placeholder}; pictures and videos are parts of their own")
    return text


def _from_data_url(url: str, where: str, most: int) -> bytes:
    header, comma, content = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise BadRequest(where, f"the data: URL {shown(url)} is not base64")
    if len(content) > most * 4 // 3 + 4:
        raise TooLarge(f"{where}: more than the {most:,} bytes allowed")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(where, f"the data: URL {shown(url)} cannot be read: {error}") from None
