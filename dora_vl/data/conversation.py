"""Turns a conversation's messages into an `Example`: turns, thoughts, tool calls, places of pictures and videos."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from typing import Any

from dora_vl.data.column_names import MEDIUM, OF_VIDEO, UNREAD, Row, is_empty, lost_content, moment_of, parsed
from dora_vl.data.example import Example
from dora_vl.data.formats.grounded import Objects
from dora_vl.data.objects import boxes_in
from dora_vl.data.pictures import picture_name
from dora_vl.data.turns import (
    CALLS,
    END_THINK,
    IMAGE_PLACEHOLDER,
    KWARGS,
    THINK,
    TOOLS,
    VIDEO_PLACEHOLDER,
    Clip,
    Role,
    Turn,
    Unusable,
    arrange,
)
from dora_vl.errors import ON_THE_WEB, short_names, short_repr

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "model": "assistant",
    "gpt": "assistant",
    "tool_call": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
}
CALLING = ("tool_call", "function_call")
"""The content of a turn from one of these is the call of a tool (ms-swift, LLaMA-Factory)."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
RESULT = ("name", "tool_call_id")
OF_ROLE: Mapping[Role, frozenset[str]] = {"assistant": frozenset((*THOUGHTS, CALLS)), "tool": frozenset(RESULT)}
"""A turn of these roles may hold these keys besides its role, content and media."""
TEXT_PARTS = ("text", "input_text", "output_text")
PICTURE_PARTS = ("image", "image_url", "input_image")
PAYLOADS = ("image", "image_url", "url", "path", "bytes", "data")
VIDEO_PARTS = ("video", "video_url", "input_video")
VIDEO_PAYLOADS = ("path", "video", "url", "video_url")
CLIP_TIMES = (("start_seconds", "video_start", "start_time"), ("end_seconds", "video_end", "end_time"))
SEEN_AS = ("fps", "nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "detail")
SEEN_AS += ("resized_height", "resized_width")
OF_SIZE = "how large or how often it is seen, which is a setting of the run, the same for all samples"
PARTS: Mapping[object, frozenset[str]] = {
    **dict.fromkeys(TEXT_PARTS, frozenset(("type", "text", "image", "image_url", "url", "path"))),
    **dict.fromkeys(PICTURE_PARTS, frozenset(("type", "index", *PAYLOADS))),
    **dict.fromkeys(VIDEO_PARTS, frozenset(("type", *VIDEO_PAYLOADS, *CLIP_TIMES[0], *CLIP_TIMES[1]))),
}
"""A part of each type may hold these keys."""
BESIDE = {"images": frozenset(("type", "bytes", "path", "url")), "videos": PARTS["video"] | {"bytes"}}
"""An object of a picture or video beside the conversation may hold these keys."""
OWN_PICTURES, OWN_VIDEOS = ("images", "image"), ("videos", "video")
OWN_MEDIA = frozenset((*OWN_PICTURES, *OWN_VIDEOS))
KINDS_OF_TURN = ("message", "text", "chat", *ROLES)
"""A turn may be of one of these as its `type`; any other may say that it is masked."""
TRAINED = ("train", "train_on_turn", "loss", "weight")
"""These keys mark whether a turn is trained. Only an answer can be, wholly or not at all; other marks are refused."""
_RESULTS = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
"""Hermes' tools answer in tags, which templates write by themselves."""
_TAGS = re.compile(
    r"<(?:img>(.*?)</img>|image>(?=[^<]*</image>)([^<]*)</image>|bbox>|ref-object>|audio>(?!.*</audio>))", re.DOTALL
)
"""Qwen names a picture in its text; ms-swift marks places for what is in other columns."""


class UnreadKey(Exception):
    """A message holds what nothing reads and what could change what is learned: `path` leads there from the message."""

    def __init__(self, message: object, path: str, what: str) -> None:
        super().__init__(path)
        self.message, self.path, self.what = message, path, what


def read_conversation(messages: Sequence[object], row: Row) -> Example:
    """Returns the conversation of messages, each a `Turn` or an object of role and content, as it is trained on.

    What the row says as `system` comes before them; its `images` and `videos` take the places that the messages leave.
    """
    sample_id, conversation = str(row["id"]), _Conversation(row)
    for number, message in enumerate(messages, 1):
        conversation.add(message, number)
    conversation.objects.check_taken()
    turns = conversation.turns
    if not is_empty(row.get("system")):
        system = Turn("system", as_text(row["system"], "system"))
        first = turns[0].text.strip() if turns and turns[0].role == "system" else None
        if first and first != system.text.strip():
            raise Unusable("its 'system' differs from the system turn that it has too; leave one of them out")
        turns = turns if first else [system, *(turns if first is None else turns[1:])]
    videos = tuple(conversation.clips + conversation.clips_left)
    images, (first_turn, *others) = arrange(conversation.all_images(), turns, videos)
    beside = _template_arguments(row, first_turn.text)
    arranged = (replace(first_turn, more=as_json(beside)) if beside else first_turn, *others)
    _check_places(arranged, len(images))
    texts = (turn.text + turn.more for turn in arranged)
    try:
        "".join([sample_id, *images, *(clip.path for clip in videos), *texts]).encode()
    except UnicodeEncodeError:
        raise Unusable("its text holds half of a surrogate pair, which is not a character") from None
    return Example(sample_id, images, arranged, videos, image_bytes=conversation.image_bytes)


WRONG_BOX = "a wrong box"
_UNKNOWN = (1 << 30, 1 << 30)
"""Stands for the size of a picture that nobody has opened."""


def _check_places(turns: Sequence[Turn], pictures: int) -> None:
    """Raises Unusable: a place of objects has one that no picture could hold."""
    try:
        for box in (box for turn in turns for boxes in boxes_in(turn.text) for box in boxes):
            box.in_fractions(_UNKNOWN)
            if not 0 <= box.image < pictures:
                raise ValueError(f"the {box.named()} is of picture {box.image + 1}, and it has {pictures} pictures")
    except ValueError as error:
        raise Unusable(str(error), WRONG_BOX) from None


class _Conversation:
    """Reads one row's messages; its pictures and videos come out in the order of their places."""

    def __init__(self, row: Row) -> None:
        self.image_bytes: dict[str, bytes] = {}
        for role, read in BESIDE.items():
            for value in listed(row.get(role)):
                if isinstance(value, Mapping) and not read.issuperset(value):
                    self._refuse_unread(value, value, read)
        self._beside = [picture_name(value, "images", self.image_bytes) for value in listed(row.get("images"))]
        self._left = list(range(len(self._beside)))
        self._images: list[str] = []
        self._tagged = 0
        self.turns: list[Turn] = []
        self.clips: list[Clip] = []
        self.objects = Objects(row)
        self.clips_left = [_read_clip(value, "videos") for value in _parts_of_videos(row)]

    def all_images(self) -> list[str]:
        """Returns the pictures in and beside the messages."""
        images = [*self._images, *(self._beside[index] for index in self._left)]
        if self._tagged and len(images) > self._tagged:
            more = len(images) - self._tagged
            raise Unusable(f"its text names pictures in <img>, and it has {more} more beside it")
        return images

    def add(self, message: object, number: int) -> None:
        """Reads one turn, `<image>` where a part is a picture, `<video>` where it is a video.

        A call in a turn of its own joins the answer before it.
        """
        if isinstance(message, Turn):
            self.turns.append(replace(message, text=self._words(message.text)))
            return
        if not isinstance(message, Mapping):
            raise Unusable(f"turn {number} must be an object of role and text, got {short_repr(message)}")
        who, what = _keys_of(message)
        role = ROLES.get(speaker) if isinstance(speaker := message.get(who), str) else None
        if role is None:
            roles = "'human', 'gpt' and 'system'" if who == "from" else "system, user and assistant"
            raise Unusable(f"turn {number} has {who!r} {short_repr(speaker)}; only {roles} are known")
        if len(message) == 2 and what in message and role != "tool" and speaker not in CALLING:  # as most are
            self.turns.append(Turn(role, self._content(message, what, number)))
            return
        read = OWN_MEDIA | OF_ROLE.get(role, frozenset()) | {who, what}
        if not read.issuperset(message):
            self._refuse_unread(message, message, read, answers=role == "assistant")
        marks = {bool(mark) for key in TRAINED if not is_empty(mark := message.get(key))}
        if len(marks) > 1:
            raise Unusable(f"turn {number} is marked to be trained and not to be")
        more = {key: message[key] for key in RESULT if role == "tool" and not is_empty(message.get(key))}
        calls = message.get(what) if speaker in CALLING else message.get(CALLS) if role == "assistant" else None
        if not is_empty(parsed(calls)):
            more = {CALLS: [_call(call) for call in _in_list(calls)]}
        text = "" if speaker in CALLING else self._turn_text(message, what, number, role)
        is_trained = role != "assistant" or False not in marks
        if speaker in CALLING and self.turns and self.turns[-1].role == "assistant":
            before = self.turns.pop()
            if before.is_trained != is_trained:
                message = f"turn {number} calls a tool, and the answer before it is marked differently for training"
                raise Unusable(message)
            text, more[CALLS] = before.text, [*before.fields.get(CALLS, ()), *more.get(CALLS, ())]
        self.turns.append(Turn(role, text, more=as_json(more) if more else "", is_trained=is_trained))

    def _turn_text(self, message: Mapping[str, object], what: str, number: int, role: Role) -> str:
        """Returns a turn's text: thoughts in front, and what is a tool's result without Hermes' tags."""
        content = message.get(what)
        if role == "tool" and isinstance(content, Mapping):
            return self._words(as_json(content))
        if role == "tool" and isinstance(content, str) and (results := _RESULTS.fullmatch(content)):
            return self._words(results[1])
        if role != "assistant":
            return self._with_media(message, what, number)
        silent = is_empty(content) and not is_empty(parsed(message.get(CALLS)))
        return with_thoughts("" if silent else self._with_media(message, what, number), message)

    def _with_media(self, message: Mapping[str, object], what: str, number: int) -> str:
        """Returns a turn's text with the places of its own pictures and videos."""
        if OWN_MEDIA.isdisjoint(message):
            return self._content(message, what, number)
        # What is the turn's own is taken before what is beside the conversation; without a place it comes first.
        pictures, clips = len(self._images), len(self.clips)
        own_pictures, own_videos = (
            [value for name in names for value in listed(message.get(name))] for names in (OWN_PICTURES, OWN_VIDEOS)
        )
        own = [len(self._beside) + index for index in range(len(own_pictures))]
        own_clips = [_read_clip(value, "videos") for value in own_videos]
        self._beside += [picture_name(value, "images", self.image_bytes) for value in own_pictures]
        self._left[:0], self.clips_left[:0] = own, own_clips
        text = self._content(message, what, number)
        if self._left[: len(own)] == own:
            text = f"{IMAGE_PLACEHOLDER}\n" * len(own) + text
            self._images[pictures:pictures] = [self._beside[index] for index in own]
            del self._left[: len(own)]
        if len(self.clips) == clips:
            text = f"{VIDEO_PLACEHOLDER}\n" * len(own_clips) + text
            self.clips += own_clips
            del self.clips_left[: len(own_clips)]
        if not {*own}.isdisjoint(self._left) or len(self.clips) < clips + len(own_clips):
            count = len(own) + len(own_clips)
            raise Unusable(f"turn {number} has {count} pictures and videos, and fewer places in its text")
        return text

    def _content(self, message: Mapping[str, object], what: str, number: int) -> str:
        content = message.get(what)
        if isinstance(content, str):
            return self._words(content)
        if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
            raise Unusable(f"{what!r} of turn {number} is neither text nor parts: {short_repr(content)}")
        return "".join(self._part(part, message, f"{what}.", number) for part in content)

    def _refuse_unread(
        self, message: object, fields: Row, read: Collection[str], path: str = "", *, answers: bool = False
    ) -> None:
        """Refuses what a message, or a part of it, holds besides known keys, bookkeeping, and default values."""
        for key, value in fields.items():
            if key in read or is_empty(value) or (key, value) == ("detail", "auto"):
                if path and isinstance(value, dict):
                    self._refuse_unread(message, value, BESIDE["images"], f"{path}{key}.")
                continue
            if key in TRAINED:
                if value in (0, 1) and (answers or not value):
                    continue
                what = "an answer is trained wholly or not, by 1 or 0" if answers else "only answers are trained"
                raise UnreadKey(message, f"{path}{key}", what)
            if key in SEEN_AS:
                raise UnreadKey(message, f"{path}{key}", OF_SIZE)
            if read in (BESIDE["videos"], PARTS["video"]) and moment_of(key) is not None:
                raise UnreadKey(message, f"{path}{key}", f"{OF_VIDEO}; start_seconds and end_seconds say which")
            if (key, path) == ("type", "") and value not in KINDS_OF_TURN:
                raise UnreadKey(message, key, UNREAD)
            loss = lost_content(key, value, unknown=True)
            if loss is not None or path:
                raise UnreadKey(message, f"{path}{loss[0] if loss else key}", loss[1] if loss else UNREAD)

    def _part(self, part: object, message: object, path: str, number: int) -> str:
        if isinstance(part, str):
            return self._words(part)
        fields = _usual_part(part) if isinstance(part, Mapping) else {}
        kind, text = fields.get("type"), fields.get("text")
        if kind is None:
            kind = next((key for key in ("text", "image", "image_url", "video") if not is_empty(fields.get(key))), "")
        if not isinstance(kind, str) or kind not in PARTS:
            raise Unusable(f"turn {number} has a part that is not text, a picture or a video: {short_repr(part)}")
        self._refuse_unread(message, fields, PARTS[kind], path)
        if kind in VIDEO_PARTS:
            if all(fields.get(key) is None for key in VIDEO_PAYLOADS):
                return self._words(VIDEO_PLACEHOLDER)
            self.clips.append(_read_clip(fields, f"part of turn {number}"))
            return VIDEO_PLACEHOLDER
        picture = self._payload(fields, message, path, number)
        if kind in TEXT_PARTS:
            if not isinstance(text, str):
                raise Unusable(f"turn {number} has a part of text without text: {short_repr(part)}")
            return picture + self._words(text)
        if not picture and (index := fields.get("index")) is not None:
            self._take(index, number)
            return IMAGE_PLACEHOLDER
        return picture or self._words(IMAGE_PLACEHOLDER)

    def _payload(self, fields: Mapping[str, object], message: object, path: str, number: int) -> str:
        """Returns the place of the picture that a part holds; nothing where it holds none."""
        payloads = {key: value for key in PAYLOADS if (value := fields.get(key)) is not None}
        if len(payloads) > 1 and payloads.keys() != {"bytes", "path"}:
            raise UnreadKey(message, f"{path}{[*payloads][1]}", MEDIUM)
        for value in [*payloads.values()][:1]:
            self._images.append(picture_name(value, f"part of turn {number}", self.image_bytes))
        return IMAGE_PLACEHOLDER if payloads else ""

    def _words(self, text: str) -> str:
        """Returns the text, `<image>` for pictures that it names in tags; those beside take its places in order."""
        text = self.objects.fill(text)
        if "<" not in text:
            return text
        plain = _TAGS.sub("", text)
        for index in self._left[: plain.count(IMAGE_PLACEHOLDER)]:
            self._take(index)
        count = text.count(VIDEO_PLACEHOLDER)
        self.clips += self.clips_left[:count]
        del self.clips_left[:count]
        for tag in _TAGS.finditer(text):
            name = tag[1] if tag[2] is None else tag[2]
            if name is None:
                remedy = "write what it means into the text"
                raise Unusable(f"its text has {tag[0]}, which nothing here fills; {remedy}")
            self._images.append(picture_name(name.strip(), tag[0][:5], self.image_bytes))
            self._tagged += 1
        return _TAGS.sub(IMAGE_PLACEHOLDER, text)

    def _take(self, index: object, number: int = 0) -> None:
        """Takes a picture beside the messages by its index, from 0 (as TRL's)."""
        if not isinstance(index, int) or not 0 <= index < len(self._beside):
            raise Unusable(f"a part of turn {number} has the index {short_repr(index)} of {len(self._beside)} pictures")
        self._images.append(self._beside[index])
        if index in self._left:
            self._left.remove(index)


def _keys_of(message: Mapping[str, object]) -> tuple[str, str]:
    """Returns the keys of a message's role and content: LLaVA's, Gemini's, or the usual ones."""
    if message.get("role") is None and "from" in message:
        return "from", "value"
    return "role", "parts" if "parts" in message and "content" not in message else "content"


def _usual_part(part: Mapping[str, object]) -> Mapping[str, object]:
    """Returns a part as it is, or Anthropic's and Gemini's of a picture with a path or data that is read here."""
    key = next((key for key in ("source", "inline_data", "inlineData", "file_data", "fileData") if key in part), None)
    held = None if key is None else part[key]
    if key is None or not isinstance(held, Mapping):
        return part
    names = ("data", "url", "file_uri", "fileUri")
    values = {name: value for name in names if not is_empty(value := held.get(name))}
    kinds = [value for name in ("media_type", "mime_type", "mimeType") if (value := held.get(name))]
    is_read = held.keys() <= {"type", *names, "media_type", "mime_type", "mimeType"} and len(values) == 1
    if not is_read or not all(str(kind).startswith("image/") for kind in kinds):
        return part
    ((name, value),) = values.items()
    value = f"data:image;base64,{value}" if name == "data" else value
    return {**{other: entry for other, entry in part.items() if other != key}, "type": "image", "image": value}


def _in_list(value: object) -> Sequence[Any]:
    """Returns the list in a column or message, also one written as JSON or a single entry, without null entries."""
    entries = parsed(value)
    return [parsed(entry) for entry in entries if entry is not None] if isinstance(entries, list) else [entries]


def as_json(value: object) -> str:
    """Writes a value as JSON; raises `Unusable` for what JSON cannot hold."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise Unusable(f"{short_repr(value)} cannot be written as JSON") from None


def with_thoughts(text: str, message: Row) -> str:
    """Returns an answer's text with what the message holds as thoughts in front."""
    thoughts = {as_text(message[key], key).strip() for key in THOUGHTS if not is_empty(message.get(key))}
    if not thoughts:
        return text
    thought, *others = thoughts
    if others or END_THINK in thought or THINK in text:
        raise Unusable(f"an answer has thoughts twice: {short_names(THOUGHTS)}, or {THINK} in its text")
    return f"{THINK}\n{thought}\n{END_THINK}\n\n{text}"


def _call(call: object) -> dict[str, object]:
    """Returns a tool call as transformers' templates expect it, with its arguments as an object."""
    fields = call if isinstance(call, Mapping) else {}
    function = parsed(fields.get("function", fields))
    named = function if isinstance(function, Mapping) else {}
    arguments = named.get("arguments")
    arguments = {} if is_empty(arguments) else parsed(arguments)
    fields, named = ({key: value for key, value in of.items() if value is not None} for of in (fields, named))
    is_whole = isinstance(named.get("name"), str) and bool(named["name"]) and isinstance(arguments, dict)
    unread = {*named, *fields} - {"id", "type", "index", "function", "name", "arguments"}
    if not is_whole or unread or fields.get("type", "function") != "function":
        message = f"a tool's call must hold a function's 'name' and 'arguments', an object, got {short_repr(call)}"
        raise Unusable(message)
    about = {"id": fields["id"]} if "id" in fields else {}
    return {"type": "function", **about, "function": {"name": named["name"], "arguments": arguments}}


def _template_arguments(row: Row, first: str) -> dict[str, object]:
    """Returns the row's tools and its chat template's arguments, where it has some.

    Tools that the system turn says already, in `<tools>` (Hermes), are left to it.
    """
    beside: dict[str, object] = {}
    if not is_empty(parsed(row.get(TOOLS))):
        tools = [
            tool if isinstance(tool, Mapping) and "function" in tool else {"type": "function", "function": tool}
            for tool in _in_list(row[TOOLS])
        ]
        functions = [tool["function"] for tool in tools]
        names = [function.get("name") if isinstance(function, Mapping) else None for function in functions]
        if not all(isinstance(name, str) and name for name in names):
            raise Unusable(f"'tools' must be a list of functions with names, got {short_repr(row[TOOLS])}")
        if "<tools>" not in first or not all(str(name) in first for name in names):
            beside[TOOLS] = tools
    if not is_empty(row.get(KWARGS)):
        beside[KWARGS] = arguments = parsed(row[KWARGS])
        if not isinstance(arguments, dict):
            raise Unusable(f"{KWARGS!r} must be an object, got {short_repr(arguments)}")
    return beside


def listed(value: object) -> Sequence[object]:
    """Returns what a column of media holds, one that is not a list as a list of one; NaN is a table's empty cell."""
    if value is None or value in ("", b"", []) or value != value:
        return ()
    return value if isinstance(value, list | tuple) else (value,)


def _parts_of_videos(row: Row) -> Sequence[object]:
    """Returns what a row has as videos, with the times of its columns."""
    videos = listed(row.get("videos"))
    times = {name: value for name in ("start_seconds", "end_seconds") if not is_empty(value := row.get(name))}
    if not times:
        return videos
    if len(videos) != 1:
        raise Unusable(f"{short_names(times)} are of one video, and it has {len(videos)}")
    for name, value in times.items():
        with suppress(ValueError):
            times[name] = float(value) if isinstance(value, str) else value
    (video,) = videos
    return [{**(video if isinstance(video, Mapping) else {"path": video}), **times}]


def _read_clip(value: object, key: str) -> Clip:
    """Reads a path, or an object of path and times (`start_seconds`, `end_seconds` or `video_start`, `video_end`)."""
    times: list[float | None] = [None, None]
    if isinstance(value, Mapping):
        for index, names in enumerate(CLIP_TIMES):
            name = next((name for name in names if value.get(name) is not None), None)
            seconds = None if name is None else value[name]
            with suppress(OverflowError):  # a whole number beyond every float
                if isinstance(seconds, int | float) and not isinstance(seconds, bool) and math.isfinite(seconds):
                    times[index] = float(seconds)
            if name is not None and times[index] is None:
                raise Unusable(f"{name!r} of a video must be a number of seconds, got {short_repr(seconds)}")
        if value.get("bytes") is not None:
            raise Unusable(f"{key!r} holds a video's bytes; write it to a file and name that")
        value = next((value[name] for name in VIDEO_PAYLOADS if value.get(name) is not None), None)
        value = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(value, str) or not value:
        raise Unusable(f"{key!r} must be a path or a list of paths, got {short_repr(value)}")
    if value.startswith(("http://", "https://", "data:")):
        raise Unusable(f"{key!r} is not a file, {short_repr(value)}; fetch it and name the file", ON_THE_WEB)
    path, (start, end) = value.removeprefix("file://").replace("\\", "/"), times
    return Clip(path=path, start_seconds=start, end_seconds=end)


ANSWERED = ("answer", "choices", "output", "rejected")
"""A boolean of these is text."""


def as_text(value: object, name: str) -> str:
    """Returns text, or a number as text, or what JSON writes for a boolean that answers; nothing is empty text."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool) and name in ANSWERED:
        return as_json(value)
    # NaN is a table's empty cell.
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or value != value:
        key = next(iter(value), None) if isinstance(value, dict) else None
        inner = "" if key is None else f"; data.columns may name a key of it, COLUMN.{key}"
        raise Unusable(f"{name!r} must hold text, got {short_repr(value)}{inner}")
    try:
        return str(value)
    except ValueError:  # a whole number of thousands of digits
        raise Unusable(f"{name!r} holds {short_repr(value)}") from None
