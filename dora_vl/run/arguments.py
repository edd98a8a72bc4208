"""`training:` of a run becomes `transformers.TrainingArguments`; what would not work is refused first."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from transformers import TrainingArguments
from transformers.integrations.deepspeed import deepspeed_config
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from dora_vl.errors import UserError, one_line, shown
from dora_vl.run.folder import run_folder_of
from dora_vl.run.launch import Launch, several_ranks, stand_alone_environment, start_cpu_communication
from dora_vl.run.reading import shipped_folder, without_type_names
from dora_vl.run.settings import RunSettings

logger = logging.getLogger(__name__)

SAID_TWICE = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
"""DeepSpeed's name -> the field of the `training:` section that says the same."""
BLOCKS = ("zero_optimization", "bf16", "fp16", "torch_autocast", "activation_checkpointing")
"""What is an object in a DeepSpeed config."""
SHORT_NAMES = ("zero0", "zero2", "zero3", "zero3_offload")


def read_deepspeed(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a short name (`zero2`), of a file (as given, or below a checkout), or of a mapping."""
    if isinstance(value, Mapping):
        return dict(value)
    shipped = shipped_folder()
    tried = [shipped / "deepspeed" / f"{value}.json"] if value in SHORT_NAMES else [Path(value), shipped.parent / value]
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        raise UserError(f"training.deepspeed: {value} is neither a file nor one of {', '.join(SHORT_NAMES)}")
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: a DeepSpeed config is a JSON object, this is a {type(loaded).__name__}")
    return loaded


def zero_stage(config: Mapping[str, Any] | None) -> int:
    """ZeRO stage of a DeepSpeed config; 0 without one."""
    return int((config or {}).get("zero_optimization", {}).get("stage", 0))


def check_form(config: Mapping[str, Any]) -> None:
    """Reads a config as DeepSpeed will, without what the `training:` section says.

    Raises:
        UserError: a block or a value that DeepSpeed does not take; by itself it says so after the model was loaded.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    left_out = (*SAID_TWICE, "train_batch_size")
    stated = {name: value for name, value in _without_auto(config).items() if name not in left_out}
    try:
        DeepSpeedConfig(stated | {"train_micro_batch_size_per_gpu": 1})
    except (ValueError, TypeError, AttributeError, AssertionError, KeyError) as error:
        wrong = [f'"{name}" is no object' for name in BLOCKS if not isinstance(config.get(name, {}), Mapping)]
        raise UserError(f"DeepSpeed config: {wrong[0] if wrong else one_line(str(error), 200)}") from error


def _without_auto(value: Any) -> Any:
    """What transformers does not fill in."""
    if not isinstance(value, Mapping):
        return value
    return {name: _without_auto(inside) for name, inside in value.items() if inside != "auto"}


def check_deepspeed(config: Mapping[str, Any], *, method: str, bf16: bool) -> None:
    """Refuses blocks that override the recipe.

    Raises:
        UserError: `optimizer` or `scheduler` (per-part learning rates and the schedule would be dropped without
            a word), or half precision of the trained float32 parameters.
    """
    if "optimizer" in config:
        raise UserError(
            'DeepSpeed config: remove the "optimizer" block; with it one learning rate is used for every part '
            "(projector and magnitudes too) and training.optim is not used"
        )
    if "scheduler" in config:
        raise UserError(
            'DeepSpeed config: remove the "scheduler" block; with it training.lr_scheduler_type and '
            "training.warmup_steps are not used"
        )
    for name in ("bf16", "fp16"):
        enabled = config.get(name, {}).get("enabled", False)
        if enabled is True and method != "full":
            raise UserError(
                f'DeepSpeed config: "{name}": enabled casts the trained float32 parameters of adapter.method {method}; '
                'write "auto" and set model.dtype for the frozen weights'
            )
    if "torch_autocast" in config and config["torch_autocast"].get("enabled") and method != "full":
        raise UserError('DeepSpeed config: remove "torch_autocast"; adapters set their own number types')
    if method == "full" and bf16 and config.get("bf16", {}).get("enabled") is False:
        raise UserError('DeepSpeed config: "bf16": enabled is false, but training.bf16 is true; write "auto"')


def check_agreement(config: Mapping[str, Any], section: Any) -> None:
    """Refuses a number that the `training:` section says otherwise; "auto" takes the section's.

    Args:
        section: transformers' TrainingArguments.

    Raises:
        UserError: they differ; transformers says so only when training starts, in a traceback.
    """
    parts = section.gradient_accumulation_steps * section.world_size
    whole = section.per_device_train_batch_size * parts
    if config.get("train_batch_size", "auto") not in ("auto", whole):
        raise UserError(
            f'DeepSpeed config: "train_batch_size" is {config["train_batch_size"]!r}, but training says {whole} '
            '(per_device_train_batch_size x gradient_accumulation_steps x ranks); write "auto"'
        )
    for name, field in SAID_TWICE.items():
        stated, ours = config.get(name, "auto"), getattr(section, field)
        if stated not in ("auto", ours):
            raise UserError(
                f'DeepSpeed config: "{name}" is {stated!r}, but training.{field} is {ours!r}; write "auto" and set '
                f"training.{field}"
            )


# Fields of earlier transformers that people still write, and what to write now (transformers 5 migration guide).
RENAMED = {
    "evaluation_strategy": "training.eval_strategy",
    "warmup_ratio": "training.warmup_steps as a number below 1, such as 0.03",
    "group_by_length": "data.group_by_modality_length",
    "overwrite_output_dir": "the top-level overwrite: true",
    "resume_from_checkpoint": "the top-level resume: last",
    "logging_dir": "nothing: log.jsonl is in training.output_dir",
    "no_cuda": "training.use_cpu",
    "per_gpu_train_batch_size": "training.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "training.per_device_eval_batch_size",
    "save_safetensors": "nothing: adapters are always safetensors",
    "adafactor": "training.optim: adafactor",
    "batch_size": "training.per_device_train_batch_size (x gradient_accumulation_steps x GPUs is a step)",
    "epochs": "training.num_train_epochs",
    "lr": "training.learning_rate",
    "steps": "training.max_steps",
    "half_precision_backend": "nothing: it has no replacement",
    "fp16_backend": "nothing: it has no replacement",
    "dataloader_num_workers": "data.workers",
}
# What is ours to decide; a user's value would break the run.
OWNED = {
    "remove_unused_columns": "batches are read whole",
    "label_smoothing_factor": "the loss is computed at labelled positions only",
    "use_liger_kernel": "the loss is computed at labelled positions only",
    "auto_find_batch_size": "the batch size is part of the recipe",
    "push_to_hub": "upload training.output_dir/adapter with `hf upload` afterwards",
    "fsdp": "sharding is DeepSpeed's here; set training.deepspeed",
    "local_rank": "the launcher sets it",
    "neftune_noise_alpha": "the Trainer adds its noise to plain language models only; raise adapter.dropout",
}
STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")
AT_LEAST: Mapping[str, float] = {
    "learning_rate": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "warmup_steps": 0.0,
    "num_train_epochs": 0.0,
    "seed": 0,
    "data_seed": 0,
    "logging_steps": 0.0,
    "save_steps": 0.0,
    "eval_steps": 0.0,
    "ddp_timeout": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}
"""The smallest value that makes sense; below it torch or the Trainer fails late, or trains towards a larger loss."""
# Defaults that differ from the library's: a log line that can be drawn, a loss that shows when it is not a number.
OURS: dict[str, Any] = {
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "report_to": "none",
    "save_total_limit": 2,
}


def training_fields() -> list[str]:
    """Names of every field `training:` takes."""
    return [field.name for field in dataclasses.fields(TrainingArguments) if field.init and field.name not in OWNED]


def check_training_section(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section with each value in its field's type.

    Raises:
        UserError: unknown, renamed or refused fields, and values of the wrong type.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    section = {_accepted_name(key, known): value for key, value in section.items()}
    # YAML reads an unquoted `no` as false.
    section = {key: "no" if key in STRATEGIES and value is False else value for key, value in section.items()}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainingArguments, "training", instantiate=False)
    try:
        parsed = parser.parse_object({"training": section}).training
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(without_type_names(" ".join(str(error).split()))) from error
    values = {key: getattr(parsed, key) for key in section}
    _check_values(values)
    check_trackers(values.get("report_to"))
    return values


def check_trackers(report_to: object) -> None:
    """Refuses a tracker that transformers does not know, or whose package is not installed, before weights are read.

    Raises:
        UserError: of `training.report_to`, a name or a list of names.
    """
    names = [report_to] if isinstance(report_to, str) else report_to
    for name in names if isinstance(names, Sequence) else ():
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"training.report_to: no tracker {shown(name)}; there are {', '.join(INTEGRATION_TO_CALLBACK)} and none"
            )
        # transformers lists the first one without MLflow alone, the second never; it says itself that they are missing.
        if name not in ("azure_ml", "flyte", *get_available_reporting_integrations()):
            raise UserError(
                f"training.report_to: {name} is not installed; pip install {name.replace('_', '-')}, or leave it out: "
                "log.jsonl in the run folder has every number"
            )


def _check_values(section: Mapping[str, Any]) -> None:
    """Refuses what would end in the library's own error, some of it only at the first validation."""
    for name, least in AT_LEAST.items():
        value = section.get(name)
        if isinstance(value, int | float) and not least <= value < math.inf:
            raise UserError(f"training.{name} is {value:g}; it must be a number of at least {least:g}")
    if (strategy := section.get("train_sampling_strategy")) in ("group_by_length", "batch_rebalance"):
        raise UserError(
            f"training.train_sampling_strategy: {strategy} cannot read the lengths of these samples; set "
            "data.group_by_modality_length: true (LLaVA) or data.packing: true (commonsense) instead"
        )
    if (metric := section.get("metric_for_best_model")) not in (None, "loss", "eval_loss"):
        raise UserError(
            f"training.metric_for_best_model is {metric}, but validation measures the loss alone; write loss, or "
            "compare checkpoints' adapters by another metric afterwards"
        )


def _accepted_name(key: str, known: set[str]) -> str:
    if key in RENAMED:
        raise UserError(f"training.{key} is not a setting here; use {RENAMED[key]}")
    if key in OWNED:
        raise UserError(f"training.{key} cannot be set: {OWNED[key]}")
    if key == "activation_checkpointing" and key not in known:  # the name before transformers 5.22
        return "gradient_checkpointing"
    if key not in known:
        close = difflib.get_close_matches(key, known - OWNED.keys(), n=1, cutoff=0.6)
        hint = f"did you mean training.{close[0]}?" if close else "see transformers.TrainingArguments"
        raise UserError(f"training.{key} is not a setting; {hint}")
    return key


def training_arguments(config: RunSettings) -> TrainingArguments:
    """Makes the arguments, which also starts the process group and tells transformers about ZeRO-3.

    Must run before the model is loaded, or ZeRO-3 would hold a whole model on every rank.
    """
    section, on_cuda = check_training_section(config.training), torch.cuda.is_available()
    _check_precision(config, section)
    validate = section.get("eval_strategy", "epoch" if config.data.held_out else "no")
    if validate != "no" and config.data.held_out is None:
        raise UserError(f"training.eval_strategy is {validate}, but data.validation names no file")
    given = {**OURS, "eval_strategy": validate, "dataloader_pin_memory": on_cuda, "tf32": True, **section}
    if not on_cuda:
        del given["tf32"]  # CUDA's alone: a GPU recipe also runs, slowly, on a CPU
    if given.get("deepspeed") is not None:
        given["deepspeed"] = read_deepspeed(given["deepspeed"])
        check_form(given["deepspeed"])
        check_deepspeed(given["deepspeed"], method=config.adapter.method, bf16=bool(section.get("bf16")))
        if given.get("use_cpu") and on_cuda:
            raise UserError(
                "training.use_cpu does not work with training.deepspeed where there is CUDA; remove it and start with "
                "CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
            )
        given["use_cpu"] = not on_cuda  # or accelerate would not count DeepSpeed's ranks rightly on a CPU
        stand_alone_environment()
        start_cpu_communication(limit=given.get("ddp_timeout", TrainingArguments.ddp_timeout))
    elif several_ranks() and not on_cuda:
        given["use_cpu"] = True  # or accelerate would not see that the ranks belong together
    run_folder_of(config)
    # Ranks draw different dropout, from the seed that they set; the order of samples must be one for all of them.
    given.setdefault("data_seed", given.get("seed", TrainingArguments.seed))
    given.update(remove_unused_columns=False, dataloader_num_workers=config.data.workers)
    try:
        made = TrainingArguments(**given)
    except ValueError as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error
    if given.get("deepspeed") is not None:
        check_agreement(given["deepspeed"], made)
    if made.n_gpu > 1:  # one process that sees several GPUs: torch's DataParallel would take them all
        made._n_gpu = 1
        logger.warning(
            "this one process trains on one GPU of %d; start it with `deepspeed` to use all", torch.cuda.device_count()
        )
    return made


def launch_of(arguments: TrainingArguments) -> Launch:
    """The processes of the run that the arguments were made for."""
    deepspeed = deepspeed_config() if arguments.deepspeed is not None else None
    return Launch(arguments.world_size, None if arguments.deepspeed is None else zero_stage(deepspeed))


def order_seed(arguments: TrainingArguments) -> int:
    """The seed of the samples' order, one for all ranks."""
    return arguments.seed if arguments.data_seed is None else arguments.data_seed


def _check_precision(config: RunSettings, section: Mapping[str, Any]) -> None:
    method = config.adapter.method
    if method != "full" and (section.get("bf16") or section.get("fp16")):
        flag = "bf16" if section.get("bf16") else "fp16"
        raise UserError(
            f"training.{flag} is for adapter.method: full; with {method} the frozen weights take model.dtype and what "
            f"trains stays float32: remove training.{flag} and set model.dtype"
        )
    if method == "full" and config.model.dtype != "float32" and not (section.get("bf16") or section.get("fp16")):
        raise UserError(
            f"adapter.method: full with model.dtype {config.model.dtype} would train without float32 masters: set "
            "training.bf16: true (with training.deepspeed), or model.dtype: float32"
        )
    if method == "full" and section.get("bf16") and section.get("deepspeed") is None:
        raise UserError("training.bf16 with adapter.method: full needs training.deepspeed, which keeps float32 masters")
