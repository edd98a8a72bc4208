"""Column names: those of each role, those of bookkeeping, and what any other column may hold, judged by its value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from dora_vl.data.pictures import PICTURE_ENDINGS, VIDEO_ENDINGS
from dora_vl.data.text_file import json_of
from dora_vl.errors import UserError

Row = Mapping[str, object]
"""A row of a file: its cells by their columns."""

ROLES: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "question_id", "qid", "__key__"),
    "images": (
        *("images", "image", "image_path", "img", "picture", "file_name", "filename", "img_path", "image_file"),
        *("image_url", "photo", *PICTURE_ENDINGS),
    ),
    "videos": ("videos", "video"),
    "start_seconds": ("start_seconds", "video_start"),
    "end_seconds": ("end_seconds", "video_end"),
    "system": ("system", "system_prompt"),
    "question": ("question", "query", "prompt"),
    "answer": ("answer", "answers", "response", "label", "output", "solution", "multiple_choice_answer"),
    "most_frequent": ("multiple_choice_answer",),
    "choices": ("choices", "options"),
    "hint": ("hint", "context", "input"),
    "caption": ("caption", "captions", "text", "txt", "description"),
    "conversations": ("conversations", "conversation"),
    "messages": ("messages",),
    "texts": ("texts",),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "scored": ("answer",),
    "history": ("history",),
    "chosen": ("chosen", "chosen_response"),
    "rejected_images": ("rejected_images",),
    "rejected": ("rejected", "rejected_response", "rejected_messages"),
    "judged": ("kto_tag", "label", "desirable"),
    "tools": ("tools",),
    "objects": ("objects",),
    "bbox_type": ("bbox_type",),
    "chat_template_kwargs": ("chat_template_kwargs",),
    "turns": ("turns",),
    "answers": ("answers",),
    "subtitles": ("subtitles",),
    "extra": ("extra",),
}
"""A column has a role by one of these names; earlier names count before later ones."""
KNOWN = frozenset(name for names in ROLES.values() for name in names)
JOINED: Mapping[str, tuple[re.Pattern[str], ...]] = {
    "images": (re.compile(r"(?:image|img|picture|photo)[ _]?(\d{1,4})"), re.compile(r"(left|right)_(?:image|img)")),
    "choices": (re.compile(r"(?:choice|option)[ _]?([a-h]|\d{1,2})"), re.compile(r"([a-h])")),
}
"""Several columns may have these roles together if their names match; the group gives their order."""

MEDIUM, CHOICES, LABEL, RATING, ASKED, UNREAD = (
    *("a picture or video", "choices", "a label", "a rating"),
    *("what goes with a question", "nothing that can be trained on here"),
)
TEXT, FLAG, NESTED, NOTED = "a second text", "a flag", "a list or object", "a note"
PREFERENCE = "an answer of a preference"
_WORDS: Mapping[str, str] = {
    word: kind
    for kind, words in {
        MEDIUM: "image img picture photo pic video frame screenshot media visual pixel thumbnail thumb figure scan",
        CHOICES: "choice option distractor",
        LABEL: "label class gold correct gt target hateful sentiment emotion verdict truth valid foil toxic toxicity "
        "stance entailment",
        PREFERENCE: "chosen rejected preference",
        RATING: "rating score reward rank vote weight quality upvote downvote helpfulness star margin",
        ASKED: "hint context passage history system ocr lecture",
        UNREAD: "audio bbox boxes bboxes objects tool function reasoning thinking thought kwargs "
        "rotation rotate orientation crop flip mirror mask",
        TEXT: "question query prompt instruction answer response completion reply solution caption text description "
        "rationale explanation",
        NOTED: "id uid uuid guid key index idx indices no nr number count total length len size width height area "
        "ratio hash md sha checksum digest license licence copyright attribution source origin provenance "
        "dataset data corpus subset collection split fold partition shard row line page chapter date time "
        "timestamp datetime year month day created updated at on author creator owner annotator worker "
        "contributor uploader publisher photographer reviewer editor operator organization institution model "
        "generator teacher engine version revision commit release language lang locale country url uri link "
        "website site domain host type kind category categories subcategory topic subtopic subject field "
        "subfield genre task skill level grade difficulty tag keyword format encoding mime extension token word "
        "char character turn round group unit duration second camera device temperature seed cost latency batch epoch "
        "step iteration session project name username nickname view like metadata meta info",
    }.items()
    for word in words.split()
}
"""The first or last word of a name tells what a column may be; only the last makes it a note."""
_NAME_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_MEDIA_FILE = tuple(f".{ending}" for ending in (*PICTURE_ENDINGS, *VIDEO_ENDINGS))
_LONGEST_ENDING = max(map(len, _MEDIA_FILE))


def plain_name(name: str) -> str:
    """Returns a column's name as the table of roles spells it: in lower case, without spaces around it."""
    return name if name in KNOWN else re.sub(r"[\s-]+", "_", name.strip().lower())


def is_empty(value: object) -> bool:
    """Tells whether a column is empty: null, blank text, a list or object of nothing else, or pandas' NaN."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list | dict):
        entries = [value]
        for entry in entries:  # it grows, since values may be nested deeper than functions
            if isinstance(entry, list | dict):
                entries += entry.values() if isinstance(entry, dict) else entry
            elif not is_empty(entry):
                return False
        return True
    return value == b"" or value != value


def without_nulls(value: Any) -> Any:
    """Drops the nulls with which Arrow fills what an object lacks, where others of its column have it."""
    if isinstance(value, Mapping) and value.keys() != {"bytes", "path"}:
        return {name: without_nulls(content) for name, content in value.items() if content is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


class Cell(str):
    """Text from a table's cell, the only text in which a list may be written; other files hold lists as such."""

    __slots__ = ()


def parsed(value: object) -> object:
    """Parses a text that is a JSON list or object; returns anything else unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(UserError):
            return json_of(value, "a cell")
    return value


_FLAGS = {"true": True, "false": False, "1": 1, "0": 0, "1.0": 1, "0.0": 0}
_FLAG_WORDS = ("is", "has", "was", "should", "can")


def flag_of(value: object, *, numbers: bool = True) -> bool | None:
    """Returns a boolean, which may be written as text or, with `numbers`, as 1 or 0; None for anything else."""
    if isinstance(value, str):
        value = _FLAGS.get(value.strip().lower())
    is_flag = isinstance(value, bool) or (numbers and isinstance(value, int | float) and value in (0, 1))
    return bool(value) if is_flag else None


def holds_media(value: object) -> bool:
    """Tells whether a value is bytes, an object of `bytes` and `path`, a path of media, or a list of them."""
    if isinstance(value, str):
        value = value.partition("?")[0] if value.startswith("http") else value
        ending = value[-_LONGEST_ENDING:]
        return "." in ending and ending.lower().endswith(_MEDIA_FILE)
    if isinstance(value, list):  # columns of a table hold one kind
        value = next((entry for entry in value if entry is not None), None)
        return not isinstance(value, list) and holds_media(value)
    if isinstance(value, dict):
        return bool(value.get("bytes")) or (value.keys() == {"bytes", "path"} and bool(value["path"]))
    return isinstance(value, bytes | bytearray) and bool(value)


def lost_content(path: str, value: object, *, unknown: bool = False, has_media: bool = False) -> tuple[str, str] | None:
    """Returns what may change what is learned, with its path, in a value that would be left out; None for bookkeeping.

    Args:
        unknown: True takes any name that is not one of bookkeeping.
        has_media: True where the sample has pictures or videos, of which this may be a note.
    """
    try:
        return _loss(path, value, unknown, has_media)
    except RecursionError:
        return path, NESTED


def _loss(path: str, value: object, unknown: bool, has_media: bool) -> tuple[str, str] | None:
    value = parsed(value)
    if is_empty(value):
        return None
    name = path.rpartition(".")[2]
    # A single letter names a choice only as a column.
    kind = "" if len(name) == 1 and name != path else kind_of_column(name)
    if holds_media(value):
        is_name = has_media and isinstance(value, str) and kind != MEDIUM and name.lower().endswith("name")
        return None if is_name else (path, MEDIUM)
    if kind == MEDIUM and has_media:  # named after pictures in another column
        kind = _kind_of_word(_NAME_WORDS.findall(name)[-1]) or MEDIUM
        kind = NOTED if kind == MEDIUM and isinstance(value, int | float) else kind
    if isinstance(value, dict) and kind in ("", NOTED, MEDIUM):
        inner = (_loss(f"{path}.{key}", entry, unknown, has_media) for key, entry in value.items())
        losses = [loss for loss in inner if loss]
        several = next((loss for loss in losses if loss[1] == MEDIUM), (path, NESTED))
        return several if len(losses) > 1 else next(iter(losses), (path, MEDIUM) if kind == MEDIUM else None)
    if isinstance(value, list) and kind == NOTED:  # a list of words may hold the answers
        if any(isinstance(text, str) and _by_value(text, False) == TEXT for text in value):
            return path, NESTED
        return next(filter(None, (_loss(path, entry, unknown, has_media) for entry in value)), None)
    if kind == NOTED:
        kind = _kind_of_note(name, value) if isinstance(value, str) else ""
    elif not kind or isinstance(value, bool) or (kind in (MEDIUM, ASKED) and isinstance(value, list)):
        kind = _by_value(value, unknown)
    return (path, kind) if kind else None


_DIRECTING = frozenset(("task", "type", "kind", "format", "genre", "mode", "style", "skill"))
"""A note of these names may say what is to be done, which a sentence does and a name of one does not."""


def _kind_of_note(name: str, text: str) -> str:
    """Returns what a text in a bookkeeping column may be of a question or an answer; "" for a mere note.

    A unit without a number, such as kg, belongs to an answer; `scene 3` names a group.
    """
    words = name.lower().split("_")
    if words[-1] in ("unit", "units"):
        return "" if any(map(str.isdigit, text)) else TEXT
    if not _DIRECTING.isdisjoint((words[0], words[-1])) and (text.endswith((".", "!", ":")) or text.count(" ") > 2):
        return ASKED
    return TEXT if len(text) > 300 or text.endswith("?") else ""


OF_VIDEO = "a part of the video"
_BEGIN, _END = frozenset(("start", "begin", "onset", "from")), frozenset(("end", "finish", "stop", "to"))
_OF_TIME = frozenset(("s", "sec", "secs", "second", "seconds", "time", "t", "video", "clip", "segment"))
_PARTS = frozenset(
    ("times", "timestamp", "timestamps", "ts", "offset", "span", "interval", "moment", "frame", "frames")
)


def moment_of(name: str) -> str | None:
    """Returns which part of a video a column may say: `start_seconds`, `end_seconds`, "" for another; None for none."""
    words = {word.lower() for word in _NAME_WORDS.findall(name)}
    rest = words - _OF_TIME
    if len(rest) == 1 and rest <= _BEGIN | _END:
        return "start_seconds" if rest <= _BEGIN else "end_seconds"
    return "" if words and words <= _PARTS | _BEGIN | _END | _OF_TIME else None


def _by_value(value: object, unknown: bool) -> str:
    """Returns what a value is if its name says nothing; "" for bookkeeping."""
    if isinstance(value, list | dict):
        return NESTED
    if flag_of(value, numbers=False) is not None:
        return FLAG
    if isinstance(value, str):
        is_code = value.isascii() and not any(map(str.isspace, value)) and any(map(str.isdigit, value))
        is_noted = "://" in value or (not unknown and (is_code or not re.search(r"[^\W\d_]", value)))
        return "" if is_noted else TEXT
    return {int: LABEL, float: RATING}.get(type(value), "") if unknown else ""


def _kind_of_word(word: str) -> str:
    return _WORDS.get(word.lower()) or _WORDS.get(word.lower().removesuffix("s"), "")


_NOTE_PARTICIPLES = (
    *("annotated", "checked", "collected", "curated", "edited", "labeled", "labelled", "photographed", "provided"),
    *("recorded", "reviewed", "submitted", "uploaded", "verified", "written"),
)
"""`reviewed_by` is a note, and `paid_by` may be an answer."""


@lru_cache(maxsize=1 << 12)
def kind_of_column(name: str) -> str:
    """Returns what a column is, judged only by its name; "" if the name says nothing."""
    words = [word.lower() for word in _NAME_WORDS.findall(name)] or [""]
    kinds = [*map(_kind_of_word, words)]
    if MEDIUM in kinds:
        return MEDIUM
    if any(pattern.fullmatch(plain_name(name)) for pattern in JOINED["choices"]):
        return CHOICES
    if not name.strip() or words[0] == "unnamed":  # pandas' column of row numbers
        return NOTED
    is_right_choice = words[0] == "answer" and words[-1] in ("id", "key", "index", "idx", "number", "no")
    if is_right_choice or plain_name(name) == "kto_tag":
        return LABEL
    kind = next((kind for kind in (kinds[0], kinds[-1]) if kind not in ("", NOTED)), "")
    is_flag = len(words) > 1 and words[0] in _FLAG_WORDS
    is_noted = kinds[-1] == NOTED and kind in ("", TEXT) and not is_flag
    counts = ("n", "num", "nb", "number", "total", "created", "updated", "modified", "date", "time")
    is_noted |= words[-1:] == ["by"] and words[0] in _NOTE_PARTICIPLES
    if is_noted or words[0] in counts or plain_name(name) in (*ROLES["id"], "parallel_tool_calls"):
        return NOTED
    return kind or (FLAG if is_flag else TEXT if plain_name(name) in KNOWN and name != "extra" else "")


LIKELY_NAMES: Mapping[str, tuple[str, ...]] = {
    role: tuple(names.split())
    for role, names in {
        "question": "q frage pregunta pergunta domanda user human problem sentence prefix",
        "answer": "a antwort respuesta resposta reponse risposta assistant gpt target reply suffix choice",
        "image": "bild foto imagen immagine url file src path pixels media",
        "caption": "alt alt_text title",
        "chosen": "preferred_output preferred_response accepted_response",
        "rejected": "non_preferred_output non_preferred_response dispreferred_response",
    }.items()
}
"""These names may mean a role: they are proposed, not taken for it."""
_ROLE_OF_LIKELY_NAME = {name: name for name in sorted(KNOWN - {"solution"})} | {
    name: role for role, names in LIKELY_NAMES.items() for name in names
}


@lru_cache(maxsize=1 << 12)
def nearest_role(name: str) -> str | None:
    """Returns what a column of an unknown name was probably meant to be."""
    name = plain_name(name)
    close = get_close_matches(name, _ROLE_OF_LIKELY_NAME, n=1, cutoff=0.8)
    is_meant = kind_of_column(name) != NOTED or name in _ROLE_OF_LIKELY_NAME
    return _ROLE_OF_LIKELY_NAME[close[0]] if close and is_meant else None
