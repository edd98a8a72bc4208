"""A row of any format to an `Example`, and the one reader of a file's rows that tells what cannot be a sample.

Each format gives messages of a role and its content; one way leads from these to turns, pictures and videos.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from string import ascii_lowercase, ascii_uppercase
from typing import Any

from dora_vl.data.columns import (
    FORMATS,
    JUDGED,
    PREFERENCES,
    REPLIES,
    USUAL,
    Columns,
    ColumnsError,
    Resolved,
    Row,
    lists_replies,
)
from dora_vl.data.example import (
    LETTER,
    Answer,
    CountedFromOne,
    Example,
    correct_choice,
    from_record,
    listed_choices,
    turns_of,
    with_letters,
    written_in_python,
)
from dora_vl.data.names import KNOWN, MEDIUM, UNREAD, Cell, flag_of, is_nothing, losing, parsed, plain_name
from dora_vl.data.names import ROLES as COLUMNS
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
    refuse_places,
)
from dora_vl.errors import EMPTY_ANSWER, NO_ANSWER, NO_SAMPLE, ON_THE_WEB, BadSample, UserError, shown, shown_names

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
"""A turn of these roles may hold these keys besides `TURN_KEYS`."""
TEXT_PARTS = ("text", "input_text", "output_text")
PICTURE_PARTS = ("image", "image_url", "input_image")
PAYLOADS = ("image", "image_url", "url", "path", "bytes", "data")
VIDEO_PARTS = ("video", "video_url", "input_video")
VIDEO_PAYLOADS = ("path", "video", "url", "video_url")
CLIP_TIMES = (("start_seconds", "video_start"), ("end_seconds", "video_end"))
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
TURN_KEYS = {who: OWN_MEDIA | {who, what} for who, what in (("role", "content"), ("from", "value"))}
"""A turn whose role stands under this key may hold these keys."""
ASKING, REPLYING = ("user", "human", "question"), ("assistant", "gpt", "answer")
"""A round may be one object with these keys (The Cauldron, ms-swift)."""
TRAINED = ("train", "train_on_turn", "loss", "weight")
"""These keys mark whether a turn is trained. Only an answer can be, wholly or not at all; other marks are refused."""
_RESULTS = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
"""Hermes' tools answer in tags, which templates write by themselves."""
_TAGS = re.compile(r"<(?:img>(.*?)</img>|bbox>|ref-object>|audio>(?!.*</audio>))", re.DOTALL)
"""Qwen names a picture in its text; ms-swift marks places for what stands in other columns."""


class UnreadKey(Exception):
    """A message holds what nothing reads and what could change what is learned: `path` leads there from the message."""

    def __init__(self, message: object, path: str, what: str) -> None:
        super().__init__(path)
        self.message, self.path, self.what = message, path, what


def read_conversation(messages: Sequence[object], row: Row) -> Example:
    """Returns the conversation of messages, each a `Turn` or an object of role and content, as it is trained on.

    What the row says as `system` stands before them; its `images` and `videos` take the places that the messages leave.
    """
    sample_id, conversation = str(row["id"]), _Conversation(row)
    for number, message in enumerate(messages, 1):
        conversation.add(message, number)
    turns = conversation.turns
    if not is_nothing(row.get("system")):
        system = Turn("system", _text(row["system"], "system"))
        first = turns[0].text.strip() if turns and turns[0].role == "system" else None
        if first and first != system.text.strip():
            raise Unusable("its 'system' differs from the system turn that it has too; leave one of them out")
        turns = turns if first else [system, *(turns if first is None else turns[1:])]
    videos = tuple(conversation.clips + conversation.clips_left)
    images, (first_turn, *others) = arrange(conversation.all_images(), turns, videos)
    beside = _template_arguments(row, first_turn.text)
    arranged = (replace(first_turn, more=_json(beside)) if beside else first_turn, *others)
    texts = (turn.text + turn.more for turn in arranged)
    try:
        "".join([sample_id, *images, *(clip.path for clip in videos), *texts]).encode()
    except UnicodeEncodeError:
        raise Unusable("its text holds half of a surrogate pair, which is no character") from None
    scored = row.get("scored")
    answers = (Answer(text=scored),) if isinstance(scored, str) and scored else ()
    return Example(sample_id, images, arranged, videos, answers=answers, image_bytes=conversation.image_bytes)


class _Conversation:
    """Reads one row's messages; its pictures and videos come out in the order of their places."""

    def __init__(self, row: Row) -> None:
        self.image_bytes: dict[str, bytes] = {}
        for role, read in BESIDE.items():
            for value in _listed(row.get(role)):
                if isinstance(value, Mapping) and not read.issuperset(value):
                    self._refuse_unread(value, value, read)
        self._beside = [self._picture(value, "images") for value in _listed(row.get("images"))]
        self._left = list(range(len(self._beside)))
        self._images: list[str] = []
        self._tagged = 0
        self.turns: list[Turn] = []
        self.clips: list[Clip] = []
        self.clips_left = [_read_clip(value, "videos") for value in _listed(row.get("videos"))]

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
            raise Unusable(f"turn {number} must be an object of role and text, got {shown(message)}")
        who, what = ("from", "value") if message.get("role") is None and "from" in message else ("role", "content")
        role = ROLES.get(speaker) if isinstance(speaker := message.get(who), str) else None
        if role is None:
            roles = "'human', 'gpt' and 'system'" if who == "from" else "system, user and assistant"
            raise Unusable(f"turn {number} has {who!r} {shown(speaker)}; only {roles} are known")
        if len(message) == 2 and what in message and role != "tool" and speaker not in CALLING:  # as most are
            self.turns.append(Turn(role, self._content(message, what, number)))
            return
        read = TURN_KEYS[who] | OF_ROLE.get(role, frozenset())
        if not read.issuperset(message):
            self._refuse_unread(message, message, read, answers=role == "assistant")
        marks = {bool(mark) for key in TRAINED if not is_nothing(mark := message.get(key))}
        if len(marks) > 1:
            raise Unusable(f"turn {number} is marked to be trained and not to be")
        more = {key: message[key] for key in RESULT if role == "tool" and not is_nothing(message.get(key))}
        calls = message.get(what) if speaker in CALLING else message.get(CALLS) if role == "assistant" else None
        if not is_nothing(parsed(calls)):
            more = {CALLS: [_call(call) for call in _in_list(calls)]}
        text = "" if speaker in CALLING else self._said(message, what, number, role)
        is_trained = role != "assistant" or False not in marks
        if speaker in CALLING and self.turns and self.turns[-1].role == "assistant":
            before = self.turns.pop()
            if before.is_trained != is_trained:
                raise Unusable(f"turn {number} calls a tool, and the answer before it is trained otherwise")
            text, more[CALLS] = before.text, [*before.fields.get(CALLS, ()), *more.get(CALLS, ())]
        more_text = _json(more) if more else ""
        self.turns.append(Turn(role, text, more=more_text, is_trained=is_trained))

    def _said(self, message: Mapping[str, object], what: str, number: int, role: Role) -> str:
        """Returns a turn's text: thoughts in front, and what is a tool's result without Hermes' tags."""
        content = message.get(what)
        if role == "tool" and isinstance(content, Mapping):
            return self._words(_json(content))
        if role == "tool" and isinstance(content, str) and (results := _RESULTS.fullmatch(content)):
            return self._words(results[1])
        if role != "assistant":
            return self._with_media(message, what, number)
        silent = is_nothing(content) and not is_nothing(parsed(message.get(CALLS)))
        return _with_thoughts("" if silent else self._with_media(message, what, number), message)

    def _with_media(self, message: Mapping[str, object], what: str, number: int) -> str:
        """Returns a turn's text with the places of its own pictures and videos."""
        if OWN_MEDIA.isdisjoint(message):
            return self._content(message, what, number)
        # What is the turn's own is taken before what stands beside the conversation; without a place it comes first.
        pictures, clips = len(self._images), len(self.clips)
        own_pictures, own_videos = (
            [value for name in names for value in _listed(message.get(name))] for names in (OWN_PICTURES, OWN_VIDEOS)
        )
        own = [len(self._beside) + index for index in range(len(own_pictures))]
        own_clips = [_read_clip(value, "videos") for value in own_videos]
        self._beside += [self._picture(value, "images") for value in own_pictures]
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
            raise Unusable(f"{what!r} of turn {number} is neither text nor parts: {shown(content)}")
        return "".join(self._part(part, message, f"{what}.", number) for part in content)

    def _refuse_unread(
        self,
        message: object,
        fields: Mapping[str, object],
        read: Collection[str],
        path: str = "",
        *,
        answers: bool = False,
    ) -> None:
        """Refuses what a message, or a part of it, holds besides what is read, bookkeeping, and what says the usual."""
        for key, value in fields.items():
            if key in read or is_nothing(value) or (key, value) == ("detail", "auto"):
                if path and isinstance(value, dict):
                    self._refuse_unread(message, value, BESIDE["images"], f"{path}{key}.")
                continue
            if key in TRAINED:
                if value in (0, 1) and (answers or not value):
                    continue
                what = "an answer is trained wholly or not, by 1 or 0" if answers else "only answers are trained"
                raise UnreadKey(message, f"{path}{key}", what)
            loss = losing(key, value, unknown=True)
            if loss is not None or path:
                raise UnreadKey(message, f"{path}{loss[0] if loss else key}", loss[1] if loss else UNREAD)

    def _part(self, part: object, message: object, path: str, number: int) -> str:
        if isinstance(part, str):
            return self._words(part)
        fields = part if isinstance(part, Mapping) else {}
        kind, text = fields.get("type"), fields.get("text")
        if kind is None:
            kind = next((key for key in ("text", "image", "image_url", "video") if not is_nothing(fields.get(key))), "")
        if not isinstance(kind, str) or kind not in PARTS:
            raise Unusable(f"turn {number} has a part that is no text, picture or video: {shown(part)}")
        self._refuse_unread(message, fields, PARTS[kind], path)
        if kind in VIDEO_PARTS:
            if all(fields.get(key) is None for key in VIDEO_PAYLOADS):
                return self._words(VIDEO_PLACEHOLDER)
            self.clips.append(_read_clip(fields, f"part of turn {number}"))
            return VIDEO_PLACEHOLDER
        picture = self._payload(fields, message, path, number)
        if kind in TEXT_PARTS:
            if not isinstance(text, str):
                raise Unusable(f"turn {number} has a part of text without text: {shown(part)}")
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
        self._images += [self._picture(value, f"part of turn {number}") for value in [*payloads.values()][:1]]
        return IMAGE_PLACEHOLDER if payloads else ""

    def _words(self, text: str) -> str:
        """Returns the text, `<image>` for pictures that it names in tags; those beside take its places in order."""
        if "<" not in text:
            return text
        for index in self._left[: text.count(IMAGE_PLACEHOLDER)]:
            self._take(index)
        count = text.count(VIDEO_PLACEHOLDER)
        self.clips += self.clips_left[:count]
        del self.clips_left[:count]
        for tag in _TAGS.finditer(text):
            if tag[1] is None:
                remedy = "write what it stands for into the text"
                raise Unusable(f"its text has {tag[0]}, which nothing here fills; {remedy}")
            self._images.append(self._picture(tag[1].strip(), "<img>"))
            self._tagged += 1
        return _TAGS.sub(IMAGE_PLACEHOLDER, text)

    def _take(self, index: object, number: int = 0) -> None:
        """Takes a picture beside the messages by its index, from 0 (as TRL's)."""
        if not isinstance(index, int) or not 0 <= index < len(self._beside):
            raise Unusable(f"a part of turn {number} has the index {shown(index)} of {len(self._beside)} pictures")
        self._images.append(self._beside[index])
        if index in self._left:
            self._left.remove(index)

    def _picture(self, value: object, key: str) -> str:
        return picture_name(value, key, self.image_bytes)


def _in_list(value: object) -> Sequence[Any]:
    """Returns what a column or a message holds as a list, or as JSON of one, or of one entry, without nulls."""
    value = _without_nulls(parsed(value))
    return [parsed(entry) for entry in value] if isinstance(value, list) else [value]


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise Unusable(f"{shown(value)} cannot be written as JSON") from None


def _with_thoughts(text: str, message: Row) -> str:
    """Returns an answer's text with what the message holds as thoughts in front."""
    thoughts = {_text(message[key], key).strip() for key in THOUGHTS if not is_nothing(message.get(key))}
    if not thoughts:
        return text
    thought, *others = thoughts
    if others or END_THINK in thought or THINK in text:
        raise Unusable(f"an answer has thoughts twice: {shown_names(THOUGHTS)}, or {THINK} in its text")
    return f"{THINK}\n{thought}\n{END_THINK}\n\n{text}"


def _call(call: object) -> dict[str, object]:
    """Returns a tool's call as transformers' templates take it, its arguments an object."""
    fields = call if isinstance(call, Mapping) else {}
    function = parsed(fields.get("function", fields))
    named = function if isinstance(function, Mapping) else {}
    arguments = named.get("arguments")
    arguments = {} if is_nothing(arguments) else parsed(arguments)
    is_whole = isinstance(named.get("name"), str) and bool(named["name"]) and isinstance(arguments, dict)
    unread = {*named, *fields} - {"id", "type", "index", "function", "name", "arguments"}
    if not is_whole or unread or fields.get("type", "function") != "function":
        raise Unusable(f"a tool's call must hold a function's 'name' and 'arguments', an object, got {shown(call)}")
    about = {"id": fields["id"]} if "id" in fields else {}
    return {"type": "function", **about, "function": {"name": named["name"], "arguments": arguments}}


def _template_arguments(row: Row, first: str) -> dict[str, object]:
    """Returns the row's tools and its chat template's arguments, where it has some.

    Tools that the system turn says already, in `<tools>` (Hermes), are left to it.
    """
    beside: dict[str, object] = {}
    if not is_nothing(parsed(row.get(TOOLS))):
        tools = [
            tool if isinstance(tool, Mapping) and "function" in tool else {"type": "function", "function": tool}
            for tool in _in_list(row[TOOLS])
        ]
        functions = [tool["function"] for tool in tools]
        names = [function.get("name") if isinstance(function, Mapping) else None for function in functions]
        if not all(isinstance(name, str) and name for name in names):
            raise Unusable(f"'tools' must be a list of functions with names, got {shown(row[TOOLS])}")
        if "<tools>" not in first or not all(str(name) in first for name in names):
            beside[TOOLS] = tools
    if not is_nothing(row.get(KWARGS)):
        beside[KWARGS] = arguments = _without_nulls(parsed(row[KWARGS]))
        if not isinstance(arguments, dict):
            raise Unusable(f"{KWARGS!r} must be an object, got {shown(arguments)}")
    return beside


def _listed(value: object) -> Sequence[object]:
    """Returns what a column of media holds, one that is no list as a list of one; NaN is a table's empty cell."""
    if value is None or value in ("", b"", []) or value != value:
        return ()
    return value if isinstance(value, list | tuple) else (value,)


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
                raise Unusable(f"{name!r} of a video must be a number of seconds, got {shown(seconds)}")
        if value.get("bytes") is not None:
            raise Unusable(f"{key!r} holds a video's bytes; write it to a file and name that")
        value = next((value[name] for name in VIDEO_PAYLOADS if value.get(name) is not None), None)
        value = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(value, str) or not value:
        raise Unusable(f"{key!r} must be a path or a list of paths, got {shown(value)}")
    if value.startswith(("http://", "https://", "data:")):
        raise Unusable(f"{key!r} is no file, {shown(value)}; fetch it and name the file", ON_THE_WEB)
    path, (start, end) = value.removeprefix("file://").replace("\\", "/"), times
    return Clip(path=path, start_seconds=start, end_seconds=end)


def _messages(row: Row, key: str) -> Sequence[object]:
    """Returns a column that must be a list of turns, or of rounds, each an object of a question and its answer."""
    messages = row.get(key)
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise Unusable(f"{key!r} must be a list of turns, got {shown(messages)}")
    if key not in ("prompt", "completion") and (reply := row.get("completion")):
        messages = [*messages, reply if isinstance(reply, Mapping) else {"role": "assistant", "content": reply}]
    first = messages[0]
    if not isinstance(first, dict) or "role" in first or "from" in first:
        return messages
    turns: list[object] = []
    for number, entry in enumerate(messages, 1):
        fields = entry if isinstance(entry, Mapping) else {}
        asking, replying = ([key for key in keys if key in fields] for keys in (ASKING, REPLYING))
        if len(asking) != 1 or len(replying) != 1:
            known = "role and content, or the user's and the assistant's words"
            raise Unusable(f"entry {number} of {key!r} must hold {known}, got {shown(entry)}")
        more = {name: value for name, value in fields.items() if name not in (*asking, *replying)}
        question, answer = _round(fields[asking[0]], fields[replying[0]])
        turns += [{**more, **question}, answer]
    return turns


def _round(question: object, answer: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _earlier_rounds(row: Row) -> list[object]:
    """Reads `history`, pairs of a question and its answer (ms-swift)."""
    history = row.get("history")
    messages: list[object] = []
    for pair in history if isinstance(history, list) else [] if is_nothing(history) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Unusable(f"'history' must hold pairs of a question and an answer, got {shown(pair)}")
        messages += _round(*pair)
    return messages


def _prompt_completion(row: Row) -> list[object]:
    """Reads `prompt` and `completion`, each text or a list of messages (TRL)."""
    messages = _earlier_rounds(row)
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        is_text = isinstance(row[key], str)
        messages += [{"role": role, "content": row[key]}] if is_text else _messages(row, key)
    return messages


def _instructions(row: Row) -> list[object]:
    """Reads `instruction`, `input`, `output` (Alpaca, LLaMA-Factory)."""
    instruction, added, output = (_text(row.get(name), name) for name in ("instruction", "input", "output"))
    if not output.strip():
        raise Unusable("'output' is empty", EMPTY_ANSWER)
    question = f"{instruction}\n{added}" if instruction and added else instruction or added
    return [*_earlier_rounds(row), Turn("user", question, len(added)), Turn("assistant", output)]


def _preferred(row: Row) -> Sequence[object]:
    """Returns the conversation that ends with the chosen, or the judged, answer, by the format that asks for it."""
    for asked, answered, messages in (
        ("messages", "completion", partial(_messages, key="messages")),
        ("conversations", "completion", partial(_messages, key="conversations")),
        ("prompt", "completion", _prompt_completion),
        ("instruction", "output", _instructions),
        ("question", "answer", _question_answer),
    ):
        if asked in row:
            conversation = messages({**row, answered: row["chosen"]} if "chosen" in row else row)
            _refuse_other_turns(conversation, row)
            return conversation
    chosen, rejected = (_messages(row, key) for key in ("chosen", "rejected"))
    if [*chosen[:-1]] != [*rejected[:-1]]:
        raise Unusable(OTHER_TURNS)
    return chosen


OTHER_TURNS = "its chosen and rejected conversations differ before their last answers"


def _refuse_other_turns(conversation: Sequence[object], row: Row) -> None:
    """Refuses rejected messages whose turns before the last are not those before the chosen answer."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not isinstance(rejected, list) or not any(isinstance(message, Mapping) for message in rejected):
        return
    earlier = [*map(_bare, rejected[:-1])]
    before = [*map(_bare, conversation[:-1])]
    if before[len(before) - len(earlier) :] != earlier or (isinstance(chosen, list) and len(chosen) > len(rejected)):
        raise Unusable(OTHER_TURNS)


def _bare(message: object) -> object:
    """Returns what a message says, whatever its keys are called."""
    if isinstance(message, Turn):
        return {"role": message.role, "content": message.text}
    if not isinstance(message, Mapping):
        return message
    names = {"from": "role", "value": "content"}
    fields = {names.get(key, key): value for key, value in _without_nulls(message).items()}
    speaker = fields.get("role")
    return {**fields, "role": ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker}


def _rejected(value: object) -> tuple[str, ...]:
    """Reads rejected answers: a text, a message, a conversation that ends with one, or a list of texts."""
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        texts = [*value]
    else:
        message = value[-1] if isinstance(value, list) and value else value
        fields = message if isinstance(message, Mapping) else {}
        if not is_nothing(fields.get(CALLS)) or fields.get("from", fields.get("role")) in CALLING:
            raise Unusable("its rejected answer calls a tool; preferences compare texts alone")
        text = fields.get("content", fields.get("value")) if fields else message
        if isinstance(text, list):  # a list of parts
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, Mapping))
        texts = [_with_thoughts(_text(text, "rejected"), fields)]
    if not all(text.strip() for text in texts):
        raise Unusable("its rejected answer is empty", EMPTY_ANSWER)
    return tuple(texts)


def _compared(example: Example, row: Row) -> Example:
    """Adds the rejected answers and the pictures that they are about; without answers the chosen one is about these."""
    stored = dict(example.image_bytes)
    names = [picture_name(value, "rejected_images", stored) for value in _listed(row.get("rejected_images"))]
    others = () if names == [*example.images] else tuple(names)
    if others and len(others) != len(example.images):
        raise Unusable(f"it has {len(example.images)} pictures and {len(others)} rejected_images")
    chosen = example.turns[-1].text
    rejected = (chosen,) if is_nothing(row.get("rejected")) and others else _rejected(row.get("rejected"))
    refuse_places(rejected, has_videos=bool(example.videos), kind="rejected answer")
    if not others and chosen.strip() in {text.strip() for text in rejected}:
        raise Unusable("its rejected answer is the chosen one")
    return replace(example, rejected=rejected, rejected_images=others, image_bytes=stored)


def _question_answer(row: Row) -> list[object]:
    """Reads question and answer from columns of their own; of several answers the most frequent, the first of equals.

    A hint stands before the question, choices behind it (`_written_choices`).
    """
    question, answer = _text(row["question"], "question"), _answer(row["answer"])
    if not is_nothing(row.get("choices")) and answer.strip():
        labels, choices = _choices(row["choices"])
        if choices:
            question, answer = _written_choices(question, choices, answer, labels)
    hint = _text(row.get("hint"), "hint").strip()
    if not _says(question, [hint]):
        question = f"{hint}\n{question}"
    return [*_earlier_rounds(row), *_round(question, answer)]


def _record(row: Row) -> Sequence[object]:
    """Returns a record of `dora-vl prepare`: its turns, or its question with the answer of the largest weight."""
    example = read_record(row)
    if example.turns or not example.choices:
        return turns_of(example)
    correct = example.extra.get("correct", example.answers[0].text if example.answers else None)
    return _round(*_written_choices(example.question, example.choices, correct))


def read_record(row: Row) -> Example:
    """Returns a row as the record that it is, its `id` included."""
    record = _without_nulls(row)
    if isinstance(record.get("videos"), Mapping):
        record["video"] = record.pop("videos")
    return from_record(record)


def _without_nulls(value: Any) -> Any:
    """Drops the nulls with which tables fill what a row lacks."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(content) for name, content in value.items() if content is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _written_choices(
    question: str, choices: Sequence[str], answer: object, labels: Sequence[str] = ()
) -> tuple[str, str]:
    """Returns a question with its choices as LLaVA writes MMBench's, a line each, and the right one's letter.

    A question that says its choices itself stays as it is: with letters, or where the answer is the text of one.

    Args:
        answer: the right choice, by its label or text; without labels but letters, by its letter or number from 0.
        labels: what the file calls the choices, where it calls them something.
    """
    if any(not choice.strip() for choice in choices) or len(choices) > len(ascii_uppercase):
        raise Unusable(f"its {len(choices)} choices must be text, at most {len(ascii_uppercase)} of them")
    lettered = _LETTERED.fullmatch(str(answer).strip())
    if lettered and lettered[2].strip() in (choice.strip() for choice in choices):
        answer = lettered[2]
    names, label = [label.casefold() for label in labels], str(answer).strip(" ().:").casefold()
    in_order = names == list(ascii_lowercase[: len(names)])  # also without names
    if label in names and not in_order:
        index = names.index(label)
    else:
        index = correct_choice(answer, choices, by_place=in_order)
    letter = "" if index is None else ascii_uppercase[index]
    lines = with_letters(choices)
    if _says(question, choices):
        if str(answer).strip() in (choice.strip() for choice in choices):
            return question, str(answer)
        if all(re.search(rf"\b{line[0]}\W", question) for line in lines):
            return question, letter
    return "\n".join([question, *lines, LETTER]), letter


def _choices(value: object) -> tuple[list[str], list[str]]:
    """Returns the choices' own labels, if any, and their texts; empty choices are none."""
    labels: object = []
    if isinstance(value, str):
        value = listed_choices(value)
    if isinstance(value, Mapping) and "text" in value:
        labels, value = value.get("label") or [], value["text"]
    elif isinstance(value, Mapping):
        texts_by_label = {name: text for name, text in value.items() if not is_nothing(text)}
        labels, value = [*texts_by_label], [*texts_by_label.values()]
    if not isinstance(value, list | tuple) or not isinstance(labels, list) or len(labels) not in (0, len(value)):
        raise Unusable(f"its choices must be a list of text, got {shown(value)}")
    texts = [_text(text, "choices") for text in value]
    lettered = [_LETTERED.fullmatch(text.strip()) for text in texts]
    letters = [match[1].casefold() for match in lettered if match]
    if not labels and len(texts) > 1 and letters == list(ascii_lowercase[: len(texts)]):
        labels, texts = letters, [match[2] for match in lettered if match]
    return [_text(label, "choices") for label in labels], texts


_LETTERED = re.compile(r"\(?([A-Za-z])[.):]\)?\s+(.*)", re.DOTALL)  # such as `A. cat`


def _says(question: str, texts: Sequence[str]) -> bool:
    """Tells whether the question holds all of these texts, as whole words; every question holds an empty text."""
    return all(not text or re.search(rf"(?<!\w){re.escape(text.strip())}(?!\w)", question) for text in texts)


def _answer(value: object, name: str = "answer") -> str:
    """Returns the most frequent of several answers, the first of equals."""
    return next(iter(_answers(value, name)), "")


def _answers(value: object, name: str = "answer") -> list[str]:
    """Returns the distinct answers, the most frequent first; each is text or an object, SQuAD's a list in an object."""
    value = _in_object(value)
    listed = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    texts = [_text(_in_object(entry), name) for entry in listed]
    return [text for text, _ in Counter(text for text in texts if text.strip()).most_common()]


def _several_answers(format_name: str, fields: Row) -> tuple[Answer, ...]:
    """Returns the right answers of a row that has several, the trained one first; of others nothing."""
    texts: list[str] = []
    if fields.get("turns") or not is_nothing(fields.get("choices")):
        return ()  # a conversation ends with one answer, and one choice is right
    if format_name == "records":
        heaviest_first = sorted(read_record({**fields, "id": "-"}).answers, key=lambda answer: -answer.weight)
        texts = [text for text in dict.fromkeys(answer.text for answer in heaviest_first) if text.strip()]
    elif role := next((role for role in ("answer", "caption") if role in fields), None):
        texts = _answers(fields[role], role)
    # A half of a surrogate pair, which no file can hold, is spelled out.
    written = [text.encode("utf-8", "backslashreplace").decode() for text in texts]
    return tuple(Answer(text=text) for text in written) if len(written) > 1 else ()


ANSWER_KEYS = ("answer", "text", "start", "answer_start", "answer_id", "answer_confidence")
"""An object of an answer may hold these keys besides bookkeeping (SQuAD, VQA)."""


def _in_object(value: object) -> object:
    """Returns what an object says as its answer or text; anything else is that itself."""
    if not isinstance(value, Mapping):
        return value
    text = next((text for key in ANSWER_KEYS[:2] if (text := value.get(key)) is not None), None)
    for key, entry in value.items() if text is not None else ():
        if key not in ANSWER_KEYS and (loss := losing(key, entry)):
            raise UnreadKey(value, *loss)
    return value if text is None else text


ANSWERED = ("answer", "choices", "output", "rejected")
"""A boolean of these is text."""


def _text(value: object, name: str) -> str:
    """Returns text, or a number as text, or what JSON writes for a boolean that answers; nothing is empty text."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool) and name in ANSWERED:
        return _json(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # NaN: a table's empty cell
        raise Unusable(f"{name!r} must hold text, got {shown(value)}")
    try:
        return str(value)
    except ValueError:  # a whole number of thousands of digits
        raise Unusable(f"{name!r} holds {shown(value)}") from None


MESSAGES: Mapping[str, Callable[[Row], Sequence[object]]] = {
    PREFERENCES: _preferred,
    JUDGED: _preferred,
    "conversations": partial(_messages, key="conversations"),
    "messages": partial(_messages, key="messages"),
    "texts": partial(_messages, key="texts"),
    "prompt/completion": _prompt_completion,
    "instructions": _instructions,
    "records": _record,
    "question/answer": _question_answer,
    "captions": lambda row: _round(row.get("question", ""), _answer(row["caption"], "caption")),
}
CONVERSATIONAL = ("conversations", "messages", "prompt/completion")
"""In these formats an answer beside messages ends them (TRL's and ms-swift's `solution`)."""


def id_of(row: Row, number: int, columns: Columns) -> str:
    """Returns the row's own id, else its place in the file."""
    stated = columns.id_of(row)
    if stated is None:
        return f"row {number + 1}"
    return stated if isinstance(stated, str) else shown(stated)


def read_row(row: Row, *, columns: Columns = USUAL) -> Example:
    """Returns one row of any format as the conversation that is trained on.

    Raises:
        BadSample: its keys fit no format, or it does not hold what its format asks for.
        ColumnsError: it holds something that its format would leave out.
    """
    return read_fields(columns.resolve(row), id_of(row, 0, columns))


def read_fields(resolved: Resolved, sample_id: str) -> Example:
    """Returns a row of known columns as the conversation that is trained on; raises as `read_row` does."""
    fields = resolved.fields
    if resolved.format is None:
        nulls = [name for name, value in fields.items() if value is None and plain_name(name) in KNOWN]
        if nulls:
            kind = NO_SAMPLE if plain_name(nulls[0]) in COLUMNS["question"] else NO_ANSWER
            raise BadSample(sample_id, f"its {shown_names(nulls)} is null", kind)
        alone = "text alone is not trained on; " if {*map(plain_name, fields)} <= {*COLUMNS["caption"]} else ""
        formats = "; ".join(" and ".join(form.needs) for form in FORMATS if form.needs)
        raise BadSample(
            sample_id,
            f"its keys {shown([*fields], 120)} fit no format ({alone}{formats}); data.columns says what a column is, "
            "such as {headline: question}, data.ask the question of all rows",
        )
    fields = {**fields, "id": sample_id}
    try:
        _refuse_python_lists(fields)
        if "answer" in fields and resolved.format.name in CONVERSATIONAL:
            fields["completion"] = _answer(fields["answer"])
        example = read_conversation(MESSAGES[resolved.format.name](fields), fields)
        last = example.turns[-1]
        if resolved.format.name in (PREFERENCES, JUDGED) and (last.more or not last.is_trained):
            raise Unusable("its last answer calls a tool or is not to be trained; preferences compare texts alone")
        if resolved.format.name == PREFERENCES:
            return _compared(example, fields)
        if resolved.format.name == JUDGED:
            return replace(example, is_good=_judgement(resolved))
        answers = _several_answers(resolved.format.name, fields)
        return replace(example, answers=answers) if answers else example
    except Unusable as error:
        raise BadSample(sample_id, str(error), error.kind) from None
    except UnreadKey as unread:
        held = {role: value if isinstance(value, list) else [value] for role, value in fields.items()}
        by_role = (role for role, entries in held.items() if any(entry is unread.message for entry in entries))
        role = next(by_role, resolved.format.needs[0])
        column = next((name for name, used_as in resolved.uses.items() if used_as == role), role)
        path = f"{column}.{unread.path}"
        raise ColumnsError(f"{path!r} would be left out ({unread.what});", Columns(ignored=(path,))) from None
    except RecursionError:
        raise BadSample(sample_id, "its values are nested too deeply") from None


def _refuse_python_lists(fields: Row) -> None:
    for role in REPLIES:
        text = fields.get(role)
        if isinstance(text, Cell) and lists_replies(written_in_python(text), role, in_cell=True):
            raise Unusable(f"{role!r} is a list as Python writes it, {shown(text)}; write it as JSON")


def _judgement(resolved: Resolved) -> bool:
    value = resolved.fields["judged"]
    is_good = flag_of(value)
    if is_good is None:
        column = next(column for column, role in resolved.uses.items() if role == "judged")
        raise Unusable(f"{shown(column)} says whether the answer is good: write true or false, got {shown(value)}")
    return is_good


class RowReader:
    """Reads the rows of one file or folder as conversations, and remembers what it has met.

    Attributes:
        format: of its rows, once one of a known format has been read.
        uses: the role of each column, "" where it is left out, of each kind of row, in order.
    """

    def __init__(self, name: str, columns: Columns = USUAL) -> None:
        self.format: str | None = None
        self.uses: list[Mapping[str, str]] = []
        self._name = name
        self._columns = columns
        self._first = ""

    def read(self, record: Row, number: int) -> Example | BadSample:
        """Returns the row `number`, from 0, of what the container gives; or why it cannot be a sample."""
        sample_id = id_of(record, number, self._columns)
        row = f"row {number + 1}"
        row += "" if sample_id == row else f" ({sample_id})"
        try:
            resolved = self._columns.resolve(record)
        except ColumnsError as error:
            raise UserError(f"{self._name}, {row}: {error}") from None
        if resolved.uses not in self.uses:
            self.uses.append(resolved.uses)
        if resolved.format is not None:
            name = resolved.format.name
            if self.format is None:
                self.format, self._first = name, row
            if name != self.format:
                firsts = f"{self.format}: {self._first}; {name}: {row}"
                raise UserError(f"{self._name}: rows of mixed formats, first of each {firsts}; write one file a format")
        try:
            return read_fields(resolved, sample_id)
        except (ColumnsError, CountedFromOne) as error:
            raise UserError(f"{self._name}, {row}: {error}") from None
        except BadSample as error:  # anew, since a traceback keeps all that was read alive
            # Halves of surrogate pairs, which no file can hold, are spelled out.
            name, reason = (
                text.encode("utf-8", "backslashreplace").decode() for text in (error.sample_id, error.reason)
            )
            return BadSample(name, reason, error.kind)


def check_usable(name: str, rows: int, usable: int, first_problem: str | None) -> None:
    """Refuses a file of whose `rows`, as far as they were read, none can be a sample."""
    if not rows:
        raise UserError(f"{name}: holds no records")
    if not usable:
        raise UserError(f"{name}: none of its {rows} records is a sample; the first one: {first_problem}")
