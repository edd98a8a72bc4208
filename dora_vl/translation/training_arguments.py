"""The settings that tools inherit from transformers' TrainingArguments; most have the same name in `training:`."""

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
from dora_vl.translation.rules import Asked, Found, Rule, is_on, lost, number, same, to, unless, whole
from dora_vl.translation.shell_command import options

SAME_ORDER = "batches of like length: less padding, another order"
PROGRAM, LAUNCHER = "(program)", "(launcher)"
"""Keys under which a script's program stands, and what starts it."""
_STAGE = re.compile(r"(?:zero_?|z)([0-3])", re.IGNORECASE)


def learning_rate(asked: Asked) -> Found:
    """The rate, as a number."""
    return Found(settings={"training.learning_rate": number(asked)})


def precision(dtype: str) -> Rule:
    """`bf16` or `fp16`: the number type of the frozen weights; with all weights training, of the arithmetic."""

    def rule(asked: Asked) -> Found:
        if not is_on(asked.value):
            return Found(note="off")
        if asked.method == "full":
            return Found(settings={f"training.{asked.key}": True}, note="with float32 masters, which DeepSpeed keeps")
        return Found(settings={"model.dtype": dtype}, note="of the frozen weights; what trains is float32")

    return rule


def warmup_ratio(asked: Asked) -> Found:
    """A share of all steps, unless steps are named too, which win."""
    if float(asked.settings.get("warmup_steps") or 0) > 0:
        return Found(note="warmup_steps wins over it")
    return Found(settings={"training.warmup_steps": number(asked)}, note="below 1: a share of all steps")


def warmup_steps(asked: Asked) -> Found:
    """A number of steps; 0 leaves the ratio to say it."""
    if number(asked) == 0 and asked.settings.get("warmup_ratio"):
        return Found(note="0: warmup_ratio counts")
    value = number(asked)
    return Found(settings={"training.warmup_steps": int(value) if value >= 1 or value == 0 else value})


def deepspeed(asked: Asked) -> Found:
    """A DeepSpeed JSON as the shipped one of its stage, by its content where it is there, else by its name."""
    config = asked.value if isinstance(asked.value, Mapping) else _read_yaml(Path(str(asked.value)), asked.file)
    if config is None:
        name = Path(str(asked.value)).name
        stages = _STAGE.findall(name)
        if not stages:
            return Found(
                note="the file is not there, and its name does not say the stage; zero2 or zero3", is_lost=True
            )
        return _shipped(int(stages[0]), offloads="offload" in name.lower(), beside="by the file's name")
    zero = config.get("zero_optimization", {})
    offloads = any(
        (zero.get(f"offload_{what}") or {}).get("device", "none") != "none" for what in ("optimizer", "param")
    )
    dropped = [name for name in ("optimizer", "scheduler") if name in config]
    note = f"its {' and '.join(dropped)} blocks are left out: training says both" if dropped else ""
    return _shipped(int(zero.get("stage", 0)), offloads=offloads, beside=note)


def launcher(asked: Asked) -> Found:
    """What starts the program: the DeepSpeed stage of `accelerate launch --config_file` is a setting here."""
    started = "start it with `deepspeed` on as many GPUs: a step is batch x accumulation x GPUs"
    if "launch" not in (words := shlex.split(str(asked.value))):
        return Found(note=started)
    given = options([word for word in words[words.index("launch") + 1 :] if word != "-m"], asked.file)
    if "zero_stage" in given:
        config: Mapping[str, Any] = {"zero_optimization": {"stage": given["zero_stage"]}}
    elif "config_file" not in given:
        return Found(note=started)
    else:
        name = str(given["config_file"])
        content = _read_yaml(Path(name), asked.file)
        if content is None:
            return deepspeed(replace(asked, value=name))
        if content.get("distributed_type") != "DEEPSPEED":
            kind = content.get("distributed_type", "NO")
            return Found(note=f"{kind} has no counterpart; {started}", is_lost=kind not in ("NO", "MULTI_GPU"))
        settings = content.get("deepspeed_config") or {}
        if "deepspeed_config_file" in settings:
            return deepspeed(replace(asked, value=settings["deepspeed_config_file"]))
        offloads = {f"offload_{part}": {"device": settings.get(f"offload_{part}_device", "none")}
                    for part in ("optimizer", "param")}  # fmt: skip
        config = {"zero_optimization": {"stage": settings.get("zero_stage", 2), **offloads}}
    return deepspeed(replace(asked, value=config))


def _shipped(stage: int, *, offloads: bool, beside: str) -> Found:
    name = {0: "zero0", 1: "zero2", 2: "zero2", 3: "zero3"}[stage] + ("_offload" if stage == 3 and offloads else "")
    notes = [beside] if beside else []
    if stage == 1:
        notes.append("stage 1 is not shipped: 2 splits the gradients too, the same steps")
    if stage == 2 and offloads:
        notes.append("without its offload: zero3_offload is the shipped one that has it")
    return Found(settings={"training.deepspeed": name}, note="; ".join(notes))


def _read_yaml(path: Path, file: Path) -> Mapping[str, Any] | None:
    """A settings file in YAML or JSON, from here or from beside the file that names it; None where it is not there."""
    there = next((candidate for candidate in (path, file.parent / path) if candidate.is_file()), None)
    if there is None:
        return None
    try:
        content = yaml.safe_load(there.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{there}: neither YAML nor JSON: {one_line(str(error), 200)}") from None
    return content if isinstance(content, Mapping) else None


def eval_strategy(asked: Asked) -> Found:
    """Our runs validate where there is validation data, and only there."""
    wanted = "no" if asked.value is False else str(asked.value)
    held_out = ("eval_dataset", "val_size", "val_dataset", "split_dataset_ratio", "dataset_test_split")
    if wanted != "no" and not any(asked.settings.get(one) for one in held_out):
        return Found(
            note="no validation data is named; data.validation or data.validation_share names it", is_lost=True
        )
    return Found(settings={"training.eval_strategy": wanted})


def save_strategy(asked: Asked) -> Found:
    """YAML reads an unquoted `no` as false."""
    return Found(settings={"training.save_strategy": "no" if asked.value is False else str(asked.value)})


def report_to(asked: Asked) -> Found:
    """Trackers, where they are installed here."""
    from dora_vl.run.trackers import check_trackers

    listed = asked.value if isinstance(asked.value, list) else [asked.value]
    wanted = [one for one in listed if one not in ("none", False)]
    try:
        check_trackers(wanted)
    except UserError as error:
        return Found(note=str(error).removeprefix("training.report_to: "), is_lost=True)
    return Found(settings={"training.report_to": wanted or "none"})


def resume(asked: Asked) -> Found:
    """`true` is the newest checkpoint; one of another tool cannot be gone on from."""
    if not asked.value or asked.value in ("false", "none", "null"):
        return Found(note="off")
    if is_on(asked.value):
        return Found(settings={"resume": "last"})
    return Found(
        note="another tool's checkpoint; `dora-vl convert` takes its adapter, for adapter.initial", is_lost=True
    )


def order(asked: Asked) -> Found:
    """How samples are put together."""
    by_length = asked.value == "group_by_length" or is_on(asked.value)
    if asked.key == "train_sampling_strategy" and asked.value not in ("group_by_length", "random"):
        return Found(note="samples come in random order, or by length", is_lost=True)
    return Found(settings={"data.group_by_modality_length": by_length}, note="" if by_length else f"true: {SAME_ORDER}")


ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
               "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS", "FORCE_TORCHRUN", "WANDB_PROJECT", "HF_HOME")  # fmt: skip
"""Variables before a command that mean the same here."""
COMMON: Mapping[str, Rule] = {
    PROGRAM: same("tasks/llava_instruct.py"),
    LAUNCHER: launcher,
    **{name: same("of the environment: set it likewise") for name in ENVIRONMENT},
    "learning_rate": learning_rate,
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
    "warmup_ratio": warmup_ratio,
    "warmup_steps": warmup_steps,
    "bf16": precision("bfloat16"),
    "fp16": precision("float16"),
    "deepspeed": deepspeed,
    "eval_strategy": eval_strategy,
    "evaluation_strategy": eval_strategy,
    "save_strategy": save_strategy,
    "report_to": report_to,
    "resume_from_checkpoint": resume,
    "group_by_length": order,
    "train_sampling_strategy": order,
    "dataloader_num_workers": to("data.workers", whole),
    "overwrite_output_dir": to("overwrite", lambda asked: is_on(asked.value)),
    "gradient_checkpointing": to("training.gradient_checkpointing", lambda asked: is_on(asked.value)),
    "activation_checkpointing": to("training.gradient_checkpointing", lambda asked: is_on(asked.value)),
    "do_train": same("a run trains"),
    "do_eval": same("what is held out is measured while training"),
    "do_predict": unless(False, "evaluation.file names questions that are asked after training"),
    "remove_unused_columns": same("batches are read whole"),
    "logging_dir": same("log.jsonl is in training.output_dir"),
    "save_safetensors": same("adapters are always safetensors"),
    "include_num_input_tokens_seen": lost("log.jsonl has samples a second and the share of padding"),
}
"""What all of them call the same."""


def _field(asked: Asked) -> Found:
    """A field of `training:` under its own name, if a run takes this value of it."""
    from dora_vl.run.arguments import training_fields

    fields = set(training_fields()) - COMMON.keys()
    together = {name: value for name, value in asked.settings.items() if name in fields}
    if _refusal(json.dumps(together, default=str)) is not None:  # taking one by one is slow
        refusal = _refusal(json.dumps({asked.key: asked.value}, default=str))
        if refusal is not None:
            return Found(note=refusal, is_lost=True)
    return Found(settings={f"training.{asked.key}": asked.value})


@cache
def _refusal(section: str) -> str | None:
    """Why a run does not take a `training:` section, given as JSON; None where it does."""
    from dora_vl.run.arguments import check_training_section

    try:
        check_training_section(json.loads(section))
    except UserError as error:
        return str(error)
    return None


def otherwise(tool: str, elsewhere: Mapping[str, str] | None = None) -> Rule:
    """A setting that no table names: a field of `training:` where transformers has it, else one without counterpart.

    Args:
        tool: whose setting it would be.
        elsewhere: beginnings of names -> what alone reads them; supervised fine-tuning with an adapter does not.
    """

    def rule(asked: Asked) -> Found:
        from dora_vl.run.arguments import OWNED, RENAMED, training_fields

        reader = next((what for start, what in (elsewhere or {}).items() if asked.key.startswith(start)), None)
        if reader is not None:
            return Found(note=f"of {reader} alone, not read here or there")
        if asked.key in OWNED:
            is_off = not asked.value or asked.value in ("false", "False")
            return Found(note="off") if is_off else Found(note=OWNED[asked.key], is_lost=True)
        if asked.key in training_fields():
            return _field(asked)
        if asked.key in RENAMED:
            return Found(note=f"transformers has it no longer; here {RENAMED[asked.key]}", is_lost=True)
        return Found(note=f"no setting of {tool} that is known here", is_lost=True)

    return rule
