"""Rules that several tools share: transformers' TrainingArguments, PEFT's fields, places of a model, launchers."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dora_vl.errors import UserError, one_line
from dora_vl.start.rules import (
    ALL_LINEAR,
    Counterpart,
    Rule,
    Setting,
    globs_of_endings,
    globs_of_expression,
    is_on,
    lost,
    number,
    same,
    to,
    unless,
    whole,
    words,
)
from dora_vl.start.settings_file import LAUNCHER, PROGRAM, options
from dora_vl.training.arguments import OWNED, RENAMED, check_trackers, check_training_section, training_fields

PIXELS = "the base's own processor has the limits (preprocessor_config.json)"
STARTS = "starts are kaiming, gaussian, orthogonal and pissa"
ATTENTION = {name: name for name in ("sdpa", "eager", "flash_attention_2")} | {"auto": None}
DECODER = ("model.language_model*", "lm_head")
_STAGE = re.compile(r"(?:zero_?|z)([0-3])", re.IGNORECASE)


# -- adapters -----------------------------------------------------------------------------------------------------


def adapters_alone(rule: Rule) -> Rule:
    """A setting that full fine-tuning does not read."""
    return lambda setting: Counterpart(note="not read by full") if setting.method == "full" else rule(setting)


def which_method(setting: Setting) -> Counterpart:
    """DoRA, LoRA or full."""
    return Counterpart(settings={"adapter.method": setting.method})


def targets(setting: Setting) -> Counterpart:
    """PEFT's `all-linear`, list of endings, or expression for whole names."""
    value = setting.value
    if isinstance(value, str) and value.lower() == ALL_LINEAR:
        return Counterpart(settings={"adapter.targets": [ALL_LINEAR]})
    if isinstance(value, str):
        return expression(setting)
    return Counterpart(settings={"adapter.targets": globs_of_endings(sorted(words(setting)))})


def expression(setting: Setting) -> Counterpart:
    """A regular expression for whole names."""
    try:
        return Counterpart(settings={"adapter.targets": globs_of_expression(str(setting.value))})
    except ValueError as error:
        return Counterpart(note=f"{error} has no counterpart among patterns; write adapter.targets", is_lost=True)


def by_pattern(name: str) -> Rule:
    """`rank_pattern` and `alpha_pattern`: an expression at a name's end -> a number."""

    def rule(setting: Setting) -> Counterpart:
        if not isinstance(setting.value, Mapping):
            raise UserError(f"{setting.file}: {setting.key} is no mapping of names to numbers")
        made: dict[str, Any] = {}
        for text, value in setting.value.items():
            try:
                globs = globs_of_expression(text.removeprefix("^"))
            except ValueError as error:
                return Counterpart(
                    note=f"{error} has no counterpart among patterns; write adapter.{name}", is_lost=True
                )
            made |= {glob if glob.startswith("*") else globs_of_endings([glob])[0]: value for glob in globs}
        return Counterpart(settings={f"adapter.{name}": made}) if made else Counterpart(note="empty")

    return rule


def modules_to_save(setting: Setting) -> Counterpart:
    """Modules that train whole: the projector, and any others as parts of their names."""
    names = words(setting) if setting.value else []
    others = {name.rpartition(".")[2]: [f"*{name}.*"] for name in names if not is_projector(name)}
    settings: dict[str, Any] = {"adapter.train_projector": any(is_projector(name) for name in names)}
    return Counterpart(settings=settings | ({"adapter.also_train": others} if others else {}))


def is_projector(name: str) -> bool:
    """Whether a module's name is one that projectors of transformers' families have."""
    from dora_vl.backbones.families import PROJECTORS  # transformers: not before the file was read

    return name.rpartition(".")[2] in (*PROJECTORS, "projector", "mm_projector")


def dropout(setting: Setting) -> Counterpart:
    """The probability, and with DoRA PEFT's place of it."""
    settings: dict[str, Any] = {"adapter.dropout": number(setting)}
    if setting.method != "dora" or not settings["adapter.dropout"]:
        return Counterpart(settings=settings)
    note = "dropout before the frozen product too, as PEFT's DoRA; low_rank is faster"
    return Counterpart(settings={**settings, "adapter.dropout_mode": "whole_change"}, note=note)


def scaling(setting: Setting) -> Counterpart:
    """rsLoRA."""
    return Counterpart(settings={"adapter.rank_scaling": "sqrt" if is_on(setting.value) else "linear"})


def start(setting: Setting) -> Counterpart:
    """How A and B begin."""
    value = str(setting.value).lower()
    if value in ("true", "gaussian", "orthogonal"):
        return Counterpart(settings={"adapter.init": {"true": "kaiming"}.get(value, value)})
    if value.startswith("pissa"):
        return Counterpart(settings={"adapter.init": "pissa"}, note="by an exact decomposition")
    return Counterpart(note=STARTS, is_lost=True)


def chosen_places(setting: Setting, freezes: Mapping[str, tuple[str, bool]]) -> list[str]:
    """The places of a model that are not frozen.

    Args:
        freezes: place -> the setting that freezes it, and whether it does where the file is silent.
    """
    values = {place: setting.settings.get(name, usual) for place, (name, usual) in freezes.items()}
    return [place for place, value in values.items() if not is_on(value)]


def whole_places(setting: Setting, freezes: Mapping[str, tuple[str, bool]]) -> Counterpart:
    """What full fine-tuning trains; with adapters the targets say it."""
    if setting.method != "full" or setting.key != next(
        name for name, _ in freezes.values() if name in setting.settings
    ):
        return Counterpart(note="said by adapter.targets")
    places = chosen_places(setting, freezes)
    globs = [glob for place in places for glob in (DECODER if place == "language" else (place,))]
    return Counterpart(settings={"adapter.targets": globs})


def quantised(kind_setting: str) -> Rule:
    """So many bits, of the kind that another setting says."""

    def rule(setting: Setting) -> Counterpart:
        kind = str(setting.settings.get(kind_setting) or "bnb").lower()
        names = {("bnb", 4): "nf4", ("bitsandbytes", 4): "nf4", ("bnb", 8): "int8", ("hqq", 4): "hqq"}
        name = names.get((kind, whole(setting)))
        if name is None:
            note = f"{kind} of {setting.value} bits; there are nf4, int8 and hqq (4 bits)"
            return Counterpart(note=note, is_lost=True)
        return Counterpart(settings={"model.quantisation": name})

    return rule


def streaming(setting: Setting) -> Counterpart:
    """A stream has no lengths to group by."""
    settings = {"data.streaming": True, "data.group_by_modality_length": False}
    return Counterpart(settings=settings) if is_on(setting.value) else Counterpart(note="read whole")


def held_out_share(setting: Setting) -> Counterpart:
    """A share of the samples, or a number of them."""
    value = number(setting)
    if value <= 0:
        return Counterpart(note="none is held out")
    if value < 1:
        return Counterpart(settings={"data.validation_share": value}, note="whole pictures at a time")
    return Counterpart(settings={"data.validation_size": int(value)})


# -- training -----------------------------------------------------------------------------------------------------


def precision(dtype: str) -> Rule:
    """`bf16` or `fp16`: the number type of the frozen weights; with all weights training, of the arithmetic."""

    def rule(setting: Setting) -> Counterpart:
        if not is_on(setting.value):
            return Counterpart(note="off")
        if setting.method == "full":
            note = "with float32 masters, which DeepSpeed keeps"
            return Counterpart(settings={f"training.{setting.key}": True}, note=note)
        return Counterpart(settings={"model.dtype": dtype}, note="of the frozen weights; what trains is float32")

    return rule


def warmup(setting: Setting) -> Counterpart:
    """A number of steps, or below 1 a share of all of them; the number wins where both are said."""
    value = number(setting)
    steps, share = (float(setting.settings.get(name) or 0) for name in ("warmup_steps", "warmup_ratio"))
    if setting.key == "warmup_ratio" and steps > 0:
        return Counterpart(note="warmup_steps wins over it")
    if setting.key == "warmup_steps" and value == 0 and share:
        return Counterpart(note="0: warmup_ratio counts")
    return Counterpart(settings={"training.warmup_steps": int(value) if value >= 1 or not value else value})


def deepspeed(setting: Setting) -> Counterpart:
    """A DeepSpeed JSON as the shipped one of its stage, by its content where it is there, else by its name."""
    config = setting.value if isinstance(setting.value, Mapping) else _read(str(setting.value), setting.file)
    if config is None:
        name = Path(str(setting.value)).name
        stages = _STAGE.findall(name)
        if not stages:
            note = "the file is not there, and its name does not say the stage; zero2 or zero3"
            return Counterpart(note=note, is_lost=True)
        return _shipped(int(stages[0]), offloads="offload" in name.lower(), beside="by the file's name")
    zero = config.get("zero_optimization", {})
    parts = [zero.get(f"offload_{part}") or {} for part in ("optimizer", "param")]
    dropped = [name for name in ("optimizer", "scheduler") if name in config]
    note = f"its {' and '.join(dropped)} blocks are left out: training says both" if dropped else ""
    offloads = any(part.get("device", "none") != "none" for part in parts)
    return _shipped(int(zero.get("stage", 0)), offloads=offloads, beside=note)


def _shipped(stage: int, *, offloads: bool, beside: str) -> Counterpart:
    name = {0: "zero0", 1: "zero2", 2: "zero2", 3: "zero3"}[stage] + ("_offload" if stage == 3 and offloads else "")
    notes = [beside] if beside else []
    if stage == 1:
        notes.append("stage 1 is not shipped: 2 splits the gradients too, the same steps")
    if stage == 2 and offloads:
        notes.append("without its offload: zero3_offload is the shipped one that has it")
    return Counterpart(settings={"training.deepspeed": name}, note="; ".join(notes))


def launcher(setting: Setting) -> Counterpart:
    """What starts the program: the DeepSpeed stage of `accelerate launch --config_file` is a setting here."""
    started = "start it with `deepspeed` on as many GPUs: a step is batch x accumulation x GPUs"
    command = shlex.split(str(setting.value))
    if "launch" not in command:
        return Counterpart(note=started)
    given = options([word for word in command[command.index("launch") + 1 :] if word != "-m"], setting.file)
    if "zero_stage" in given:
        return deepspeed(replace(setting, value={"zero_optimization": {"stage": given["zero_stage"]}}))
    if "config_file" not in given:
        return Counterpart(note=started)
    config = _read(str(given["config_file"]), setting.file)
    if config is None:
        return deepspeed(replace(setting, value=given["config_file"]))
    if (kind := config.get("distributed_type", "NO")) != "DEEPSPEED":
        return Counterpart(note=f"{kind}; {started}", is_lost=kind not in ("NO", "MULTI_GPU"))
    plugin = config.get("deepspeed_config") or {}
    if "deepspeed_config_file" in plugin:
        return deepspeed(replace(setting, value=plugin["deepspeed_config_file"]))
    zero: dict[str, Any] = {"stage": plugin.get("zero_stage", 2)}
    for part in ("optimizer", "param"):
        zero[f"offload_{part}"] = {"device": plugin.get(f"offload_{part}_device", "none")}
    return deepspeed(replace(setting, value={"zero_optimization": zero}))


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


def eval_strategy(setting: Setting) -> Counterpart:
    """Our runs validate where there is validation data, and only there; YAML reads an unquoted `no` as false."""
    strategy = "no" if setting.value is False else str(setting.value)
    if strategy != "no" and not any(setting.settings.get(name) for name in HELD_OUT):
        note = "no validation data is named; data.validation or data.validation_share names it"
        return Counterpart(note=note, is_lost=True)
    return Counterpart(settings={"training.eval_strategy": strategy})


def report_to(setting: Setting) -> Counterpart:
    """Trackers, where they are installed here."""
    listed = setting.value if isinstance(setting.value, list) else [setting.value]
    trackers = [name for name in listed if name not in ("none", False)]
    try:
        check_trackers(trackers)
    except UserError as error:
        return Counterpart(note=str(error).removeprefix("training.report_to: "), is_lost=True)
    return Counterpart(settings={"training.report_to": trackers or "none"})


def resume(setting: Setting) -> Counterpart:
    """`true` is the newest checkpoint; one of another tool cannot be gone on from."""
    if not is_on(setting.value):
        return Counterpart(note="off")
    if setting.value is True or str(setting.value).lower() == "true":
        return Counterpart(settings={"resume": "last"})
    note = "another tool's checkpoint; `dora-vl convert` takes its adapter, for adapter.initial"
    return Counterpart(note=note, is_lost=True)


def order(setting: Setting) -> Counterpart:
    """How samples are put together."""
    if setting.key == "train_sampling_strategy" and setting.value not in ("group_by_length", "random"):
        return Counterpart(note="samples come in random order, or by length", is_lost=True)
    by_length = setting.value == "group_by_length" or (setting.key == "group_by_length" and is_on(setting.value))
    note = "" if by_length else "true: batches of like length: less padding, another order"
    return Counterpart(settings={"data.group_by_modality_length": by_length}, note=note)


def on(setting: Setting) -> bool:
    """A switch's value."""
    return is_on(setting.value)


ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
               "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS", "FORCE_TORCHRUN", "WANDB_PROJECT", "HF_HOME")  # fmt: skip
"""Variables before a command that mean the same here."""
AS_NEEDED = "samples are made as they are needed, by data.workers processes"
COMMON: Mapping[str, Rule] = {
    PROGRAM: same("dora-vl train"),
    LAUNCHER: launcher,
    **{name: same("of the environment: set it likewise") for name in ENVIRONMENT},
    "learning_rate": to("training.learning_rate", number),
    "num_train_epochs": to("training.num_train_epochs", number),
    "max_steps": to("training.max_steps", whole),
    "per_device_train_batch_size": to("training.per_device_train_batch_size", whole),
    "per_device_eval_batch_size": to("training.per_device_eval_batch_size", whole),
    "gradient_accumulation_steps": to("training.gradient_accumulation_steps", whole),
    "weight_decay": to("training.weight_decay", number),
    "max_grad_norm": to("training.max_grad_norm", number),
    "adam_beta1": to("training.adam_beta1", number),
    "adam_beta2": to("training.adam_beta2", number),
    "adam_epsilon": to("training.adam_epsilon", number),
    "ddp_timeout": to("training.ddp_timeout", whole),
    "warmup_ratio": warmup,
    "warmup_steps": warmup,
    "bf16": precision("bfloat16"),
    "fp16": precision("float16"),
    "deepspeed": deepspeed,
    "eval_strategy": eval_strategy,
    "evaluation_strategy": eval_strategy,
    "save_strategy": to("training.save_strategy", lambda setting: str(setting.value) if setting.value else "no"),
    "report_to": report_to,
    "resume_from_checkpoint": resume,
    "group_by_length": order,
    "train_sampling_strategy": order,
    "dataloader_num_workers": to("data.workers", whole),
    "overwrite_output_dir": to("overwrite", on),
    "gradient_checkpointing": to("training.gradient_checkpointing", on),
    "activation_checkpointing": to("training.gradient_checkpointing", on),
    "cache_dir": lost("the environment's HF_HOME"),
    "neftune_noise_alpha": lost("adapter.dropout"),
    "do_predict": unless(False, "evaluation.file names questions that are asked after training"),
    "include_num_input_tokens_seen": lost("log.jsonl has samples a second and the share of padding"),
    "trust_remote_code": same("models are transformers' own code"),
    "do_train": same("a run trains"),
    "do_eval": same("what is held out is measured while training"),
    "remove_unused_columns": same("batches are read whole"),
    "logging_dir": same("log.jsonl is in training.output_dir"),
    "save_safetensors": same("adapters are always safetensors"),
    "use_fast_tokenizer": same("a fast tokenizer"),
    "plot_loss": same("dora-vl report draws it"),
    "overwrite_cache": same("a changed file is read anew"),
    **dict.fromkeys(("preprocessing_num_workers", "dataset_num_proc", "lazy_preprocess"), same(AS_NEEDED)),
}
"""What all of them call the same."""
MICRO_BATCH = Counterpart(settings={"optim.loss_normalisation": "micro_batch"}, note="the mean of each micro-batch")
STEP_TOKENS = Counterpart(settings={"optim.loss_normalisation": "step_tokens"}, note="one mean over the step's tokens")
DECAY = Counterpart(settings={"optim.weight_decay_on": "all_but_biases"}, note="magnitudes decay as all else does")


def otherwise(tool: str) -> Rule:
    """A setting that no table names: a field of `training:` where transformers has it, else one without counterpart."""

    def rule(setting: Setting) -> Counterpart:
        if setting.key in OWNED:
            return (
                Counterpart(note=OWNED[setting.key], is_lost=True) if is_on(setting.value) else Counterpart(note="off")
            )
        if setting.key in training_fields():
            return _field(setting)
        if setting.key in RENAMED:
            return Counterpart(note=f"transformers has it no longer; here {RENAMED[setting.key]}", is_lost=True)
        if not is_on(setting.value):
            return Counterpart(note="off")
        return Counterpart(note=f"a setting of {tool}'s own, or none", is_lost=True)

    return rule


def _field(setting: Setting) -> Counterpart:
    """A field of `training:` under its own name, if a run takes this value of it."""
    fields = set(training_fields()) - COMMON.keys()
    together = {name: value for name, value in setting.settings.items() if name in fields}
    if _refusal(json.dumps(together, default=str)) is not None:  # taking one by one is slow
        refusal = _refusal(json.dumps({setting.key: setting.value}, default=str))
        if refusal is not None:
            return Counterpart(note=refusal, is_lost=True)
    return Counterpart(settings={f"training.{setting.key}": setting.value})


@cache
def _refusal(section: str) -> str | None:
    """Why a run does not take a `training:` section, given as JSON; None where it does."""
    try:
        check_training_section(json.loads(section))
    except UserError as error:
        return str(error)
    return None
