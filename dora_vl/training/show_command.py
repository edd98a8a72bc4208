"""`dora-vl show batch`: the first micro-batch of a run, its tokens coloured by what training does to them."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dora_vl.errors import UserError
from dora_vl.training.train_command import TASKS, pipeline_of, settings_and_task

DESCRIPTION = """\
Shows the first micro-batch that training would see: every token, whether it is trained on, read only, the place of a
picture, or padding. The base's weights are not read (a base that a recipe composes is composed first, once).

  dora-vl show batch llava/llava15 --variant 7b_dora --data.train my.json --data.image_folder pictures
  dora-vl show batch my_run.yaml --to batch.html            pictures beside the samples; or batch.png

CONFIG is a file or a recipe's name; behind it any setting of the run, --section.key value. Which script the run is of
is seen by its settings; --task names it (llava_instruct, vlbart_image, vlbart_video, commonsense).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options; what stands behind CONFIG is read by `run`."""
    parser.add_argument("what", choices=("batch",), help="what to show")
    parser.add_argument("config", metavar="CONFIG", help="YAML file with the run's settings, or a recipe's name")
    parser.add_argument(
        "settings",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="--to FILE.html or FILE.png, --task NAME, --variant, --section.key value",
    )


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Makes the batch and shows it; yields the lines to print."""
    options, settings = own_options(arguments.settings)
    if options.to is not None and options.to.suffix not in (".html", ".png"):
        raise UserError(f"--to {options.to}: give the name of an .html or a .png file")
    words = [f"--config={arguments.config}", *settings]
    from dora_vl.report.batch import batch_page, batch_picture, terminal_lines
    from dora_vl.report.page import write_page
    from dora_vl.run.folder import replace_file
    from dora_vl.training.first_batch import first_batch, shown_settings

    config, task = settings_and_task(words, options.task, program="dora-vl show batch")
    with tempfile.TemporaryDirectory() as folder:
        view = first_batch(pipeline_of(task)(shown_settings(config, Path(folder))))
        yield from terminal_lines(view, colours=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
        if options.to is not None and options.to.suffix == ".png":
            try:
                replace_file(options.to, batch_picture(view))
            except OSError as error:
                raise UserError(f"{options.to}: cannot be written ({error.strerror})") from error
        elif options.to is not None:
            write_page(options.to, batch_page(view, title=Path(arguments.config).stem))
    if options.to is not None:
        yield f"{options.to}"


def own_options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The verb's own options among a run's settings, and the settings."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--task", choices=TASKS)
    try:
        return parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
