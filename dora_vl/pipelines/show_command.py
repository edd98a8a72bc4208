"""`dora-vl show batch`: the first micro-batch of a run, its tokens coloured by what training does to them."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_vl.errors import UserError

if TYPE_CHECKING:
    from dora_vl.training.pipeline import Pipeline

DESCRIPTION = """\
Shows the first micro-batch that training would see: every token, whether it is trained on, read only, the place of a
picture, or padding. The base's weights are not read (a base that a recipe composes is composed first, once).

  dora-vl show batch llava/llava15 --variant 7b_dora --data.train my.json --data.image_folder pictures
  dora-vl show batch my_run.yaml --to batch.html            pictures beside the samples; or batch.png

CONFIG is a file or a recipe's name; behind it any setting of the run, --section.key value. Which script the run is of
is seen by its settings; --task names it (llava_instruct, vlbart_image, vlbart_video, commonsense).
"""
TASKS = ("llava_instruct", "vlbart_image", "vlbart_video", "commonsense")
KINDS = (".html", ".png")


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
    """Makes the batch and shows it; yields the lines to print.

    Raises:
        UserError: a setting, the data or the base is wrong, as training would say it.
    """
    options, settings = _own_options(arguments.settings)
    if options.to is not None and options.to.suffix not in KINDS:
        raise UserError(f"--to {options.to}: give the name of an .html or a .png file")
    words = [f"--config={arguments.config}", *settings]

    from dora_vl.pipelines.first_batch import first_batch, shown_settings
    from dora_vl.report.batch_text import batch_page, batch_picture, terminal_lines
    from dora_vl.report.page import write_page

    config, task = _config(words, options.task)
    with tempfile.TemporaryDirectory() as folder:
        view = first_batch(_pipeline(shown_settings(config, Path(folder)), task))
        yield from terminal_lines(view, colours=_colours())
        if options.to is not None and options.to.suffix == ".png":
            _write_bytes(options.to, batch_picture(view))
        elif options.to is not None:
            write_page(options.to, batch_page(view, title=Path(arguments.config).stem))
    if options.to is not None:
        yield f"{options.to}"


def _own_options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--task", choices=TASKS)
    try:
        return parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None


def _config(words: Sequence[str], task: str | None) -> tuple[Any, str]:
    """The settings by the class of the named task, or of the one that knows most of what is stated."""
    from dora_vl.run.command_line import read_settings, setting_names
    from dora_vl.run.commonsense_recipe import CommonsenseRunConfig
    from dora_vl.run.recipe import RunConfig
    from dora_vl.run.vlbart_recipe import VlBartRunConfig
    from dora_vl.tasks import vlbart_image

    classes: dict[str, type[Any]] = {
        "llava_instruct": RunConfig,
        "commonsense": CommonsenseRunConfig,
        "vlbart_image": VlBartRunConfig,
        "vlbart_video": VlBartRunConfig,
    }
    stated = _stated(words)
    name = task or min(list(classes)[:3], key=lambda one: len(_unknown(stated, setting_names(classes[one]))))
    config = read_settings(words, classes[name], program="dora-vl show batch")
    if task is None and name == "vlbart_image" and not set(config.data.train) <= set(vlbart_image.subtasks()):
        return config, "vlbart_video"
    return config, name


def _stated(words: Sequence[str]) -> set[str]:
    """Dotted names of all settings that the file and the command line give."""
    from jsonargparse import get_loader
    from yaml import YAMLError

    from dora_vl.report.settings_view import flattened
    from dora_vl.run.command_line import files_first

    found: set[str] = set()
    for word in files_first(words):
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            continue
        if name != "config":
            found.add(name)
            continue
        try:
            content = get_loader("yaml")(value if value.startswith("{") else Path(value).read_text(encoding="utf-8"))
        except (OSError, ValueError, YAMLError):  # the parser says what is wrong with it
            continue
        found |= set(flattened(content))
    return found


def _unknown(stated: set[str], names: Sequence[str]) -> list[str]:
    """Those that are neither a setting nor inside one."""
    known = (*names, "training", "variant")
    return [one for one in stated if not any(one == name or one.startswith(f"{name}.") for name in known)]


def _pipeline(config: Any, task: str) -> Pipeline:
    if task == "llava_instruct":
        from dora_vl.pipelines.image_text import instruct_pipeline

        return instruct_pipeline(config)
    if task == "commonsense":
        from dora_vl.pipelines.commonsense import CommonsensePipeline

        return CommonsensePipeline(config)
    from dora_vl.pipelines.vlbart import VlBartPipeline
    from dora_vl.tasks import vlbart_image, vlbart_video

    is_video = task == "vlbart_video"
    known = (vlbart_video if is_video else vlbart_image).subtasks(task_prompt=config.data.task_prompt)
    return VlBartPipeline(config, known, name=task, is_video=is_video)


def _colours() -> bool:
    """Whether a terminal that has not asked for plain text reads this."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _write_bytes(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
