"""`dora-vl COMMAND ...`: the command line over the library."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from dora_vl import __version__
from dora_vl.errors import LONGEST_MESSAGE, UserError, exit_on_user_error, one_line, short_repr

COMMANDS: Mapping[str, tuple[str, str]] = {
    "analyze": ("options:analyze", "what training changed: magnitudes and directions"),
    "ask": ("evaluation.ask_command:add_arguments", "a model's answers about pictures or videos of your own"),
    "check-data": ("data.check:add_arguments", "what is wrong with data files, before a run finds it"),
    "compare": ("options:compare", "methods and ranks of one recipe, each at its best rate"),
    "convert": ("options:convert", "adapters of other tools"),
    "demo": ("serving.demo_command:add_arguments", "a web page: adapters and their base answer side by side"),
    "doctor": ("start.doctor:add_arguments", "what this machine has for a run, and what is missing"),
    "estimate": ("options:estimate", "memory, traffic and time of a run, before it starts"),
    "evaluate": (
        "evaluation.evaluate_command:add_arguments",
        "official scores with intervals, of adapters and predictions",
    ),
    "export": ("options:export", "a trained model as vLLM serves it; checks it"),
    "init": ("start.init:add_arguments", "your pictures and questions to the files of a first run"),
    "merge": ("options:merge", "base + adapter as a plain model folder; checks it"),
    "prepare": ("data.prepare:add_arguments", "a publisher's files to records"),
    "push": ("options:push", "a run's adapter to the hub, with a model card of what it scores"),
    "quickstart": ("start.quickstart:add_arguments", "the demo: a small model fetched, trained, tested and merged"),
    "replay": (
        "training.replay_command:add_arguments",
        "short chats that a base writes, so that a run keeps what it knows",
    ),
    "report": ("options:report", "a run, or several side by side, as one page"),
    "serve": (
        "serving.serve_command:add_arguments",
        "a base and adapters, unmerged in one batch, for OpenAI's clients",
    ),
    "show": ("options:show", "the first batch of a run, its tokens by label"),
    "train": ("training.train_command:add_arguments", "a run, from its settings to a tested adapter"),
}
"""Maps each command to what reads its words, and to what `dora-vl --help` says of it.

A function, in a module that is imported when it is used, describes the command to a parser, adds its options, and sets
defaults: `work` makes the lines to print, as they are ready, and finds what was typed as `options.words`; it is named
as `module:function` where its module is slow to import. With `takes_settings` a run's own settings may follow, which
`work` finds as `options.settings`; with `logs` it sets up logging itself.
"""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option in one short line, however long its value is."""

    def error(self, message: str) -> NoReturn:
        """Prints the usage and the message, and ends with status 2."""
        super().error(one_line(message, LONGEST_MESSAGE - len(self.prog)))


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; a problem in the input is one line on stderr and exit status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0].startswith("--local_rank"):  # the deepspeed launcher's; LOCAL_RANK says the same
        words = words[1:]
    if not words or words[0] in {"-h", "--help"}:
        width = max(map(len, COMMANDS))
        lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
        print("usage: dora-vl COMMAND ...", "", *lines, "", sep="\n")
        print("dora-vl COMMAND --help explains one command, with examples.")
        return
    if words[0] == "--version":
        print(__version__)
        return
    name, *rest = words
    if name not in COMMANDS:
        nearest = get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        raise UserError(f"no command {short_repr(name)}; did you mean {nearest!r}? dora-vl --help lists all")
    parser = _Parser(prog=f"dora-vl {name}", formatter_class=argparse.RawDescriptionHelpFormatter)
    _function(COMMANDS[name][0])(parser)
    if not parser.get_default("logs"):
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if parser.get_default("takes_settings"):  # what the parser does not know is a run's own setting
        options, options.settings = parser.parse_known_args(rest)
    else:
        options = parser.parse_args(rest)
    import_module("numpy")  # torch would import it where a Ctrl-C is lost
    options.words = rest
    work = _function(options.work) if isinstance(options.work, str) else options.work
    for line in work(options):
        print(line, flush=True)


def _function(path: str) -> Any:
    """Imports a function that is named as `module:function`."""
    module, _, name = path.partition(":")
    return getattr(import_module(f"dora_vl.{module}"), name)


if __name__ == "__main__":
    main()
