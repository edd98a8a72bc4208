"""The commands that the documentation shows, and what is wrong with one: parsed as the program would, nothing run."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from textwrap import dedent
from typing import Any, NoReturn
from unittest import mock

from dora_vl.errors import UserError
from dora_vl.run.settings import CommonsenseRunConfig, RunConfig, VlBartRunConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "configs/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
OUTPUTS = ("python", "yaml", "json", "diff", "toml", "html")
"""Fences in these languages hold no commands."""
FOREIGN = ("git", "vllm", "llama-mtmd-cli", "curl", "tensorboard", "trackio", "docker", "accelerate", "trl", "swift",
           "llamafactory-cli", "xdg-open", "mkdir", "cp", "ls", "llamafactory", "zensical", "mkdocs")  # fmt: skip
"""Programs of others, of whose options nothing is known here."""
USERS_FILES = re.compile(r"(?!configs/)[\w./\-]+\.yaml|[A-Z]+")
"""A recipe that the reader has: a file, and none of the shipped ones; or a word in capitals that stands for one."""
_FENCE = re.compile(r"^( *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^\1```", re.MULTILINE | re.DOTALL)
STAND_INS = {
    RunConfig: ("--model.base", "BASE", "--data.train", "FILE"),
    CommonsenseRunConfig: ("--model.base", "BASE", "--data.train", '["FILE"]'),
    VlBartRunConfig: ("--model.base", "BASE", "--data.tasks", "{}"),
}
"""What a run cannot do without, where the reader's own file says it."""
TASKS: dict[str, type[Any]] = {
    "llava_instruct": RunConfig,
    "commonsense": CommonsenseRunConfig,
    "vlbart_image": VlBartRunConfig,
    "vlbart_video": VlBartRunConfig,
}


@dataclass(frozen=True)
class Documented:
    """A command; one in running text is not whole: what it needs may be left out."""

    page: str
    words: tuple[str, ...]
    is_whole: bool = True

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def blocks(text: str, *languages: str) -> Iterator[str]:
    """What stands in a page's fences of these languages."""
    return (dedent(fence["body"]) for fence in _FENCE.finditer(text) if fence["language"] in languages)


def commands_of(page: Path) -> list[Documented]:
    """The commands in a page's fences, and those in its running text."""
    text = page.read_text(encoding="utf-8")
    lines: list[tuple[str, bool]] = []
    for every_line, languages in ((True, ("bash", "sh", "console", "shell")), (False, ("", "text"))):
        for body in blocks(text, *languages):
            lines += [(line, every_line) for line in body.replace("\\\n", " ").splitlines()]
    commands = [
        Documented(page.name, tuple(words))
        for line, every_line in lines
        for words in _split(line.removeprefix("$ "))
        if every_line or words[0].removeprefix(".venv/bin/") in (*CHECKS, *FOREIGN)
    ]
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", _FENCE.sub("", text)):
        for words in _split(re.sub(r"\[[^\]]*\]|\.\.\.", " ", " ".join(span.split()))):
            if words[0].removeprefix(".venv/bin/") in CHECKS and len(words) > 1:
                commands.append(Documented(page.name, tuple(words), is_whole=False))
    return commands


def _split(line: str) -> Iterator[list[str]]:
    """The commands of a line, without a loop's own words and the variables before them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    try:
        words = [*lexer, ";"]
    except ValueError:  # an apostrophe: no command
        return
    command: list[str] = []
    for word in words:
        if not word or not set(word) <= set(";&|"):
            if command or not (word in ("do", "done") or re.fullmatch(r"[A-Z_]+=.*", word)):
                command.append(word)
            continue
        if command and command[0] not in ("for", "cd", "export", "..."):
            yield command
        command = []


# -- what is wrong with one -------------------------------------------------------------------------------------


class _Parsed(Exception):
    """The program's own parser took the command."""

    def __init__(self, options: argparse.Namespace, unknown: Sequence[str]) -> None:
        super().__init__()
        self.options, self.unknown = options, unknown


def complaint(command: Documented) -> str | None:
    """What the program would say of it; None: nothing."""
    program, *words = command.words
    check = CHECKS.get(program.removeprefix(".venv/bin/"))
    try:
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
    from dora_vl.training.show_command import own_options

    if words and words[0] in ("--help", "--version"):
        return
    parsed = _parse(lambda: cli.main(list(words)), words, is_whole)
    if parsed is None:
        return
    verb, options, settings = words[0], parsed.options, list(parsed.unknown)
    if verb in ("train", "show", "estimate"):
        task = {"vlbart": "vlbart_image", "commonsense": "commonsense"}.get(Path(options.config).parent.name)
        settings += getattr(options, "settings", None) or []
        if verb == "show":
            shown, settings = own_options(settings)
            task = shown.task or task
        check_settings(TASKS[task or "llava_instruct"], ["--config", options.config, *settings], is_whole=True)
        return
    if verb == "prepare" and options.source.islower():
        assert options.source in SOURCES, f"there is no source {options.source}"
    if verb == "evaluate" and options.benchmarks is not None:
        for name in options.benchmarks.split(","):
            if not name.endswith(".yaml"):
                find_benchmark(name.partition("=")[0].partition(":")[0])


def check_python(words: Sequence[str], is_whole: bool) -> None:
    """`python SCRIPT ...` and `python -m MODULE ...`."""
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
        return
    if words[0] == "-m":
        module, rest = words[1], words[2:]
        assert importlib.util.find_spec(module) is not None, f"there is no module {module}"
        if module in ("pip", "pytest", "http.server", "zensical", "mkdocs"):
            return
    else:
        assert (ROOT / words[0]).is_file(), f"there is no script {words[0]}"
        module, rest = words[0].removesuffix(".py").replace("/", "."), words[1:]
    task = module.removeprefix("tasks.")
    if module == "dora_vl.cli":
        check_dora_vl(rest, is_whole)
    elif task in TASKS:
        check_settings(TASKS[task], rest, is_whole=is_whole)
    else:
        beside = str((ROOT / words[0]).parent)
        with mock.patch.object(sys, "path", [beside, *sys.path]):  # a script finds what lies beside it
            main = getattr(importlib.import_module(module), "main", None)
            assert main is not None or not rest, f"{module} takes no options"
            if main is not None:
                _parse(main, rest, is_whole)


def check_deepspeed(words: Sequence[str], is_whole: bool) -> None:
    """`deepspeed [launcher's options] SCRIPT ...`, by DeepSpeed's own parser."""
    from deepspeed.launcher.runner import parse_args

    launched = _quietly(lambda: parse_args(list(words)))
    check_python([*(["-m"] if launched.module else []), launched.user_script, *launched.user_args], is_whole)


def check_torchrun(words: Sequence[str], is_whole: bool) -> None:
    """`torchrun [its options] -m MODULE ...`."""
    from torch.distributed.run import get_args_parser

    launched = _quietly(lambda: get_args_parser().parse_args(list(words)))
    script = [*(["-m"] if launched.module else []), launched.training_script]
    check_python([*script, *launched.training_script_args], is_whole)


def check_make(words: Sequence[str], is_whole: bool) -> None:
    """`make TARGET`, and variables that the Makefile has."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = r"^([A-Z]+) [?:]?=" if is_variable else r"^([a-z][\w\-]*):"
        assert name in re.findall(pattern, text, re.MULTILINE), f"the Makefile has no {name}"


def check_pip(words: Sequence[str], is_whole: bool) -> None:
    """`pip install 'dora-vl[extra]'`: the extra is there."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    extras = re.findall(r"^([a-z]+) = \[", text.split("\n[")[0], re.MULTILINE)
    assert words[0] == "install", f"pip {words[0]}"
    for names in re.findall(r"(?:dora-vl|\.)\[([\w,\-]+)\]", " ".join(words)):
        unknown = set(names.split(",")) - set(extras)
        assert not unknown, f"pyproject.toml has no extra {sorted(unknown)}"


CHECKS: dict[str, Callable[[Sequence[str], bool], None]] = {
    "dora-vl": check_dora_vl,
    "python": check_python,
    "python3": check_python,
    "deepspeed": check_deepspeed,
    "torchrun": check_torchrun,
    "make": check_make,
    "pip": check_pip,
}


def check_settings(kind: type[Any], words: Sequence[str], *, is_whole: bool) -> None:
    """A run's settings: the recipe and its variant are there, every option is a setting and has a value of its type.

    A reader's own file stands for whatever a run needs.
    """
    from dora_vl.run.reading import read_settings

    given = [word for word in words if word not in ("--help", "--print_config")]
    own = next((at for at, word in enumerate(given) if USERS_FILES.fullmatch(word) and not (ROOT / word).is_file()), 0)
    if own:
        del given[own - 1 : own + 1]
    if given == ["--config"]:  # of a shorthand: what follows stands elsewhere
        return
    if own or "--help" in words or not is_whole:
        given = [*STAND_INS[kind], *given]
    read_settings(given, kind)


def _parse(main: Callable[[], Any], words: Sequence[str], is_whole: bool) -> _Parsed | None:
    """What the program's parser makes of the words; the program goes no further. None where it is only asked for help.

    Raises: AssertionError with the parser's complaint; one about what is left out counts of whole commands alone.
    """
    if "--help" in words or "-h" in words:
        return None
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def known(self: argparse.ArgumentParser, given: Sequence[str] | None = None, *_: Any) -> NoReturn:
        raise _Parsed(*parse_known_args(self, given))

    def every(self: argparse.ArgumentParser, given: Sequence[str] | None = None, *_: Any) -> NoReturn:
        options, unknown = parse_known_args(self, given)
        if unknown:
            self.error(f"unrecognized arguments: {shlex.join(unknown)}")
        raise _Parsed(options, ())

    patched = mock.patch.multiple(argparse.ArgumentParser, parse_args=every, parse_known_args=known)
    try:
        with patched, mock.patch.object(sys, "argv", ["program", *words]):
            _quietly(main)
    except _Parsed as parsed:
        return parsed
    except AssertionError as error:
        if is_whole or not re.search(r"(are|is) required|expected one argument", str(error)):
            raise
        return None
    raise AssertionError("it has no parser of its options")


def _quietly(work: Callable[[], Any]) -> Any:
    """Runs it; a parser's complaint, or any other end with a status, becomes the error."""
    errors = StringIO()
    try:
        with redirect_stderr(errors), redirect_stdout(StringIO()), mock.patch.dict(os.environ):
            return work()
    except SystemExit:
        message = errors.getvalue().strip().splitlines()[-1:] or ["it ends at once"]
        raise AssertionError(message[0]) from None
