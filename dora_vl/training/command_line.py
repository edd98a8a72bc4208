"""Reads one run's settings: `--config FILE`, `--variant NAME` of it, then `--section.key value`; says what was meant.

Where a key is wrong, the nearest is named.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, cast

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from dora_vl.errors import UserError, shown, shown_text
from dora_vl.files import read_yaml, refuse_other_number
from dora_vl.training.recipe import RunConfig

# Settings under other tools' names: whose file it is, and what its names are called here.


NAMES: Mapping[str, str] = {
    "model_name_or_path": "model.base",
    "base_model": "model.base",
    "model_id": "model.base",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "data_path": "data.train",
    "train_file": "data.train",
    "media_dir": "data.image_folder",
    "image_dir": "data.image_folder",
    "image_folder": "data.image_folder",
    "val_size": "data.validation_share",
    "val_set_size": "data.validation_share",
    "split_dataset_ratio": "data.validation_share",
    "cutoff_len": "data.max_tokens",
    "sequence_len": "data.max_tokens",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "model_max_length": "data.max_tokens",
    "max_samples": "data.limit",
    "template": "model.template",
    "version": "model.template",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "target_modules": "adapter.targets",
    "finetuning_type": "adapter.method",
    "train_type": "adapter.method",
    "tuner_type": "adapter.method",
    "use_dora": "adapter.method",
    "peft_use_dora": "adapter.method",
    "quantization_bit": "model.quantisation",
    "load_in_4bit": "model.quantisation",
    "load_in_8bit": "model.quantisation",
    "mm_projector_lr": "optim.projector_learning_rate",
    "micro_batch_size": "training.per_device_train_batch_size",
    "num_epochs": "training.num_train_epochs",
}
"""What other tools call a setting -> its name here."""

TELLING: Mapping[str, frozenset[str]] = {
    "llama-factory": frozenset(
        {"finetuning_type", "stage", "cutoff_len", "dataset_dir", "lora_target", "freeze_vision_tower"}
    ),
    "trl": frozenset(
        {
            "dataset_name",
            "use_peft",
            "lora_r",
            "lora_target_modules",
            "lora_task_type",
            "assistant_only_loss",
            "datasets",
        }
    ),
    "ms-swift": frozenset(
        {"train_type", "tuner_type", "sft_type", "freeze_vit", "freeze_aligner", "split_dataset_ratio", "vit_lr"}
    ),
    "llava": frozenset({"mm_projector_lr", "lora_enable", "mm_projector_type", "vision_tower", "image_aspect_ratio"}),
    "peft": frozenset({"peft_type", "target_modules", "inference_mode", "init_lora_weights", "modules_to_save"}),
    "Axolotl": frozenset({"base_model", "datasets", "micro_batch_size", "sequence_len", "val_set_size"}),
}
"""Names that tell whose file it is."""
UNTRANSLATED = ("Axolotl", "another tool")
"""Whose settings `dora-vl translate` has no table of."""
SHOWN = 6
LEAST = 2
"""Of other tools' names, so many make a file another tool's."""


def refuse_other_tools(path: Path, settings: Mapping[str, object], sections: Iterable[str]) -> None:
    """Refuses a settings file of another tool, with what its settings are called here.

    Args:
        settings: the file's content.
        sections: names of ours, each of which holds a mapping.

    Raises:
        UserError: it has names of theirs at its top level, and no section of ours.
    """
    theirs = [name for name in settings if name in NAMES]
    if any(isinstance(settings.get(name), Mapping) for name in sections) or len(theirs) < LEAST:
        return
    likely = max(TELLING, key=lambda tool: len(TELLING[tool] & settings.keys()))
    whose = likely if TELLING[likely] & settings.keys() else "another tool"
    names = ", ".join(f"{name} is {NAMES[name]}" for name in theirs[:SHOWN])
    more = f" and {len(theirs) - SHOWN} more" if len(theirs) > SHOWN else ""
    is_translated = whose not in UNTRANSLATED
    way = f"`dora-vl translate {path}`" if is_translated else "`dora-vl init FOLDER` writes a file for your pictures"
    raise UserError(
        f"{path}: settings of {whose}, which are laid out otherwise here: {names}{more}; sections model, adapter, "
        f"data, training; {way}"
    )


def refuse_untranslated(path: Path, settings: Mapping[str, object]) -> None:
    """Refuses the settings of a tool that is known here, but has no table.

    Raises:
        UserError: its names are theirs.
    """
    counts = {tool: len(names & settings.keys()) for tool, names in TELLING.items()}
    if max(counts.values()) and max(counts, key=lambda tool: counts[tool]) in UNTRANSLATED:
        refuse_other_tools(path, settings, ())


ENDING = ".yaml"
VARIANTS, VARIANT = "variants", "variant"
NO_SETTINGS = ("config", "print_config", "local_rank", "help")
"""Options of the parser; from a file it would take another file's name by the first."""
SECTIONS = ("model", "adapter", "data", "optim", "training", "evaluation", VARIANTS)


def shipped_folder() -> Path:
    """The folder of recipes and DeepSpeed JSON: in the package where it is installed, beside it in a checkout."""
    package = Path(str(files("dora_vl")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def recipe_names() -> list[str]:
    """Every recipe's name, such as `llava/llava15_7b`."""
    folder = shipped_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"*{ENDING}"))


def find_recipe(name: str) -> Path:
    """The file that a path or a recipe's name stands for; a file that is there comes first.

    Raises:
        UserError: neither; it lists the recipes.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_folder() / f"{name.removesuffix(ENDING).removeprefix('configs/')}{ENDING}"
    if shipped.is_file():
        return shipped
    raise UserError(f"--config {shown(name, 200)}: no such file or recipe; the recipes are {', '.join(recipe_names())}")


def with_variant(names: Sequence[str], variant: str | None) -> list[dict[str, Any]]:
    """The settings of each `--config`, under the variant.

    Args:
        names: paths or recipes' names.
        variant: what `--variant` says; None: each file's own choice, its key `variant`, or the file as it stands.

    Raises:
        UserError: a file is not there or cannot be used, has not the variant, or none of them has any.
    """
    paths = [find_recipe(name) for name in names]
    if variant is not None and not any(map(variants_of, paths)):
        where = f"{', '.join(map(str, paths))}: no variants there" if paths else "no --config FILE is given"
        raise UserError(f"--variant {shown(variant)}: {where}")
    return [_resolved(path, variant) for path in paths]


def variants_of(path: Path) -> list[str]:
    """Names of a file's variants."""
    return list(_read(path).get(VARIANTS) or {})


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes over them: mappings are merged, all else is replaced."""
    over = {
        key: merged(settings[key], value)
        if isinstance(value, Mapping) and isinstance(settings.get(key), Mapping)
        else value
        for key, value in changes.items()
    }
    return {**settings, **over}


def _read(path: Path) -> Mapping[str, Any]:
    """A file's settings.

    Raises:
        UserError: it is no YAML, no mapping of settings, or another tool's.
    """
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: must hold settings such as `model:`, found a {type(content).__name__}")
    refuse_other_tools(path, content, SECTIONS)
    return content


def _resolved(path: Path, variant: str | None) -> dict[str, Any]:
    """A file's settings under a variant: the one of this name, or else the file's own choice."""
    content = _read(path)
    variants = content.get(VARIANTS, {})
    if not isinstance(variants, Mapping) or not all(isinstance(one, Mapping) for one in variants.values()):
        raise UserError(f"{path}: variants is not a mapping of names to settings")
    settings = {key: value for key, value in content.items() if key != VARIANTS}
    name = settings.get(VARIANT) if variant is None else variant
    if VARIANTS in content and name is not None:
        if name not in variants:
            raise UserError(f"{path}: no variant {shown(name)}; there are {', '.join(map(str, variants))}")
        settings = {**merged(settings, variants[name]), VARIANT: name}
    if strange := [name for name in NO_SETTINGS if name in settings]:
        raise UserError(f"{path}: {strange[0]} is not a setting; it belongs on the command line")
    return settings


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


def read_run(arguments: Sequence[str], *, program: str = "run", description: str = "") -> RunConfig:
    """A LLaVA run's settings from command-line arguments; see `read_settings`."""
    return read_settings(arguments, RunConfig, program=program, description=description)


def read_settings(
    arguments: Sequence[str], settings: type[Settings], *, program: str = "run", description: str = ""
) -> Settings:
    """Settings of a run's dataclass from command-line arguments; they win over the file's.

    Raises:
        UserError: a key that is not a setting (with the nearest one), a value of the wrong type, or a count below 1.
    """
    parser = run_parser(program, description, settings)
    try:
        config = _instantiate(parser, parser.parse_args(files_first(arguments)), settings)
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(explain(str(error), setting_names(settings))) from error
    _check_counts(config)
    from dora_vl.training.arguments import check_training_section  # transformers: not for --help

    checked: Any = config  # a dataclass with a `training` section, as every run's
    return dataclasses.replace(checked, training=check_training_section(checked.training))


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
    files, others = _taken(arguments, "--config")
    variants, _ = _taken(others, "--variant")
    for argument in others:
        refuse_other_number(argument.partition("=")[2] if argument.startswith("--") else argument)
    settings = with_variant(files, variants[-1] if variants else None)
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


def read_run_file(path: str | Path, *overrides: str) -> RunConfig:
    """Settings of a YAML file, with `--section.key=value` overrides."""
    return read_run([f"--config={path}", *overrides])


def _instantiate(parser: ArgumentParser, parsed: Namespace, settings: type[Settings]) -> Settings:
    built, kind = parser.instantiate(parsed), cast(Any, settings)
    return kind(**{one.name: getattr(built, one.name) for one in dataclasses.fields(kind)})


def setting_names(settings: type[Any] = RunConfig) -> list[str]:
    """Every dotted name a run understands, `training.*` included."""
    from dora_vl.training.arguments import training_fields

    parser = run_parser("run", "", settings)
    skipped = {"help", "config", "print_config", "local_rank"}
    # Only leaf settings: a name such as "model" also stands for a whole section.
    named = [action.dest for action in parser._actions if action.dest not in skipped]
    leaves = [name for name in named if not any(other.startswith(f"{name}.") for other in named)]
    return leaves + [f"training.{name}" for name in training_fields()]


def explain(message: str, names: Iterable[str]) -> str:
    """One line from the parser's message, with the nearest settings where a key is unknown."""
    line = " ".join(message.split())
    unknown = _unknown_key(line)
    if unknown is None:
        return said_plainly(line)
    known = NAMES.get(unknown.rsplit(".", 1)[-1])
    close = [known] if known in (names := list(names)) else nearest(unknown, names)
    hint = f"; did you mean {' or '.join(close)}?" if close else "; --help lists the settings"
    return f"{unknown} is not a setting{hint}"


_WRONG_KIND = re.compile(r"^\W*(?:Parser key )?\W*([\w.]+)\W*: Expected an? <class '(\w+)'>\. Got value: (.*)$")
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
_ONE_OF = re.compile(
    r"^\W*(?:Parser key )?\W*([\w.]+)\W*: (Does not validate|Expected a typing\.Literal).*value: (.*)$"
)


def said_plainly(line: str) -> str:
    """A complaint of the parser about a value, without Python's names of types."""
    if (found := _WRONG_KIND.match(line)) and found[2] in _KINDS:
        return f"{found[1]} is {shown_text(found[3])}; it must be {_KINDS[found[2]]}"
    if found := _ONE_OF.match(line):
        literals = [one.strip("'") for group in re.findall(r"Literal\[([^\]]*)\]", line) for one in group.split(", ")]
        kinds = [_KINDS[one] for one in re.findall(r"<class '(\w+)'>", line.partition("Errors:")[0]) if one in _KINDS]
        if known := list(dict.fromkeys([*literals, *kinds])):
            return f"{found[1]} is {shown_text(found[3])}; it must be one of {', '.join(known)}"
    return line.replace('Parser key "', '"', 1)


def _unknown_key(line: str) -> str | None:
    """The key a parser message complains about, dotted and without dashes; None for other complaints."""
    if found := re.search(r"unrecognized arguments: --?([\w.\-]+)", line):
        return found[1]
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", line):
        return f"{found[1]}.{found[2]}"
    if found := re.search(r"Option '([\w.]+)' is not accepted", line):
        return found[1]
    return None


def nearest(unknown: str, names: Iterable[str]) -> list[str]:
    """Up to two settings whose dotted name, or whose last word, is close to `unknown`, best first.

    A word that a name holds as a whole (`mm_projector_lr` and `optim.projector_learning_rate`) counts too.
    """
    spelled_out = re.sub(r"\blr\b|(?<=_)lr\b", "learning_rate", unknown.replace("-", "_"))
    last = spelled_out.rsplit(".", 1)[-1]
    section = spelled_out.rsplit(".", 1)[0] if "." in spelled_out else ""

    def likeness(name: str) -> float:
        theirs = name.rsplit(".", 1)[-1]
        alike = difflib.SequenceMatcher(None, last, theirs).ratio()
        return alike + 0.1 * (section != "" and name.startswith(f"{section}."))

    ranked = sorted(names, key=likeness, reverse=True)
    best = [name for name in ranked[:2] if likeness(name) >= 0.6]
    exact = [name for name in best if name.rsplit(".", 1)[-1] == last]
    return exact or best
