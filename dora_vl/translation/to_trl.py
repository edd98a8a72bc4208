"""A run as the YAML of `trl sft --config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dora_vl.errors import UserError
from dora_vl.translation.own_settings import OURS_ALONE, defaults, method, otherwise
from dora_vl.translation.rules import Asked, Found, Rule, Tool, lost, number, to, whole
from dora_vl.translation.to_peft import also_train, dropout_mode, target_modules, train_projector

NAME = "TRL"
JSON_ENDINGS = (".json", ".jsonl")


def _method(asked: Asked) -> Found:
    if asked.value == "full":
        return Found(settings={"use_peft": False})
    if asked.value not in ("dora", "lora"):
        raise UserError(
            f"{asked.file}: adapter.method is {asked.value}, which {NAME} has not; dora, lora and full it has"
        )
    return Found(settings={"use_peft": True, "use_dora": asked.value == "dora"})


def _renamed(rule: Rule, name: str, other: str) -> Rule:
    """PEFT's name of a setting as TRL calls it."""

    def renamed(asked: Asked) -> Found:
        if asked.method == "full":
            return Found(note="all weights train", is_lost=bool(asked.value) and asked.key == "adapter.targets")
        found = rule(asked)
        if name not in found.settings:
            return found
        return Found(settings={other: _as_list(found.settings[name])}, note=found.note)

    return renamed


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else value


def _targets(asked: Asked) -> Found:
    found = _renamed(target_modules, "target_modules", "lora_target_modules")(asked)
    value = found.settings.get("lora_target_modules")
    if value and any(sign in value[0] for sign in "*|("):
        return Found(note="names' endings or all-linear there; an expression only from Python", is_lost=True)
    return found


def _adapters_alone(rule: Rule) -> Rule:
    return lambda asked: Found(note="not read without use_peft") if asked.method == "full" else rule(asked)


def _files(asked: Asked) -> Found:
    paths = [
        one if isinstance(one, str) else one["path"]
        for one in ([asked.value] if isinstance(asked.value, str) else asked.value)
    ]
    if len(paths) == 1 and paths[0].startswith("hub:"):
        name, _, split = paths[0].removeprefix("hub:").partition(":")
        return Found(settings={"dataset_name": name, **({"dataset_train_split": split} if split else {})})
    if all(path.endswith(JSON_ENDINGS) for path in paths):
        note = "rows must have messages, and their pictures as images"
        return Found(settings={"datasets": [{"path": "json", "data_files": path} for path in paths]}, note=note)
    return Found(note="a set of the hub, or JSON with messages and images", is_lost=True)


def _quantised(asked: Asked) -> Found:
    if asked.value == "hqq":
        return Found(note="4 or 8 bits of bitsandbytes there", is_lost=True)
    return Found(settings={"load_in_4bit" if asked.value == "nf4" else "load_in_8bit": True})


def _dtype(asked: Asked) -> Found:
    return Found(settings={"dtype": asked.value, "bf16": asked.value == "bfloat16"})


def _deepspeed(asked: Asked) -> Found:
    return Found(
        note=f"accelerate launch --config_file: TRL ships {asked.value} as a configuration of accelerate", is_lost=True
    )


def _start(asked: Asked) -> Found:
    return Found(note="so there too") if asked.value == "kaiming" else Found(note="kaiming there", is_lost=True)


TABLE: Mapping[str, Rule] = {
    **OURS_ALONE,
    "model.base": to("model_name_or_path"),
    "model.revision": to("model_revision"),
    "model.template": lost("the processor's own chat template"),
    "model.dtype": _dtype,
    "model.quantisation": _quantised,
    "model.attn_implementation": to("attn_implementation"),
    "adapter.method": _method,
    "adapter.rank": _adapters_alone(to("lora_r", whole)),
    "adapter.alpha": _adapters_alone(to("lora_alpha", number)),
    "adapter.dropout": _adapters_alone(to("lora_dropout", number)),
    "adapter.dropout_mode": _adapters_alone(dropout_mode),
    "adapter.rank_scaling": _adapters_alone(to("use_rslora", lambda asked: asked.value == "sqrt")),
    "adapter.targets": _targets,
    "adapter.train_projector": _renamed(train_projector, "modules_to_save", "lora_modules_to_save"),
    "adapter.also_train": _renamed(also_train, "modules_to_save", "lora_modules_to_save"),
    "adapter.init": _adapters_alone(_start),
    "adapter.initial": lost("no option for it; from Python PeftModel.from_pretrained"),
    "adapter.rank_pattern": lost("one rank for all layers"),
    "adapter.alpha_pattern": lost("one alpha for all layers"),
    "data.train": _files,
    "data.image_folder": lost("rows hold their pictures, or whole paths"),
    "data.validation": lost("a split of the set: dataset_test_split"),
    "data.validation_share": lost("a split of the set: dataset_test_split"),
    "data.max_tokens": to("max_length", whole, note="of a model of pictures it may cut picture tokens"),
    "data.workers": to("dataloader_num_workers", whole),
    "data.streaming": to("dataset_streaming"),
    "data.group_by_modality_length": lost("samples come in random order"),
    "optim.b_learning_rate_ratio": lost("one rate for A and B"),
    "optim.loss_normalisation": lost("the mean over the step's tokens"),
    "training.deepspeed": _deepspeed,
    "resume": lost("its checkpoints are its own"),
    "overwrite": lost("it goes on from what is there where it is told to"),
}

TO_TRL = Tool(
    name=NAME,
    table=TABLE,
    otherwise=otherwise,
    method=method,
    defaults=defaults(),
    always={
        "(labels)": Found(
            settings={"assistant_only_loss": True}, note="of models of pictures with transformers 5.18 on"
        ),
    },
)
