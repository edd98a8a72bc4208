"""`dora-vl completion`: a script with which a shell completes verbs and options, without a lookup at each Tab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from dora_vl.commands import COMMANDS
from dora_vl.errors import UserError

DESCRIPTION = """\
Prints a script with which a shell completes dora-vl's verbs, options and files.

  dora-vl completion bash > ~/.local/share/bash-completion/completions/dora-vl
  dora-vl completion zsh > ~/.zfunc/_dora-vl            # a folder of your fpath
"""
SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dora-vl completion`."""
    parser.add_argument("shell", choices=SHELLS)


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Yields the script.

    Raises:
        UserError: shtab, which writes it, is not installed.
    """
    if find_spec("shtab") is None:
        raise UserError("completion needs the package shtab; pip install shtab (or 'dora-vl[shell]')")
    import shtab

    yield shtab.complete(whole_parser(), shell=arguments.shell)


def whole_parser() -> argparse.ArgumentParser:
    """All verbs with all their options in one parser."""
    import shtab

    whole = argparse.ArgumentParser(prog="dora-vl")
    verbs = whole.add_subparsers()
    for verb, command in COMMANDS.items():
        parser = verbs.add_parser(verb, help=command.summary)
        import_module(command.module).add_arguments(parser)
        for action in parser._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return whole
