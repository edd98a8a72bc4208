"""The commands that the documentation shows, and what is wrong with one: parsed as the program would, nothing run."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from textwrap import dedent
from typing import Any, NoReturn
from unittest import mock

from dora_vl.errors import UserError

ROOT = Path(__file__).parents[1]
OUTPUTS = ("python", "yaml", "json", "diff", "toml", "html")
"""Fences in these languages hold no commands."""
SHELL = ("bash", "sh", "console", "shell")
"""In these every line must be one."""
FOREIGN = ("git", "vllm", "llama-mtmd-cli", "curl", "tensorboard", "trackio", "docker", "accelerate", "trl", "swift",
           "llamafactory-cli", "xdg-open", "mkdir", "cp", "ls", "llamafactory", "zensical", "mkdocs")  # fmt: skip
"""Programs of others, of whose options nothing is known here."""
OURS = ("dora-vl", "python", "python3", "deepspeed", "torchrun", "make", "pip")
USERS_FILES = re.compile(r"(?!configs/)[\w./\-]+\.yaml|[A-Z]+")
"""A recipe that the reader has: a file, and none of the shipped ones; or a word in capitals that stands for one."""
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Documented:
    """A command and where it stands."""

    file: Path
    line: int
    words: tuple[str, ...]
    is_whole: bool = True
    """False: in running text, where what it needs may be left out."""

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}: {shlex.join(self.words)}"


def documented_files() -> list[Path]:
    """Every page that shows commands."""
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "configs" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]


def commands_of(file: Path) -> list[Documented]:
    """The commands in a page's fences, and those in its running text."""
    text = file.read_text(encoding="utf-8")
    found: list[Documented] = []
    for fence in _FENCE.finditer(text):
        language = fence["language"]
        if language in OUTPUTS:
            continue
        first = text.count("\n", 0, fence.start("body")) + 1
        for offset, line in _joined(fence["body"]):
            for words in _parts(line, every_line=language in SHELL):
                found.append(Documented(file, first + offset, tuple(words)))
    plain = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    for span in _SPAN.finditer(plain):
        words = _words(re.sub(r"\[[^\]]*\]|\.\.\.", " ", " ".join(span[1].split())))
        if words and _name(words[0]) in OURS and len(words) > 1:
            found.append(Documented(file, plain.count("\n", 0, span.start()) + 1, tuple(words), is_whole=False))
    return found


def _joined(body: str) -> Iterator[tuple[int, str]]:
    """A fence's lines with those that a backslash continues, and where each begins."""
    whole, start = "", 0
    for number, line in enumerate(body.splitlines()):
        start = start if whole else number
        whole += line
        if whole.endswith("\\"):
            whole = f"{whole[:-1]} "
            continue
        yield start, whole
        whole = ""


def _parts(line: str, *, every_line: bool) -> Iterator[list[str]]:
    """The commands of a line; `for ...; do` and `done` are taken off."""
    words = _words(line.removeprefix("$ "))
    if not words or not (every_line or _is_command(words)):
        return
    part: list[str] = []
    for word in [*words, "&&"]:
        ends = word in ("&&", ";", "|", "&", "||") or word.endswith(";")
        if word not in ("&&", ";", "|", "&", "||"):
            part.append(word.removesuffix(";"))
        if ends:
            cleaned = [one for one in part if one not in ("do", "done")]
            cleaned = cleaned[next((n for n, one in enumerate(cleaned) if not re.fullmatch(r"[A-Z_]+=.*", one)), 0) :]
            if cleaned and cleaned[0] not in ("for", "cd", "export", "..."):
                yield cleaned
            part = []


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return []


def _is_command(words: Sequence[str]) -> bool:
    first = words[1] if words[0] == "for" and "do" in words else words[0]
    return _name(words[0]) in (*OURS, *FOREIGN) or (words[0] == "for" and bool(first))


def _name(word: str) -> str:
    return word.removeprefix(".venv/bin/")


# -- what is wrong with one -------------------------------------------------------------------------------------


class _Parsed(Exception):
    """The program's own parser took the command."""


def complaint(command: Documented) -> str | None:
    """What the program would say of it; None: nothing."""
    program, *words = command.words
    try:
        check = CHECKS.get(_name(program))
        if check is not None:
            check(words, command.is_whole)
        elif program not in FOREIGN:
            return f"{program} is no program that is known here"
    except (UserError, ValueError, AssertionError) as error:
        return str(error)
    return None


def check_dora_vl(words: Sequence[str], is_whole: bool) -> None:
    """`dora-vl VERB ...`: the verb, its options, and the names that some of them take from a table."""
    from dora_vl import cli
    from dora_vl.data.benchmarks.table import SOURCES
    from dora_vl.evaluation.benchmarks import find_benchmark

    if words and words[0] in ("--help", "--version"):
        return
    options = _parse(lambda: cli.main(list(words)), words, is_whole)
    if options is None:
        return
    if words[0] == "prepare" and options.source.islower():
        assert options.source in SOURCES, f"there is no source {options.source}"
    if words[0] == "evaluate" and options.benchmarks is not None:
        for name in options.benchmarks.split(","):
            if not name.endswith(".yaml"):
                find_benchmark(name.partition("=")[0].partition(":")[0])
    if words[0] == "estimate":
        from dora_vl.training.estimate_command import add_arguments

        parser = argparse.ArgumentParser()
        add_arguments(parser)
        own, settings = parser.parse_known_args(list(words[1:]))
        check_settings("llava_instruct", ["--config", own.config, *settings])
    if words[0] == "train":
        check_settings(_task_of(options.config), ["--config", options.config, *options.settings])
    if words[0] == "show":
        from dora_vl.training.show_command import own_options

        own, settings = own_options(options.settings)
        check_settings(own.task or _task_of(options.config), ["--config", options.config, *settings])


def _task_of(config: str) -> str:
    """Whose settings a recipe holds, by its folder; a reader's own are a vision-language model's."""
    return {"vlbart": "vlbart_image", "commonsense": "commonsense"}.get(Path(config).parent.name, "llava_instruct")


def check_python(words: Sequence[str], is_whole: bool) -> None:
    """`python SCRIPT ...` and `python -m MODULE ...`."""
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
        return
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None, f"there is no module {words[1]}"
        if words[1] in ("pip", "pytest", "http.server", "zensical", "mkdocs"):
            return
        module, rest = words[1], words[2:]
    else:
        assert (ROOT / words[0]).is_file(), f"there is no script {words[0]}"
        module, rest = words[0].removesuffix(".py").replace("/", "."), words[1:]
    if module in ("dora_vl.cli",):
        return check_dora_vl(rest, is_whole)
    if module.startswith("tasks.") and module.removeprefix("tasks.") in settings_of_tasks():
        return check_settings(module.removeprefix("tasks."), rest, is_whole=is_whole)
    beside = str((ROOT / words[0]).parent) if words[0] != "-m" else str(ROOT)
    with mock.patch.object(sys, "path", [beside, *sys.path]):  # a script finds what lies beside it
        main = getattr(importlib.import_module(module), "main", None)
        if main is not None or rest:
            assert main is not None, f"{module} takes no options"
            _parse(main, rest, is_whole)
    return None


def check_deepspeed(words: Sequence[str], is_whole: bool) -> None:
    """`deepspeed [launcher's options] SCRIPT ...`, by DeepSpeed's own parser."""
    from deepspeed.launcher.runner import parse_args

    launched = _quietly(lambda: parse_args(list(words)))
    module = ["-m", launched.user_script] if launched.module else [launched.user_script]
    check_python([*module, *launched.user_args], is_whole)


def check_torchrun(words: Sequence[str], is_whole: bool) -> None:
    """`torchrun [its options] -m MODULE ...`."""
    from torch.distributed.run import get_args_parser

    launched = _quietly(lambda: get_args_parser().parse_args(list(words)))
    module = ["-m", launched.training_script] if launched.module else [launched.training_script]
    check_python([*module, *launched.training_script_args], is_whole)


def check_make(words: Sequence[str], is_whole: bool) -> None:
    """`make TARGET`, and variables that the Makefile has."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z][\w\-]*):", text, re.MULTILINE)
    for word in words:
        name, is_variable, _ = word.partition("=")
        known = re.findall(r"^([A-Z]+) [?:]?=", text, re.MULTILINE) if is_variable else targets
        assert name in known, f"the Makefile has no {name}"


def check_pip(words: Sequence[str], is_whole: bool) -> None:
    """`pip install 'dora-vl[extra]'`: the extra is there."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    extras = re.findall(r"^([a-z]+) = \[", text.split("\n[")[0], re.MULTILINE)
    assert words[0] == "install", f"pip {words[0]}"
    for word in words[1:]:
        for named in re.findall(r"(?:dora-vl|\.)\[([\w,\-]+)\]", word):
            unknown = set(named.split(",")) - set(extras)
            assert not unknown, f"pyproject.toml has no extra {sorted(unknown)}"


CHECKS: dict[str, Callable[[Sequence[str], bool], Any]] = {
    "dora-vl": check_dora_vl,
    "python": check_python,
    "python3": check_python,
    "deepspeed": check_deepspeed,
    "torchrun": check_torchrun,
    "make": check_make,
    "pip": check_pip,
}


def settings_of_tasks() -> dict[str, type[Any]]:
    """The scripts of tasks/ that train -> the dataclass of their settings."""
    from dora_vl.run.settings import CommonsenseRunConfig, RunConfig, VlBartRunConfig

    return {
        "llava_instruct": RunConfig,
        "commonsense": CommonsenseRunConfig,
        "vlbart_image": VlBartRunConfig,
        "vlbart_video": VlBartRunConfig,
    }


def check_settings(task: str, words: Sequence[str], *, is_whole: bool = True) -> None:
    """A run's settings: the recipe and its variant are there, every option is a setting and has a value of its type.

    A reader's own file stands for whatever a run needs.
    """
    from dora_vl.run.reading import read_settings

    kind = settings_of_tasks()[task]
    given = [word for word in words if word not in ("--help", "--print_config")]
    own_file = any(USERS_FILES.fullmatch(word) and not (ROOT / word).is_file() for word in given)
    if own_file:
        at = next(n for n, word in enumerate(given) if USERS_FILES.fullmatch(word))
        given = [*given[: at - 1], *given[at + 1 :]]
    if given == ["--config"]:  # of a shorthand: what follows stands elsewhere
        return
    if own_file or "--help" in words or not is_whole:
        given = [*STAND_INS[kind.__name__], *given]
    read_settings(given, kind)


STAND_INS = {
    "RunConfig": ("--model.base", "BASE", "--data.train", "FILE"),
    "CommonsenseRunConfig": ("--model.base", "BASE", "--data.train", '["FILE"]'),
    "VlBartRunConfig": ("--model.base", "BASE", "--data.tasks", "{}"),
}
"""What a run cannot do without, where the reader's own file says it."""


def _parse(main: Callable[[], Any], words: Sequence[str], is_whole: bool) -> argparse.Namespace | None:
    """What the program's parser makes of the words; the program goes no further. None where it is only asked for help.

    Raises: AssertionError with the parser's complaint; one about what is left out counts of whole commands alone.
    """
    if "--help" in words or "-h" in words:
        return None
    parsed: list[argparse.Namespace] = []
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def whole(self: argparse.ArgumentParser, given: Sequence[str] | None = None, *_: Any) -> NoReturn:
        options, unknown = parse_known_args(self, given)
        if unknown:
            self.error(f"unrecognized arguments: {shlex.join(unknown)}")
        parsed.append(options)
        raise _Parsed

    def known(self: argparse.ArgumentParser, given: Sequence[str] | None = None, *_: Any) -> NoReturn:
        parsed.append(parse_known_args(self, given)[0])
        raise _Parsed

    patched = mock.patch.multiple(argparse.ArgumentParser, parse_args=whole, parse_known_args=known)
    try:
        with patched, mock.patch.object(sys, "argv", ["program", *words]):
            _quietly(main)
    except _Parsed:
        return parsed[0]
    except AssertionError as error:
        if is_whole or not re.search(r"(are|is) required|expected one argument", str(error)):
            raise
        return None
    raise AssertionError("it has no parser of its options")


def _quietly(work: Callable[[], Any]) -> Any:
    """Runs it; a parser's complaint, or any other end with a status, becomes the error."""
    said = StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(StringIO()), mock.patch.dict(os.environ):
            return work()
    except SystemExit:
        message = said.getvalue().strip().splitlines()[-1:] or ["it ends at once"]
        raise AssertionError(message[0]) from None


def blocks(file: Path, language: str) -> Iterator[tuple[int, str]]:
    """What stands in a page's fences of a language, each with its line."""
    text = file.read_text(encoding="utf-8")
    for fence in _FENCE.finditer(text):
        if fence["language"] == language:
            yield text.count("\n", 0, fence.start("body")) + 1, dedent(fence["body"])


def unknown_settings(content: Mapping[str, Any], known: Iterable[str], before: str = "") -> list[str]:
    """Dotted names of a YAML's keys that no run has; below a setting that is a mapping itself any key may stand."""
    known = list(known)
    found: list[str] = []
    for key, value in content.items():
        name = f"{before}{key}"
        if name == "variants":
            found += [one for variant in value.values() for one in unknown_settings(variant, known)]
        elif not any(one.startswith(f"{name}.") for one in known):
            found += [] if name in known else [name]
        elif isinstance(value, dict):
            found += unknown_settings(value, known, f"{name}.")
    return found


def missing_names(code: str) -> list[str]:
    """What a block of Python imports from this project and is not there."""
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").partition(".")[0] in ("dora_vl", "data_prep", "tasks")]
    return [
        f"{node.module}.{name.name}"
        for node in ours
        for name in node.names
        if not hasattr(importlib.import_module(str(node.module)), name.name)
    ]
