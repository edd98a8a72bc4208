"""What a request to `/v1/chat/completions` may hold: OpenAI's fields, as far as they are served here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from dora_vl.core.strength import MOST_STRENGTH

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

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        return _few(value)


class Address(_Strict):
    """Where a picture or a video is: a data: URL, or one on the web where those are allowed."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None
    """Accepted and not used: the model's own processor decides how a picture is seen."""


class TextPart(_Strict):
    """Words."""

    type: Literal["text"]
    text: str


class PicturePart(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: Address

    @field_validator("image_url", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


class VideoPart(_Strict):
    """A video, as vLLM and Qwen's clients write it."""

    type: Literal["video_url"]
    video_url: Address

    @field_validator("video_url", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


Part = Annotated[TextPart | PicturePart | VideoPart, Field(discriminator="type")]


class Message(_Strict):
    """One turn of the talk."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]
    name: str | None = None
    refusal: None = None
    """Clients send an earlier answer back as they got it, with this null."""

    @model_validator(mode="after")
    def _media_are_asked_about(self) -> Message:
        parts = [] if isinstance(self.content, str) else self.content
        if self.role != "user" and not all(isinstance(part, TextPart) for part in parts):
            raise ValueError(f"a message of the {self.role} holds words alone; pictures belong to the user's")
        return self


class StreamOptions(_Strict):
    """What a stream says beside the answer."""

    include_usage: bool = False


class ResponseFormat(_Strict):
    """The only form of an answer that there is."""

    type: Literal["text"]


class ChatRequest(_Strict):
    """A request. Fields that would change the answer in a way that is not served may hold their neutral value alone."""

    model: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    strength: Annotated[float, Field(ge=0, le=MOST_STRENGTH, allow_inf_nan=False)] | None = None
    """Ours: how much of the adapter is applied; all of it where nothing is said."""

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
    """With `user` and `metadata` of those that clients send along; without tools they change no answer."""

    @field_validator("stop")
    @classmethod
    def _some_text(cls, value: str | list[str] | None) -> str | list[str] | None:
        for one in [value] if isinstance(value, str) else value or []:
            if not 0 < len(one) <= LONGEST_STOP:
                raise ValueError(f"a stop text has 1 to {LONGEST_STOP} characters, not {len(one)}")
        return value

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
