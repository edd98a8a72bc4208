"""Makes `transformers.TrainingArguments` of a run's `training:`, after refusing what would not work."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from transformers import TrainingArguments
from transformers.integrations.deepspeed import deepspeed_config
from transformers.integrations.integration_utils import get_available_reporting_integrations

from dora_vl.errors import SettingError, UserError, needs_extra, one_line, short_repr, wrong_value
from dora_vl.files import read_json, shipped_folder
from dora_vl.run.folder import run_folder_of
from dora_vl.run.launch import Launch, several_ranks, stand_alone_environment, start_cpu_communication
from dora_vl.run.settings import RunConfig

logger = logging.getLogger(__name__)

REFUSED_FIELDS = {
    "remove_unused_columns": "batches are read whole",
    "label_smoothing_factor": "the loss is computed at labelled positions only",
    "use_liger_kernel": "the loss is computed at labelled positions only",
    "auto_find_batch_size": "the batch size is part of the recipe",
    "push_to_hub": "`dora-vl push RUN OWNER/NAME` uploads the adapter with its model card afterwards",
    "local_rank": "the launcher sets it",
    "resume_from_checkpoint": "the top-level resume: last does it",
    "dataloader_num_workers": "data.workers says it",
    "neftune_noise_alpha": "the Trainer adds its noise to plain language models only; raise adapter.dropout",
}
"""Maps fields that a run must not set, since they would break it, to the reason."""
STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")
AT_LEAST: Mapping[str, float] = {
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "num_train_epochs"), 0),
    **dict.fromkeys(("seed", "data_seed", "logging_steps", "save_steps", "eval_steps"), 0),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1),
    **dict.fromkeys(("gradient_accumulation_steps", "ddp_timeout"), 1),
}
"""Maps a field to its smallest value that makes sense; below it torch or the Trainer fails late, or the loss grows."""
TRAINER_DEFAULTS = {"logging_steps": 10, "logging_nan_inf_filter": False, "report_to": "none", "save_total_limit": 2}
"""These defaults differ from the library's: log lines can be plotted, and a loss that is not finite shows."""

SHIPPED_CONFIGS = ("zero0", "zero2", "zero3", "zero3_offload")  # of the shipped DeepSpeed configs
SECTION_FIELDS = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "train_batch_size",
)
"""transformers takes these from the `training:` section, or compares them with it."""


def training_fields() -> list[str]:
    """Returns the names of all fields that `training:` takes."""
    return [
        field.name for field in dataclasses.fields(TrainingArguments) if field.init and field.name not in REFUSED_FIELDS
    ]


@functools.cache
def training_parser() -> ArgumentParser:
    """Makes the section's parser, once: it reads the source of every field's class."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainingArguments, "training", instantiate=False, skip={"fsdp"})
    parser.add_argument("--training.fsdp", type=bool, default=False)
    return parser


def check_training_section(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the section with each value in its field's type."""
    section = {_accepted_name(key): value for key, value in section.items()}
    # YAML reads an unquoted `no` as false.
    section = {key: "no" if key in STRATEGIES and value is False else value for key, value in section.items()}
    try:
        parsed = training_parser().parse_object({"training": section}).training
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise wrong_value(str(error)) from error
    values = {key: getattr(parsed, key) for key in section}
    for name, least in AT_LEAST.items():
        value = values.get(name)
        if isinstance(value, int | float) and not least <= value < math.inf:
            raise SettingError(f"training.{name}", f" is {value:g}; it must be a number of at least {least:g}")
    if (strategy := values.get("train_sampling_strategy")) in ("group_by_length", "batch_rebalance"):
        raise SettingError(
            "training.train_sampling_strategy", f": {strategy} is data.group_by_modality_length or data.packing"
        )
    if (metric := values.get("metric_for_best_model")) not in (None, "loss", "eval_loss"):
        raise SettingError(
            "training.metric_for_best_model", f" is {metric}, but validation measures only the loss; write loss"
        )
    return values


def _accepted_name(key: str) -> str:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = f"training.{key}"
    if key in REFUSED_FIELDS:
        raise SettingError(name, f" cannot be set: {REFUSED_FIELDS[key]}")
    if key in fields:
        return key
    if key == "activation_checkpointing":  # the name before transformers 5.22
        return "gradient_checkpointing"
    close = [
        f"training.{name}" for name in difflib.get_close_matches(key, fields - REFUSED_FIELDS.keys(), n=1, cutoff=0.6)
    ]
    hint = f"did you mean {close[0]}?" if close else "see transformers.TrainingArguments"
    raise SettingError(name, f" is not a setting; {hint}", close)


def _check_trackers(names: Iterable[str]) -> None:
    """Refuses a tracker that is unknown or not installed, which a Trainer reports only once the weights are read."""
    never_listed = ("azure_ml", "flyte")
    if missing := set(names) - {*get_available_reporting_integrations(), *never_listed}:
        raise SettingError("training.report_to", f": {min(missing)} is unknown or not installed; leave it out")


def training_arguments(config: RunConfig) -> TrainingArguments:
    """Makes the arguments of a run's settings, which also starts the process group and tells transformers about ZeRO-3.

    Must run before the model is loaded, or ZeRO-3 would hold a whole model on every rank.
    """
    section, on_cuda = check_training_section(config.training), torch.cuda.is_available()
    data, method = config.data, config.adapter.method
    _check_sequential(section, config)
    if section.pop("fsdp", None):
        _check_fsdp(section, config.task)
    _check_precision(section, method=method, dtype=config.model.dtype)
    validate = section.get("eval_strategy", "epoch" if data.held_out else "no")
    _check_validation(config, validate)
    values = {**TRAINER_DEFAULTS, "eval_strategy": validate, "dataloader_pin_memory": on_cuda, "tf32": True, **section}
    if config.optim.early_stopping is not None:
        values = {**_best_of_validations(values), **values}
    if not on_cuda:
        del values["tf32"]  # only CUDA's: a GPU recipe also runs, slowly, on a CPU
    if values.get("deepspeed") is not None:
        values["deepspeed"] = read_deepspeed(values["deepspeed"])
        check_deepspeed(values["deepspeed"], method=method)
        if values.get("use_cpu") and on_cuda:
            raise SettingError(
                "training.use_cpu", " with training.deepspeed and a GPU: start with CUDA_VISIBLE_DEVICES= instead"
            )
        values["use_cpu"] = not on_cuda  # or accelerate would not count DeepSpeed's ranks rightly on a CPU
        stand_alone_environment()
        start_cpu_communication(limit=values.get("ddp_timeout", TrainingArguments.ddp_timeout))
    elif several_ranks() and not on_cuda:
        values["use_cpu"] = True  # or accelerate would not see that the ranks belong together
    run_folder_of(section)
    # Ranks draw different dropout, from the seed that they set; the order of samples must be one for all of them.
    values.setdefault("data_seed", values.get("seed", TrainingArguments.seed))
    values.update(remove_unused_columns=False, dataloader_num_workers=data.workers)
    try:
        arguments = TrainingArguments(**values)
    except ValueError as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error
    _check_trackers(list(arguments.report_to or ()))
    _check_optim_args(arguments)
    engine: Any = vars(arguments).get("hf_deepspeed_config")
    if engine is not None and engine.mismatches:  # transformers itself says so after the model was loaded
        raise SettingError(
            "training.deepspeed", f' contradicts the training section, write "auto": {"; ".join(engine.mismatches)}'
        )
    if arguments.n_gpu > 1:  # one process that sees several GPUs: torch's DataParallel would take them all
        arguments._n_gpu = 1
        logger.warning(
            "this one process trains on one GPU of %d; start it with `deepspeed` to use all", torch.cuda.device_count()
        )
    return arguments


def _check_sequential(section: Mapping[str, Any], config: RunConfig) -> None:
    """Refuses the files' own order where the data's order would take its place unsaid."""
    data = config.data
    reasons = (
        (config.task == "vlbart", "data.mixing orders the tasks' steps; leave it out"),
        (data.streaming, "data.streaming has its own order; leave it out and set data.shuffle_buffer: 1"),
        (data.replay > 0, "data.replay mixes chats in; leave it out"),
        (data.group_by_modality_length, "samples are grouped; set data.group_by_modality_length: false"),
    )
    reason = next((reason for holds, reason in reasons if holds), None)
    if section.get("train_sampling_strategy") == "sequential" and reason is not None:
        raise SettingError("training.train_sampling_strategy", f" is sequential, and {reason}")


def _check_optim_args(arguments: TrainingArguments) -> None:
    """Refuses options of the optimizer that cannot be read; the Trainer reads them once the weights are there."""
    if not arguments.optim_args:
        return
    from transformers import Trainer  # seconds, which most runs need not wait here

    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ValueError, TypeError, AttributeError) as error:
        reason = one_line(f"{short_repr(arguments.optim_args)} cannot be read ({error})", 200)
        raise SettingError("training.optim_args", f": {reason}; write it as momentum=0.9,nesterov=true") from error


def _check_validation(config: RunConfig, strategy: str) -> None:
    """Refuses a validation, and what needs one, where nothing is held out."""
    if strategy != "no" and config.data.held_out is None:
        raise SettingError("training.eval_strategy", f" is {strategy}, but data.validation names no file")
    if strategy == "no" and config.optim.early_stopping is not None:
        raise SettingError("optim.early_stopping", ": nothing is validated; set data.validation_share: 0.1")


def _best_of_validations(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings by which the adapter is that of the lowest loss: a checkpoint with each validation."""
    when = values["eval_strategy"]
    every = {"save_steps": values.get("eval_steps") or values["logging_steps"]} if when == "steps" else {}
    return {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_strategy": when, **every}


def _check_fsdp(section: Mapping[str, Any], task: str) -> None:
    """Refuses what does not go with the weights' shards of `run.launch`, which are not the Trainer's."""
    if section.get("deepspeed") is not None:
        raise SettingError("training.fsdp", " and training.deepspeed both share weights out; leave one out")
    if task == "vlbart":
        raise SettingError("training.fsdp", " is for decoders; set training.deepspeed: zero3")
    if not several_ranks():
        raise SettingError("training.fsdp", " shares weights out among ranks; start several, or leave it out")


def _check_precision(section: Mapping[str, Any], *, method: str, dtype: str) -> None:
    flag = next((flag for flag in ("bf16", "fp16") if section.get(flag)), None)
    if method != "full" and flag:
        raise SettingError(
            f"training.{flag}", " is for adapter.method: full; set model.dtype, what an adapter trains is float32"
        )
    if method == "full" and dtype != "float32" and not flag:
        raise SettingError(
            "adapter.method", ": full needs training.bf16 and training.deepspeed, or model.dtype: float32"
        )
    if method == "full" and flag == "bf16" and section.get("deepspeed") is None:
        raise SettingError(
            "training.bf16", " with adapter.method: full needs training.deepspeed, which keeps float32 masters"
        )


def launch_of(arguments: TrainingArguments) -> Launch:
    """Returns the processes of the run that the arguments were made for."""
    stage = None if arguments.deepspeed is None else zero_stage(deepspeed_config())
    return Launch(arguments.world_size, stage)


def order_seed(arguments: TrainingArguments) -> int:
    """Returns the seed of the samples' order, one for all ranks."""
    return arguments.seed if arguments.data_seed is None else arguments.data_seed


def read_deepspeed(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON of a short name (`zero2`), of a file (as given, or below a checkout), or of a mapping."""
    from_section = dict.fromkeys(SECTION_FIELDS, "auto")  # or DeepSpeed fails without a batch, and does not clip
    if isinstance(value, Mapping):
        return {**from_section, **value}
    shipped = shipped_folder()
    paths = (
        [shipped / "deepspeed" / f"{value}.json"] if value in SHIPPED_CONFIGS else [Path(value), shipped.parent / value]
    )
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise SettingError("training.deepspeed", f": {value} is neither a file nor one of {', '.join(SHIPPED_CONFIGS)}")
    return {**from_section, **read_json(path)}


def zero_stage(config: Mapping[str, Any] | None) -> int:
    """Returns the ZeRO stage of a DeepSpeed config; 0 without one."""
    return int((config or {}).get("zero_optimization", {}).get("stage", 0))


def check_deepspeed(config: Mapping[str, Any], *, method: str) -> None:
    """Reads a config as DeepSpeed will, and refuses blocks that override the recipe."""
    with needs_extra("deepspeed", "training.deepspeed"):
        from deepspeed.runtime.config import DeepSpeedConfig

    plain = {name: value for name, value in _without_auto(config).items() if name not in SECTION_FIELDS}
    try:
        DeepSpeedConfig(plain | {"train_micro_batch_size_per_gpu": 1})
    except (ValueError, TypeError, AttributeError, AssertionError, KeyError) as error:
        for name in ("zero_optimization", "bf16", "fp16", "torch_autocast", "activation_checkpointing"):
            if not isinstance(config.get(name, {}), Mapping):
                raise SettingError(f"training.deepspeed.{name}", " is not an object") from error
        raise SettingError("training.deepspeed", f": {one_line(str(error), 200)}") from error
    refused = {
        "optimizer": "remove it; with it one learning rate is used for every part (projector and magnitudes too)",
        "scheduler": "remove it; with it training.lr_scheduler_type and training.warmup_steps are not used",
    }
    for name in ("bf16", "fp16", "torch_autocast"):
        if method != "full" and config.get(name, {}).get("enabled") not in (None, False, "auto"):
            refused[name] = (
                f'enabled casts the trained float32 parameters of adapter.method {method}; write "auto" and set '
                "model.dtype for the frozen weights"
            )
    for name, reason in refused.items():
        if name in config:
            raise SettingError(f"training.deepspeed.{name}", f": {reason}")


def _without_auto(value: Any) -> Any:
    """Drops what transformers fills in itself."""
    if not isinstance(value, Mapping):
        return value
    return {name: _without_auto(inside) for name, inside in value.items() if inside != "auto"}
