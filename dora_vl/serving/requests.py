"""What a request to `/v1/chat/completions` may hold: OpenAI's fields, as far as they are served here."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dora_vl.core.strength import MOST_STRENGTH
from dora_vl.errors import UserError, one_line

LONGEST_NAME = 256
MOST_STOPS, LONGEST_STOP = 16, 256
LARGEST_SEED = 2**63 - 1
MOST_MESSAGES, MOST_PARTS, MOST_FIELDS = 512, 256, 64


def _limit_fields(value: Any) -> Any:
    """Refuses an object of too many fields: each wrong one costs memory and a message."""
    if isinstance(value, dict) and len(value) > MOST_FIELDS:
        raise ValueError(f"it has {len(value):,} fields, and {MOST_FIELDS} are allowed")
    return value


class _Strict(BaseModel):
    """Refuses unknown fields: nothing that a client asks for is dropped in silence."""

    model_config = ConfigDict(extra="forbid", strict=True)
    _few_fields = model_validator(mode="before")(_limit_fields)


class _Url(_Strict):
    """`detail` is accepted and not used: the model's own processor decides how a picture is seen."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


Address = Annotated[_Url, BeforeValidator(lambda value: {"url": value} if isinstance(value, str) else value)]
"""Holds a picture's or video's content as a data: URL."""


class TextPart(_Strict):
    """Text."""

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


ContentPart = Annotated[TextPart | PicturePart | VideoPart, Field(discriminator="type")]


class Message(_Strict):
    """One turn; a text is one part. Clients send answers back as they got them, `refusal` null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[ContentPart],
        Field(min_length=1, max_length=MOST_PARTS, fail_fast=True),
        BeforeValidator(lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value),
    ]
    name: str | None = None
    refusal: None = None

    @model_validator(mode="after")
    def _media_are_the_users(self) -> Message:
        if self.role != "user" and not all(isinstance(part, TextPart) for part in self.content):
            raise ValueError(f"a message of the {self.role} may only hold text; pictures belong to the user's")
        return self


class StreamOptions(_Strict):
    """Says what a stream holds beside the answer."""

    include_usage: bool = False


class ResponseFormat(_Strict):
    """Names the form of an answer, of which there is one."""

    type: Literal["text"]


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
    Field(max_length=MOST_STOPS, fail_fast=True),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]


class ChatRequest(_Strict):
    """A request.

    Fields that would change the answer in a way that is not served may only hold their neutral value; those from
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
    metadata: Annotated[dict[str, str] | None, BeforeValidator(_limit_fields)] = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @property
    def max_new_tokens(self) -> int | None:
        """Returns the longest answer that is asked for."""
        return self.max_completion_tokens or self.max_tokens


class TooLarge(UserError):
    """More, or larger, than is allowed."""


class BadRequest(UserError):
    """A part of the request cannot be used; `param` says which."""

    def __init__(self, param: str, reason: str) -> None:
        super().__init__(f"{param}: {reason}")
        self.param = param


MOST_VALUES = 1_000_000
"""A request may hold this many commas and opening brackets: each value follows one, and takes about 100 bytes."""
LONGEST_PLACE, LONGEST_REASON = 80, 300
_TAG = re.compile(r"(\.content\[\d+\])\.(?:text|image_url|video_url)")
NOT_SERVED = "this server only accepts the neutral value; vLLM with dora-vl's plugin supports more"
NEUTRAL = ("n", "logprobs", "frequency_penalty", "presence_penalty", "response_format", "store", "tool_choice")
REASONS = {
    "extra_forbidden": "is not supported here; vLLM with dora-vl's plugin supports OpenAI's other fields",
    "json_invalid": "is not JSON: {error}",
    "missing": "is missing",
    "union_tag_not_found": "needs a type: text, image_url or video_url",
    "value_error": "{error}",
}
"""Maps kinds of errors to our messages where Pydantic's own does not say what to do."""


def parse_request(content: bytes) -> ChatRequest:
    """Returns a request's JSON, checked."""
    if sum(map(content.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise TooLarge(f"the request holds more than {MOST_VALUES:,} commas and opening brackets; none needs as many")
    try:
        return ChatRequest.model_validate_json(content)
    except ValidationError as error:
        first, *others = error.errors(include_url=False, include_input=False)
        pieces = [f"[{piece}]" if isinstance(piece, int) else f".{piece}" for piece in first["loc"]]
        location = _TAG.sub(r"\1", "".join(pieces)).removeprefix(".")  # without pydantic's names for the kinds of parts
        words = REASONS[first["type"]].format_map(first.get("ctx", {})) if first["type"] in REASONS else first["msg"]
        if first["loc"] and first["loc"][0] in NEUTRAL:
            words = NOT_SERVED
        reason = one_line(words, LONGEST_REASON) + (f" (and {len(others)} more)" if others else "")
        raise BadRequest(one_line(location or "the request", LONGEST_PLACE), reason) from None
