"""Training files, and what each column of a row is: one table of roles with people's names, and one resolver.

Of each role the first column that holds something is used. Every other column is left out, which is said before the
first step. It ends the run where it could change what is learned: its name or its value decides, at every depth, and
the error says the setting that settles it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property, lru_cache
from itertools import filterfalse
from typing import Literal

from dora_vl.data.example import FIELDS
from dora_vl.data.pictures import PICTURE_ENDINGS, VIDEO_ENDINGS
from dora_vl.data.text_file import json_of
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
    "conversations": ("conversations", "conversation"),
    "messages": ("messages",),
    "texts": ("texts",),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response", "answer"),
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
    RowFormat("conversations", ("conversations",), ("completion",)),
    RowFormat("messages", ("messages",), ("completion",)),
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
    """What could change what is learned would be left out; ends a run, whatever share of bad samples it accepts.

    Attributes:
        remedy: the settings that settle it, beside those that the run has; the message says them.
    """

    def __init__(self, problem: str, remedy: Columns, otherwise: str = "") -> None:
        super().__init__(f"{problem}; {remedy.as_settings()}{otherwise}")
        self.remedy = remedy


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

    A dotted name leads into a column: `meta.image` is the key `image` of the object in `meta`, or of those in its list.

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
                near = get_close_matches(role, _KNOWN, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UserError(
                    f"data.columns: {shown(column)} cannot be {shown(role)}{hint}; there are {', '.join(ROLES)}"
                )

    def resolve(self, row: Row, *, strict: bool = True) -> Resolved:
        """The row's format, and what it holds of each role.

        Raises:
            ColumnsError: if that is `strict`, a column would be left out that could change what is learned, or the row
                lacks what a column of nearly that name may be.
        """
        for path in self._paths:
            row = _lifted(row, path, keep=path in self.roles)
        # A null output is an answer that is missing, not another format.
        names = tuple(name for name, value in row.items() if value is not None or name == "output")
        if names not in self._shapes:
            self._shapes[names] = list(self._shapes_of(names))
        shape = next((shape for shape in self._shapes[names] if shape.format.fits(row)), None)
        if shape is None:
            if strict:
                self._refuse_nearly_named(row)
            return Resolved(None, row)
        fields: dict[str, object] = {}
        roles: dict[str, str] = {}
        for role, alternatives in shape.candidates:
            columns = alternatives[0]
            if len(alternatives) > 1:
                filled = (names for names in alternatives if any(not is_nothing(row[name]) for name in names))
                columns = next(filled, columns)
            value = _held(row, columns)
            fields[role] = _listed(value, role) if isinstance(value, str) and role in _LISTED else value
            roles |= dict.fromkeys(columns, role)
        if self.ask and shape.format.name in ASKED_OF and is_nothing(fields.get("question")):
            fields["question"] = self.ask
        uses = {name: roles.get(name, "") for name in shape.names}
        resolved = Resolved(shape.format, fields, uses)
        if strict and (left := [name for name, role in uses.items() if not role]):
            _refuse_left_out(row, left if not self.roles else [*filterfalse(self._is_settled, left)], resolved)
        return resolved

    def id_of(self, row: Row) -> object:
        """What the row itself says as its id; None where it says nothing."""
        return next((row[name] for name in self._ids if row.get(name) is not None), None)

    @cached_property
    def _ids(self) -> tuple[str, ...]:
        return (*(column for column, name in self.roles.items() if name in ROLES["id"]), *ROLES["id"])

    def as_settings(self) -> str:
        """What a run's YAML says for it."""
        columns = ", ".join(f"{shown_text(name, 40)}: {role}" for name, role in self.roles.items())
        ignored = ", ".join(shown_text(name, 40) for name in self.ignored)
        keys = {f"columns: {{{columns}}}": columns, f"ignore: [{ignored}]": ignored, f"ask: {self.ask}": self.ask}
        return " and ".join(f"data.{text}" for text, value in keys.items() if value)

    @cached_property
    def _paths(self) -> tuple[str, ...]:
        return tuple(name for name in (*self.roles, *self.ignored) if "." in name)

    def _is_settled(self, name: str) -> bool:
        """Whether `data.columns` says of another column that it is what this one may be."""
        roles = {role for role, names in ROLES.items() if not {role, *names}.isdisjoint(self.roles.values())}
        is_preferred = _kind(name) == RATING and any(_kind(column) == RATING for column in self.roles)
        return is_preferred or any(plain_name(name) in ROLES[role] for role in roles)

    def _refuse_nearly_named(self, row: Row) -> None:
        """Raises ColumnsError where a row of no format would have one by other names, or by a question for all."""
        unnamed = {name: value for name, value in row.items() if value is not None and name not in self.ignored}
        for name, value in [*unnamed.items()]:
            unnamed |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {}
        unnamed = {name: value for name, value in unnamed.items() if name not in self.roles}
        guesses = {name: role for name, value in unnamed.items() if (role := _nearly(name, value, row))}
        captions = {name: "question" for name in unnamed if plain_name(name) in ROLES["caption"]}
        for roles, ask in ((guesses, ""), (guesses | captions, ""), (guesses, EXAMPLE_QUESTION)):
            trial = Columns({**self.roles, **roles}, self.ignored, self.ask or ask)
            if (resolved := trial.resolve(row, strict=False)).format is not None:
                used = {name: role for name, role in roles.items() if resolved.uses.get(name)}
                lacks = (
                    f"its columns {shown([*row], 120)} fit no format; did you mean" if used else "it has no question"
                )
                raise ColumnsError(lacks, Columns(used, (), ask))

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


def _refuse_left_out(row: Row, left: Sequence[str], resolved: Resolved) -> None:
    fields, form = resolved.fields, resolved.format
    has_media = not (is_nothing(fields.get("images")) and is_nothing(fields.get("videos")))
    is_caption = form is not None and form.name == "captions"
    lost = {name: loss for name in left if (loss := losing(name, row[name], unknown=is_caption, has_media=has_media))}
    if not lost or form is None:
        return
    used = {text.strip() for text in _texts_in(list(fields.values()))}
    lost = [loss for name, loss in lost.items() if not (isinstance(text := row[name], str) and text.strip() in used)]
    if lost:
        remedy = _remedy(lost, resolved.uses, form.name)
        listed = ", ".join(f"{shown(path, 30)} ({what})" for path, what in lost[:4])
        names = ", ".join(shown_text(path, 30) for path in remedy.roles if path in dict(lost))
        otherwise = f" says what it is, data.ignore: [{names}] leaves it out" if names else " leaves it out"
        raise ColumnsError(f"{form.name} would leave out {listed}", remedy, otherwise)


def _remedy(lost: Iterable[tuple[str, str]], uses: Mapping[str, str], form: str) -> Columns:
    """What would settle columns that are left out, as far as their names and the row's format tell."""
    roles: dict[str, str] = {}
    ignored: list[str] = []
    caption = [column for column, role in uses.items() if role == "caption"]
    for path, what in lost:
        name = plain_name(path.rpartition(".")[2])
        role = _EXAMPLES.get(what)
        if what == MEDIUM:
            role = "video" if "video" in name else "image"
            roles |= {column: role for column, used_as in uses.items() if used_as == f"{role}s"} | {path: role}
        elif caption and what in (LABEL, TEXT) and not roles:
            roles = dict.fromkeys(caption, "answer" if name in ROLES["question"] else "question")
            roles |= {path: "answer"} if name not in _KNOWN else {}
        elif form == "question/answer" and what in (CHOICES, ASKED) and role not in roles.values():
            roles[path] = _EXAMPLES[what]
        else:
            ignored.append(path)
    return Columns(roles, tuple(ignored))


def _texts_in(value: object) -> Iterator[str]:
    """All texts of a value, at every depth."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _texts_in(inner)


def _lifted(row: Row, path: str, *, keep: bool) -> Row:
    """The row without what stands at a dotted path in one of its columns, which is a column of its own if kept."""
    column, *keys = path.split(".")
    if path in row or row.get(column) is None:
        return row
    rest, taken = _without(row[column], keys)
    return {**row, column: rest} | ({path: taken} if keep and taken is not None else {})


def _without(value: object, keys: Sequence[str]) -> tuple[object, object]:
    """A nested value without what stands under these keys, and that; of lists for each entry."""
    value = _parsed(value)
    if isinstance(value, list):
        pairs = [_without(entry, keys) for entry in value]
        return [rest for rest, _ in pairs], [taken for _, taken in pairs if taken is not None] or None
    if not isinstance(value, dict) or keys[0] not in value:
        return value, None
    if len(keys) == 1:
        return {name: inner for name, inner in value.items() if name != keys[0]}, value[keys[0]]
    rest, taken = _without(value[keys[0]], keys[1:])
    return {**value, keys[0]: rest}, taken


_LISTED = frozenset(("images", "videos", "conversations", "messages", "texts", "history", "prompt", "completion"))
"""Roles that hold a list, which a cell of text may write as JSON, or as paths between `|`, `;` or `,`."""


def _listed(text: str, role: str) -> object:
    """A list that is written as text; any other text as it is."""
    value = _parsed(text)
    if role in ("prompt", "completion"):
        is_talk = isinstance(value, list) and value and isinstance(value[0], dict)
        return value if is_talk else text
    if value is text and role in ("images", "videos") and not text.startswith("data:"):
        paths = re.split(r"\s*[|;,]\s*", text)
        return paths if len(paths) > 1 and all(map(_holds_media, paths)) else text
    return value


def _parsed(value: object) -> object:
    """The list or object that a text writes as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(UserError):
            return json_of(value, "a cell")
    return value


def plain_name(name: str) -> str:
    """A column's name as the table of roles has it: no case, no spaces around it."""
    if name in _KNOWN:
        return name
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def is_known(name: str) -> bool:
    """Whether a column's name is one of a role."""
    return plain_name(name) in _KNOWN


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
    """Whether a column is empty: null, blank text, a list or object of nothing else, or pandas' NaN."""
    if value is None:
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list | dict):
        return all(map(is_nothing, value.values() if isinstance(value, dict) else value))
    return value == b"" or value != value


MEDIUM, CHOICES, LABEL, RATING, ASKED, UNREAD = (
    *("a picture or video", "choices", "a label", "a rating"),
    *("what goes with a question", "nothing that can be trained on here"),
)
TEXT, FLAG, NESTED, NOTED = "a second text", "a flag", "a list or object", "a note"
_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("image", "img", "picture", "photo", "pic", "video", "frame", "screenshot"), MEDIUM),
    **dict.fromkeys(("media", "visual", "pixel", "thumbnail", "thumb", "figure", "scan"), MEDIUM),
    **dict.fromkeys(("choice", "option", "distractor"), CHOICES),
    **dict.fromkeys(("label", "class", "gold", "correct", "gt", "target", "hateful", "sentiment", "emotion"), LABEL),
    **dict.fromkeys(("verdict", "truth", "valid", "foil", "toxic", "toxicity", "stance", "entailment"), LABEL),
    **dict.fromkeys(("rating", "score", "reward", "rank", "chosen", "rejected", "preference", "vote"), RATING),
    **dict.fromkeys(("weight", "quality", "upvote", "downvote", "helpfulness", "kto"), RATING),
    **dict.fromkeys(("hint", "context", "passage", "history", "system", "ocr", "lecture"), ASKED),
    **dict.fromkeys(("audio", "bbox", "boxes", "bboxes", "objects", "tool", "function", "reasoning"), UNREAD),
    **dict.fromkeys(("thinking", "thought", "kwargs"), UNREAD),
    **dict.fromkeys(("question", "query", "prompt", "instruction", "answer", "response", "completion"), TEXT),
    **dict.fromkeys(("reply", "solution", "caption", "text", "description", "rationale", "explanation"), TEXT),
}
"""What a column may be by the first or last word of its name."""
_NOTES = frozenset(
    (
        *("id", "uid", "uuid", "guid", "key", "index", "idx", "indices", "no", "nr", "number", "count", "total"),
        *("length", "len", "size", "width", "height", "area", "ratio", "hash", "md", "sha", "checksum", "digest"),
        *("license", "licence", "copyright", "attribution", "source", "origin", "provenance", "dataset", "corpus"),
        *("data", "subset", "collection", "split", "fold", "partition", "shard", "row", "line", "page", "chapter"),
        *("date", "time", "timestamp", "datetime", "year", "month", "day", "created", "updated", "at", "on", "by"),
        *("author", "creator", "owner", "annotator", "worker", "contributor", "uploader", "publisher"),
        *("model", "generator", "teacher", "engine", "version", "revision", "commit", "release"),
        *("language", "lang", "locale", "country", "url", "uri", "link", "website", "site", "domain", "host"),
        *("type", "kind", "category", "categories", "subcategory", "topic", "subtopic", "subject", "field", "genre"),
        *("subfield", "task", "skill", "level", "grade", "difficulty", "tag", "keyword", "format", "encoding", "mime"),
        *("extension", "token", "word", "char", "character", "turn", "round", "duration", "second", "fps"),
        *("camera", "device", "temperature", "seed", "cost", "latency", "batch", "epoch", "step", "iteration"),
        *("session", "project", "name", "username", "nickname", "view", "like", "star", "metadata", "meta", "info"),
    )
)
"""Last words of the names of bookkeeping."""
_COUNTS = frozenset(("n", "num", "nb", "number", "total", "created", "updated", "modified", "date", "time"))
"""First words of such names."""
_PLACES = frozenset(("id", "key", "index", "idx", "number", "no"))
"""Last words of the names of what says which choice is the answer."""
_VERDICTS = frozenset(("is", "has", "was", "should", "can"))
"""First words of the names of flags."""
_EXAMPLES = {MEDIUM: "image", CHOICES: "choices", LABEL: "answer", ASKED: "hint"}
EXAMPLE_QUESTION = "What is it?"
_NAME_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_MEDIA_FILE = tuple(f".{ending}" for ending in (*PICTURE_ENDINGS, *VIDEO_ENDINGS))
_FLAGS = frozenset((0, 1, "0", "1", "0.0", "1.0"))
_LETTERS = re.compile(r"[^\W\d_]")
MOST_NOTED = 300
"""Characters of a text under the name of a note; a longer one may be what is asked or answered."""
DEEPEST = 16


def losing(
    path: str, value: object, *, unknown: bool = False, has_media: bool = False, depth: int = 0
) -> tuple[str, str] | None:
    """What may change what is learned, with its path, in a value that would be left out; None for bookkeeping.

    Args:
        unknown: whether a name that is none of bookkeeping is enough.
        has_media: whether the sample has pictures or videos, of which notes may be taken.
    """
    value = _parsed(value)
    if is_nothing(value):
        return None
    kind = _kind(path.rpartition(".")[2])
    if _holds_media(value):
        return path, MEDIUM
    if kind == MEDIUM and has_media:
        kind = _note_of_media(path, value)
    if isinstance(value, dict) and depth < DEEPEST:
        inner = (
            losing(f"{path}.{key}", entry, unknown=unknown, has_media=has_media, depth=depth + 1)
            for key, entry in value.items()
        )
        loss = next(filter(None, inner), None)
        return loss or (None if kind in ("", NOTED) else (path, kind))
    if isinstance(value, list) and kind == NOTED and depth < DEEPEST:
        entries = (losing(path, entry, unknown=unknown, has_media=has_media, depth=depth + 1) for entry in value)
        return next(filter(None, entries), None)
    if kind == NOTED:
        is_text = isinstance(value, str) and (len(value) > MOST_NOTED or value.endswith("?"))
        return (path, TEXT) if is_text else None
    what = kind or _by_value(value, unknown)
    return (path, what) if what else None


def _by_value(value: object, unknown: bool) -> str | None:
    """What a value is whose name says nothing."""
    if isinstance(value, list | dict):
        return NESTED
    if isinstance(value, bool) or (isinstance(value, int | float | str) and value in _FLAGS):
        return FLAG
    if isinstance(value, str):
        is_code = value.isascii() and not any(map(str.isspace, value)) and any(map(str.isdigit, value))
        is_noted = "://" in value or (not unknown and (is_code or not _LETTERS.search(value)))
        return None if is_noted else TEXT
    return LABEL if unknown and isinstance(value, int | float) else None


def _note_of_media(path: str, value: object) -> str:
    """What a column is that is named after pictures that stand in another."""
    last = _NAME_WORDS.findall(path)[-1].lower()
    if last in _NOTES or last.removesuffix("s") in _NOTES:
        return NOTED
    kind = _WORDS.get(last, MEDIUM)
    return NOTED if kind == MEDIUM and isinstance(value, int | float) else kind


@lru_cache(maxsize=1 << 12)
def _kind(name: str) -> str:
    """What a column is by its name alone; "" where it says nothing."""
    words = [word.lower() for word in _NAME_WORDS.findall(name)]
    kinds = [_WORDS.get(word) or _WORDS.get(word.removesuffix("s"), "") for word in words]
    is_noted = bool(words) and not _NOTES.isdisjoint((words[-1], words[-1].removesuffix("s")))
    if MEDIUM in kinds:
        return MEDIUM
    if any(pattern.fullmatch(plain_name(name)) for pattern in _JOINED["choices"]):
        return CHOICES
    kind = next(filter(None, (*kinds[:1], *kinds[-1:])), "")
    if words[:1] == ["answer"] and words[-1] in _PLACES:
        return LABEL
    is_noted = is_noted and kind in ("", TEXT) and words[0] not in _VERDICTS
    if is_noted or not _COUNTS.isdisjoint(words[:1]) or plain_name(name) in ROLES["id"]:
        return NOTED
    return kind or (TEXT if plain_name(name) in _KNOWN and plain_name(name) != "extra" else "")


_NEARLY: Mapping[str, tuple[str, ...]] = {
    "question": ("q", "frage", "pregunta", "pergunta", "domanda", "user", "human", "problem", "sentence"),
    "answer": ("a", "antwort", "respuesta", "resposta", "reponse", "risposta", "assistant", "gpt", "target", "reply"),
    "image": ("bild", "foto", "imagen", "immagine", "url", "file", "src", "path", "pixels", "media"),
    "caption": ("description", "alt", "alt_text", "title"),
}
"""Names that may mean a role, and are not taken for it."""
_MEANT = {name: name for name in sorted(_KNOWN)} | {name: role for role, names in _NEARLY.items() for name in names}


def _nearly(name: str, value: object, row: Row) -> str | None:
    """The role that a column of an unknown name may have."""
    name = plain_name(name.rpartition(".")[2])
    if name in _KNOWN:
        return None
    if name == "chosen":
        beside = {"prompt": "completion", "instruction": "output", "question": "answer"}
        return next((role for column, role in beside.items() if column in row), "messages")
    return _nearest(name) or _EXAMPLES.get(_kind(name))


@lru_cache(maxsize=1 << 12)
def _nearest(name: str) -> str | None:
    close = get_close_matches(name, _MEANT, n=1, cutoff=0.8)
    return _MEANT[close[0]] if close and (_kind(name) != NOTED or name in _MEANT) else None


def _holds_media(value: object) -> bool:
    """Whether a value is bytes, an object of `bytes` and `path`, the path of a picture or video, or a list of them."""
    if isinstance(value, str):
        value = value.partition("?")[0] if value.startswith("http") else value
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
