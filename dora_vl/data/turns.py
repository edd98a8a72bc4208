"""A row as typed turns: who speaks, what is said, where pictures and videos go.

Turns hold no special token except `<image>` and, where a sample has videos, `<video>`: templates and tokens belong to
the backbone. Without videos `<video>` is text, such as HTML's.
Source of the rules: LLaVA c121f04, `llava/train/train.py` (`preprocess_multimodal`, `preprocess_v1`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dora_vl.errors import EMPTY_ANSWER, NO_ANSWER, ON_THE_WEB, BadSample, shown

_PATHS = ("path", "video", "url", "video_url")
_STARTS = ("start_seconds", "video_start")
_ENDS = ("end_seconds", "video_end")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video, or the part of it between two times; None is its beginning or its end."""

    path: str
    start_seconds: float | None = None
    end_seconds: float | None = None


def row_clips(fields: Mapping[str, object], sample_id: str, key: str = "videos") -> tuple[Clip, ...]:
    """The videos among a row's fields; one that is no list counts as a list of one.

    Raises:
        BadSample: see `read_clip`.
    """
    value = fields.get(key)
    if value is None or value == "" or value == []:
        return ()
    return tuple(read_clip(one, key, sample_id) for one in (value if isinstance(value, list | tuple) else [value]))


def read_clip(value: object, key: str, sample_id: str) -> Clip:
    """A path, or an object with one and times: `start_seconds`, `end_seconds`, or Qwen's `video_start`, `video_end`.

    Raises:
        BadSample: anything else: bytes, frames in a list, an address on the web, times that are no numbers.
    """
    times: tuple[float | None, float | None] = (None, None)
    if isinstance(value, Mapping):
        times = _seconds(value, _STARTS, sample_id), _seconds(value, _ENDS, sample_id)
        if value.get("bytes") is not None:
            raise BadSample(sample_id, f"{key!r} holds a video's bytes; write it to a file and name that")
        value = next((one for name in _PATHS if (one := value.get(name)) is not None), None)
        value = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(value, str) or not value:
        raise BadSample(sample_id, f"{key!r} must be a path or a list of paths, got {shown(value)}")
    if value.startswith(("http://", "https://", "data:")):
        raise BadSample(sample_id, f"{key!r} is no file, {shown(value)}; fetch it and name the file", ON_THE_WEB)
    return Clip(path=value.removeprefix("file://").replace("\\", "/"), start_seconds=times[0], end_seconds=times[1])


def _seconds(value: Mapping[str, object], names: Sequence[str], sample_id: str) -> float | None:
    name = next((one for one in names if value.get(one) is not None), None)
    found = None if name is None else value[name]
    if found is None:
        return None
    try:
        finite = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    except OverflowError:  # a whole number beyond every float
        finite = False
    if not finite or not isinstance(found, int | float):
        raise BadSample(sample_id, f"{name!r} of a video must be a number of seconds, got {shown(found)}")
    return float(found)


IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"

INPUT_CHARACTERS = "input_characters"
"""Where a row of `record_table.load_table` says it of its last question; see `Turn`."""
Role = Literal["system", "user", "assistant"]

SPEAKERS: Mapping[Role, str] = {"system": "system", "user": "human", "assistant": "gpt"}
"""What LLaVA's JSON calls each role."""
_ROLES: Mapping[str, Role] = {
    **{name: role for role, name in SPEAKERS.items()},
    "user": "user",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Turn:
    """One utterance; `text` holds `<image>` at each place where a picture goes, `<video>` where a video does.

    Its last `input_characters` are an instruction's input, which a line break parts from the instruction. Prompts that
    were published for instructions have a place for each; all others take the text as it stands.
    """

    role: Role
    text: str
    input_characters: int = 0

    @property
    def instruction(self) -> str:
        """The text without its input."""
        return self.text[: -self.input_characters - 1] if self.input_characters else self.text

    @property
    def input(self) -> str:
        """The input; empty where there is none."""
        return self.text[len(self.text) - self.input_characters :]


@dataclass(frozen=True)
class Conversation:
    """A sample without its pixels: `images` are paths relative to the picture folder, `videos` to that of the videos.

    Turns alternate, begin with the user and end with a non-empty answer; a system turn may stand before them. The
    placeholders in them are as many as `images` and `videos`, each in the same order.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    videos: tuple[Clip, ...] = ()


def read_conversation(record: Mapping[str, object]) -> Conversation:
    """One record of LLaVA's JSON, or one row of `record_table.load_table`, as a conversation.

    A first turn from "gpt" is dropped, as the original does. With one picture its placeholder
    moves to the front of its turn, followed by a newline (the published normalisation); with several pictures
    every placeholder stays where it is, because moving them would lose which picture the text speaks of. Where no
    turn has a placeholder, the pictures come before the first question. The original folds repeated placeholders of
    one turn into one; here any other count that differs from the pictures is an error. An empty or null `image`
    means text only. Videos (`video` or `videos`) have `<video>`, which stays where it is, or go before the first
    question; where a sample has no picture, `<image>` may stand for them, as in LLaVA-Video's sets.

    Raises:
        BadSample: a speaker who is neither human, gpt nor system, turns that do not alternate, a last turn without
            an answer, an empty answer, or placeholders that are not as many as the pictures or videos.
    """
    sample_id = _id(record)
    if record.get("problem"):  # `record_table.load_table` found it while converting the file
        raise BadSample(sample_id, str(record["problem"]))
    images = read_paths(record, ("images", "image"), sample_id)
    videos = row_clips(record, sample_id) or row_clips(record, sample_id, "video")
    return as_conversation(sample_id, images, spoken_turns(record, sample_id), videos)


def as_conversation(
    sample_id: str, images: Sequence[str], turns: Sequence[Turn], videos: Sequence[Clip] = ()
) -> Conversation:
    """Turns of any origin, checked and their placeholders put in order; see `read_conversation`.

    Raises:
        BadSample: as `read_conversation`.
    """
    system = [turn for turn in turns[:1] if turn.role == "system"]
    talk = _alternating(_without_leading_answer([*turns[len(system) :]]), sample_id)
    if system and not system[0].text.strip():
        system = []
    images, talk = _numbered_places(images, talk, sample_id)
    talk = _with_places(system, talk, images, videos)
    counted = {IMAGE_PLACEHOLDER: (len(images), "pictures")}
    if videos:
        counted[VIDEO_PLACEHOLDER] = len(videos), "videos"
    for placeholder, (named, what) in counted.items():
        _check_placeholders([*system, *talk], placeholder, named, what, sample_id)
        if any(placeholder in turn.text for turn in system):
            told = f"its system turn holds {placeholder}; {what} belong to a question"
            raise BadSample(sample_id, told, f"placeholders differ from {what}")
    if len(images) == 1 and not videos:
        talk = [Turn(turn.role, placeholder_first(turn.text)) for turn in talk]
    return Conversation(sample_id, tuple(images), (*system, *talk), tuple(videos))


_NUMBERED_PLACE = re.compile(r"<(\|?)image[ _]?(\d{1,3})\1>")
"""`<image1>`, `<image 1>`, `<image_1>`, `<|image_1|>`: where the first picture goes, in MMMU, MATH-V, for Phi."""


def _numbered_places(images: Sequence[str], talk: list[Turn], sample_id: str) -> tuple[Sequence[str], list[Turn]]:
    """Numbered places as `<image>`, and the pictures in the order in which the text shows them."""
    shown_at = [int(number) for turn in talk for _, number in _NUMBERED_PLACE.findall(turn.text)]
    if not shown_at:
        return images, talk
    missing = sorted({number for number in shown_at if not 0 < number <= len(images)})
    unplaced = sorted(set(range(1, len(images) + 1)) - set(shown_at))
    if missing or unplaced or any(IMAGE_PLACEHOLDER in turn.text for turn in talk):
        told = f"its text has places of the pictures {sorted(set(shown_at))}, and it names {len(images)} pictures"
        raise BadSample(sample_id, told, "placeholders differ from pictures")
    talk = [replace(turn, text=_NUMBERED_PLACE.sub(IMAGE_PLACEHOLDER, turn.text)) for turn in talk]
    return [images[number - 1] for number in shown_at], talk


def _with_places(system: Sequence[Turn], talk: list[Turn], images: Sequence[str], videos: Sequence[Clip]) -> list[Turn]:
    """Pictures and videos that no turn has a place for come before the first question."""

    def places(placeholder: str) -> int:
        return sum(turn.text.count(placeholder) for turn in [*system, *talk])

    if videos and not images and not places(VIDEO_PLACEHOLDER) and places(IMAGE_PLACEHOLDER) == len(videos):
        talk = [Turn(turn.role, turn.text.replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)) for turn in talk]
    front = "" if places(IMAGE_PLACEHOLDER) else f"{IMAGE_PLACEHOLDER}\n" * len(images)
    front += "" if places(VIDEO_PLACEHOLDER) else f"{VIDEO_PLACEHOLDER}\n" * len(videos)
    return [Turn("user", front + talk[0].text), *talk[1:]] if front else talk


def _id(record: Mapping[str, object]) -> str:
    value = record.get("id")
    return "(no id)" if value is None else str(value)


def read_paths(record: Mapping[str, object], keys: Sequence[str], sample_id: str) -> tuple[str, ...]:
    """The paths under the first of `keys` that holds any; a string counts as a list of one.

    Raises:
        BadSample: neither a path nor a list of paths.
    """
    for key in keys:
        value = record.get(key)
        if value is None or value == "" or value == []:
            continue
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, Sequence) or not all(isinstance(path, str) and path for path in paths):
            raise BadSample(sample_id, f"{key!r} must be a path or a list of paths, got {shown(value)}")
        return tuple(paths)
    return ()


def raw_turns(record: Mapping[str, object], sample_id: str) -> list[tuple[str, str]]:
    """The turns as (from, value) pairs, whatever the speakers are called.

    Raises:
        BadSample: 'conversations' is not a list of objects that hold both as text.
    """
    entries = record.get("conversations")
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise BadSample(sample_id, f"'conversations' must be a list of turns, got {shown(entries)}")
    return [_raw_turn(entry, number, sample_id) for number, entry in enumerate(entries, 1)]


def _raw_turn(entry: object, number: int, sample_id: str) -> tuple[str, str]:
    if not isinstance(entry, Mapping):
        raise BadSample(sample_id, f"turn {number} must hold 'from' and 'value', got {shown(entry)}")
    speaker, text = entry.get("from"), entry.get("value")
    if not isinstance(speaker, str) or not isinstance(text, str):
        got = f"from {shown(speaker)} and value {shown(text)}"
        raise BadSample(sample_id, f"turn {number} must have text as 'from' and 'value', got {got}")
    return speaker, text


def spoken_turns(record: Mapping[str, object], sample_id: str) -> list[Turn]:
    """The turns by role, as `raw_turns` finds them.

    Raises:
        BadSample: as `raw_turns`; or a speaker who is neither one of LLaVA's (human, gpt, system) nor a role.
    """
    turns = [
        Turn(_role(speaker, number, sample_id), text)
        for number, (speaker, text) in enumerate(raw_turns(record, sample_id), 1)
    ]
    if isinstance(apart := record.get(INPUT_CHARACTERS), int) and apart and len(turns) > 1:
        turns[-2] = replace(turns[-2], input_characters=apart)
    return turns


def _role(speaker: str, number: int, sample_id: str) -> Role:
    if speaker not in _ROLES:
        known = "only 'human', 'gpt' and 'system' are known"
        raise BadSample(sample_id, f"turn {number} is from {shown(speaker)}; {known}")
    return _ROLES[speaker]


def _without_leading_answer(turns: list[Turn]) -> list[Turn]:
    return turns[1:] if turns and turns[0].role == "assistant" else turns


def _alternating(turns: list[Turn], sample_id: str) -> list[Turn]:
    if not turns:
        raise BadSample(sample_id, "it has no question: its only turn is from 'gpt' or 'system'")
    for number, turn in enumerate(turns):
        if turn.role == "system":
            raise BadSample(sample_id, "a system turn stands among the others; it must be the first, and one")
        expected: Role = "assistant" if number % 2 else "user"
        if turn.role != expected:
            raise BadSample(sample_id, f"two turns in a row are from the {turn.role}; human and gpt must alternate")
        if turn.role == "assistant" and not turn.text.replace(IMAGE_PLACEHOLDER, "").strip():
            told = f"answer {number // 2 + 1} of {(len(turns) + 1) // 2} is empty"
            raise BadSample(sample_id, told, EMPTY_ANSWER)
    if turns[-1].role == "user":
        raise BadSample(sample_id, "its last question has no answer", NO_ANSWER)
    return turns


def _check_placeholders(turns: Sequence[Turn], placeholder: str, named: int, what: str, sample_id: str) -> None:
    placeholders = sum(turn.text.count(placeholder) for turn in turns)
    if placeholders != named:
        raise BadSample(
            sample_id,
            f"its text has {placeholders} {placeholder} placeholders, but it names {named} {what}",
            f"placeholders differ from {what}",
        )


def placeholder_first(text: str) -> str:
    """A turn's text with its picture's place in front, on a line of its own: the published normalisation."""
    if IMAGE_PLACEHOLDER not in text:
        return text
    rest = text.replace(IMAGE_PLACEHOLDER, "").strip()
    return f"{IMAGE_PLACEHOLDER}\n{rest}".strip()
