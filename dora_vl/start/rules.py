"""The engine of `dora-vl translate`: a table a tool says what becomes of each setting, and this reads it.

A setting is set here under another name, is always so here, or has no counterpart; nothing is left out in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dora_vl.core.config import Method
from dora_vl.errors import UserError, shown, shown_text
from dora_vl.run.reading import SECTIONS

NOT_READ_BY_FULL = frozenset(
    f"adapter.{name}" for name in ("rank", "alpha", "rank_scaling", "dropout", "dropout_mode", "init")
) | {"optim.b_learning_rate_ratio"}
"""Settings that full fine-tuning does not read."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a file, with what a rule may need to know beside it.

    Attributes:
        settings: all of the file's, with the tool's defaults beneath.
        method: what the file trains, in our words.
    """

    key: str
    value: Any
    settings: Mapping[str, Any]
    method: Method
    file: Path

    def wrong(self, why: str) -> UserError:
        """The error that this value cannot be taken."""
        return UserError(f"{self.file}: {self.key} is {shown(self.value)}{why}")

    @property
    def is_on(self) -> bool:
        """Whether a switch is on."""
        return is_on(self.value)

    @property
    def number(self) -> float:
        """Raises UserError if it is none."""
        try:
            return float(self.value)
        except (TypeError, ValueError):
            raise self.wrong(", no number") from None

    @property
    def words(self) -> list[str]:
        """Several names: a list, or text with commas or spaces between. Raises UserError if it is neither."""
        if isinstance(self.value, str):
            return self.value.replace(",", " ").split()
        if isinstance(self.value, list) and all(isinstance(name, str) for name in self.value):
            return self.value
        raise self.wrong(", no list of names")


@dataclass(frozen=True)
class Counterpart:
    """What a setting is here.

    Attributes:
        settings: dotted name -> value; empty where nothing need be set, or can be.
        is_lost: it has none, and `note` says why; beside settings: they say a part of it, and `note` what is left.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    is_lost: bool = False


Rule = Callable[[Setting], Counterpart]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool's settings and what they are here.

    Attributes:
        otherwise: for settings that the table does not name.
        method: what a file trains.
        defaults: what it takes where a file is silent, of settings whose default is another one here.
        always: what each of its runs does and no setting says, by a few words.
        needed: what a run cannot do without -> what to write where the file does not say it.
    """

    name: str
    table: Mapping[str, Rule]
    otherwise: Rule
    method: Callable[[Mapping[str, Any]], Method]
    defaults: Mapping[str, Any]
    always: Mapping[str, Counterpart] = field(default_factory=dict)
    needed: Mapping[str, Any] = field(
        default_factory=lambda: {
            "model.base": "BASE",
            "data.train": "train.json",
            "training.output_dir": "runs/translated",
        }
    )


@dataclass(frozen=True)
class Row:
    """One line of the table above a translated file."""

    key: str
    value: Any
    counterpart: Counterpart
    is_in_file: bool = True

    @property
    def name(self) -> str:
        """The key; in brackets where the file does not hold it."""
        return self.key if self.is_in_file or self.key.startswith("(") else f"({self.key or 'not said'})"


@dataclass(frozen=True, kw_only=True)
class Translation:
    """Every setting's row, and the run that they make, by dotted names."""

    rows: tuple[Row, ...]
    settings: Mapping[str, Any]


def translate(tool: Tool, content: Mapping[str, Any], file: Path) -> Translation:
    """All settings of one file; null is silence. Raises UserError: a value that its setting cannot have."""
    stated = {key: value for key, value in content.items() if value is not None}
    settings = {**tool.defaults, **stated}
    method = tool.method(settings)

    def row(key: str, *, is_in_file: bool) -> Row:
        setting = Setting(key=key, value=settings[key], settings=settings, method=method, file=file)
        counterpart = tool.table.get(key, tool.otherwise)(setting)
        if method == "full" and counterpart.settings and counterpart.settings.keys() <= NOT_READ_BY_FULL:
            counterpart = Counterpart(note="not read by full")
        return Row(key, settings[key], counterpart, is_in_file)

    rows = [row(key, is_in_file=True) for key in stated]
    settled = {name for line in rows for name in line.counterpart.settings}
    rows += [Row(key, None, Counterpart(note="null: as if it were not there")) for key in content if key not in stated]
    defaults = [row(key, is_in_file=False) for key in tool.defaults if key not in stated]
    # A default whose setting the file says under another name (torch_dtype, dtype) is none of this run's.
    rows += [line for line in defaults if not line.counterpart.settings or line.counterpart.settings.keys() - settled]
    rows += [Row(key, None, counterpart, is_in_file=False) for key, counterpart in tool.always.items()]
    run: dict[str, Any] = {}
    for line in rows:  # what the file says comes first, and wins
        run = {**line.counterpart.settings, **run}
    note = "the file does not say it: put yours here"
    for name, value in tool.needed.items():
        if name not in run:
            run[name] = value
            rows.append(Row("", None, Counterpart({name: value}, note), is_in_file=False))
    return Translation(rows=tuple(rows), settings=run)


# -- rules --------------------------------------------------------------------------------------------------------


def is_on(value: Any) -> bool:
    """Whether a switch is on, as YAML or a command line says it."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "false", "no", "0", "off", "none", "null")
    return bool(value)


COMPUTED: dict[str, Rule] = {}
"""Rules that the tables name."""


def computed(rule: Callable[[Setting], Counterpart]) -> Rule:
    """Makes a function a rule that the tables name."""
    COMPUTED[rule.__name__.removeprefix("_")] = rule
    return rule


def of_adapters(rule: Rule, otherwise: str = "not read by full") -> Rule:
    """A rule for runs that train an adapter."""

    @wraps(rule)
    def checked(setting: Setting) -> Counterpart:
        return Counterpart(note=otherwise) if setting.method == "full" else rule(setting)

    return checked


def is_llava(checkpoint: object) -> bool:
    """Whether LLaVA's own builder takes a checkpoint for a LLaVA, which it tells by the name."""
    return "llava" in PurePosixPath(str(checkpoint)).name.lower()


def missing(why: str) -> Counterpart:
    """No counterpart."""
    return Counterpart(note=why, is_lost=True)


Entry = Mapping[str, Any]
OFF = Counterpart(note="off")


def _only(entry: Entry, setting: Setting) -> Counterpart:
    """A rule for these values; a file with any other is refused."""
    kinds, rule = entry["only"], entry["rule"]
    if setting.value not in kinds:
        raise setting.wrong(f"; there is a counterpart of {' and '.join(kinds) or 'supervised fine-tuning'} alone")
    return (COMPUTED[rule] if isinstance(rule, str) else rule_of(rule))(setting)


def _composed(entry: Entry, setting: Setting) -> Counterpart:
    """For settings of a base that the run puts together; a published LLaVA has its own."""
    if is_llava(setting.settings.get("model_name_or_path", "")):
        return Counterpart(note=entry.get("note", ""))
    return rule_of(entry["composed"])(setting)


def _words(entry: Entry, setting: Setting) -> Counterpart:
    """Another name, and other words for its values; a value that is not named has no counterpart."""
    if isinstance(setting.value, str | int | float) and setting.value in entry["values"]:
        return Counterpart({entry["words"]: entry["values"][setting.value]})
    return missing(entry["why"])


def _attention(entry: Entry, setting: Setting) -> Counterpart:
    """`model.attn_implementation`, under its own names and others; YAML reads an unquoted `off` as false."""
    others = entry["attention"]
    names = {name: name for name in ("sdpa", "eager", "flash_attention_2")}
    values = {**names, "auto": None, **others, **({False: others["off"]} if "off" in others else {})}
    why = f"there are {', '.join(names)}"
    return _words({"words": "model.attn_implementation", "values": values, "why": why}, setting)


def _quantised(entry: Entry, setting: Setting) -> Counterpart:
    """So many bits, of the kind that another setting says."""
    names = {("bnb", 4): "nf4", ("bitsandbytes", 4): "nf4", ("bnb", 8): "int8", ("hqq", 4): "hqq"}
    kind = str(setting.settings.get(entry["quantised"]) or "bnb").lower()
    if (kind, setting.number) in names:
        return Counterpart({"model.quantisation": names[kind, int(setting.number)]})
    return missing(f"{kind} of {setting.value} bits; there are nf4, int8 and hqq (4 bits)")


KINDS: Mapping[str, Callable[[Entry, Setting], Counterpart]] = {
    "only": _only,
    "rule": lambda entry, setting: COMPUTED[entry["rule"]](setting),
    "composed": _composed,
    "to": lambda entry, setting: Counterpart(
        {entry["to"].replace("*", setting.key): setting.value}, entry.get("note", "")
    ),
    "switch": lambda entry, setting: Counterpart({entry["switch"]: setting.is_on}),
    "opposite": lambda entry, setting: Counterpart({entry["opposite"]: not setting.is_on}, entry.get("note", "")),
    "words": _words,
    "where_on": lambda entry, setting: Counterpart(entry["where_on"], entry.get("note", "")) if setting.is_on else OFF,
    "same": lambda entry, setting: Counterpart(note=entry["same"]),
    "lost": lambda entry, setting: missing(entry["lost"]),
    "unless_off": lambda entry, setting: missing(entry["unless_off"]) if setting.is_on else OFF,
    "usual": lambda entry, setting: Counterpart() if setting.value == entry["usual"] else missing(entry["why"]),
    "attention": _attention,
    "quantised": _quantised,
}
"""What an entry of `tables.yaml` may be, which explains each; the first that it holds counts."""


def rule_of(entry: Entry) -> Rule:
    """The rule that an entry stands for."""
    return partial(KINDS[next(kind for kind in KINDS if kind in entry)], entry)


# -- text ---------------------------------------------------------------------------------------------------------


def table(translation: Translation) -> Iterator[str]:
    """A line a setting: its name and value there, and what it is here. Names in brackets are not in the file."""
    rows = [
        (row.name, "" if row.value is None else shown_text(_plain(row.value), 44), row.counterpart)
        for row in translation.rows
    ]
    first = min(max((len(name) for name, _, _ in rows), default=0), 34)
    second = max((len(value) for _, value, _ in rows), default=0)
    for name, value, counterpart in rows:
        note = counterpart.note
        if counterpart.settings:
            head = "; ".join(f"{name}: {_plain(value)}" for name, value in counterpart.settings.items())
            result = head + (f"  ({'IN PART: ' if counterpart.is_lost else ''}{note})" if note else "")
        else:
            head = "NO COUNTERPART" if counterpart.is_lost else "as here"
            result = f"{head}: {note}" if note else head
        yield f"{name:{first}}  {value:{second}}  {shown_text(result, 400)}".rstrip()


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def summary(translation: Translation) -> str:
    """How many settings are taken over, and which are not; the tool's defaults in brackets, as in the table."""
    count = sum(row.is_in_file for row in translation.rows)
    lost = [(row.name, bool(row.counterpart.settings)) for row in translation.rows if row.counterpart.is_lost]
    groups = {
        how: [name for name, in_part in lost if in_part is part]
        for how, part in (("without a counterpart", False), ("in part", True))
    }
    named = [f"{len(names)} {how}: {', '.join(names)}" for how, names in groups.items() if names]
    return f"{count} settings, {'; '.join(named) or 'each has its counterpart'}"


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Settings by dotted names as a run's YAML, sections in their usual order."""
    nested: dict[str, Any] = {section: {} for section in SECTIONS}
    for name, value in settings.items():
        *outer, last = name.split(".")
        section = nested
        for part in outer:
            section = section.setdefault(part, {})
        section[last] = json.loads(json.dumps(value, default=str))  # tuples and mappings of any kind as YAML's own
    used = {name: section for name, section in nested.items() if section != {}}
    return yaml.safe_dump(used, sort_keys=False, allow_unicode=True, width=110)


# -- names of layers as PEFT reads them, a list of endings or a regular expression, as our patterns of full names ----

TOPS = ("model", "transformer", "language_model", "vision_tower", "visual")
"""What stands at the top of models of transformers."""
MOST_PATTERNS = 64
_TOKEN = re.compile(
    r"(?P<open>\((?:\?:)?(?!\?))|(?P<bar>\|)|(?P<many>(?:\.|\\d)[*+]\??)|"
    r"(?P<single>\)|\\d|\\\.|\.|[\w-]|\[\^?[\w-]+\])(?P<optional>\?)?"
)
_GLOBS = {".*": "*", ".+": "?*", "\\d+": "[0-9]*", "\\d": "[0-9]", "\\.": ".", ".": "?"}
_GROUP = re.compile(r"\(([^()]*)\)")


def globs_of_endings(names: Iterable[str]) -> list[str]:
    """PEFT's list: a name that it equals, or that it ends with behind a dot."""

    def is_full(name: str) -> bool:  # from the model's top, with a layer's number, or the head, which stands at the top
        parts = name.split(".")
        return name == "lm_head" or (parts[0] in TOPS and any(part.isdecimal() for part in parts))

    return [name if is_full(name) else f"*.{name}" for name in names]


def globs_of_expression(expression: str) -> list[str]:
    """A regular expression that has to fit a whole name, as patterns that hit the same names.

    Read are texts, `.`, `.*`, `.+`, `\\d`, `\\d+`, classes, groups of choices and `?`.

    Raises: ValueError where it cannot be said so; the message is the part that cannot.
    """
    text, index, written = expression.removeprefix("^").removesuffix("$"), 0, ""
    while index < len(text):
        token = _TOKEN.match(text, index)
        glob = None if token is None else _glob(token)
        if token is None or glob is None:
            raise ValueError(text[index:])
        written, index = written + glob, token.end()
    waiting, globs = [written], list[str]()
    while waiting:
        pattern = waiting.pop(0)
        if group := _GROUP.search(pattern):
            start, end = group.span()
            waiting = [pattern[:start] + choice + pattern[end:] for choice in group[1].split("|")] + waiting
        elif "(" in pattern or ")" in pattern:
            raise ValueError("brackets that do not match")
        else:
            globs += [re.sub(r"\*+", "*", glob) for glob in pattern.split("|")]
        if len(waiting) + len(globs) > MOST_PATTERNS:
            raise ValueError(f"more than {MOST_PATTERNS} patterns")
    return list(dict.fromkeys(globs))


def _glob(token: re.Match[str]) -> str | None:
    """A token as it is in a pattern, with choices in brackets; None for what patterns cannot say."""
    if token["open"] or token["bar"]:
        return token[0][0]
    if token["many"]:
        return _GLOBS.get(token["many"].removesuffix("?"))
    single = token["single"]
    glob = _GLOBS.get(single, single.replace("[^", "[!"))
    if not token["optional"]:
        return glob
    return "|)" if single == ")" else f"({glob}|)"
