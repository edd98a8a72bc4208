"""Resolves which role (image, question, answer, ...) each column of a training row has.

Each role takes the first of its columns that is not empty. All other columns are left out, and logged before the first
step. If leaving one out could change what is learned, judged by its name and its value at any depth, the run ends with
an error that names the setting that fixes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from itertools import chain
from shlex import quote
from typing import Literal

from dora_vl.data.column_names import (
    ASKED,
    CHOICES,
    JOINED,
    KNOWN,
    LABEL,
    MEDIUM,
    OF_VIDEO,
    PREFERENCE,
    ROLES,
    TEXT,
    Cell,
    Row,
    flag_of,
    holds_media,
    is_empty,
    kind_of_column,
    lost_content,
    moment_of,
    nearest_role,
    parsed,
    plain_name,
)
from dora_vl.data.formats.row_format import Candidate, Candidates, Resolved, Roles, RowFormat
from dora_vl.data.formats.table import FORMATS
from dora_vl.data.pictures import VIDEO_ENDINGS
from dora_vl.data.turns import CALLS, KWARGS, TOOLS
from dora_vl.errors import UserError, short_names, short_repr, short_text

Mixing = Literal["proportional", "balanced"]
Packing = Literal["trees", "packed", "plain"]
"""Says how samples are laid out in a batch's rows; see `data.packing`."""


EVERYWHERE = ("id", "images", "videos", "start_seconds", "end_seconds", "system", TOOLS, KWARGS, "objects")
EVERYWHERE += ("bbox_type",)
"""Rows of every format may have these roles."""
NAMES = {role: (role,) for form in FORMATS for role in (*form.needs, *form.uses)} | dict(ROLES)
"""Maps each role to its columns' names; a role that `ROLES` does not have is a column of its own name."""


class ColumnsError(UserError):
    """A column that may change what is learned would be left out. Ends the run, whatever `data.max_bad_share` allows.

    `remedy` has the settings that fix it, beside those that the run has; `other` fixes it as well.
    """

    def __init__(self, problem: str, remedy: Columns, other: Columns | None = None) -> None:
        super().__init__(f"{problem} {_fix('set', remedy.as_settings(), other and other.as_settings())}".rstrip())
        self.problem, self.remedy, self.other = problem, remedy, other

    @property
    def options(self) -> str:
        """Returns the fix as options of `dora-vl init` and `check-data`."""
        return _fix("pass", self.remedy.as_options(), self.other and self.other.as_options())


def _fix(verb: str, remedy: str, other: str | None) -> str:
    return ", or ".join(filter(None, (remedy and f"{verb} {remedy}", other)))


_Shape = tuple[RowFormat, Candidates]
"""A format that a row's column names allow, and for each role the columns that may hold it."""


@dataclass(frozen=True)
class Columns:
    """The settings of a file's columns: `data.columns`, `data.ignore`, and `data.ask`, which rows without question get.

    `roles` has a known name, such as `image` or `question`, for a column of another name. A dotted name leads into a
    column: `meta.image` is the key `image` of the object in `meta`, or of those in its list.
    """

    roles: Roles = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    ask: str = ""
    _shapes: dict[tuple[str, ...], list[_Shape]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for column, role in self.roles.items():
            if role not in NAMES and role not in KNOWN:
                (near,) = get_close_matches(role, KNOWN, n=1, cutoff=0.0)
                message = f"data.columns: {short_repr(column)} cannot be {short_repr(role)}; did you mean {near}?"
                raise UserError(message)
        if both := [column for column in self.roles if column in self.ignored]:
            message = f"data.columns says what {short_repr(both[0])} is, and data.ignore leaves it out; do only one"
            raise UserError(message)

    def resolve(self, row: Row, *, strict: bool = True) -> Resolved:
        """Returns the row's format, and what it holds of each role.

        Raises:
            ColumnsError: if that is `strict`, a column would be left out that could change what is learned, or the row
                lacks what a column of nearly that name may be.
        """
        for path in (*self.roles, *self.ignored):
            if "." in path:
                row = _move_to_column(row, path, keep=path in self.roles)
        # A null output is an answer that is missing, not another format.
        names = tuple(name for name, value in row.items() if value is not None or name == "output")
        if names not in self._shapes:
            self._shapes[names] = list(self._shapes_of(names))
        shapes = (shape for shape in self._shapes[names] if shape[0].fits(row, shape[1], self.roles))
        form, candidates = next(shapes, (None, {}))
        if form is None:
            if strict:
                self._refuse_nearly_named(row)
            return Resolved(None, row)
        fields: dict[str, object] = {}
        roles: dict[str, str] = {}
        for role, alternatives in candidates.items():
            filled = (names for names in alternatives if any(not is_empty(row[name]) for name in names))
            columns = next(filled, alternatives[0]) if len(alternatives) > 1 else alternatives[0]
            fields[role] = _role_value(row, columns, role)
            roles |= dict.fromkeys(columns, role)
        if self.ask and form.may_lack_question and is_empty(fields.get("question")):
            fields["question"] = self.ask
        uses = {name: roles.get(name, "") for name in names if name not in self.ignored}
        called = {role: self.roles.get(name, plain_name(name)) for name, role in reversed(roles.items())}
        if strict and (left := [name for name, role in uses.items() if not role]):
            self._refuse_left_out(row, left, form.name, fields, uses)
        return Resolved(form, fields, uses, called)

    def id_of(self, row: Row, otherwise: str) -> str:
        """Returns the row's own id as text, else what it is called otherwise."""
        named = (column for column, role in self.roles.items() if role in ROLES["id"])
        own = next((row[name] for name in (*named, *ROLES["id"]) if row.get(name) is not None), otherwise)
        return own if isinstance(own, str) else short_repr(own)

    def as_settings(self) -> str:
        """Returns the settings as a run's YAML states them."""
        columns = ", ".join(f"{short_text(name, 80)}: {role}" for name, role in self.roles.items())
        ignored = ", ".join(short_text(name, 80) for name in self.ignored)
        keys = {f"columns: {{{columns}}}": columns, f"ignore: [{ignored}]": ignored, f"ask: {self.ask}": self.ask}
        return " and ".join(f"data.{text}" for text, value in keys.items() if value)

    def as_options(self) -> str:
        """Returns the settings as options of `dora-vl init` and `check-data`."""
        columns = ",".join(f"{name}={role}" for name, role in self.roles.items())
        options = {"--columns": columns, "--ignore": ",".join(self.ignored), "--ask": self.ask}
        return " ".join(f"{option} {quote(value)}" for option, value in options.items() if value)

    def missing_column(self, uses: Iterable[Mapping[str, str]]) -> str:
        """Names a column that no row has, by the columns of the rows that could be read; "" where there is none."""
        there = roles_of_columns(uses)
        name = next((name for name in self.roles if there and name not in there), None)
        names = f"data.columns (--columns) names; there are {short_names(there)}"
        return "" if name is None else f"no row has a column {short_repr(name)}, which {names}"

    @cached_property
    def _takes_one_answer(self) -> bool:
        """Tells whether `data.columns` gives an answer of a preference another role, so that it is the only one."""
        return any(
            kind_of_column(name) == PREFERENCE and role not in ("chosen", "rejected")
            for name, role in self.roles.items()
        )

    def _role_is_taken(self, name: str) -> bool:
        """Tells whether `data.columns` gives another column the role that this one may have."""
        roles = {role for role, names in NAMES.items() if not {role, *names}.isdisjoint(self.roles.values())}
        return (kind_of_column(name) == PREFERENCE and self._takes_one_answer) or any(
            plain_name(name) in NAMES[role] for role in roles
        )

    def _refuse_left_out(self, row: Row, left: Sequence[str], form: str, fields: Row, uses: Mapping[str, str]) -> None:
        """Raises ColumnsError where a column that is left out could change what is learned."""
        if self.roles:
            self._refuse_second(row, left)
        has_videos = not is_empty(fields.get("videos"))
        if has_videos:
            _refuse_moments(row, left)
        if self.roles:
            left = [name for name in left if not self._role_is_taken(name)]
        has_media = has_videos or not is_empty(fields.get("images"))
        losses = {name: lost_content(name, row[name], unknown=form == "captions", has_media=has_media) for name in left}
        if not any(losses.values()):
            return
        used = {text.strip() for text in _texts_in(list(fields.values()))}  # what says the same may be left out
        unlike = (name for name in losses if not (isinstance(text := row[name], str) and text.strip() in used))
        lost = [loss for name in unlike if (loss := losses[name])]
        if lost:
            remedy = _remedy(row, lost, uses, form)
            listed = ", ".join(f"{short_repr(path, 30)} ({what})" for path, what in lost[:4])
            others = Columns(ignored=tuple(path for path, _ in lost if path not in remedy.ignored))
            raise ColumnsError(f"{form} would leave out {listed};", remedy, others if others.ignored else None)

    def _refuse_second(self, row: Row, left: Sequence[str]) -> None:
        """Raises ColumnsError where `data.columns` gives a role to two filled columns that are not taken as one."""
        for name in left:
            if name in self.roles and not is_empty(row[name]):
                role = self.roles[name]
                first = next(other for other in self.roles if self.roles[other] == role)
                problem = f"{short_repr(first)} and {short_repr(name)} are both {role}; write a row for each, or"
                # All column settings, since a column that has a role cannot be ignored as well.
                others = {column: kept for column, kept in self.roles.items() if column != name}
                raise ColumnsError(problem, Columns(others, (*self.ignored, name), self.ask))

    def _refuse_nearly_named(self, row: Row) -> None:
        """Raises ColumnsError where a row of no format would have one by other names, or by a question for all."""
        paths = [name for name, value in row.items() if value is not None and name not in self.ignored]
        objects = {name: inner for name in paths if isinstance(inner := parsed(row[name]), dict)}
        paths += [f"{name}.{key}" for name, inner in objects.items() if not holds_media(inner) for key in inner]
        free = [path for path in paths if path not in self.roles]
        names = {plain_name(path.rpartition(".")[2]) for path in paths}
        guesses = {name: role for name in free if (role := _guess_role(name, names))}
        if not {*ROLES["images"], *ROLES["videos"]} & {*names, *guesses.values(), *self.roles.values()}:
            guesses |= {name: _media_role(name, row[name]) for name in free if holds_media(row.get(name))}
        _refuse_several_answers(guesses)
        unlike = _numbered_otherwise(guesses)
        guesses = {name: role for name, role in guesses.items() if name not in unlike}
        texts = {name: "question" for name in free if plain_name(name) in (*ROLES["caption"], "instruction")}
        trials = [(guesses, ""), (guesses | texts, ""), (guesses, EXAMPLE_QUESTION)]
        has_null = any(row[name] is None and plain_name(name) in ROLES["question"] for name in row)
        for roles, ask in trials[:2] if has_null else trials:
            trial = Columns({**self.roles, **roles}, (*self.ignored, *unlike), self.ask or ask)
            resolved = trial.resolve(row, strict=False)
            used = {name: role for name, role in roles.items() if resolved.uses.get(name)}
            if resolved.format is not None and (used or ask):
                meant = f" fit no format; did you mean {short_names(dict.fromkeys(used.values()))}?"
                lacks = meant if used else " have no question;"
                remedy = Columns(used, unlike, ask)
                settled = Columns({**self.roles, **used}, trial.ignored, trial.ask)
                try:
                    settled.resolve(row, strict=settled.resolve(row, strict=False).format is not None)
                except ColumnsError as error:
                    remedy = Columns({**used, **error.remedy.roles}, (*unlike, *error.remedy.ignored), ask)
                raise ColumnsError(f"its columns {short_repr([*row], 120)}{lacks}", remedy)

    def _shapes_of(self, names: Sequence[str]) -> Iterator[_Shape]:
        used_names = [name for name in names if name not in self.ignored]
        candidates = {role: self._alternatives(role, used_names) for role in NAMES}
        lacking = [(form, [role for role in form.needs if not candidates[role]]) for form in FORMATS]
        lacking_question = [form for form, lacks in lacking if self.ask and lacks == ["question"]]
        for form in (*(form for form, lacks in lacking if not lacks), *lacking_question):
            roles = dict.fromkeys((*EVERYWHERE, *form.needs, *form.uses))
            yield form, {role: candidates[role] for role in roles if candidates[role]}

    def _alternatives(self, role: str, names: Sequence[str]) -> list[Candidate]:
        """Returns the columns that may hold a role, those together that are taken as one."""
        if role in (*ROLES["chosen"], *ROLES["rejected"]) and self._takes_one_answer:
            return []
        named = [column for column, name in self.roles.items() if column in names and name in (role, *NAMES[role])]
        joined = role in JOINED and bool(named)
        alternatives: list[Candidate] = [dict.fromkeys(named, "")] if joined else [{name: ""} for name in named]
        free = {name: plain_name(name) for name in names if name not in self.roles}
        alternatives += [{name: ""} for usual in NAMES[role] for name, plain in free.items() if plain == usual]
        for pattern in JOINED.get(role, ()):
            matches = {name: match[1] for name, plain in free.items() if (match := pattern.fullmatch(plain))}
            together = sorted(matches, key=lambda name: (len(matches[name]), matches[name]))
            if len(together) > 1 or (together and role == "images"):
                alternatives.append({name: matches[name] if role == "choices" else "" for name in together})
        return alternatives


_NUMBER = re.compile(r"(?:\d+|(?<=_)[a-h])$")


def _refuse_several_answers(guesses: Mapping[str, str]) -> None:
    """Refuses answers in columns that are called alike but for a letter or number: no setting says which is right."""
    names = [name for name, role in guesses.items() if role in ROLES["answer"] and _NUMBER.search(plain_name(name))]
    if len(names) > 1:
        remedy = "write the better one as chosen and the other as rejected, or a row for each that is right"
        raise ColumnsError(f"{short_names(names)} are several answers to one question; {remedy}", Columns())


def _numbered_otherwise(guesses: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the captions, and the pictures, of other numbers than the first caption's (Winoground)."""
    numbers = {name: match[0] for name in guesses if (match := _NUMBER.search(plain_name(name)))}
    captions = [name for name in numbers if guesses[name] == "caption"]
    if len(captions) < 2:
        return ()
    others = (name for name, number in numbers.items() if number != numbers[captions[0]])
    return tuple(name for name in others if guesses[name] in ("caption", "image"))


def _guess_role(path: str, names: set[str]) -> str | None:
    """Returns the role that a column of unknown name probably has, unless another column's name says that role."""
    name = path.rpartition(".")[2]
    if name == "chosen" and "rejected" not in names:
        beside = {"prompt": "completion", "instruction": "output", "question": "answer"}
        return next((role for column, role in beside.items() if column in names), "messages")
    if plain_name(name) in KNOWN:
        return None if name == path or (name == "rejected" and "chosen" not in names) else name
    role = nearest_role(name) or _EXAMPLES.get(kind_of_column(name))
    is_held = role is not None and any(role in known and not names.isdisjoint(known) for known in ROLES.values())
    return None if is_held else role


def _refuse_moments(row: Row, left: Iterable[str]) -> None:
    """Raises ColumnsError for columns that may say which part of a video is meant."""
    moments = {name: role for name in left if (role := moment_of(name)) is not None and not is_empty(row[name])}
    if moments:
        roles = {role: name for name, role in reversed(moments.items()) if role and _is_number(row[name])}
        ignored = tuple(name for name in moments if name not in roles.values())
        remedy = Columns({name: role for role, name in reversed(roles.items())}, ignored)
        form = "" if roles else "; an object of path, start_seconds and end_seconds says which"
        problem = f"{short_names(moments)} would be left out ({OF_VIDEO}{form});"
        raise ColumnsError(problem, remedy, Columns(ignored=tuple(moments)) if roles else None)


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True


def _remedy(row: Row, losses: Iterable[tuple[str, str]], uses: Mapping[str, str], form: str) -> Columns:
    """Returns the settings that take in the columns left out, as far as their names and the row's format tell."""
    roles: dict[str, str] = {}
    ignored: list[str] = []
    caption = [column for column, role in uses.items() if role == "caption"]
    for path, what in losses:
        name = plain_name(path.rpartition(".")[2])
        role = _media_role(name, row.get(path))
        of_role = {column: role for column, used_as in uses.items() if used_as == f"{role}s"}
        # A picture itself, where the column used has only its name.
        if what == MEDIUM and isinstance(row.get(path), dict) and all(isinstance(row[name], str) for name in of_role):
            roles[path] = role
            continue
        # A picture or video: the first of its kind, or one of several numbered columns.
        if what == MEDIUM and (not of_role or any(pattern.fullmatch(name) for pattern in JOINED["images"])):
            roles |= of_role | {path: role}
        # A label, question or answer by its name beside a caption, which is the other of the two.
        elif (
            caption
            and not roles
            and what in (LABEL, TEXT)
            and (kind_of_column(name) == LABEL or nearest_role(name) in (*ROLES["question"], *ROLES["answer"]))
        ):
            roles = dict.fromkeys(caption, "answer" if name in ROLES["question"] else "question")
            roles |= {} if name in KNOWN else {path: "answer"}
        # A judgement by its own name: prompt and completion are judged.
        elif name == "kto_tag" and form == "question/answer":
            judged = {"question": "prompt", "answer": "completion"}
            roles |= {column: judged[role] for column, role in uses.items() if role in judged}
        # A flag named `label` beside a format that can be judged.
        elif name == "label" and form in _WITH_JUDGEMENT and flag_of(row.get(path)) is not None:
            roles[path] = "kto_tag"
        # The chosen answer to a conversation.
        elif form in ("conversations", "messages") and path == "chosen":
            roles[path] = "completion"
        # More text that is asked: a hint.
        elif form == "question/answer" and what == ASKED and "hint" not in (*uses.values(), *roles.values()):
            roles[path] = "hint"
        elif not (what == PREFERENCE and "completion" in roles.values()):
            ignored.append(path)
    return Columns(roles, tuple(ignored))


def _media_role(name: str, value: object) -> str:
    is_video = isinstance(value, str) and value.lower().endswith(tuple(f".{ending}" for ending in VIDEO_ENDINGS))
    return "video" if is_video or "video" in name else "image"


def _texts_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts_in(inner)


def _move_to_column(row: Row, path: str, *, keep: bool) -> Row:
    """Returns the row without the value at a dotted path in a column; if kept, that is a column of its own."""
    column, *keys = path.split(".")
    if path in row or row.get(column) is None:
        return row
    rest, taken = _without(row[column], keys)
    return {**row, column: rest} | ({path: taken} if keep and taken is not None else {})


def _without(value: object, keys: Sequence[str]) -> tuple[object, object]:
    """Returns a nested value without these keys, and the values they had; takes lists entry by entry."""
    value = parsed(value)
    if isinstance(value, list):
        pairs = [_without(entry, keys) for entry in value]
        return [rest for rest, _ in pairs], [taken for _, taken in pairs if taken is not None] or None
    if not isinstance(value, dict) or keys[0] not in value:
        return value, None
    if len(keys) == 1:
        return {name: inner for name, inner in value.items() if name != keys[0]}, value[keys[0]]
    rest, taken = _without(value[keys[0]], keys[1:])
    return {**value, keys[0]: rest}, taken


_WITH_JUDGEMENT = ("conversations", "messages", "instructions")
EXAMPLE_QUESTION = "What is it?"
_EXAMPLES = {MEDIUM: "image", CHOICES: "choices", LABEL: "answer", ASKED: "hint"}
REPLIES = ("chosen", "rejected", "answer", "caption")
"""A cell of these roles may list several texts."""
_LISTED = frozenset(
    ("images", "videos", "conversations", "messages", "texts", "history", "prompt", "completion", *REPLIES)
)
"""These roles hold a list, which a cell of text may write as JSON, or as paths between `|`, `;` or `,`."""

_OFTEN_EMPTY = frozenset(("images", "videos", "hint", "choices"))
"""A row may lack these, so that the text "nan" is an empty cell there; as an answer it is only doubted."""
_BETWEEN = re.compile(r"\s*[|;,]\s*")


def lists_replies(value: object, role: str, *, in_cell: bool) -> bool:
    """Tells whether what a text writes is several replies, or messages; other JSON is a reply that a model learns."""
    entries = value if isinstance(value, list) else [value]
    if in_cell and isinstance(value, list) and all(isinstance(entry, str) for entry in entries):
        return True
    is_said = (isinstance(entry, dict) and any(keys <= entry.keys() for keys in _MESSAGE_KEYS) for entry in entries)
    return role in ("chosen", "rejected") and bool(entries) and all(is_said)


_MESSAGE_KEYS = ({"role", "content"}, {"role", CALLS}, {"from", "value"})


def _parse_list(text: str, role: str) -> object:
    """Returns a list that is written as text; any other text as it is."""
    value = parsed(text)
    if role in REPLIES:
        return value if lists_replies(value, role, in_cell=isinstance(text, Cell)) else text
    if role in ("prompt", "completion"):
        return value if isinstance(value, list) and value and isinstance(value[0], dict) else text
    if value is text and role in ("images", "videos") and _BETWEEN.search(text) and not text.startswith("data:"):
        paths = _BETWEEN.split(text)
        return paths if all(map(holds_media, paths)) else text
    return value


def _role_value(row: Row, columns: Candidate, role: str) -> object:
    """Returns what the columns hold of a role: of several a list, or an object by their labels, without empty ones."""
    cells = {name: row[name] for name in columns}
    if role in _OFTEN_EMPTY:
        is_nan = {name for name, text in cells.items() if isinstance(text, str) and text.strip().lower() == "nan"}
        cells |= dict.fromkeys(is_nan)
    (first, label), *others = columns.items()
    if label:
        return {label: cells[name] for name, label in columns.items()}
    if others:
        lists = (value if isinstance(value, list) else [value] for value in cells.values())
        return [value for value in chain.from_iterable(lists) if not is_empty(value)]
    value = cells[first]
    return _parse_list(value, role) if isinstance(value, str) and role in _LISTED else value


def roles_of_columns(uses: Iterable[Mapping[str, str]]) -> dict[str, set[str]]:
    """Returns what each column is used as in any of these rows; nothing for one that all leave out."""
    roles: dict[str, set[str]] = {}
    for row in uses:
        for name, role in row.items():
            roles.setdefault(name, set()).update({role} - {""})
    return roles


def column_lines(uses: Iterable[Mapping[str, str]]) -> list[str]:
    """Returns a line for each column: what it is used as, or that it is left out."""
    return [
        f"  {short_text(name, 40)}: " + (f"used as {' and '.join(sorted(roles))}" if roles else "left out")
        for name, roles in roles_of_columns(uses).items()
    ]


USUAL = Columns()


@dataclass(frozen=True, kw_only=True)
class TrainFile:
    """One of several training files."""

    path: str
    """A file, a folder of shards, or hub:OWNER/NAME."""
    weight: float = 1.0
    """How often an epoch sees each of its samples; 0.5: half of them, chosen by the seed; 2: each twice."""


def train_files(train: str | Sequence[str | TrainFile]) -> tuple[TrainFile, ...]:
    """Returns what `data.train` names, one path or several files, as a list."""
    files = (train,) if isinstance(train, str) else train
    return tuple(TrainFile(path=file) if isinstance(file, str) else file for file in files)


def train_name(train: str | Sequence[str | TrainFile]) -> str:
    """Returns the files' names, for messages."""
    return ", ".join(file.path for file in train_files(train))
