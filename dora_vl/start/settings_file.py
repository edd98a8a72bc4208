"""Whose settings a file holds, and what they are: YAML, JSON, or the one command of a script that trains."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from yaml import YAMLError, safe_load

from dora_vl.errors import UserError, one_line, shown, shown_names
from dora_vl.training.settings_files import SECTIONS, TELLING, refuse_untranslated

TOOLS = ("llama-factory", "trl", "ms-swift", "llava", "peft")
"""Those with a table."""
PROGRAM, LAUNCHER = "(program)", "(launcher)"
"""Keys under which a script's program stands, and what starts it."""
LARGEST_FILE = 4 << 20
"""Bytes; settings are short, and a file of weights given by mistake is not read."""
CONFIG_OPTION = "config"

PROGRAMS: Sequence[tuple[str, str, str]] = (
    ("llama-factory", "llamafactory-cli", "train"),
    ("llama-factory", "lmf", "train"),
    ("trl", "trl", "sft"),
    ("ms-swift", "swift", "sft"),
    ("ms-swift", "swift/cli/sft.py", ""),
    *(("llava", f"llava/train/{name}.py", "") for name in ("train", "train_mem", "train_xformers")),
    *(("llava", f"llava/train/{name}.py", "") for name in ("train_dora", "train_mem_dora")),
    ("trl", "sft.py", ""),
    ("trl", "sft_vlm.py", ""),
    ("llama-factory", "src/train.py", ""),
    ("llama-factory", "src/train_bash.py", ""),
)
"""Tool, how the path of its program ends, and the verb behind it; the first that fits counts."""

_ASSIGNED = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)")
_SUM = re.compile(r"\$\(\(?\s*(?:expr\s+)?(\d+)\s*\\?([-+*/])\s*(\d+)\s*\)?\)")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))")


@dataclass(frozen=True, kw_only=True)
class _Command:
    """One command line, and what stands before it as NAME=VALUE."""

    words: tuple[str, ...]
    environment: Mapping[str, str]


def read_settings(path: Path, tool: str | None = None) -> tuple[str, dict[str, Any]]:
    """The tool's name, a member of `TOOLS`, and the file's settings.

    Args:
        tool: whose they are, where that is known.

    Raises:
        UserError: it is no file of settings, of no tool that is known, or of ours.
    """
    text = _text(path)
    settings = _mapping(path, text)
    if settings is None:
        return _of_script(path, text, tool)
    if any(isinstance(settings.get(name), Mapping) for name in SECTIONS):
        raise UserError(f"{path}: a run of dora_vl already")
    return tool or _likely_tool(path, settings), settings


def _text(path: Path) -> str:
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it, such as its adapter_config.json")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes: no file of settings")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text; settings are YAML, JSON or a shell script") from None


def _mapping(path: Path, text: str) -> dict[str, Any] | None:
    """The content of YAML or JSON; None where it is neither."""
    try:
        content = json.loads(text) if path.suffix == ".json" else safe_load(text)
    except (ValueError, YAMLError, RecursionError) as error:
        if path.suffix in (".json", ".yaml", ".yml"):
            raise UserError(f"{path}: no {path.suffix[1:].upper()}: {one_line(str(error), 200)}") from None
        return None
    if isinstance(content, Mapping) and all(isinstance(key, str) for key in content):
        return {key: scalar(value) if isinstance(value, str) else value for key, value in content.items()}
    return None


def _likely_tool(path: Path, settings: Mapping[str, Any]) -> str:
    refuse_untranslated(path, settings)
    likely = max(TOOLS, key=lambda name: len(TELLING[name] & settings.keys()))
    if TELLING[likely] & settings.keys():
        return likely
    raise UserError(
        f"{path}: its settings ({shown_names(settings)}) are of no tool that is known here; --from says whose they "
        f"are: {', '.join(TOOLS)}"
    )


def _of_script(path: Path, text: str, tool: str | None) -> tuple[str, dict[str, Any]]:
    """The one command of a script that trains, with the script's own variables filled in."""
    try:
        starts = [(command, *start) for command in _commands(text) if (start := _program(command.words)) is not None]
    except ValueError as error:
        raise UserError(f"{path}: no shell script: {error}") from None
    if not starts:
        raise UserError(
            f"{path}: neither settings (YAML, JSON) nor a command that trains with a tool that is known here: "
            f"{', '.join(TOOLS)}"
        )
    if len(starts) > 1:
        lines = "; ".join(shlex.join(command.words[: at + 1])[:60] for command, at, _, _ in starts)
        raise UserError(f"{path}: {len(starts)} commands that train ({lines}); keep one in a file")
    command, at, rest, found_tool = starts[0]
    settings = options(rest, path) if not rest or rest[0].startswith("--") else _positional(path, rest)
    if (named := settings.pop(CONFIG_OPTION, None)) is not None:
        settings = {**_file_of(path, str(named)), **settings}
    around = {**{name: scalar(value) for name, value in command.environment.items()}, PROGRAM: command.words[at]}
    if at:
        around[LAUNCHER] = shlex.join(command.words[:at])
    return tool or found_tool, {**around, **settings}


def _program(words: Sequence[str]) -> tuple[int, list[str], str] | None:
    """Where a command's program stands, the words behind it, and whose it is."""
    for at, word in enumerate(words):
        for tool, ending, verb in PROGRAMS:
            fits = f"/{word}".endswith(f"/{ending}") if not verb else PurePosixPath(word).name == ending
            if fits and (not verb or list(words[at + 1 : at + 2]) == [verb]):
                return at, list(words[at + (2 if verb else 1) :]), tool
    return None


def _positional(path: Path, rest: Sequence[str]) -> dict[str, Any]:
    """`llamafactory-cli train FILE key=value --key value`: the file's settings, and those behind it."""
    settings = _file_of(path, rest[0])
    for place, word in enumerate(rest[1:], start=1):
        if word.startswith("--"):
            return {**settings, **options(rest[place:], path)}
        key, _, value = word.partition("=")
        settings[key] = scalar(value)
    return settings


def _file_of(script: Path, name: str) -> dict[str, Any]:
    """The settings file that a command names: from here, or from the script's folder or one above it."""
    candidates = (Path(name), *(folder / name for folder in script.resolve().parents[:4]))
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise UserError(f"{script}: it takes its settings from {name}, which is not there; translate that file")
    settings = _mapping(path, _text(path))
    if settings is None:
        raise UserError(f"{path}: no mapping of settings")
    return settings


def _commands(text: str) -> Iterator[_Command]:
    """Every command of a script, its lines joined and its variables filled in where the script sets them.

    Raises: ValueError where a line's quotes do not close.
    """
    variables: dict[str, str] = {}
    for words in _lines(text, variables):
        assigned = [_ASSIGNED.fullmatch(word) for word in words if word != "export"]
        if words and all(assigned):
            variables |= {match[1]: match[2] for match in assigned if match}
            continue
        for part in _parts(words):
            before = next((at for at, word in enumerate(part) if not _ASSIGNED.fullmatch(word)), len(part))
            environment = dict(word.split("=", 1) for word in part[:before])
            if part[before:]:
                yield _Command(words=tuple(part[before:]), environment=environment)


def _lines(text: str, variables: Mapping[str, str]) -> Iterator[list[str]]:
    """The words of each line; one whose quotes are open goes on in the next."""
    waiting, problem = "", None
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        waiting = f"{waiting}\n{line}" if problem else line
        filled = _VARIABLE.sub(partial(_filled, variables=variables), waiting)
        try:
            words = shlex.split(_SUM.sub(_summed, filled), comments=True)
        except ValueError as error:
            problem = error
            continue
        problem = None
        yield words
    if problem:
        raise problem


def _summed(match: re.Match[str]) -> str:
    """`$(expr 16 / 4)` and `$((16 / 4))`, as a shell counts."""
    left, sign, right = int(match[1]), match[2], int(match[3])
    if sign == "/":
        return str(left // right) if right else match[0]
    return str({"*": left * right, "+": left + right, "-": left - right}[sign])


def _filled(match: re.Match[str], variables: Mapping[str, str]) -> str:
    name, default = match[1] or match[3], match[2]
    return variables.get(name, match[0] if default is None else default)


def _parts(words: Sequence[str]) -> Iterator[list[str]]:
    """The commands of one line."""
    part: list[str] = []
    for word in words:
        if word in ("&&", ";", "||", "|", "&"):
            yield part
            part = []
        else:
            part.append(word)
    yield part


def options(words: Sequence[str], file: Path) -> dict[str, Any]:
    """`--name value`, `--name=value`, `--name` alone (true) and `--name a b`, with each value as YAML reads it.

    Raises:
        UserError: a word before any option, or a variable that the script does not set.
    """
    values: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            values[name] = [value] if equals else []
        elif not name:
            raise UserError(f"{file}: {shown(word)} stands before the first option of the command")
        elif _VARIABLE.search(word):
            raise UserError(f"{file}: --{name} is {shown(word)}, which the script does not set; write its value in")
        else:
            values[name].append(word)
    read = {name: [scalar(word) for word in several] for name, several in values.items()}
    return {
        name: True if not several else several[0] if len(several) == 1 else several for name, several in read.items()
    }


def scalar(text: str) -> Any:
    """A word as YAML reads it, `True` and `False` of Python included, and numbers such as 2e-4."""
    try:
        value = safe_load(text)
    except YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value) if re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", value, re.IGNORECASE) else value
        except ValueError:
            return value
    return value if value is not None else text
