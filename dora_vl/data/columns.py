"""Training files, and what each column of a row is: one table of roles with people's names, and one resolver.

Of each role the first column that holds something is used. Every other column is left out, which is said before the
first step, and refused where it looks like a part of the sample: nothing that means something is dropped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

from dora_vl.data.example import FIELDS
from dora_vl.data.pictures import PICTURE_ENDINGS, VIDEO_ENDINGS
from dora_vl.errors import UserError, shown, shown_text

Row = Mapping[str, object]
Mixing = Literal["proportional", "balanced"]
RowKind = Literal["trees", "packed", "plain"]
"""How samples stand in a batch's rows; see `data.rows`."""

ROLES: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "question_id", "qid", "__key__"),
    "images": (
        *("images", "image", "image_path", "img", "picture", "file_name", "filename", "img_path", "image_file"),
        *("image_url", "photo", *PICTURE_ENDINGS),
    ),
    "videos": ("videos", "video"),
    "system": ("system", "system_prompt"),
    "question": ("question", "query", "prompt"),
    "answer": ("answer", "answers", "response", "label", "output"),
    "choices": ("choices", "options"),
    "hint": ("hint", "context", "input"),
    "caption": ("caption", "captions", "text", "txt"),
    "conversations": ("conversations",),
    "messages": ("messages",),
    "texts": ("texts",),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output",),
    "scored": ("answer",),
    "history": ("history",),
    "turns": ("turns",),
    "answers": ("answers",),
    "subtitles": ("subtitles",),
    "extra": ("extra",),
}
"""What a column can be, and the names under which it is known, the first of them before the others."""
_KNOWN = frozenset(name for names in ROLES.values() for name in names)
_JOINED: Mapping[str, tuple[re.Pattern[str], ...]] = {
    "images": (re.compile(r"(?:image|img|picture|photo)[ _]?(\d{1,4})"), re.compile(r"(left|right)_(?:image|img)")),
    "choices": (re.compile(r"(?:choice|option)[ _]?([a-h]|\d{1,2})"), re.compile(r"([a-h])")),
}
"""Roles that several columns may have together, and how those are called; the group tells their order."""


@dataclass(frozen=True)
class RowFormat:
    """One form that a row can have.

    Attributes:
        needs: roles, each in a column that is not null.
        uses: further roles that it reads, besides `EVERYWHERE`.
        fits: what else makes a row one of this form.
    """

    name: str
    needs: tuple[str, ...]
    uses: tuple[str, ...] = ()
    fits: Callable[[Row], bool] = lambda row: True


EVERYWHERE = ("id", "images", "videos", "system")


def _is_record(row: Row) -> bool:
    if not {name for name, value in row.items() if value is not None} <= FIELDS:
        return False
    answers = row.get("answers")
    first = answers[0] if isinstance(answers, Sequence) and not isinstance(answers, str) and answers else None
    return row.get("turns") is not None or (isinstance(first, Mapping) and "text" in first)


FORMATS: tuple[RowFormat, ...] = (
    RowFormat("conversations", ("conversations",)),
    RowFormat("messages", ("messages",)),
    RowFormat("texts", ("texts",)),
    RowFormat("prompt/completion", ("prompt", "completion"), ("history",)),
    RowFormat("instructions", ("instruction", "output"), ("input", "history", "scored")),
    RowFormat("records", (), ("question", "turns", "answers", "choices", "subtitles", "extra"), _is_record),
    RowFormat("question/answer", ("question", "answer"), ("choices", "hint", "history")),
    RowFormat("captions", ("caption", "images")),
    RowFormat("captions", ("caption", "videos")),
)
"""Asked from the top: the first that fits is the row's."""
ASKED_OF = ("question/answer", "captions")
"""Formats whose rows may have no question, so that `data.ask` is theirs."""


class ColumnsError(UserError):
    """Columns that mean something would be left out; ends a run, whatever share of bad samples it accepts."""


@dataclass(frozen=True)
class Resolved:
    """A row by its roles: `fields` is what each holds, `uses` the role of each column, "" where it is left out."""

    format: RowFormat | None
    fields: Row
    uses: Mapping[str, str] = field(default_factory=dict)


Candidate = Mapping[str, str]
"""Columns that hold a role together, each with its label among them, "" where it has none."""


@dataclass(frozen=True)
class _Shape:
    """What the names of a row's columns decide: the columns that are kept, and of each role those that may hold it."""

    format: RowFormat
    names: Sequence[str]
    candidates: Sequence[tuple[str, Sequence[Candidate]]]


@dataclass(frozen=True)
class Columns:
    """The contract of a file's columns.

    Args:
        roles: what `data.columns` says: a known name, such as `image` or `question`, for a column of another name.
        ignored: what `data.ignore` names.
        ask: what `data.ask` says, the question of rows that have none.
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    ask: str = ""
    _shapes: dict[tuple[str, ...], list[_Shape]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for column, role in self.roles.items():
            if role not in ROLES and role not in _KNOWN:
                raise UserError(f"data.columns: {shown(column)} cannot be {shown(role)}; there are {', '.join(ROLES)}")

    def resolve(self, row: Row, *, strict: bool = True) -> Resolved:
        """The row's format, and what it holds of each role.

        Raises:
            ColumnsError: a column would be left out that looks like a part of the sample, if that is `strict`.
        """
        # A null output is an answer that is missing, not another format.
        names = tuple(name for name, value in row.items() if value is not None or name == "output")
        if names not in self._shapes:
            self._shapes[names] = list(self._shapes_of(names))
        shape = next((shape for shape in self._shapes[names] if shape.format.fits(row)), None)
        if shape is None:
            return Resolved(None, row)
        fields: dict[str, object] = {}
        roles: dict[str, str] = {}
        for role, alternatives in shape.candidates:
            columns = alternatives[0]
            if len(alternatives) > 1:
                filled = (names for names in alternatives if any(not is_nothing(row[name]) for name in names))
                columns = next(filled, columns)
            fields[role] = _held(row, columns)
            roles |= dict.fromkeys(columns, role)
        if self.ask and shape.format.name in ASKED_OF and is_nothing(fields.get("question")):
            fields["question"] = self.ask
        uses = {name: roles.get(name, "") for name in shape.names}
        if strict and (left := [name for name, role in uses.items() if not role]):
            has_media = not (is_nothing(fields.get("images")) and is_nothing(fields.get("videos")))
            _refuse_left_out(row, left, shape.format, has_media)
        return Resolved(shape.format, fields, uses)

    def id_of(self, row: Row) -> object:
        """What the row itself says as its id; None where it says nothing."""
        return next((row[name] for name in self._ids if row.get(name) is not None), None)

    @cached_property
    def _ids(self) -> tuple[str, ...]:
        return (*(column for column, name in self.roles.items() if name in ROLES["id"]), *ROLES["id"])

    def _shapes_of(self, names: Sequence[str]) -> Iterator[_Shape]:
        used_names = [name for name in names if name not in self.ignored]
        candidates = {role: self._alternatives(role, used_names) for role in ROLES}
        for form in FORMATS:
            if all(candidates[role] or (self.ask and role == "question") for role in form.needs):
                roles = dict.fromkeys((*EVERYWHERE, *form.needs, *form.uses))
                yield _Shape(form, used_names, [(role, candidates[role]) for role in roles if candidates[role]])

    def _alternatives(self, role: str, names: Sequence[str]) -> list[Candidate]:
        """The columns that may hold a role, those together that are taken as one."""
        named = [column for column, name in self.roles.items() if column in names and name in (role, *ROLES[role])]
        joined = role in _JOINED and bool(named)
        alternatives: list[Candidate] = [dict.fromkeys(named, "")] if joined else [{name: ""} for name in named]
        free = {name: plain_name(name) for name in names if name not in self.roles}
        alternatives += [
            {name: ""} for usual_name in ROLES[role] for name, plain in free.items() if plain == usual_name
        ]
        for pattern in _JOINED.get(role, ()):
            matches = {name: match[1] for name, plain in free.items() if (match := pattern.fullmatch(plain))}
            together = sorted(matches, key=lambda name: (len(matches[name]), matches[name]))
            if len(together) > 1 or (together and role == "images"):
                alternatives.append({name: matches[name] if role == "choices" else "" for name in together})
        return alternatives


def _refuse_left_out(row: Row, left: Sequence[str], form: RowFormat, has_media: bool) -> None:
    looks = {
        name: what
        for name in left
        if not is_nothing(row[name]) and (what := _looks_like(name, row[name], has_media)) is not None
    }
    if looks:
        name, what = next(iter(looks.items()))
        listed = ", ".join(f"{shown(name, 30)} ({what})" for name, what in [*looks.items()][:4])
        raise ColumnsError(
            f"{form.name} would leave out {listed}; say in data.columns what it is (such as "
            f"{{{shown_text(name, 24)}: {_EXAMPLES.get(what, 'question')}}}){_NEXT.get(what, '')}, or name it in "
            "data.ignore"
        )


def plain_name(name: str) -> str:
    """A column's name as the table of roles has it: no case, no spaces around it."""
    if name in _KNOWN:
        return name
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _held(row: Row, columns: Candidate) -> object:
    """What a column holds; what several do as one list, or by their labels, empty ones left out."""
    (first, label), *others = columns.items()
    if label:
        return {label: row[name] for name, label in columns.items()}
    if not others:
        return row[first]
    values: list[object] = []
    for name in columns:
        value = row[name]
        values += value if isinstance(value, list) else [value]
    return [value for value in values if not is_nothing(value)]


def is_nothing(value: object) -> bool:
    """Whether a column is empty: null, blank text, an empty list or object, or the NaN that pandas writes for them."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list):
        return all(map(is_nothing, value))
    return value in ({}, b"") or value != value


MEDIUM, CHOICES, LABEL, RATING, ASKED, UNREAD = (
    *("a picture or video", "choices", "a label", "a rating"),
    *("what goes with a question", "nothing that can be trained on here"),
)
_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("image", "img", "picture", "photo", "pic", "video", "frame", "screenshot"), MEDIUM),
    **dict.fromkeys(("choice", "option", "distractor"), CHOICES),
    **dict.fromkeys(("label", "class", "gold", "correct", "gt", "target"), LABEL),
    **dict.fromkeys(("rating", "score", "reward", "rank", "chosen", "rejected", "preference", "vote"), RATING),
    **dict.fromkeys(("hint", "context", "passage", "history", "system"), ASKED),
    **dict.fromkeys(("audio", "bbox", "boxes", "bboxes", "objects", "tool", "function", "reasoning"), UNREAD),
}
"""What a column may be by the first or last word of its name."""
_NOTES = frozenset(
    ("id", "index", "idx", "count", "width", "height", "size", "hash", "license", "source", "type", "format", "caption")
)
"""Last words of what is noted of pictures that stand in another column."""
_EXAMPLES = {MEDIUM: "image", CHOICES: "choices", LABEL: "answer", RATING: "answer", ASKED: "hint"}
_NEXT = {LABEL: ", and the caption that it judges the question", RATING: ", keep only the rows that are good"}
_NAME_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_MEDIA_FILE = tuple(f".{ending}" for ending in (*PICTURE_ENDINGS, *VIDEO_ENDINGS))


def _looks_like(name: str, value: object, has_media: bool) -> str | None:
    """What a column that is left out looks like, by its value or its name; None for notes."""
    what = MEDIUM if _holds_media(value) else _named_like(name)
    if what == MEDIUM and has_media and not _holds_media(value):
        about = _NAME_WORDS.findall(name)[-1].lower() in _NOTES or isinstance(value, int | float)
        return None if about else what
    return what


@lru_cache(maxsize=1 << 12)
def _named_like(name: str) -> str | None:
    """What a column looks like by its name alone."""
    words = [word.lower() for word in _NAME_WORDS.findall(name)]
    kinds = [_WORDS.get(word) or _WORDS.get(word.removesuffix("s")) for word in words]
    if MEDIUM in kinds:
        return MEDIUM
    if any(pattern.fullmatch(plain_name(name)) for pattern in _JOINED["choices"]):
        return CHOICES
    return next(filter(None, (*kinds[:1], *kinds[-1:])), None)


def _holds_media(value: object) -> bool:
    """Whether a value is bytes, an object of `bytes` and `path`, the path of a picture or video, or a list of them."""
    if isinstance(value, str):
        return value.endswith(_MEDIA_FILE) or value.lower().endswith(_MEDIA_FILE)
    if isinstance(value, list):  # columns of a table hold one kind
        value = next((entry for entry in value if entry is not None), None)
        return not isinstance(value, list) and _holds_media(value)
    if isinstance(value, dict):
        return bool(value.get("bytes")) or (value.keys() == {"bytes", "path"} and bool(value["path"]))
    return isinstance(value, bytes | bytearray) and bool(value)


def roles_of_columns(uses: Iterable[Mapping[str, str]]) -> dict[str, set[str]]:
    """What each column is used as in some of these rows; nothing where all leave it out."""
    roles: dict[str, set[str]] = {}
    for row in uses:
        for name, role in row.items():
            roles.setdefault(name, set()).update({role} - {""})
    return roles


def column_lines(uses: Iterable[Mapping[str, str]]) -> list[str]:
    """A line for each column: what it is used as, or that it is left out."""
    return [
        f"  {shown_text(name, 40)}: " + (f"used as {' and '.join(sorted(roles))}" if roles else "left out")
        for name, roles in roles_of_columns(uses).items()
    ]


USUAL = Columns()
"""Without settings."""


@dataclass(frozen=True, kw_only=True)
class TrainFile:
    """One of several training files."""

    path: str
    """A file, a folder of shards, or hub:OWNER/NAME."""
    weight: float = 1.0
    """How often an epoch sees each of its samples; 0.5: half of them, chosen by the seed; 2: each twice."""


def train_files(train: str | Sequence[str | TrainFile]) -> tuple[TrainFile, ...]:
    """What `data.train` names, one path or several files, as a list."""
    files = (train,) if isinstance(train, str) else train
    return tuple(TrainFile(path=file) if isinstance(file, str) else file for file in files)


def train_name(train: str | Sequence[str | TrainFile]) -> str:
    """The files' names, for messages."""
    return ", ".join(file.path for file in train_files(train))
