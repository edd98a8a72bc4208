"""What a request to `/v1/chat/completions` may hold: OpenAI's fields, as far as they are served here."""

from __future__ import annotations

import base64
import binascii
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dora_vl.backbones.video_inputs import Video
from dora_vl.core.strength import MOST_STRENGTH
from dora_vl.data.pictures import NOT_DECODED, NoPicture, decode_image, opened_picture
from dora_vl.data.readers import ROLES
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Clip, Turn, placeholder_first
from dora_vl.data.video import Uniform, VideoReader
from dora_vl.errors import BadSample, UserError, one_line, shown
from dora_vl.run.media import VideoReading
from dora_vl.serving.remote_media import FetchLimits, NotFetched, fetch

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


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
    """One turn of the talk; clients send an earlier answer back as they got it, with a refusal that is null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]
    name: str | None = None
    refusal: None = None

    @property
    def parts(self) -> list[Part]:
        """The content as parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    @model_validator(mode="after")
    def _media_are_the_users(self) -> Message:
        if self.role != "user" and not all(isinstance(part, TextPart) for part in self.parts):
            raise ValueError(f"a message of the {self.role} holds words alone; pictures belong to the user's")
        return self


class StreamOptions(_Strict):
    """What a stream says beside the answer."""

    include_usage: bool = False


class ResponseFormat(_Strict):
    """The only form of an answer that there is."""

    type: Literal["text"]


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


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
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
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
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

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


# A request's messages as turns, and the pictures and videos in them: decoded, limited, nothing left on the disk.


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
        parts = [part for message in messages for part in message.parts]
        shown_videos = sum(isinstance(part, VideoPart) for part in parts)
        self.refuse_many(sum(isinstance(part, PicturePart) for part in parts), shown_videos, "the request shows")
        pictures: list[Image.Image] = []
        videos: list[Video] = []

        def text_of(part: Part, where: str) -> str:
            if isinstance(part, TextPart):
                return words(part.text, where, shows_videos=shown_videos > 0)
            go_on()
            if isinstance(part, VideoPart):
                where += ".video_url"
                videos.append(self.video(self._content(part.video_url.url, where), where))
                return f"{VIDEO_PLACEHOLDER}\n"
            where += ".image_url"
            pictures.append(self.picture(self._content(part.image_url.url, where), where))
            return f"{IMAGE_PLACEHOLDER}\n"

        turns: list[Turn] = []
        for number, message in enumerate(messages):
            where = f"messages[{number}].content"
            is_text = isinstance(message.content, str)
            text = "".join(
                text_of(part, where if is_text else f"{where}[{place}]") for place, part in enumerate(message.parts)
            )
            ends_with_words = isinstance(message.parts[-1], TextPart)
            turns.append(Turn(ROLES[message.role], text if ends_with_words else text.removesuffix("\n")))
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
        limits = self.limits
        for count, most, what in ((pictures, limits.pictures, "pictures"), (videos, limits.videos, "videos")):
            if count > most:
                raise TooLarge(f"{who} {count} {what}, and {most} are allowed here")

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
        """The frames of a video's file that a model sees. Raises BadRequest: it cannot be decoded, or not in time."""
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


# -- the JSON that a request brings: of at most so many values, and checked --------------------------------------------

Model = TypeVar("Model", bound=BaseModel)
MOST_VALUES = 200_000
"""Commas and opening brackets of a request: each value has one before it, and may take a hundred times its bytes."""
BEFORE_A_VALUE = (b",", b"[", b"{")
NO_MARKS = bytes(set(range(256)).difference(b'"', *BEFORE_A_VALUE))
LONGEST_PLACE, LONGEST_REASON = 80, 300
REASONS = {
    "missing": "it is missing",
    "extra_forbidden": "there is no such field here",
    "union_tag_invalid": "its type must be text, image_url or video_url",
    "union_tag_not_found": "it needs a type: text, image_url or video_url",
}
WORDS = {
    "Input should be": "it must be",
    "List should have": "it must have",
    "String should have": "it must have",
    " after validation": "",
    "a valid ": "a ",
    "a integer": "an integer",
    "a object": "an object",
    "Value error, ": "",
    "Invalid JSON": "it is no JSON",
}
"""Pydantic's words, and those for a person who knows OpenAI's fields."""


def parsed(kind: type[Model], content: bytes) -> Model:
    """A request's JSON, checked.

    Raises:
        TooLarge: it holds more values than any request needs.
        BadRequest: it names the first place that is wrong.
    """
    if _holds_too_many(content):
        beyond = f"the request holds more than {MOST_VALUES:,} commas and opening brackets outside of its texts"
        raise TooLarge(f"{beyond}; none needs as many")
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        # Of several forms of one place the one that came farthest: deepest, and beyond its type.
        first = max(errors, key=lambda item: (len(item["loc"]), not item["type"].endswith("_type")))
        place, reason = _place(first), REASONS.get(first["type"], first["msg"])
        for theirs, ours in WORDS.items():
            reason = reason.replace(theirs, ours)
        others = {other for other in map(_place, errors) if not place.startswith(other)}
        more = f" (and {len(others)} more)" if others else ""
        raise BadRequest(one_line(place, LONGEST_PLACE), one_line(reason, LONGEST_REASON) + more) from None


def _place(error: ErrorDetails) -> str:
    """Where it is, such as `messages[0].content[1].image_url`: without pydantic's names for the forms of a value."""
    place, form = "", False
    for number, piece in enumerate(error["loc"]):
        named = error["type"] == "extra_forbidden" and number == len(error["loc"]) - 1
        if isinstance(piece, int):
            place += f"[{piece}]"
        elif (form or re.fullmatch(r"(constrained-)?str|list\[.*\]", piece)) and not named:
            form = not form and not piece.endswith("str")  # an item's form comes after its number
        else:
            place += f".{piece}"
    return place.removeprefix(".") or "the request"


def _holds_too_many(content: bytes) -> bool:
    """Whether it holds too many values, before any is made: each step is one pass, in C, whatever a client wrote.

    Past the first place where it is no JSON the count may be wrong; the parser reads no further either.
    """

    def values(part: bytes) -> int:
        return sum(map(part.count, BEFORE_A_VALUE))

    if values(content) <= MOST_VALUES:  # nearly always, and its texts need not be told apart
        return False
    marks = content.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, NO_MARKS)
    if marks.count(b'"') > 4 * (MOST_VALUES + 1):  # a value has a name and a text at most, or there are as many pieces
        return True
    return values(b"".join(marks.split(b'"')[::2])) > MOST_VALUES
