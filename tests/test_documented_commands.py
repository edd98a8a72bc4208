"""Every command that the documentation shows is one: the program's own parser takes it, and nothing is run.

Those of docs/first_hour.ipynb too, whose cells a slow test runs one by one.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from textwrap import dedent
from typing import Any, NoReturn
from unittest import mock

import pytest
import yaml

from dora_vl import cli
from dora_vl.data.benchmarks.table import SOURCES
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import find_benchmark
from dora_vl.run.settings import FIELDS, Task
from dora_vl.run.settings_parser import read_run, setting_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "configs/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
FOREIGN = ("git", "vllm", "llama-mtmd-cli", "curl", "tensorboard", "trackio", "docker", "accelerate", "trl", "swift",
           "llamafactory-cli", "xdg-open", "mkdir", "cp", "ls", "grep", "llamafactory", "zensical",
           "mkdocs", "source", "lm_eval")  # fmt: skip
FOREIGN_MODULES = ("lmms_eval",)
"""Programs of others, of whose options nothing is known here."""
OTHER_PACKAGES = {"tensorboard", "trackio", "wandb"}
"""These modules are of other projects and never imported here."""
USERS_FILE = re.compile(r"(?!configs/)[\w./\-]+\.yaml|[A-Z]+")
"""A recipe that the reader has: a file, and none of the shipped ones; or a word in capitals that stands for one."""
FENCE = re.compile(r"^( *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^\1```", re.MULTILINE | re.DOTALL)
TASKS: Mapping[str, Task] = {
    "llava_instruct": "llava",
    "commonsense": "commonsense",
    "vlbart_image": "vlbart",
    "vlbart_video": "vlbart",
}
"""A script of tasks/ that trains -> its task where no settings name one."""
STAND_INS: Mapping[Task, tuple[str, ...]] = {
    **dict.fromkeys(FIELDS, ("--model.base", "BASE", "--data.train", "FILE")),
    "vlbart": ("--model.base", "BASE", "--data.train", "{}"),
}
"""What a run cannot do without, where the reader's own file says it."""
Command = tuple[str, tuple[str, ...], bool]
"""Page, words, and whether it is whole: in running text, what a command needs may be left out."""


def blocks(text: str, *languages: str) -> Iterator[str]:
    """What stands in a page's fences of these languages."""
    return (dedent(fence["body"]) for fence in FENCE.finditer(text) if fence["language"] in languages)


def commands_of(page: Path) -> Iterator[Command]:
    """The commands in a page's fences, and those in its running text."""
    text = page.read_text(encoding="utf-8")
    for of_shell, languages in ((True, ("bash", "sh", "console", "shell")), (False, ("", "text"))):
        for line in "\n".join(blocks(text, *languages)).replace("\\\n", " ").splitlines():
            for words in split(line.removeprefix("$ ")):
                if of_shell or words[0] in (*CHECKS, *FOREIGN):
                    yield page.name, tuple(words), True
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text)):
        for words in split(re.sub(r"\[[^\]]*\]|\.\.\.", " ", " ".join(span.split()))):
            if words[0] in CHECKS and len(words) > 1:
                yield page.name, tuple(words), False


def split(line: str) -> Iterator[list[str]]:
    """The commands of a line, without a loop's own words and the variables before them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    try:
        words = [*lexer, ";"]
    except ValueError:  # an apostrophe: no command
        return
    command: list[str] = []
    for word in words:
        if word and set(word) <= set(";&|"):
            if command and command[0] not in ("for", "cd", "export", "..."):
                yield [command[0].removeprefix(".venv/bin/"), *command[1:]]
            command = []
        elif command or not (word in ("do", "done") or re.fullmatch(r"[A-Z_]+=.*", word)):
            command.append(word)


class Parsed(Exception):
    """A program's own parser took the words: what it made of them, and those it does not know."""


def parse(main: Callable[[], Any], words: Sequence[str], is_whole: bool) -> tuple[Any, list[str]] | None:
    """What the program's parser makes of the words; it goes no further. None where it is only asked for help.

    Raises: AssertionError with the parser's complaint; one about what is left out counts of whole commands alone.
    """
    if "--help" in words or "-h" in words:
        return None
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def known(self: argparse.ArgumentParser, args: Sequence[str] | None = None, *_: Any) -> NoReturn:
        raise Parsed(*parse_known_args(self, args))

    def strict(self: argparse.ArgumentParser, args: Sequence[str] | None = None, *_: Any) -> NoReturn:
        options, unknown = parse_known_args(self, args)
        if unknown:
            self.error(f"unrecognized arguments: {shlex.join(unknown)}")
        raise Parsed(options, [])

    patched = mock.patch.multiple(argparse.ArgumentParser, parse_args=strict, parse_known_args=known)
    try:
        with patched, mock.patch.object(sys, "argv", ["program", *words]):
            quietly(main)
    except Parsed as parsed:
        return parsed.args  # type: ignore[return-value]
    except AssertionError as error:
        if is_whole or not re.search(r"(are|is) required|expected one argument", str(error)):
            raise
        return None
    raise AssertionError("it has no parser of its options")


def quietly(work: Callable[[], Any]) -> Any:
    """Runs it; a parser's complaint, or any other end with a status, becomes the error."""
    errors = StringIO()
    try:
        with redirect_stderr(errors), redirect_stdout(StringIO()), mock.patch.dict(os.environ):
            return work()
    except SystemExit:
        raise AssertionError(errors.getvalue().strip().splitlines()[-1:]) from None


def check_dora_vl(words: Sequence[str], is_whole: bool) -> None:
    """`dora-vl COMMAND ...`: the command, its options, and the names that some of them take from a table."""
    if words[0] in ("--help", "--version"):
        return
    parsed = parse(lambda: cli.main(list(words)), words, is_whole)
    if parsed is None:
        return
    verb, (options, settings) = words[0], parsed
    if verb in ("train", "show", "estimate"):
        settings = [*settings, *(getattr(options, "settings", None) or [])]
        check_settings("image_text", ["--config", options.config, *settings], is_whole=True)
    elif verb == "prepare" and options.source.islower():
        assert options.source in SOURCES
    elif verb == "evaluate" and options.benchmarks is not None:
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
        if module in FOREIGN_MODULES:
            return
        assert importlib.util.find_spec(module) is not None
        if module in ("pip", "pytest", "http.server", "zensical", "mkdocs"):
            return
    else:
        assert (ROOT / words[0]).is_file()
        module, rest = words[0].removesuffix(".py").replace("/", "."), words[1:]
    task = module.removeprefix("tasks.")
    if module == "dora_vl.cli":
        check_dora_vl(rest, is_whole)
    elif task in TASKS:
        check_settings(TASKS[task], rest, is_whole=is_whole)
    else:
        with mock.patch.object(sys, "path", [str((ROOT / words[0]).parent), *sys.path]):  # it finds what lies beside it
            main = getattr(importlib.import_module(module), "main", None)
            assert main is not None or not rest
            if main is not None:
                parse(main, rest, is_whole)


def check_deepspeed(words: Sequence[str], is_whole: bool) -> None:
    """`deepspeed [launcher's options] SCRIPT ...`, by DeepSpeed's own parser."""
    from deepspeed.launcher.runner import parse_args

    launched = quietly(lambda: parse_args(list(words)))
    check_python([*(["-m"] if launched.module else []), launched.user_script, *launched.user_args], is_whole)


def check_torchrun(words: Sequence[str], is_whole: bool) -> None:
    """`torchrun [its options] -m MODULE ...`."""
    from torch.distributed.run import get_args_parser

    launched = quietly(lambda: get_args_parser().parse_args(list(words)))
    assert launched.module
    check_python(["-m", launched.training_script, *launched.training_script_args], is_whole)


def check_make(words: Sequence[str], is_whole: bool) -> None:
    """`make TARGET`, and variables that the Makefile has."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    names = re.findall(r"^([A-Z]+ [?:]?=|[a-z][\w\-]*:)", text, re.MULTILINE)
    assert {word.partition("=")[0] for word in words} <= {re.split("[ :]", name)[0] for name in names}


def check_pip(words: Sequence[str], is_whole: bool) -> None:
    """`pip install PACKAGE ...`, of packages that are declared; a checkout is `.`, its extras are there."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.")[0]
    extras = set(re.findall(r"^([a-z]+) = \[", text.split("[project.optional-dependencies]")[1], re.MULTILINE))
    packages = {re.split(r"[^\w.\-]", line, maxsplit=1)[0] for line in re.findall(r'"([^"]+)"', text)}
    assert words[0] == "install"
    for word in words[1:]:
        if names := re.fullmatch(r"\.\[([\w,\-]+)\]", word):
            assert set(names[1].split(",")) <= extras
        elif not word.startswith("--") and word != ".":
            assert re.split("[<>=]", word)[0] in (packages | OTHER_PACKAGES) - {"dora-vl"}


CHECKS: Mapping[str, Callable[[Sequence[str], bool], None]] = {
    "dora-vl": check_dora_vl,
    "python": check_python,
    "python3": check_python,
    "deepspeed": check_deepspeed,
    "torchrun": check_torchrun,
    "make": check_make,
    "pip": check_pip,
}


def check_settings(task: Task, words: Sequence[str], *, is_whole: bool) -> None:
    """A run's settings: recipe and variant are there, every option is a setting and has a value of its type.

    A reader's own file stands for whatever a run needs.
    """
    asks_help = "--help" in words
    words = [word for word in words if word not in ("--help", "--print_config")]
    at = next((at for at, word in enumerate(words) if USERS_FILE.fullmatch(word) and not (ROOT / word).is_file()), 0)
    if at:
        del words[at - 1 : at + 1]
    if words == ["--config"]:  # of a shorthand: what follows stands elsewhere
        return
    read_run([*(STAND_INS[task] if at or asks_help or not is_whole else ()), *words], task=task)


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


def check(command: Command) -> None:
    _, (program, *words), is_whole = command
    assert program in CHECKS or program in FOREIGN
    if program in CHECKS:
        CHECKS[program](words, is_whole)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command[0]}: {shlex.join(command[1])}")
def test_the_program_takes_it(command: Command) -> None:
    check(command)


def test_the_published_vlbart_recipe_reads_the_features_that_its_commands_make() -> None:
    commands = [words for page, words, _ in COMMANDS if page == "recipes.md"]
    made = {words[words.index("--to") + 1] for words in commands if "data_prep.features" in words}
    made.add("features/nlvr")  # named in a remark
    (words,) = [words for words in commands if "vlbart/image" in words and words[0] == "deepspeed"]
    config = read_run(["--config", *words[words.index("vlbart/image") :]], task="vlbart")
    assert {*config.data.features.values(), *config.evaluation.features.values()} == made


@pytest.mark.parametrize(
    "line",
    [
        "dora-vl merge --adapter a --to b --adaptor c",
        "dora-vl prepare pop --from a --to b",
        "dora-vl show batch llava/llava15 --variant 7b_dura",
        "deepspeed tasks/llava_instruct.py --config llava/llava15 --adapter.rnk 8",
        "python tasks/no_such.py",
        "make demos",
        "pip install 'dora-vl[video]'",
        "dore-vl init my",
    ],
)
def test_a_wrong_one_is_found(line: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Text.\n\n```bash\n# a remark\n{line}\n```\n", encoding="utf-8")
    (command,) = commands_of(page)
    with pytest.raises((AssertionError, UserError)):
        check(command)


def test_every_extra_that_an_error_names_is_declared() -> None:
    """pip takes an extra from the metadata of the dora-vl that is installed, which no index need have."""
    used = {
        name
        for path in (ROOT / "dora_vl").rglob("*.py")
        for name in re.findall(r'(?:needs_extra\(|MissingExtra\([^\n]*, )"([\w-]+)"', path.read_text(encoding="utf-8"))
    }
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    declared = set(re.findall(r"^([a-z]+) = \[", text.partition("\n[")[0], re.MULTILINE))
    assert {"deepspeed", "quantised", "serve", "towers", "video", "web"} < used <= declared


def unknown_settings(content: Mapping[str, Any], settings: Iterable[str], before: str = "") -> Iterator[str]:
    """Dotted names of a YAML's keys that no run has; below a setting that is a mapping itself any key may stand."""
    settings = list(settings)
    for key, value in content.items():
        name = f"{before}{key}"
        if name == "variants":
            for variant in value.values():
                yield from unknown_settings(variant, settings)
        elif not any(setting.startswith(f"{name}.") for setting in settings):
            if name not in settings:
                yield name
        elif isinstance(value, dict):
            yield from unknown_settings(value, settings, f"{name}.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_yaml_holds_settings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    settings = {name for task in FIELDS for name in setting_names(task)}
    for block in blocks(text, "yaml"):
        assert list(unknown_settings(yaml.safe_load(block), settings)) == []


NOTEBOOK = ROOT / "docs" / "first_hour.ipynb"
CELLS = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
ASSETS = ROOT / "runs" / "demo" / "assets"


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_parses(cell: str) -> None:
    if cell.startswith("!"):
        assert "\n" not in cell
        check(("first_hour.ipynb", tuple(shlex.split(cell[1:])), True))
    else:
        ast.parse(cell)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not ASSETS.is_dir(), reason="runs/demo/assets is not there; make demo leaves it")
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with the demo's assets alone, where programs find this checkout."""
    shutil.copytree(ASSETS, tmp_path / "runs" / "demo" / "assets", copy_function=os.link)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in CELLS:
        if cell.startswith("!"):
            done = subprocess.run(shlex.split(cell[1:]), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
        else:
            exec(compile(cell, NOTEBOOK.name, "exec"), names)
    for run, least in (("demo", 70), ("my", 70)):
        (entry,) = json.loads((tmp_path / "runs" / run / "metrics.json").read_text())["sets"].values()
        assert entry["metrics"]["accuracy"]["value"] > least
    assert (tmp_path / "runs" / "my" / "report.html").is_file()
    assert "## Scores" in (tmp_path / "runs" / "my" / "hub" / "README.md").read_text()
