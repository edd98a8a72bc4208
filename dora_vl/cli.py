"""`dora-vl COMMAND ...`: the command line over the library."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from dora_vl import __version__
from dora_vl.errors import LONGEST_MESSAGE, UserError, exit_on_user_error, one_line, short_repr

COMMANDS: Mapping[str, tuple[str, str]] = {
    "analyze": ("dora_vl.evaluation.analyze_command", "what training changed: magnitudes and directions"),
    "ask": ("dora_vl.evaluation.ask_command", "a model's answers about pictures or videos of your own"),
    "check-data": ("dora_vl.data.check", "what is wrong with data files, before a run finds it"),
    "compare": ("dora_vl.report.compare_command", "methods and ranks of one recipe, each at its best rate"),
    "convert": ("dora_vl.adapters.convert_command", "adapters of other tools"),
    "demo": ("dora_vl.serving.demo_command", "a web page: adapters and their base answer side by side"),
    "doctor": ("dora_vl.start.doctor", "what this machine has for a run, and what is missing"),
    "estimate": ("dora_vl.training.estimate_command", "memory, traffic and time of a run, before it starts"),
    "evaluate": ("dora_vl.evaluation.evaluate_command", "official scores with intervals, of adapters and predictions"),
    "export": ("dora_vl.evaluation.export_command", "a trained model as vLLM serves it; checks it"),
    "init": ("dora_vl.start.init", "your pictures and questions to the files of a first run"),
    "merge": ("dora_vl.evaluation.merge_command", "base + adapter as a plain model folder; checks it"),
    "prepare": ("dora_vl.data.prepare", "a publisher's files to records"),
    "push": ("dora_vl.report.push_command", "a run's adapter to the hub, with a model card of what it scores"),
    "quickstart": ("dora_vl.start.quickstart", "the demo: a small model fetched, trained, tested and merged"),
    "replay": ("dora_vl.training.replay_command", "short chats that a base writes, so that a run keeps what it knows"),
    "report": ("dora_vl.report.report", "a run, or several side by side, as one page"),
    "serve": ("dora_vl.serving.serve_command", "a base and adapters, unmerged in one batch, for OpenAI's clients"),
    "show": ("dora_vl.training.show_command", "the first batch of a run, its tokens by label"),
    "train": ("dora_vl.training.train_command", "a run, from its settings to a tested adapter"),
}
"""Maps each command to its module, which is imported when it is used, and to what `dora-vl --help` says of it.

A module holds `DESCRIPTION` (what its own --help says), `add_arguments(parser)` and `run(arguments)`, which yields the
lines to print as they are ready and finds what was typed as `arguments.words`. It may set `TAKES_SETTINGS` (a run's own
settings may follow, which `run` finds as `arguments.settings`), `SETS_UP_LOGGING`, and `OPENS_BASES` (it reads a base's
weights by transformers' classes, which must know composed towers).
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
    module = import_module(COMMANDS[name][0])
    parser = _Parser(
        prog=f"dora-vl {name}", description=module.DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    if not getattr(module, "SETS_UP_LOGGING", False):
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if getattr(module, "TAKES_SETTINGS", False):  # what the parser does not know is a run's own setting
        options, options.settings = parser.parse_known_args(rest)
    else:
        options = parser.parse_args(rest)
    if getattr(module, "OPENS_BASES", False):
        from dora_vl.backbones import register_towers

        register_towers()
    import_module("numpy")  # torch would import it where a Ctrl-C is lost
    options.words = rest
    for line in module.run(options):
        print(line, flush=True)


if __name__ == "__main__":
    main()
