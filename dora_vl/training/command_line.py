"""Reads one run's settings: `--config FILE`, `--variant NAME` of it, then `--section.key value`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from dora_vl.errors import UserError
from dora_vl.files import refuse_other_number
from dora_vl.training.recipe import RunConfig
from dora_vl.training.settings_files import NO_SETTINGS, explain, with_variant

Settings = TypeVar("Settings")

FOR_ALL = ", or null for all of them"
COUNTS = {
    "limit": FOR_ALL,
    "validation_limit": FOR_ALL,
    "batch_size": "",
    "max_new_tokens": "",
    "max_pixels_per_step": "; null leaves it to the model",
}
"""Settings of any section that count what is read or asked -> what else they take than numbers."""


def run_parser(program: str, description: str, settings: type[Any] = RunConfig) -> ArgumentParser:
    """The parser of a training task; its help text comes from the fields of the settings' dataclasses."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=program, description=description, exit_on_error=False)
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file with the run's settings, or a recipe's name"
    )
    # The deepspeed launcher adds --local_rank=N to every command; the environment says it better.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_class_arguments(settings, None)
    return parser


def read_run_file(path: str | Path, *overrides: str) -> RunConfig:
    """Settings of a YAML file, with `--section.key=value` overrides."""
    return read_run([f"--config={path}", *overrides])


def read_run(arguments: Sequence[str]) -> RunConfig:
    """A LLaVA run's settings from command-line arguments; see `read_settings`."""
    return read_settings(arguments, RunConfig)


def read_settings(
    arguments: Sequence[str], settings: type[Settings], *, program: str = "run", description: str = ""
) -> Settings:
    """Settings of a run's dataclass from command-line arguments; they win over the file's.

    Raises:
        UserError: a key that is not a setting (with the nearest one), a value of the wrong type, or a count below 1.
    """
    parser = run_parser(program, description, settings)
    kind: Any = settings
    try:
        built = parser.instantiate(parser.parse_args(files_first(arguments)))
        config = kind(**{field.name: getattr(built, field.name) for field in dataclasses.fields(kind)})
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(explain(str(error), setting_names(settings))) from error
    _check_counts(config)
    from dora_vl.training.arguments import check_training_section  # transformers: not for --help

    return dataclasses.replace(config, training=check_training_section(config.training))


def _check_counts(config: object) -> None:
    """A limit of 0 would be an empty test that looks like a whole one."""
    watch = getattr(config, "watch", 0)
    if watch < 0:
        raise UserError(f"watch is {watch}; 0 asks nothing")
    for section in dataclasses.fields(cast(Any, config)):
        value = getattr(config, section.name)
        for name, hint in COUNTS.items() if dataclasses.is_dataclass(value) else ():
            number = getattr(value, name, None)
            if number is not None and number < 1:
                raise UserError(f"{section.name}.{name} is {number}; at least 1 is needed{hint}")


def files_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with the settings of each `--config` in front, as JSON: one given here wins wherever it stands.

    The parser itself opens no file.
    """
    configs, others = _taken(arguments, "--config")
    variants, _ = _taken(others, "--variant")
    for argument in others:
        refuse_other_number(argument.partition("=")[2] if argument.startswith("--") else argument)
    settings = with_variant(configs, variants[-1] if variants else None)
    return [f"--config={_as_json(one)}" for one in settings] + others


def _as_json(settings: Mapping[str, Any]) -> str:
    """JSON that YAML reads alike, as the parser does: an emoji as it is, not as the two halves of a pair."""
    pair = re.compile(r"\\ud[89ab]\w\w\\ud[c-f]\w\w")
    return pair.sub(lambda halves: json.loads(f'"{halves[0]}"'), json.dumps(settings, default=str))


def _taken(arguments: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """The values of an option, and the arguments without them; an option without a value stays for the parser."""
    values: list[str] = []
    others: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument.startswith(f"{option}="):
            values.append(argument.partition("=")[2])
        elif argument == option and (following := list(itertools.islice(waiting, 1))):
            values += following
        else:
            others.append(argument)
    return values, others


def setting_names(settings: type[Any] = RunConfig) -> list[str]:
    """Every dotted name a run understands, `training.*` included."""
    from dora_vl.training.arguments import training_fields  # transformers: not for --help

    # Only leaf settings: a name such as "model" also stands for a whole section.
    named = [action.dest for action in run_parser("run", "", settings)._actions if action.dest not in NO_SETTINGS]
    leaves = [name for name in named if not any(other.startswith(f"{name}.") for other in named)]
    return leaves + [f"training.{name}" for name in training_fields()]
