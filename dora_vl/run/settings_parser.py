"""Reads a run's settings: `--config FILE` or a recipe's name, `--variant NAME` of it, then `--section.key value`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from dora_vl.errors import SettingError, UserError, short_repr, wrong_value
from dora_vl.files import shipped_folder
from dora_vl.run.settings import (
    DEFAULTS,
    FIELDS,
    TYPES,
    AdapterConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    Task,
    foreign_fields,
)
from dora_vl.yaml_files import read_yaml, refuse_other_number

ENDING = ".yaml"
VARIANTS, VARIANT = "variants", "variant"
NO_SETTINGS = ("config", "print_config", "local_rank", "help")
"""No file may hold these options of the parser: `config` would open another file."""
SECTION_CLASSES: Mapping[str, type[Any]] = {
    "model": ModelConfig,
    "adapter": AdapterConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "objective": ObjectiveConfig,
    "evaluation": EvaluationConfig,
}
FOR_ALL = ", or null for all of them"
AT_LEAST_ONE = {
    "limit": FOR_ALL,
    "validation_limit": FOR_ALL,
    "batch_size": "",
    "max_new_tokens": "",
    "reward_threads": "",
    "max_pixels_per_step": "; null leaves it to the model",
    "early_stopping": "; null trains to the end",
}
"""Maps settings of at least 1 to the end of their message. A limit of 0 would be an empty test that looks whole."""


def read_run_file(path: str | Path, *overrides: str) -> RunConfig:
    """Reads the settings of a YAML file, with `--section.key=value` overrides."""
    return read_run([f"--config={path}", *overrides])


def read_run(
    arguments: Sequence[str], *, task: Task = "image_text", program: str = "run", description: str = ""
) -> RunConfig:
    """Reads a run's settings from command-line arguments, which win over the file's; `task` where neither names one."""
    words, task = files_as_arguments(arguments, task)
    parser = run_parser(task, program, description)
    try:
        parsed = parser.parse_args(words)
        if parsed.get("objective.loss", "sft") != "sft":  # log-probabilities of several passes are compared
            parser = run_parser(task, program, description, dropout=False)
            parsed = parser.parse_args(words)
        parsed = parser.instantiate(parsed)
        config = RunConfig(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(RunConfig)})
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise explain_parser_error(str(error), task) from error
    if config.watch < 0:
        raise SettingError("watch", f" is {config.watch}; 0 asks nothing")
    for section in dataclasses.fields(config):
        for name, hint in AT_LEAST_ONE.items():
            count = getattr(getattr(config, section.name), name, None)
            if count is not None and count < 1:
                raise SettingError(f"{section.name}.{name}", f" is {count}; at least 1 is needed{hint}")
    _check_objective(config.objective)
    rates = ("projector_learning_rate", "magnitude_learning_rate", "b_learning_rate_ratio")
    _check_numbers("optim", {name: getattr(config.optim, name) for name in rates})
    _check_numbers("optim.rates", config.optim.rates)
    from dora_vl.run.arguments import check_training_section  # transformers: not for --help

    return dataclasses.replace(config, training=check_training_section(config.training))


def _check_objective(objective: ObjectiveConfig) -> None:
    """Refuses weights, and numbers of a loss, with which nothing or the opposite would be learned."""
    if not objective.weights:
        raise SettingError("objective.loss", " is empty; name at least one")
    _check_numbers("objective.loss", objective.weights, above_zero=True)
    if any("beta" in loss.settings for loss in objective.losses):
        _check_numbers("objective", {"beta": objective.beta}, above_zero=True)
    _check_numbers("objective", {"kl": objective.kl})
    _check_numbers("objective", {"vllm_timeout": objective.vllm_timeout}, above_zero=True)
    # Below 0 is a penalty, and 0 only shows in the log.
    if objective.kind == "reward" and not any(objective.rewards.values()):
        raise SettingError("objective.rewards", " gives no reward a weight; name at least one")
    _check_numbers("objective.rewards", {name: abs(weight) for name, weight in objective.rewards.items()})
    for loss in objective.losses:
        if loss.kind == "reward" and objective.kind != "reward":
            reason = f": {loss.name} stands alone, in no sum and with no weight; write loss: {loss.name}"
            raise SettingError("objective.loss", reason)
    if objective.group < 2:
        raise SettingError("objective.group", f" is {objective.group}; answers are compared, so at least 2 are needed")
    if unused := objective.without_effect:
        name, owner = unused
        losses = ", ".join(objective.weights)
        raise SettingError(f"objective.{name}", f" goes with {owner}, and has no effect on {losses}; leave it out")


def _check_numbers(section: str, numbers: Mapping[Any, float | None], *, above_zero: bool = False) -> None:
    """Refuses numbers that are below 0 or not finite, and 0 itself where the setting would then do nothing."""
    needed = "above 0" if above_zero else "of at least 0"
    for name, number in numbers.items():
        if number is not None and not (0 < number < math.inf or (number == 0 and not above_zero)):
            raise SettingError(f"{section}.{name}", f" is {number:g}; it must be a number {needed}")


@functools.cache
def run_parser(task: Task, program: str = "run", description: str = "", *, dropout: bool = True) -> ArgumentParser:
    """Makes the parser of a task's settings, once; without `dropout` the adapter has none where no setting says so."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    how: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False, "conflict_handler": "resolve"}
    parser = ArgumentParser(prog=program, description=description, **how)
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file with the run's settings, or a recipe's name"
    )
    # The deepspeed launcher adds --local_rank=N to every command; the environment says it better.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_class_arguments(RunConfig, None, skip={*SECTION_CLASSES})
    foreign = [name.partition(".") for name in foreign_fields(task)]
    for section, kind in SECTION_CLASSES.items():
        parser.add_class_arguments(kind, section, skip={name for owner, _, name in foreign if owner == section})
    groups: Any = parser.groups
    for name, kind in TYPES[task].items():
        old = parser._option_string_actions[f"--{name}"]
        same: dict[str, Any] = {"help": old.help, "required": old.required, "default": old.default}
        groups[name.partition(".")[0]].add_argument(f"--{name}", type=kind, **same)
    parser.set_defaults({"task": task, **DEFAULTS[task], **({} if dropout else {"adapter.dropout": 0.0})})
    return parser


def setting_names(task: Task, *, training: bool = True) -> list[str]:
    """Lists every dotted name a task understands, with transformers' own below `training` unless that is left out."""
    # Only leaf settings: a name such as "model" also means a whole section.
    names = [action.dest for action in run_parser(task)._actions if action.dest not in NO_SETTINGS]
    leaves = [name for name in names if name not in SECTION_CLASSES and not name.endswith(".help")]
    if not training:
        return leaves
    from dora_vl.run.arguments import training_fields  # transformers: not for --help

    return leaves + [f"training.{name}" for name in training_fields()]


def files_as_arguments(arguments: Sequence[str], task: Task) -> tuple[list[str], Task]:
    """Puts the settings of each `--config` in front, as JSON; returns also the task that they name, or `task`.

    So an argument wins wherever it is, and the parser itself opens no file.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--variant")
    parser.add_argument("--task")
    options, others = parser.parse_known_args(list(arguments))
    for argument in others:
        refuse_other_number(argument.partition("=")[2] if argument.startswith("--") else argument)
    files = settings_of_files(options.config, options.variant)
    tasks = [options.task, *(file["task"] for file in reversed(files) if "task" in file), task]
    named = next(name for name in tasks if name is not None)
    if named not in [*FIELDS]:  # a list or a mapping has no hash
        close = difflib.get_close_matches(str(named), FIELDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise SettingError("task", f": no task {short_repr(named)}; there are {', '.join(FIELDS)}{hint}", close)
    settings = [_as_json({**file, "task": named}) for file in files]
    variant = [] if options.variant is None else [f"--variant={options.variant}"]
    return [*(f"--config={section}" for section in settings), *others, *variant], named


def _as_json(settings: Mapping[str, Any]) -> str:
    """Writes JSON that YAML, as the parser, reads alike: an emoji as it is, not as a surrogate pair."""
    pair = re.compile(r"\\ud[89ab]\w\w\\ud[c-f]\w\w")
    return pair.sub(lambda match: json.loads(f'"{match[0]}"'), json.dumps(settings, default=str))


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Maps dotted names to values; an empty mapping is a value."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix else {}
    named = {f"{prefix}.{key}" if prefix else str(key): item for key, item in value.items()}
    return {name: leaf for key, item in named.items() for name, leaf in flattened(item, key).items()}


# Settings as files hold them: recipes by name, and variants.


def find_recipe(name: str) -> Path:
    """Finds the file of a path or a recipe's name (`llava/llava15`); an existing file wins."""
    folder = shipped_folder()
    shipped = folder / f"{name.removesuffix(ENDING).removeprefix('configs/')}{ENDING}"
    path = next((path for path in (Path(name), shipped) if path.is_file()), None)
    if path is None:
        names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"*{ENDING}"))
        beside = (other / Path(name).name for other in Path(name).parent.parent.glob("*"))
        siblings = [str(path) for path in beside if path.is_file()]
        close = difflib.get_close_matches(name, [*siblings, *names], n=1)
        hint = f"did you mean {close[0]}?" if close else f"the recipes are {', '.join(names)}"
        raise SettingError("--config", f" {short_repr(name, 200)}: no such file or recipe; {hint}")
    return path


def settings_of_files(names: Sequence[str], variant: str | None) -> list[dict[str, Any]]:
    """Reads the settings of each `--config`, a path or a recipe's name, under a variant.

    None is each file's own choice, its key `variant`, or the file as it is.
    """
    paths = [find_recipe(name) for name in names]
    if variant is not None and not any(map(variants_of, paths)):
        where = f"{', '.join(map(str, paths))}: no variants there" if paths else "no --config FILE is given"
        raise SettingError("--variant", f" {short_repr(variant)}: {where}")
    return [_resolved(path, variant) for path in paths]


def variants_of(path: Path) -> list[str]:
    """Returns the names of a file's variants."""
    return list(_read(path).get(VARIANTS) or {})


def merge_settings(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lays changes over settings: mappings are merged, all else is replaced."""
    result = {**settings, **changes}
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(settings.get(key), Mapping):
            result[key] = merge_settings(settings[key], value)
    return result


def _read(path: Path) -> Mapping[str, Any]:
    """Reads a file's settings, which must be a mapping."""
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: must hold settings such as `model:`, found a {type(content).__name__}")
    return content


def _resolved(path: Path, variant: str | None) -> dict[str, Any]:
    """Returns a file's settings under a variant: the one of this name, or else the file's own choice."""
    content = _read(path)
    variants = content.get(VARIANTS, {})
    if not isinstance(variants, Mapping) or not all(isinstance(changes, Mapping) for changes in variants.values()):
        raise SettingError(VARIANTS, f" of {path} is not a mapping of names to settings")
    settings = {key: value for key, value in content.items() if key != VARIANTS}
    name = settings.get(VARIANT) if variant is None else variant
    if VARIANTS in content and name is not None:
        if name not in variants:
            raise SettingError(
                VARIANT, f": {path} has no variant {short_repr(name)}; there are {', '.join(map(str, variants))}"
            )
        settings = {**merge_settings(settings, variants[name]), VARIANT: name}
    for option in NO_SETTINGS:
        if option in settings:
            raise SettingError(option, f" in {path} is not a setting; it belongs on the command line")
    return settings


# What is said of a key or a value that the parser does not take.

_UNKNOWN = (
    re.compile(r"unrecognized arguments: --?(?P<key>[\w.\-]+)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"Option '(?P<key>[\w.]+)' is not accepted"),
)


OTHER_TOOLS: Mapping[str, str] = {
    **dict.fromkeys(("base_model", "model_name_or_path"), "model.base"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_bit", "bits"), "model.quantisation"),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "adapter.rank"),
    **dict.fromkeys(("target_modules", "lora_target", "lora_target_modules"), "adapter.targets"),
    **{"lora_alpha": "adapter.alpha", "lora_dropout": "adapter.dropout", "use_dora": "adapter.method"},
    **dict.fromkeys(("dataset", "dataset_name", "data_path"), "data.train"),
    **dict.fromkeys(
        ("cutoff_len", "max_length", "max_seq_length", "model_max_length", "sequence_len"), "data.max_tokens"
    ),
    **dict.fromkeys(("epochs", "num_epochs"), "training.num_train_epochs"),
    **dict.fromkeys(("batch_size", "micro_batch_size"), "training.per_device_train_batch_size"),
    **{"lr": "training.learning_rate", "mm_projector_lr": "optim.projector_learning_rate"},
}
"""Maps names that other tools use to the settings here, as docs/other_tools.md does at length."""


def explain_parser_error(message: str, task: Task) -> UserError:
    """Turns the parser's message into one line; names an unknown key's tasks and the nearest settings."""
    line = " ".join(message.split())
    match = next((match for pattern in _UNKNOWN if (match := pattern.search(line))), None)
    if match is None:
        error = wrong_value(line)
        if getattr(error, "key", None) != "data.train":
            return error
        text = next(action.help for action in run_parser(task)._actions if action.dest == "data.train")
        return SettingError("data.train", f" is not what task {task} takes. {text}")
    group = match.groupdict().get("group")
    unknown = f"{group}.{match['key']}" if group else match["key"]
    field = ".".join(unknown.split(".")[:2])
    owners = [name for name, fields in FIELDS.items() if field in fields]
    key = field.rpartition(".")[2]
    own, same = setting_names(task, training=False), OTHER_TOOLS.get(key, "")
    close = difflib.get_close_matches(field, own, n=1, cutoff=0.9)
    if not close and (same in own or same.startswith("training.")):
        close = [same]
    if not close:  # transformers' settings as well, whose import takes seconds
        names = setting_names(task)
        of_other_section = [name for name in names if name.rpartition(".")[2] == key]
        close = of_other_section[:1] or difflib.get_close_matches(field, names, n=1, cutoff=0.9 if owners else 0.6)
    owner = f", but of {' and '.join(owners)}" if owners else ""
    hint = f"; did you mean {close[0]}?" if close else "; --help lists the settings"
    return SettingError(unknown, f" is not a setting of task {task}{owner}{hint}", nearest=close)
