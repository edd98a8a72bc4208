"""What a request to `/v1/chat/completions` may hold: OpenAI's fields, as far as they are served here."""

from __future__ import annotations

import base64
import binascii
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dora_vl.backbones.video_inputs import Video
from dora_vl.core.strength import MOST_STRENGTH
from dora_vl.data.pictures import NOT_DECODED, NoPicture, bad_picture, load_picture, opened_picture
from dora_vl.data.readers import ROLES
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Clip, Turn
from dora_vl.data.video import Uniform, VideoReader
from dora_vl.errors import BadSample, UserError, one_line, shown
from dora_vl.evaluation.ask import Shown
from dora_vl.run.base import VideoReading
from dora_vl.serving.options import Settings
from dora_vl.serving.remote_media import NotFetched, fetch

LONGEST_NAME = 256
MOST_STOPS, LONGEST_STOP = 16, 256
LARGEST_SEED = 2**63 - 1
MOST_MESSAGES, MOST_PARTS, MOST_FIELDS = 512, 256, 64


def _few(value: Any) -> Any:
    """An object of at most so many fields: one that is wrong costs memory, and a message, for each."""
    if isinstance(value, dict) and len(value) > MOST_FIELDS:
        raise ValueError(f"it has {len(value):,} fields, and {MOST_FIELDS} are allowed")
    return value


class _Strict(BaseModel):
    """Refuses what it does not know: nothing that a client asks for is dropped in silence."""

    model_config = ConfigDict(extra="forbid", strict=True)
    _few_fields = model_validator(mode="before")(_few)


class _Url(_Strict):
    """`detail` is accepted and not used: the model's own processor decides how a picture is seen."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


Address = Annotated[_Url, BeforeValidator(lambda value: {"url": value} if isinstance(value, str) else value)]
"""Where a picture or a video is: a data: URL, or one on the web where those are allowed."""


class TextPart(_Strict):
    """Words."""

    type: Literal["text"]
    text: str


class PicturePart(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: Address


class VideoPart(_Strict):
    """A video, as vLLM and Qwen's clients write it."""

    type: Literal["video_url"]
    video_url: Address


Part = Annotated[TextPart | PicturePart | VideoPart, Field(discriminator="type")]


class Message(_Strict):
    """One turn of the talk, words alone as one part; clients send answers back as they got them, `refusal` null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Part],
        Field(min_length=1, max_length=MOST_PARTS, fail_fast=True),
        BeforeValidator(lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value),
    ]
    name: str | None = None
    refusal: None = None

    @model_validator(mode="after")
    def _media_are_the_users(self) -> Message:
        if self.role != "user" and not all(isinstance(part, TextPart) for part in self.content):
            raise ValueError(f"a message of the {self.role} holds words alone; pictures belong to the user's")
        return self


class StreamOptions(_Strict):
    """What a stream says beside the answer."""

    include_usage: bool = False


class ResponseFormat(_Strict):
    """The only form of an answer that there is."""

    type: Literal["text"]


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
    Field(max_length=MOST_STOPS, fail_fast=True),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]


class ChatRequest(_Strict):
    """A request.

    Fields that would change the answer in a way that is not served may hold their neutral value alone; those from
    `user` on are sent along by clients and change no answer. `strength` is ours: how much of the adapter is applied.
    """

    model: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    stop: Stops | None = None
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    strength: Annotated[float, Field(ge=0, le=MOST_STRENGTH, allow_inf_nan=False)] | None = None

    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    response_format: ResponseFormat | None = None

    user: str | None = None
    metadata: Annotated[dict[str, str] | None, BeforeValidator(_few)] = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @property
    def longest(self) -> int | None:
        """The longest answer that is asked for."""
        return self.max_completion_tokens or self.max_tokens


class LoadRequest(_Strict):
    """An adapter to be served from now on; vLLM's fields."""

    lora_name: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME, pattern=r"^[\w.\-/]+$")]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadRequest(_Strict):
    """An adapter to be served no longer."""

    lora_name: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]


class TooLarge(UserError):
    """More, or larger, than is allowed."""


class BadRequest(UserError):
    """A part of the request cannot be used; `param` says which."""

    def __init__(self, param: str, reason: str) -> None:
        super().__init__(f"{param}: {reason}")
        self.param = param


class RequestMedia:
    """Reads what requests show, from several threads; videos one after another, in a process that may be killed.

    Args:
        same_length: whether the videos of a batch must have equally many frames.
    """

    def __init__(self, settings: Settings, *, same_length: bool = False) -> None:
        self.settings, self._same_length = settings, same_length
        self._reader = VideoReader(limit_seconds=settings.video_seconds)
        self._decoding = threading.Lock()

    def close(self) -> None:
        """Ends the decoder's process."""
        with self._decoding:
            self._reader.close()

    def read(self, messages: Sequence[Message], go_on: Callable[[], object]) -> tuple[list[Turn], Shown]:
        """A request's messages as turns, and what they show.

        Args:
            go_on: is called before each picture and video, and raises what ends the reading.
        """
        parts = [part for message in messages for part in message.content]
        video_count = sum(isinstance(part, VideoPart) for part in parts)
        self.refuse_many(sum(isinstance(part, PicturePart) for part in parts), video_count, "the request shows")
        pictures: list[Image.Image] = []
        videos: list[Video] = []
        turns: list[Turn] = []
        for number, message in enumerate(messages):
            text = ""
            for index, part in enumerate(message.content):
                where = f"messages[{number}].content[{index}].{part.type}"
                if isinstance(part, TextPart):
                    text += words(part.text, where, shows_videos=video_count > 0)
                    continue
                go_on()
                if isinstance(part, VideoPart):
                    videos.append(self.video(self._content(part.video_url.url, where), where))
                    text += f"{VIDEO_PLACEHOLDER}\n"
                else:
                    pictures.append(self.picture(self._content(part.image_url.url, where), where))
                    text += f"{IMAGE_PLACEHOLDER}\n"
            ends_with_words = isinstance(message.content[-1], TextPart)
            turns.append(Turn(ROLES[message.role], text if ends_with_words else text.removesuffix("\n")))
        return turns, Shown(pictures=tuple(pictures), videos=tuple(videos))

    def refuse_many(self, pictures: int, videos: int, who: str) -> None:
        """Refuses more pictures or videos than may be shown."""
        most_of = {"pictures": self.settings.max_pictures, "videos": self.settings.max_videos}
        for (what, most), count in zip(most_of.items(), (pictures, videos), strict=True):
            if count > most:
                raise TooLarge(f"{who} {count} {what}, and {most} are allowed here")

    def picture(self, content: bytes, where: str) -> Image.Image:
        """A picture's file as RGB, upright."""
        try:
            with opened_picture(BytesIO(content)) as image:
                width, height = image.size
            if width * height > (most := int(self.settings.max_picture_mpx * 1_000_000)):
                raise TooLarge(f"{where}: a picture of {width} x {height} pixels; {most:,} are allowed here")
            return load_picture(BytesIO(content))
        except NoPicture as error:
            raise BadRequest(where, f"it {error}") from None
        except NOT_DECODED as error:
            raise BadRequest(where, bad_picture(error, "it", "the request").reason) from None

    def video(self, content: bytes, where: str) -> Video:
        """The frames of a video's file that a model sees. Raises BadRequest: it cannot be decoded, or not in time."""
        sampling = Uniform(self.settings.frames)
        frames = self.settings.frames if self._same_length else None
        with tempfile.TemporaryDirectory(prefix="dora-vl-") as name, self._decoding:
            folder = Path(name)
            (folder / "video").write_bytes(content)
            reading = VideoReading(folder=folder, sampling=sampling, frames=frames, reader=self._reader)
            try:
                (video,) = reading.read([Clip(path="video")])
            except BadSample as error:
                raise BadRequest(where, error.reason) from None
        return video

    def _content(self, url: str, where: str) -> bytes:
        if url[:5].lower() == "data:":
            return _from_data_url(url, where, self.settings.media_bytes)
        if not self.settings.allow_remote_media:
            raise BadRequest(where, f"{shown(url)}: this server takes data: URLs alone (--allow-remote-media)")
        try:
            return fetch(url, self.settings.media_bytes, self.settings.fetch_seconds)
        except NotFetched as error:
            raise BadRequest(where, str(error)) from None


def words(text: str, where: str, *, shows_videos: bool) -> str:
    """A person's words, which may not hold what stands for a picture or a video. Raises BadRequest: they do."""
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


Model = TypeVar("Model", bound=BaseModel)
MOST_VALUES = 200_000
"""Commas and opening brackets of a request: each value has one before it, and may take a hundred times its bytes."""
NO_MARKS = bytes(set(range(256)).difference(b'",[{'))
LONGEST_PLACE, LONGEST_REASON = 80, 300
_TAG = re.compile(r"(\.content\[\d+\])\.(?:text|image_url|video_url)")


def parsed(kind: type[Model], content: bytes) -> Model:
    """A request's JSON, checked."""
    if _holds_too_many(content):
        beyond = f"the request holds more than {MOST_VALUES:,} commas and opening brackets outside of its texts"
        raise TooLarge(f"{beyond}; none needs as many")
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first, *others = error.errors(include_url=False, include_context=False, include_input=False)
        pieces = [f"[{piece}]" if isinstance(piece, int) else f".{piece}" for piece in first["loc"]]
        location = _TAG.sub(r"\1", "".join(pieces)).removeprefix(".")  # without pydantic's names for the kinds of parts
        reason = one_line(first["msg"], LONGEST_REASON) + (f" (and {len(others)} more)" if others else "")
        raise BadRequest(one_line(location or "the request", LONGEST_PLACE), reason) from None


def _holds_too_many(content: bytes) -> bool:
    """Whether it holds too many values, before any is made: each step is one pass, in C, whatever a client wrote.

    Past the first place where it is no JSON the count may be wrong; the parser reads no further either.
    """

    def values(part: bytes) -> int:
        return part.count(b",") + part.count(b"[") + part.count(b"{")

    if values(content) <= MOST_VALUES:  # nearly always, and its texts need not be told apart
        return False
    marks = content.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, NO_MARKS)
    if marks.count(b'"') > 4 * (MOST_VALUES + 1):  # a value has a name and a text at most, or there are as many pieces
        return True
    return values(b"".join(marks.split(b'"')[::2])) > MOST_VALUES
