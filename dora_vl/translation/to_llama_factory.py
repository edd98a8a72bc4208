"""A run as the YAML of `llamafactory-cli train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from dora_vl.errors import UserError
from dora_vl.translation.own_settings import (
    OURS_ALONE,
    PRESETS,
    defaults,
    method,
    modules_of,
    otherwise,
    projector_of,
    targets_of,
)
from dora_vl.translation.rules import Asked, Found, Rule, Tool, lost, number, one_of, to, whole
from dora_vl.translation.target_patterns import ALL_LINEAR, endings_of
from dora_vl.translation.to_peft import dropout_mode

NAME = "LLaMA-Factory"
DATA_FOLDER = "data"
TEMPLATE_OF: Mapping[str, str] = {
    "llava-1.5": "llava",
    "qwen2-vl": "qwen2_vl",
    "qwen2.5-vl": "qwen2_vl",
    "qwen3-vl": "qwen3_vl_nothink",
    "gemma-3": "gemma3",
    "paligemma": "paligemma",
    "internvl3": "intern_vl",
}
"""A part of a base's name -> what LLaMA-Factory calls its prompt format."""
STAGES: Mapping[str, str] = {
    "zero0": "examples/deepspeed/ds_z0_config.json",
    "zero2": "examples/deepspeed/ds_z2_config.json",
    "zero3": "examples/deepspeed/ds_z3_config.json",
    "zero3_offload": "examples/deepspeed/ds_z3_offload_config.json",
}
"""Ours -> the file of its stage in LLaMA-Factory's repository."""


def _method(asked: Asked) -> Found:
    if asked.value == "full":
        return Found(settings={"finetuning_type": "full"})
    if asked.value not in ("dora", "lora"):
        raise UserError(
            f"{asked.file}: adapter.method is {asked.value}, which {NAME} has not; dora, lora and full it has"
        )
    return Found(settings={"finetuning_type": "lora", "use_dora": asked.value == "dora"})


def _base(asked: Asked) -> Found:
    name = str(asked.value)
    template = next((there for part, there in TEMPLATE_OF.items() if part in name.lower()), None)
    if template is None:
        return Found(settings={"model_name_or_path": name}, note="template: choose it by the model")
    return Found(settings={"model_name_or_path": name, "template": template})


def _template(asked: Asked) -> Found:
    if asked.value == "vicuna_v1":
        return Found(settings={"template": "llava"})
    return Found(note="its formats go by the model: see template in its data/README.md", is_lost=True)


def _dtype(asked: Asked) -> Found:
    name = {"bfloat16": "bf16", "float16": "fp16"}.get(asked.value)
    return Found(note="float32 where neither bf16 nor fp16 is set") if name is None else Found(settings={name: True})


def _adapters_alone(rule: Rule) -> Rule:
    return lambda asked: Found(note="not read by full") if asked.method == "full" else rule(asked)


def _alpha(asked: Asked) -> Found:
    if number(asked) != int(number(asked)):
        return Found(note="a whole number there", is_lost=True)
    return Found(settings={"lora_alpha": int(number(asked))})


def _targets(asked: Asked) -> Found:
    wanted = targets_of(asked)
    if asked.method == "full":
        return Found(
            note="full is said by freeze_vision_tower, freeze_multi_modal_projector", is_lost=bool(asked.value)
        )
    freezes = {"freeze_vision_tower": "vision" not in wanted and ALL_LINEAR not in wanted}
    if set(wanted) <= {"language", "vision"} or wanted == [ALL_LINEAR]:
        return Found(settings={"lora_target": "all", **freezes})
    endings = None if any(one in PRESETS for one in wanted) else endings_of(wanted)
    if endings is None:
        return Found(note="its targets are names' endings, or all", is_lost=True)
    return Found(settings={"lora_target": ",".join(endings), "freeze_vision_tower": False}, note="wherever they are")


def _projector(asked: Asked) -> Found:
    if asked.method == "full":
        return Found(settings={"freeze_multi_modal_projector": not asked.value})
    if not asked.value:
        return Found(note="so there too")
    name = projector_of(asked)
    if name is None:
        return Found(note="name the base's projector in additional_target", is_lost=True)
    others = [one for globs in (asked.settings.get("adapter.also_train") or {}).values() if (one := modules_of(globs))]
    return Found(settings={"additional_target": ",".join([name, *others])}, note="trains whole")


def _also_train(asked: Asked) -> Found:
    names = [modules_of(globs) for globs in asked.value.values()]
    if any(name is None for name in names):
        return Found(note="whole modules can train beside adapters, not single parameters", is_lost=True)
    if asked.settings.get("adapter.train_projector"):
        return Found(note="in additional_target, beside the projector")
    return Found(settings={"additional_target": ",".join(str(name) for name in names)}) if names else Found(note="none")


def _start(asked: Asked) -> Found:
    if asked.value == "pissa":
        return Found(settings={"pissa_init": True, "pissa_iter": -1})
    return (
        Found(note="so there too") if asked.value == "kaiming" else Found(note="kaiming or pissa there", is_lost=True)
    )


def _files(asked: Asked) -> Found:
    listed = [asked.value] if isinstance(asked.value, str) else asked.value
    paths = [one if isinstance(one, str) else one["path"] for one in listed]
    names = [PurePosixPath(path.removeprefix("hub:")).stem for path in paths]
    weights = [1.0 if isinstance(one, str) else float(one.get("weight", 1.0)) for one in listed]
    entries = ", ".join(f'"{name}": {_entry(path)}' for name, path in zip(names, paths, strict=True))
    note = f"names of {DATA_FOLDER}/dataset_info.json, which needs {{{entries}}}"
    if set(weights) != {1.0}:
        return Found(settings={"dataset": ",".join(names)}, note=f"weights are lost; {note}")
    return Found(settings={"dataset": ",".join(names)}, note=note)


def _entry(path: str) -> str:
    if path.startswith("hub:"):
        return f'{{"hf_hub_url": "{path.removeprefix("hub:")}", "formatting": "sharegpt"}}'
    columns = '{"messages": "conversations", "images": "image"}'
    return f'{{"file_name": "{path}", "formatting": "sharegpt", "columns": {columns}}}'


def _deepspeed(asked: Asked) -> Found:
    if asked.value in STAGES:
        return Found(settings={"deepspeed": STAGES[asked.value]}, note="the file of its repository")
    return Found(settings={"deepspeed": asked.value})


def _warmup(asked: Asked) -> Found:
    share = number(asked)
    return Found(settings={"warmup_ratio" if 0 < share < 1 else "warmup_steps": share if 0 < share < 1 else int(share)})


def _validation(asked: Asked) -> Found:
    return Found(settings={"eval_dataset": PurePosixPath(str(asked.value)).stem}, note="a name of dataset_info.json")


def _quantised(asked: Asked) -> Found:
    bits = {"nf4": 4, "int8": 8, "hqq": 4}[asked.value]
    return Found(settings={"quantization_bit": bits, "quantization_method": "hqq" if asked.value == "hqq" else "bnb"})


TABLE: Mapping[str, Rule] = {
    **OURS_ALONE,
    "model.base": _base,
    "model.revision": to("model_revision"),
    "model.template": _template,
    "model.dtype": _dtype,
    "model.quantisation": _quantised,
    "model.attn_implementation": one_of(
        "flash_attn", {"sdpa": "sdpa", "flash_attention_2": "fa2", "eager": "disabled"}, ""
    ),
    "adapter.method": _method,
    "adapter.rank": _adapters_alone(to("lora_rank", whole)),
    "adapter.alpha": _adapters_alone(_alpha),
    "adapter.dropout": _adapters_alone(to("lora_dropout", number)),
    "adapter.dropout_mode": dropout_mode,
    "adapter.rank_scaling": _adapters_alone(to("use_rslora", lambda asked: asked.value == "sqrt")),
    "adapter.targets": _targets,
    "adapter.train_projector": _projector,
    "adapter.also_train": _also_train,
    "adapter.init": _adapters_alone(_start),
    "adapter.initial": to("adapter_name_or_path", note="a folder that PEFT opens"),
    "adapter.rank_pattern": lost("one rank for all layers"),
    "adapter.alpha_pattern": lost("one alpha for all layers"),
    "data.train": _files,
    "data.image_folder": to("media_dir"),
    "data.video_folder": lost("pictures and videos lie below media_dir"),
    "data.video_frames": to("video_maxlen", whole),
    "data.video_fps": to("video_fps", number),
    "data.validation": _validation,
    "data.validation_share": to("val_size", number),
    "data.validation_size": to("val_size", whole),
    "data.max_tokens": to("cutoff_len", whole, note="it cuts question and answer in proportion, here the end"),
    "data.limit": to("max_samples", whole),
    "data.workers": to("dataloader_num_workers", whole),
    "data.streaming": to("streaming"),
    "data.shuffle_buffer": to("buffer_size", whole),
    "data.group_by_modality_length": lost("samples come in random order"),
    "optim.b_learning_rate_ratio": to("loraplus_lr_ratio", number),
    "optim.loss_normalisation": lost("its own: of a model with a processor the mean over each micro-batch"),
    "training.deepspeed": _deepspeed,
    "training.warmup_steps": _warmup,
    "training.bf16": to("bf16"),
    "training.tf32": to("tf32"),
    "training.gradient_checkpointing": to("disable_gradient_checkpointing", lambda asked: not asked.value),
    "resume": lost("its checkpoints are its own"),
    "overwrite": to("overwrite_output_dir"),
}

TO_LLAMA_FACTORY = Tool(
    name=NAME,
    table=TABLE,
    otherwise=otherwise,
    method=method,
    defaults=defaults(),
    always={
        "(task)": Found(settings={"stage": "sft", "do_train": True}),
        "(data)": Found(settings={"dataset_dir": DATA_FOLDER}, note="where its dataset_info.json lies"),
    },
)
