"""Whose settings a file holds, and what they are: YAML, JSON, or the one command of a script that trains."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from yaml import YAMLError, safe_load

from dora_vl.errors import UserError, one_line, shown, shown_names
from dora_vl.run.reading import SECTIONS, TELLING, refuse_other_tools

TOOLS = ("llama-factory", "trl", "ms-swift", "llava", "peft")
PROGRAM, LAUNCHER = "(program)", "(launcher)"
"""Keys under which a script's program stands, and what starts it."""
LARGEST_FILE = 4 << 20
"""Bytes; a file of weights given by mistake is not read."""
PROGRAMS: Sequence[tuple[str, str, str]] = (
    ("llama-factory", "llamafactory-cli", "train"),
    ("llama-factory", "lmf", "train"),
    ("trl", "trl", "sft"),
    ("ms-swift", "swift", "sft"),
    ("ms-swift", "swift/cli/sft.py", ""),
    *(("llava", f"llava/train/train{kind}.py", "") for kind in ("", "_mem", "_xformers", "_dora", "_mem_dora")),
    ("trl", "sft.py", ""),
    ("trl", "sft_vlm.py", ""),
    ("llama-factory", "src/train.py", ""),
    ("llama-factory", "src/train_bash.py", ""),
)
"""Tool, how the path of its program ends, and the verb behind it; the first that fits counts."""
OF_NVLABS = ("train_dora.py", "train_mem_dora.py")
"""LLaVA's programs that make an adapter a DoRA."""
_ASSIGNED = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)")
_SUM = re.compile(r"\$\(\(?\s*(?:expr\s+)?(\d+)\s*\\?([-+*/])\s*(\d+)\s*\)?\)")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))")


def read_settings(path: Path, tool: str | None = None) -> tuple[str, dict[str, Any]]:
    """The tool's name, a member of `TOOLS`, and the file's settings."""
    text = _text(path)
    settings = _mapping(path, text)
    if settings is None:
        return _of_script(path, text, tool)
    if any(isinstance(settings.get(name), Mapping) for name in SECTIONS):
        raise UserError(f"{path}: a run of dora_vl already")
    if tool is None:
        refuse_other_tools(path, settings, untranslated=True)
        tool = max(TOOLS, key=lambda name: len(TELLING[name] & settings.keys()))
        if not TELLING[tool] & settings.keys():
            names = shown_names(settings)
            raise UserError(
                f"{path}: its settings ({names}) are of no tool that is known here; --from says whose they are: "
                f"{', '.join(TOOLS)}"
            )
    return tool, settings


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


def _of_script(path: Path, text: str, tool: str | None) -> tuple[str, dict[str, Any]]:
    """The settings of the one command of a script that trains."""
    try:
        commands = list(_commands(text))
    except ValueError as error:
        raise UserError(f"{path}: no shell script: {error}") from None
    starts = [(words, variables, *start) for words, variables in commands if (start := _program(words)) is not None]
    if len(starts) != 1:
        result = "; ".join(shlex.join(words[: at + 1])[:60] for words, _, at, _, _ in starts)
        raise UserError(
            f"{path}: {len(starts)} commands that train ({result}); keep one in a file"
            if starts
            else f"{path}: neither settings (YAML, JSON) nor a command that trains with a tool that is known here: "
            f"{', '.join(TOOLS)}"
        )
    words, variables, at, rest, tool_of_program = starts[0]
    settings: dict[str, Any] = {}
    if rest and not rest[0].startswith("--"):  # llamafactory-cli train FILE key=value --key value
        settings = _file_of(path, rest.pop(0))
        while rest and not rest[0].startswith("--"):
            key, _, value = rest.pop(0).partition("=")
            settings[key] = scalar(value)
    settings |= options(rest, path)
    if (named := settings.pop("config", None)) is not None:
        settings = {**_file_of(path, str(named)), **settings}
    around = {**{name: scalar(value) for name, value in variables.items()}, PROGRAM: words[at]}
    if PurePosixPath(words[at]).name in OF_NVLABS:
        around["use_dora"] = True
    if at:
        around[LAUNCHER] = shlex.join(words[:at])
    return tool or tool_of_program, {**around, **settings}


def _program(words: Sequence[str]) -> tuple[int, list[str], str] | None:
    """Where a command's program stands, the words behind it, and whose it is."""
    for at, word in enumerate(words):
        for tool, ending, verb in PROGRAMS:
            if not verb and f"/{word}".endswith(f"/{ending}"):
                return at, list(words[at + 1 :]), tool
            if verb and PurePosixPath(word).name == ending and words[at + 1 : at + 2] == [verb]:
                return at, list(words[at + 2 :]), tool
    return None


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


def _commands(text: str) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The words of every command, with the script's variables filled in, and the NAME=VALUE before them.

    Raises: ValueError where a line's quotes do not close.
    """
    variables: dict[str, str] = {}
    for words in _lines(text, variables):
        assigned = [_ASSIGNED.fullmatch(word) for word in words if word != "export"]
        if words and all(assigned):
            variables |= {match[1]: match[2] for match in assigned if match}
            continue
        commands: list[list[str]] = [[]]
        for word in words:
            if word in ("&&", ";", "||", "|", "&"):
                commands.append([])
            else:
                commands[-1].append(word)
        for command in commands:
            before = next((at for at, word in enumerate(command) if not _ASSIGNED.fullmatch(word)), len(command))
            if command[before:]:
                yield command[before:], dict(word.split("=", 1) for word in command[:before])


def _lines(text: str, variables: Mapping[str, str]) -> Iterator[list[str]]:
    """The words of each line; one whose quotes are open goes on in the next."""

    def filled(match: re.Match[str]) -> str:
        return variables.get(match[1] or match[3], match[0] if match[2] is None else match[2])

    def computed(match: re.Match[str]) -> str:
        left, sign, right = int(match[1]), match[2], int(match[3])
        if sign == "/":
            return str(left // right) if right else match[0]
        return str({"*": left * right, "+": left + right, "-": left - right}[sign])

    waiting, problem = "", None
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        waiting = f"{waiting}\n{line}" if problem else line
        try:
            words, problem = shlex.split(_SUM.sub(computed, _VARIABLE.sub(filled, waiting)), comments=True), None
        except ValueError as error:
            problem = error
            continue
        yield words
    if problem:
        raise problem


def options(words: Sequence[str], file: Path) -> dict[str, Any]:
    """`--name value`, `--name=value`, `--name` alone (true) and `--name a b`, with each value as YAML reads it."""
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
    return {name: several if len(several) > 1 else several[0] if several else True for name, several in read.items()}


def scalar(text: str) -> Any:
    """A word as YAML reads it, `True` and `False` of Python included, and numbers such as 2e-4."""
    try:
        value = safe_load(text)
    except YAMLError:
        return text
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", value, re.IGNORECASE):
        return float(value)
    return text if value is None else value
