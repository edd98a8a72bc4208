"""The turns of a conversation, the places of its pictures and videos, and the rules that make it trainable.

Turns hold no special token except `<image>` and, where a sample has videos, `<video>`: templates and tokens belong to
the backbone. Without videos `<video>` is text, such as HTML's.
Source of the rules: LLaVA c121f04, `llava/train/train.py` (`preprocess_multimodal`, `preprocess_v1`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import AllowInfNan, Strict

from dora_vl.errors import EMPTY_ANSWER, NO_ANSWER, NO_SAMPLE

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"

THINK, END_THINK = "<think>", "</think>"
"""These enclose the thoughts that an answer begins with."""

Role = Literal["system", "user", "assistant", "tool"]
Number = Annotated[float, Strict(), AllowInfNan(False)]
"""A number of a JSON record must be finite and no text."""

SPEAKERS: Mapping[Role, str] = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}
"""LLaVA's JSON calls the roles so; a tool keeps its name."""
FOLLOWERS: Mapping[Role | None, tuple[Role, ...]] = {
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""Maps a role to those whose turns may follow one of it; None is before the first turn."""
TOOLS, KWARGS, CALLS = "tools", "chat_template_kwargs", "tool_calls"
"""A row's first turn keeps the first two of these keys in its `more`, and an answer keeps the third."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video, or the part of it between two times; None is its beginning or its end."""

    path: str
    start_seconds: Number | None = None
    end_seconds: Number | None = None


@dataclass(frozen=True)
class Turn:
    """One utterance; `text` holds `<image>` at each place where a picture goes, `<video>` where a video does.

    The last `input_characters` of the text are an instruction's input, which a line break parts from the instruction.
    Prompts that were published for instructions have a place for each; all others take the text as it is. `more` is
    JSON of what else a chat template gets: `tool_calls` of an answer, `name` and `tool_call_id` of a tool's result, and
    in the first turn the conversation's `tools` and `chat_template_kwargs`. An answer that is not trained is in prompts
    only.
    """

    role: Role
    text: str
    input_characters: int = 0
    more: str = ""
    is_trained: bool = True

    def __post_init__(self) -> None:
        if self.more and not isinstance(json.loads(self.more), dict):
            raise ValueError(f"'more' must be a JSON object, got {self.more[:40]!r}")

    @property
    def fields(self) -> dict[str, Any]:
        """Returns what `more` holds."""
        return json.loads(self.more) if self.more else {}

    @property
    def instruction(self) -> str:
        """Returns the text without its input."""
        return self.text[: -self.input_characters - 1] if self.input_characters else self.text

    @property
    def input(self) -> str:
        """Returns the input; empty where there is none."""
        return self.text[len(self.text) - self.input_characters :]


class Unusable(Exception):
    """Why a row cannot be a sample, of this kind; `readers.read_fields` knows its id and makes a `BadSample` of it."""

    def __init__(self, reason: str, kind: str = NO_SAMPLE) -> None:
        super().__init__(reason)
        self.kind = kind


def arrange(
    images: Sequence[str], turns: Sequence[Turn], videos: Sequence[Clip] = ()
) -> tuple[tuple[str, ...], tuple[Turn, ...]]:
    """Returns the pictures in the order of their places, and the turns with a place for each picture and video.

    Turns alternate, begin with the user and end with an answer; a tool may replace the user, and a system turn may come
    first. A greeting, a first turn from the assistant, is kept untrained; the original drops it. With one picture its
    placeholder moves to the front of its turn, followed by a newline (the published normalisation); with several every
    placeholder stays where it is, because moving them would lose which picture the text speaks of. Where no turn has a
    placeholder, the pictures come before the first question. The original folds repeated placeholders of one turn into
    one; here any other count than that of the pictures is an error. Videos have `<video>`, which stays where it is, or
    go before the first question; where a sample has no picture, `<image>` may replace it, as in LLaVA-Video's sets. An
    answer holds neither: no base answers in pictures.
    """
    system = [turn for turn in turns[:1] if turn.role == "system"]
    conversation = [*turns[len(system) :]]
    greeting = [replace(turn, is_trained=False) for turn in conversation[:1] if turn.role == "assistant"]
    conversation = conversation[len(greeting) :]
    _check_order(conversation)
    before = [turn for turn in (*system, *greeting) if turn.text.strip()]
    images, conversation = _by_number(images, conversation)
    conversation = _spelled_alike(len(images), conversation)
    answers = [turn.text for turn in (*before, *conversation) if turn.role == "assistant"]
    refuse_places(answers, has_videos=bool(videos))

    def places(placeholder: str) -> int:
        return sum(turn.text.count(placeholder) for turn in (*before, *conversation))

    if videos and not images and not places(VIDEO_PLACEHOLDER) and places(IMAGE_PLACEHOLDER) == len(videos):
        conversation = [
            replace(turn, text=turn.text.replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)) for turn in conversation
        ]
    pictures, clips = places(IMAGE_PLACEHOLDER), places(VIDEO_PLACEHOLDER)
    front = "" if pictures else f"{IMAGE_PLACEHOLDER}\n" * len(images)
    front += "" if clips else f"{VIDEO_PLACEHOLDER}\n" * len(videos)
    conversation[0] = replace(conversation[0], text=front + conversation[0].text)
    media = [(IMAGE_PLACEHOLDER, pictures or len(images), len(images), "pictures")]
    media += [(VIDEO_PLACEHOLDER, clips or len(videos), len(videos), "videos")] if videos else []
    for placeholder, placed, count, kind in media:
        trouble = f"placeholders differ from {kind}"
        if placed != count:
            raise Unusable(f"its text has {placed} {placeholder} placeholders, but it names {count} {kind}", trouble)
        if any(placeholder in turn.text for turn in before):
            raise Unusable(f"its system turn holds {placeholder}; {kind} belong to a question", trouble)
    if len(images) == 1 and not videos:
        conversation = [
            replace(turn, text=placeholder_first(turn.text), input_characters=0)
            if IMAGE_PLACEHOLDER in turn.text
            else turn
            for turn in conversation
        ]
    return tuple(images), (*before, *conversation)


def _check_order(conversation: Sequence[Turn]) -> None:
    if not conversation:
        raise Unusable("it has no question: its only turn is from 'gpt' or 'system'")
    if reason := out_of_order(conversation):
        raise Unusable(reason)
    answers = [turn for turn in conversation if turn.role == "assistant"]
    for number, turn in enumerate(answers, 1):
        if not turn.more and not turn.text.replace(IMAGE_PLACEHOLDER, "").strip():
            raise Unusable(f"answer {number} of {len(answers)} is empty", EMPTY_ANSWER)
    if conversation[-1].role != "assistant":
        raise Unusable("its last question has no answer", NO_ANSWER)
    if not any(turn.is_trained for turn in answers):
        raise Unusable("none of its answers is to be trained on", NO_ANSWER)


def refuse_places(answers: Sequence[str], *, has_videos: bool, kind: str = "answer") -> None:
    """Refuses answers that hold a placeholder of a picture or video: no base answers in those."""
    placeholders = (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER) if has_videos else (IMAGE_PLACEHOLDER,)
    for number, text in enumerate(answers, 1):
        for placeholder in placeholders:
            if placeholder in text:
                reason = f"{kind} {number} of {len(answers)} holds {placeholder}, a place that only questions have"
                raise Unusable(f"{reason}; rephrase it, or leave the row out", "placeholder in an answer")


def out_of_order(conversation: Sequence[Turn]) -> str | None:
    """Says which turn is out of order in what follows a system turn; None where all are in order."""
    before: Role | None = None
    for turn in conversation:
        if turn.role == "system":
            return "a system turn comes after others; there may be only one, and it must be the first"
        if turn.role not in FOLLOWERS[before]:
            where = f"after one of role {before}" if before else "first"
            rule = "turns must alternate between human (or tool) and gpt, starting with human"
            return f"{rule}; a turn of role {turn.role} comes {where}"
        before = turn.role
    return None


_NUMBERED_PLACE = re.compile(r"<(\|?)image[ _]?(\d{1,3})\1>")
"""`<image1>`, `<image 1>`, `<image_1>` and `<|image_1|>` place the first picture in MMMU, MATH-V and for Phi."""


def _by_number(images: Sequence[str], conversation: list[Turn]) -> tuple[Sequence[str], list[Turn]]:
    """Turns numbered places into `<image>`, and orders the pictures as the text shows them."""
    texts = [turn.text for turn in conversation if "<" in turn.text]
    numbers = [int(number) for text in texts for _, number in _NUMBERED_PLACE.findall(text)]
    if not numbers:
        return images, conversation
    if {*numbers} != {*range(1, len(images) + 1)} or any(IMAGE_PLACEHOLDER in turn.text for turn in conversation):
        reason = f"its text has places of the pictures {sorted(set(numbers))}, and it names {len(images)} pictures"
        raise Unusable(reason, "placeholders differ from pictures")
    conversation = [replace(turn, text=_NUMBERED_PLACE.sub(IMAGE_PLACEHOLDER, turn.text)) for turn in conversation]
    return [images[number - 1] for number in numbers], conversation


_OTHER_PLACE = re.compile(
    r"\[IMG\]|\[image\]|<Image>|<image\s+/?>|<image/>|<ImageHere>|<\|image(?:_pad)?\|>|<start_of_image>|<image_placeholder>"
    r"|<__media__>|<IMG_CONTEXT>|<image_soft_token>|\{image\}|<img\b[^<>]*>|!\[[^\]\n]*\]\([^()\s]*\)"
)
"""Other tools write the place of a picture so."""
_OF_MARKUP = ("<img", "![", "{")
"""What begins so may also be what the text is about, so that it is a place only at the start or end of a turn."""


def _spelled_alike(count: int, conversation: list[Turn]) -> list[Turn]:
    """Returns the turns with `<image>` for what other tools write, where questions about pictures have none."""
    asked = [turn.text for turn in conversation if turn.role == "user"]
    if not count or any(IMAGE_PLACEHOLDER in text for text in asked):
        return conversation
    spellings = [match[0] for text in asked for match in _OTHER_PLACE.finditer(text)]
    if not spellings:
        return conversation
    at_edges = [match[0] for text in asked for match in _OTHER_PLACE.finditer(text) if _is_at_edge(match)]
    names_file = any(spelling.startswith("![") or " " in spelling.strip("<> /") for spelling in spellings)
    is_sure = not any(spelling.startswith(_OF_MARKUP) for spelling in spellings) or at_edges == spellings
    if len({*spellings}) > 1 or len(spellings) != count or names_file or not is_sure:
        reason = f"its text has {spellings[0][:40]!r}, which may be the place of one of its {count} pictures"
        raise Unusable(f"{reason}; write {IMAGE_PLACEHOLDER} where each goes", "placeholders differ from pictures")
    return [
        replace(turn, text=_OTHER_PLACE.sub(IMAGE_PLACEHOLDER, turn.text), input_characters=0)
        if turn.role == "user" and _OTHER_PLACE.search(turn.text)
        else turn
        for turn in conversation
    ]


def _is_at_edge(match: re.Match[str]) -> bool:
    return not match.string[: match.start()].strip() or not match.string[match.end() :].strip()


def placeholder_first(text: str) -> str:
    """Returns a turn's text with its picture's place in front, on a line of its own: the published normalisation."""
    if IMAGE_PLACEHOLDER not in text:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()
