"""Rules that several tools share: transformers' TrainingArguments, PEFT's fields, places of a model, launchers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dora_vl.core.config import Method
from dora_vl.errors import UserError, one_line
from dora_vl.run.arguments import check_trackers
from dora_vl.start.rules import (
    Counterpart,
    Setting,
    computed,
    globs_of_endings,
    globs_of_expression,
    is_on,
    missing,
    of_adapters,
)
from dora_vl.start.settings_file import options

DECODER = ("model.language_model*", "lm_head")
ON_ANSWERS = "labels are on the answers alone"

# -- adapters -----------------------------------------------------------------------------------------------------


def lora_or_dora(settings: Mapping[str, Any]) -> Method:
    """Of a file that trains an adapter."""
    return "dora" if is_on(settings.get("use_dora")) else "lora"


@computed
def which_method(setting: Setting) -> Counterpart:
    """DoRA, LoRA or full."""
    return Counterpart({"adapter.method": setting.method})


@computed
@of_adapters
def targets(setting: Setting) -> Counterpart:
    """PEFT's `all-linear`, list of endings, or expression for whole names."""
    if isinstance(setting.value, str) and setting.value.lower() == "all-linear":
        return Counterpart({"adapter.targets": ["all-linear"]})
    if isinstance(setting.value, str):
        return expression(setting)
    return Counterpart({"adapter.targets": globs_of_endings(sorted(setting.words))})


@computed
def expression(setting: Setting) -> Counterpart:
    """A regular expression for whole names."""
    try:
        return Counterpart({"adapter.targets": globs_of_expression(str(setting.value))})
    except ValueError as error:
        return missing(f"{error} has no counterpart among patterns; write adapter.targets")


@computed
def by_pattern(setting: Setting) -> Counterpart:
    """`rank_pattern` and `alpha_pattern`: an expression at a name's end -> a number."""
    if not isinstance(setting.value, Mapping):
        raise setting.wrong(", no mapping of names to numbers")
    by_glob: dict[str, Any] = {}
    for text, value in setting.value.items():
        try:
            globs = globs_of_expression(text.removeprefix("^"))
        except ValueError as error:
            return missing(f"{error} has no counterpart among patterns; write adapter.{setting.key}")
        by_glob |= {glob if glob.startswith("*") else globs_of_endings([glob])[0]: value for glob in globs}
    return Counterpart({f"adapter.{setting.key}": by_glob}) if by_glob else Counterpart(note="empty")


def whole_modules(names: list[str]) -> dict[str, Any]:
    """Modules that train whole, as parts by the last of their names; the projector is one of its own."""
    others = {name.rpartition(".")[2]: [f"*{name}.*"] for name in names if not is_projector(name)}
    return {"adapter.also_train": others} if others else {}


@computed
@of_adapters
def modules_to_save(setting: Setting) -> Counterpart:
    """Modules that train whole: the projector, and others."""
    names = setting.words if setting.value else []
    return Counterpart({"adapter.train_projector": any(map(is_projector, names)), **whole_modules(names)})


def is_projector(name: str) -> bool:
    """Whether a module's name is one that projectors of transformers' families have."""
    from dora_vl.backbones.families import PROJECTORS  # transformers: not before the file was read

    return name.rpartition(".")[2] in (*PROJECTORS, "projector", "mm_projector")


@computed
def dropout(setting: Setting) -> Counterpart:
    """The probability, and with DoRA PEFT's place of it."""
    if setting.method != "dora" or not setting.number:
        return Counterpart({"adapter.dropout": setting.number})
    note = "dropout before the frozen product too, as PEFT's DoRA; low_rank is faster"
    return Counterpart({"adapter.dropout": setting.number, "adapter.dropout_mode": "whole_change"}, note)


@computed
def start(setting: Setting) -> Counterpart:
    """How A and B begin."""
    value = str(setting.value).lower()
    if value in ("true", "gaussian", "orthogonal"):
        return Counterpart({"adapter.init": {"true": "kaiming"}.get(value, value)})
    if value.startswith("pissa"):
        return Counterpart({"adapter.init": "pissa"}, "by an exact decomposition")
    return missing("starts are kaiming, gaussian, orthogonal and pissa")


@computed
def scaling(setting: Setting) -> Counterpart:
    """rsLoRA's, or the usual one."""
    return Counterpart({"adapter.rank_scaling": "sqrt" if setting.is_on else "linear"})


Freezes = Mapping[str, tuple[str, bool]]
"""Place of a model -> the setting that freezes it, and whether it is frozen where the file is silent."""


def chosen_places(setting: Setting, freezes: Freezes) -> list[str]:
    """The parts of a model that are not frozen."""
    return [part for part, (name, usual) in freezes.items() if not is_on(setting.settings.get(name, usual))]


def whole_places(setting: Setting, freezes: Freezes) -> Counterpart:
    """What full fine-tuning trains, said once; with adapters the targets say it."""
    message = [name for name, _ in freezes.values() if name in setting.settings]
    if setting.method != "full" or setting.key != message[0]:
        return Counterpart(note="said by adapter.targets")
    parts = chosen_places(setting, freezes)
    return Counterpart(
        {"adapter.targets": [glob for part in parts for glob in (DECODER if part == "language" else (part,))]}
    )


@computed
def streaming(setting: Setting) -> Counterpart:
    """A stream has no lengths to group by."""
    settings = {"data.streaming": True, "data.group_by_modality_length": False}
    return Counterpart(settings) if setting.is_on else Counterpart(note="read whole")


@computed
def held_out_share(setting: Setting) -> Counterpart:
    """A share of the samples, or a number of them."""
    number = setting.number
    if 0 < number < 1:
        return Counterpart({"data.validation_share": number}, "whole pictures at a time")
    return Counterpart({"data.validation_size": int(number)}) if number > 0 else Counterpart(note="none is held out")


def sources(name: str, paths: list[str], note: str = "", *, is_lost: bool = False) -> Counterpart:
    """Files of samples, as `data.train` or `data.validation` names them."""
    if name == "data.validation" and len(paths) > 1:
        return missing("one file of validation samples; put them together")
    return Counterpart({name: paths[0] if len(paths) == 1 else paths}, note, is_lost)


def hub(name: str, split: str) -> str:
    """A set of the hub, as `data.train` names it."""
    return f"hub:{name}" if split == "train" else f"hub:{name}:{split}"


# -- training -----------------------------------------------------------------------------------------------------


@computed
def precision(setting: Setting) -> Counterpart:
    """`bf16` or `fp16`: the number type of the frozen weights; with all weights training, of the arithmetic."""
    if not setting.is_on:
        return Counterpart(note="off")
    if setting.method == "full":
        return Counterpart({f"training.{setting.key}": True}, "with float32 masters, which DeepSpeed keeps")
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[setting.key]
    return Counterpart({"model.dtype": dtype}, "of the frozen weights; what trains is float32")


@computed
def warmup(setting: Setting) -> Counterpart:
    """A number of steps, or below 1 a share of all of them; the number wins where both are said."""
    value = setting.number
    steps, share = (float(setting.settings.get(name) or 0) for name in ("warmup_steps", "warmup_ratio"))
    if setting.key == "warmup_ratio" and steps > 0:
        return Counterpart(note="warmup_steps wins over it")
    if setting.key == "warmup_steps" and value == 0 and share:
        return Counterpart(note="0: warmup_ratio counts")
    return Counterpart({"training.warmup_steps": int(value) if value >= 1 or not value else value})


@computed
def deepspeed(setting: Setting) -> Counterpart:
    """A DeepSpeed JSON as the shipped one of its stage, by its content where it is there, else by its name."""
    config = setting.value if isinstance(setting.value, Mapping) else _read(str(setting.value), setting.file)
    if config is None:
        name = Path(str(setting.value)).name.lower()
        stages = re.findall(r"(?:zero_?|z)([0-3])", name)
        if not stages:
            return missing("the file is not there, and its name does not say the stage; zero2 or zero3")
        stage, offloads, notes = int(stages[0]), "offload" in name, ["by the file's name"]
    else:
        zero = config.get("zero_optimization", {})
        parts = [zero.get(f"offload_{part}") or {} for part in ("optimizer", "param")]
        stage, offloads = int(zero.get("stage", 0)), any(part.get("device", "none") != "none" for part in parts)
        dropped = [name for name in ("optimizer", "scheduler") if name in config]
        notes = [f"its {' and '.join(dropped)} blocks are left out: training says both"] if dropped else []
    if stage == 1:
        stage = 2
        notes.append("stage 1 is not shipped: 2 splits the gradients too, the same steps")
    elif stage == 2 and offloads:
        notes.append("without its offload: zero3_offload is the shipped one that has it")
    name = f"zero{stage}" + ("_offload" if stage == 3 and offloads else "")
    return Counterpart({"training.deepspeed": name}, "; ".join(notes))


@computed
def launcher(setting: Setting) -> Counterpart:
    """What starts the program: the DeepSpeed stage of `accelerate launch --config_file` is a setting here."""
    started = "start it with `deepspeed` on as many GPUs: a step is batch x accumulation x GPUs"
    command = shlex.split(str(setting.value))
    if "launch" not in command:
        return Counterpart(note=started)
    arguments = options([word for word in command[command.index("launch") + 1 :] if word != "-m"], setting.file)
    plugin: Any = {"zero_stage": arguments["zero_stage"]} if "zero_stage" in arguments else {}
    if not plugin and "config_file" in arguments:
        config = _read(str(arguments["config_file"]), setting.file)
        if config is None:
            return deepspeed(replace(setting, value=arguments["config_file"]))
        if (kind := config.get("distributed_type", "NO")) != "DEEPSPEED":
            return Counterpart(note=f"{kind}; {started}", is_lost=kind not in ("NO", "MULTI_GPU"))
        plugin = config.get("deepspeed_config") or {"zero_stage": 2}
    if not plugin:
        return Counterpart(note=started)
    if "deepspeed_config_file" in plugin:
        return deepspeed(replace(setting, value=plugin["deepspeed_config_file"]))
    devices = {
        part: {"device": plugin.get(f"{part}_device", "none")} for part in ("offload_optimizer", "offload_param")
    }
    return deepspeed(replace(setting, value={"zero_optimization": {"stage": plugin.get("zero_stage", 2), **devices}}))


def _read(name: str, file: Path) -> Mapping[str, Any] | None:
    """A settings file in YAML or JSON, from here or from beside the file that names it; None where it is not there."""
    path = next((candidate for candidate in (Path(name), file.parent / name) if candidate.is_file()), None)
    if path is None:
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: neither YAML nor JSON: {one_line(str(error), 200)}") from None
    return content if isinstance(content, Mapping) else None


HELD_OUT = ("eval_dataset", "val_size", "val_dataset", "split_dataset_ratio", "dataset_test_split")


@computed
def eval_strategy(setting: Setting) -> Counterpart:
    """Our runs validate where there is validation data, and only there; YAML reads an unquoted `no` as false."""
    strategy = "no" if setting.value is False else str(setting.value)
    if strategy != "no" and not any(setting.settings.get(name) for name in HELD_OUT):
        return missing("no validation data is named; data.validation or data.validation_share names it")
    return Counterpart({"training.eval_strategy": strategy})


@computed
def report_to(setting: Setting) -> Counterpart:
    """Trackers, where they are installed here."""
    listed = setting.value if isinstance(setting.value, list) else [setting.value]
    trackers = [name for name in listed if name not in ("none", False)]
    try:
        check_trackers(trackers)
    except UserError as error:
        return missing(str(error).removeprefix("training.report_to: "))
    return Counterpart({"training.report_to": trackers or "none"})


@computed
def resume(setting: Setting) -> Counterpart:
    """`true` is the newest checkpoint; one of another tool cannot be gone on from."""
    if not setting.is_on:
        return Counterpart(note="off")
    if str(setting.value).lower() == "true":
        return Counterpart({"resume": "last"})
    return missing("another tool's checkpoint; `dora-vl convert` takes its adapter, for adapter.initial")


@computed
def order(setting: Setting) -> Counterpart:
    """How samples are put together."""
    if setting.key == "train_sampling_strategy" and setting.value not in ("group_by_length", "random"):
        return missing("samples come in random order, or by length")
    by_length = setting.value == "group_by_length" or (setting.key == "group_by_length" and setting.is_on)
    note = "" if by_length else "true: batches of like length: less padding, another order"
    return Counterpart({"data.group_by_modality_length": by_length}, note)


@computed
def save_strategy(setting: Setting) -> Counterpart:
    """YAML reads an unquoted `no` as false."""
    return Counterpart({"training.save_strategy": str(setting.value) if setting.value else "no"})
