"""`dora-vl VERB ...`: the command line over the library."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from dora_vl import __version__
from dora_vl.commands import COMMANDS
from dora_vl.errors import LONGEST_MESSAGE, UserError, exit_on_user_error, one_line, shown


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with an option in one line that stays short, whatever the option's value is."""

    def error(self, message: str) -> NoReturn:
        """Prints the usage and the message, and ends with status 2."""
        super().error(one_line(message, LONGEST_MESSAGE - len(self.prog)))


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one verb; a problem in the input is one line on stderr and exit status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0].startswith("--local_rank"):  # the deepspeed launcher's; LOCAL_RANK says the same
        words = words[1:]
    if not words or words[0] in {"-h", "--help"}:
        print(overview())
        return
    if words[0] == "--version":
        print(__version__)
        return
    verb, *rest = words
    if verb not in COMMANDS:
        nearest = get_close_matches(verb, COMMANDS, n=1, cutoff=0.0)[0]
        raise UserError(f"no command {shown(verb)}; did you mean {nearest!r}? dora-vl --help lists all")
    module = import_module(COMMANDS[verb].module)
    parser = _Parser(
        prog=f"dora-vl {verb}", description=module.DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    if not getattr(module, "SETS_UP_LOGGING", False):
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for line in module.run(_options(parser, rest, takes_settings=getattr(module, "TAKES_SETTINGS", False))):
        print(line, flush=True)


def _options(parser: _Parser, words: Sequence[str], *, takes_settings: bool) -> argparse.Namespace:
    """A verb's options; what its parser does not know is a run's own setting where the verb takes those."""
    if not takes_settings:
        return parser.parse_args(words)
    options, options.settings = parser.parse_known_args(words)
    return options


def overview() -> str:
    """What `dora-vl --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {verb:{width}}  {command.summary}" for verb, command in COMMANDS.items()]
    return "\n".join(
        ["usage: dora-vl VERB ...", "", *lines, "", "dora-vl VERB --help explains one verb, with examples."]
    )


if __name__ == "__main__":
    main()
