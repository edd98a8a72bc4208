"""Whose settings a file holds, and what they are: YAML, JSON, or the command line of a script."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from yaml import YAMLError, safe_load

from dora_vl.errors import UserError, one_line, shown_names
from dora_vl.translation import llama_factory, llava_script, ms_swift, peft_adapter, trl
from dora_vl.translation.rules import Tool
from dora_vl.translation.shell_command import Command, commands, options, scalar
from dora_vl.translation.training_arguments import LAUNCHER, PROGRAM

TOOLS: Mapping[str, Tool] = {
    "llama-factory": llama_factory.LLAMA_FACTORY,
    "trl": trl.TRL,
    "ms-swift": ms_swift.MS_SWIFT,
    "llava": llava_script.LLAVA,
    "peft": peft_adapter.PEFT,
}
"""What `--from` may say."""
TELLING: Mapping[str, frozenset[str]] = {
    "llama-factory": frozenset(
        {
            "stage",
            "finetuning_type",
            "cutoff_len",
            "dataset_dir",
            "lora_target",
            "freeze_vision_tower",
            "preprocessing_num_workers",
        }
    ),
    "trl": frozenset(
        {
            "use_peft",
            "dataset_name",
            "lora_r",
            "lora_target_modules",
            "lora_task_type",
            "assistant_only_loss",
            "datasets",
        }
    ),
    "ms-swift": frozenset(
        {
            "tuner_type",
            "train_type",
            "sft_type",
            "freeze_vit",
            "freeze_aligner",
            "freeze_llm",
            "split_dataset_ratio",
            "vit_lr",
        }
    ),
    "llava": frozenset({"mm_projector_lr", "lora_enable", "mm_projector_type", "vision_tower", "image_aspect_ratio"}),
    "peft": frozenset({"peft_type", "target_modules", "inference_mode", "init_lora_weights", "modules_to_save"}),
}
"""Names that only one of them has, or nearly."""
LARGEST_FILE = 4 << 20
"""Bytes; settings are short, and a file of weights given by mistake is not read."""
CONFIG_OPTION = "config"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A file's settings, and whose they are."""

    tool: Tool
    said: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Program:
    """How a command line of a tool's training begins."""

    tool: str
    fits: Callable[[Sequence[str], int], bool]
    """Whether the words from a place on are it."""
    words: int = 1
    """So many words it has."""


def _script(*endings: str) -> Callable[[Sequence[str], int], bool]:
    return lambda words, at: any(f"/{words[at]}".endswith(f"/{one}") for one in endings)


def _verb(program: str, verb: str) -> Callable[[Sequence[str], int], bool]:
    return lambda words, at: PurePosixPath(words[at]).name == program and list(words[at + 1 : at + 2]) == [verb]


PROGRAMS = (
    _Program(tool="llama-factory", fits=_verb("llamafactory-cli", "train"), words=2),
    _Program(tool="llama-factory", fits=_verb("lmf", "train"), words=2),
    _Program(tool="trl", fits=_verb("trl", "sft"), words=2),
    _Program(tool="ms-swift", fits=_verb("swift", "sft"), words=2),
    _Program(tool="ms-swift", fits=_script("swift/cli/sft.py")),
    _Program(
        tool="llava",
        fits=_script(
            *(f"llava/train/{one}" for one in ("train.py", "train_mem.py", "train_xformers.py")),
            *(f"llava/train/{one}" for one in ("train_dora.py", "train_mem_dora.py")),
        ),
    ),
    _Program(tool="trl", fits=_script("sft.py", "sft_vlm.py")),
    _Program(tool="llama-factory", fits=_script("src/train.py", "src/train_bash.py")),
)
"""The first that fits counts."""


def read_settings_file(path: Path, wanted: str | None = None) -> Settings:
    """A file's settings and whose they are.

    Args:
        wanted: the tool, where `--from` names it.

    Raises:
        UserError: it is no file of settings, of no tool that is known, or of ours.
    """
    text = _text(path)
    if (mapping := _mapping(path, text)) is not None:
        return _of_mapping(path, mapping, wanted)
    return _of_script(path, text, wanted)


def _text(path: Path) -> str:
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file in it, such as its adapter_config.json")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes: no file of settings")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text; settings are YAML, JSON or a shell script") from None


def _mapping(path: Path, text: str) -> Mapping[str, Any] | None:
    """The content of YAML or JSON; None where it is neither."""
    try:
        content = json.loads(text) if path.suffix == ".json" else safe_load(text)
    except (ValueError, YAMLError, RecursionError) as error:
        if path.suffix in (".json", ".yaml", ".yml"):
            raise UserError(f"{path}: no {path.suffix[1:].upper()}: {one_line(str(error), 200)}") from None
        return None
    if isinstance(content, Mapping) and all(isinstance(key, str) for key in content):
        return {key: scalar(value) if isinstance(value, str) else value for key, value in content.items()}
    return None


def refuse_untranslated(path: Path, said: Mapping[str, Any]) -> None:
    """Raises a `UserError` where the names are of a tool that is known here, but has no table."""
    from dora_vl.run.other_tools import TELLING as NAMES_OF_TOOLS
    from dora_vl.run.other_tools import UNTRANSLATED, refuse_other_tools

    counts = {tool: len(names & said.keys()) for tool, names in NAMES_OF_TOOLS.items()}
    most = max(counts.values())
    if most and all(tool in UNTRANSLATED for tool, count in counts.items() if count == most):
        refuse_other_tools(path, said, ())


def _of_mapping(path: Path, said: Mapping[str, Any], wanted: str | None) -> Settings:
    from dora_vl.run.command_line import SECTIONS

    if any(isinstance(said.get(name), Mapping) for name in SECTIONS):
        raise UserError(f"{path}: a run of dora_vl already; --to peft, llama-factory or trl writes it for those")
    if wanted is None:
        refuse_untranslated(path, said)
        likely = max(TELLING, key=lambda name: len(TELLING[name] & said.keys()))
        if not TELLING[likely] & said.keys():
            raise UserError(
                f"{path}: its settings ({shown_names(said)}) are of no tool that is known here; --from says whose they "
                f"are: {', '.join(TOOLS)}"
            )
        wanted = likely
    return Settings(tool=TOOLS[wanted], said=said)


def _of_script(path: Path, text: str, wanted: str | None) -> Settings:
    try:
        found = [(command, *place) for command in commands(text) if (place := _place(command)) is not None]
    except ValueError as error:
        raise UserError(f"{path}: no shell script: {error}") from None
    if not found:
        raise UserError(
            f"{path}: neither settings (YAML, JSON) nor a command that trains with a tool that is known here: "
            f"{', '.join(TOOLS)}"
        )
    if len(found) > 1:
        starts = "; ".join(shlex.join(command.words[: at + 1])[:60] for command, at, _ in found)
        raise UserError(f"{path}: {len(found)} commands that train ({starts}); keep one in a file")
    command, at, program = found[0]
    tool = TOOLS[wanted or program.tool]
    rest = list(command.words[at + program.words :])
    said = _positional(path, rest) if rest and not rest[0].startswith("--") else options(rest, path)
    if (named := said.pop(CONFIG_OPTION, None)) is not None:
        said = {**_file_of(path, str(named)), **said}
    return Settings(tool=tool, said={**_around(command, at), **said})


def _place(command: Command) -> tuple[int, _Program] | None:
    for at in range(len(command.words)):
        for program in PROGRAMS:
            if program.fits(command.words, at):
                return at, program
    return None


def _positional(path: Path, rest: Sequence[str]) -> dict[str, Any]:
    """`llamafactory-cli train FILE key=value --key value`: the file's settings, and those behind it."""
    said = _file_of(path, rest[0])
    for number, word in enumerate(rest[1:], start=1):
        if word.startswith("--"):
            return {**said, **options(rest[number:], path)}
        key, _, value = word.partition("=")
        said[key] = scalar(value)
    return said


def _file_of(script: Path, name: str) -> dict[str, Any]:
    """The settings file that a command names: from here, or from the script's folder or one above it."""
    tried = (Path(name), *(folder / name for folder in script.resolve().parents[:4]))
    path = next((one for one in tried if one.is_file()), None)
    if path is None:
        raise UserError(f"{script}: it takes its settings from {name}, which is not there; translate that file")
    mapping = _mapping(path, _text(path))
    if mapping is None:
        raise UserError(f"{path}: no mapping of settings")
    return dict(mapping)


def _around(command: Command, at: int) -> dict[str, Any]:
    """What stands before the program: variables of the environment, and what starts it."""
    before = shlex.join(command.words[:at])
    said: dict[str, Any] = {name: scalar(value) for name, value in command.environment.items()}
    said[PROGRAM] = command.words[at]
    return {**said, LAUNCHER: before} if before else said
