"""LLaMA-Factory's YAML: what `llamafactory-cli train` takes for supervised fine-tuning, and its `dataset_info.json`.

Names and defaults: `src/llamafactory/hparams` of 0.9.5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dora_vl.core.config import Method
from dora_vl.errors import UserError, shown, shown_names
from dora_vl.start.rules import (
    Counterpart,
    Rule,
    Setting,
    Tool,
    globs_of_endings,
    is_on,
    lost,
    number,
    one_of,
    same,
    to,
    unless,
    where_on,
    whole,
    words,
)
from dora_vl.start.tool_rules import (
    ATTENTION,
    COMMON,
    DECAY,
    MICRO_BATCH,
    PIXELS,
    adapters_alone,
    chosen_places,
    dropout,
    held_out_share,
    is_projector,
    otherwise,
    quantised,
    scaling,
    streaming,
    which_method,
    whole_places,
)

FREEZES = {
    "language": ("freeze_language_model", False),
    "vision": ("freeze_vision_tower", True),
    "projector": ("freeze_multi_modal_projector", True),
}
LLAVA_TEMPLATES = ("llava", "vicuna")
TEMPLATES_OF_LLAVA = ("llava-1.5", "llava_1.5", "llava-v1.5")


def method(settings: Mapping[str, Any]) -> Method:
    """`full`, or LoRA with or without DoRA."""
    if settings["finetuning_type"] == "full":
        return "full"
    return "dora" if is_on(settings["use_dora"]) else "lora"


def _stage(setting: Setting) -> Counterpart:
    if setting.value != "sft":
        raise UserError(
            f"{setting.file}: stage is {shown(setting.value)}; supervised fine-tuning alone (sft) has a counterpart"
        )
    return Counterpart(note="supervised fine-tuning")


def _method(setting: Setting) -> Counterpart:
    if setting.value not in ("lora", "full"):
        raise UserError(f"{setting.file}: finetuning_type is {shown(setting.value)}; lora and full have a counterpart")
    return which_method(setting)


def _targets(setting: Setting) -> Counterpart:
    """Of a model with pictures: the parts that are not frozen; its projector is never a LoRA's target by `all`."""
    names = words(setting)
    places = [place for place in chosen_places(setting, FREEZES) if place != "projector"]
    if names == ["all"]:
        return Counterpart(settings={"adapter.targets": places})
    if len(places) == 2:
        return Counterpart(settings={"adapter.targets": globs_of_endings(names)})
    where, note = (
        ("*language_model*", "of the language model alone: the tower is frozen")
        if "language" in places
        else ("*vis*", "of the tower alone")
    )
    return Counterpart(settings={"adapter.targets": [f"{where}.{name}" for name in names]}, note=note)


def _projector(setting: Setting) -> Counterpart:
    if setting.method == "full":
        return Counterpart(note="said by adapter.targets")
    also = str(setting.settings.get("additional_target") or "").split(",")
    if any(is_projector(name) for name in also):
        return Counterpart(note="said by additional_target")
    return Counterpart(settings={"adapter.train_projector": False}, note="LoRA leaves it as it is, frozen or not")


def _additional(setting: Setting) -> Counterpart:
    names = words(setting)
    others = {name.rpartition(".")[2]: [f"*{name}.*"] for name in names if not is_projector(name)}
    settings: dict[str, Any] = {"adapter.train_projector": True} if len(others) < len(names) else {}
    return Counterpart(settings={**settings, **({"adapter.also_train": others} if others else {})}, note="whole")


def _alpha(setting: Setting) -> Counterpart:
    if setting.value != "":
        return Counterpart(settings={"adapter.alpha": number(setting)})
    rank = whole(replace(setting, key="lora_rank", value=setting.settings["lora_rank"]))
    return Counterpart(settings={"adapter.alpha": 2.0 * rank}, note="twice the rank")


def _template(setting: Setting) -> Counterpart:
    base = str(setting.settings.get("model_name_or_path", "")).lower()
    if not any(part in base for part in TEMPLATES_OF_LLAVA):
        return Counterpart(note="the base's own chat template; compare with dora-vl show batch")
    if setting.value in LLAVA_TEMPLATES:
        return Counterpart(settings={"model.template": "vicuna_v1"})
    return Counterpart(note="formats of a LLaVA-1.5 are listed in docs/training.md", is_lost=True)


# -- dataset_info.json --------------------------------------------------------------------------------------------

INFO = "dataset_info.json"
ROLES: Mapping[str, str] = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "images": "images",
    "videos": "videos",
}
"""What `columns` of a set calls a column -> its role in `data.columns`."""
TURNS: Mapping[tuple[str, str], str] = {("from", "value"): "conversations", ("role", "content"): "messages"}
"""What the turns call the speaker and the words -> the role of their column."""


@dataclass(frozen=True)
class _DataSet:
    """One data set: where it is, what its columns are, and what of it has no counterpart."""

    path: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    trouble: str = ""


def _eval_dataset(setting: Setting) -> Counterpart:
    """`eval_dataset`: one file."""
    counterpart = _files("data.validation", setting)
    if isinstance(counterpart.settings.get("data.validation"), list):
        return Counterpart(note="one file of validation samples; put them together", is_lost=True)
    return counterpart


def _media_folder(setting: Setting) -> Counterpart:
    """`media_dir`: where pictures' paths start; by default where `dataset_info.json` lies."""
    return Counterpart(settings={"data.image_folder": setting.value or _folder(setting)})


def _folder(setting: Setting) -> str:
    return str(setting.settings.get("dataset_dir") or "data")


def _files(name: str, setting: Setting) -> Counterpart:
    names = words(setting)
    info = _read_info(setting)
    if info is None:
        where = f"{_folder(setting)}/{INFO}"
        return Counterpart(note=f"{where}, which says what file that is, is not there; put the file here", is_lost=True)
    if unknown := [name for name in names if name not in info]:
        raise UserError(f"{setting.file}: {setting.key} names {unknown[0]}, which {INFO} has not: {shown_names(info)}")
    sets = {name: _data_set(info[name], _folder(setting)) for name in names}
    trouble = [f"{name}: {entry.trouble}" for name, entry in sets.items() if entry.trouble]
    columns = {column: role for entry in sets.values() for column, role in entry.columns.items()}
    for set_name, entry in sets.items():
        if clash := [column for column, role in entry.columns.items() if columns[column] != role]:
            trouble.append(f"{set_name}: its column {clash[0]} is {entry.columns[clash[0]]} here; rename one")
    paths = [entry.path for entry in sets.values()]
    if not all(paths):
        return Counterpart(note="; ".join(trouble), is_lost=True)
    settings: dict[str, Any] = {name: paths[0] if len(paths) == 1 else paths}
    settings |= {"data.columns": columns} if columns else {}
    return Counterpart(settings=settings, note="; ".join(trouble), is_lost=bool(trouble))


def _read_info(setting: Setting) -> Mapping[str, Any] | None:
    folder = Path(_folder(setting))
    folders = (
        folder,
        setting.file.parent / folder,
        *(parent / folder for parent in setting.file.resolve().parents[:4]),
    )
    path = next((folder / INFO for folder in folders if (folder / INFO).is_file()), None)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: no object of data sets")
    return content


def _data_set(entry: Any, folder: str) -> _DataSet:
    if not isinstance(entry, Mapping):
        return _DataSet(trouble="its entry is no object")
    if entry.get("ranking"):
        return _DataSet(trouble="pairs of a better and a worse answer are no samples")
    if name := entry.get("file_name"):
        path = str(Path(folder) / str(name))
    elif name := entry.get("hf_hub_url"):
        split = str(entry.get("split") or "train")
        path = f"hub:{name}" if split == "train" else f"hub:{name}:{split}"
    else:
        return _DataSet(trouble="it is loaded by a script, or from another hub; put its rows into a file")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    trouble = [f"num_samples {entry['num_samples']}: data.limit"] if entry.get("num_samples") else []
    trouble += [f"subset {entry['subset']}: `dora-vl prepare hugging-face` takes one"] if entry.get("subset") else []
    trouble += [f"its column {columns[name]} is not read" for name in ("tools", "audios") if columns.get(name)]
    roles = {str(columns[name]): role for name, role in ROLES.items() if columns.get(name)}
    if entry.get("formatting", "alpaca") != "alpaca":
        role = TURNS.get((tags.get("role_tag", "from"), tags.get("content_tag", "value")))
        if role is None:
            trouble.append("its turns' keys: rename them to from and value, or role and content")
        roles[str(columns.get("messages") or "conversations")] = role or "conversations"
    roles = {column: role for column, role in roles.items() if column != role}
    return _DataSet(path, roles, "; ".join(trouble))


TABLE: Mapping[str, Rule] = {
    **COMMON,
    "stage": _stage,
    "finetuning_type": _method,
    "use_dora": adapters_alone(which_method),
    "lora_rank": adapters_alone(to("adapter.rank", whole)),
    "lora_alpha": adapters_alone(_alpha),
    "lora_dropout": adapters_alone(dropout),
    "lora_target": adapters_alone(_targets),
    "use_rslora": adapters_alone(scaling),
    "loraplus_lr_ratio": adapters_alone(to("optim.b_learning_rate_ratio", number)),
    "pissa_init": adapters_alone(where_on({"adapter.init": "pissa"})),
    "additional_target": _additional,
    "freeze_vision_tower": partial(whole_places, freezes=FREEZES),
    "freeze_language_model": partial(whole_places, freezes=FREEZES),
    "freeze_multi_modal_projector": _projector,
    "pure_bf16": where_on({"model.dtype": "bfloat16"}, "what trains is float32 all the same"),
    "model_name_or_path": to("model.base"),
    "model_revision": to("model.revision"),
    "adapter_name_or_path": to("adapter.initial", note="a folder of PEFT's with the same rank and layers"),
    "flash_attn": one_of(
        "model.attn_implementation",
        {**ATTENTION, "fa2": "flash_attention_2", "disabled": "eager", "off": "eager", False: "eager"},
        "sdpa, flash_attention_2 and eager are there",
    ),
    "disable_gradient_checkpointing": to(
        "training.gradient_checkpointing", lambda setting: not is_on(setting.value), note="on unless it is disabled"
    ),
    "quantization_bit": quantised("quantization_method"),
    "template": _template,
    "dataset": partial(_files, "data.train"),
    "dataset_dir": same("said by data.train"),
    "media_dir": _media_folder,
    "eval_dataset": _eval_dataset,
    "val_size": held_out_share,
    "cutoff_len": to("data.max_tokens", whole, note="here the end is cut, there questions and answers in proportion"),
    "max_samples": to("data.limit", whole, note="of each file, as there"),
    "streaming": streaming,
    "buffer_size": to("data.shuffle_buffer", whole),
    "interleave_probs": lost("weights say how often an epoch sees each sample: data.train with {path, weight}"),
    "mix_strategy": unless("concat", "files are mixed by weights: data.train with {path, weight}"),
    **{f"{kind}_{limit}_pixels": lost(PIXELS) for kind in ("image", "video") for limit in ("max", "min")},
    "video_fps": to("data.video_fps", number),
    "video_maxlen": to("data.video_frames", whole),
    "hf_hub_token": lost("the environment's HF_TOKEN"),
}

LLAMA_FACTORY = Tool(
    name="LLaMA-Factory",
    table=TABLE,
    otherwise=otherwise("LLaMA-Factory"),
    method=method,
    defaults={
        "finetuning_type": "lora",
        "use_dora": False,
        "lora_rank": 8,
        "lora_alpha": "",
        "lora_dropout": 0.0,
        "lora_target": "all",
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True,
        "cutoff_len": 2048,
        "disable_gradient_checkpointing": False,
        "image_max_pixels": 768 * 768,
        "dataset_dir": "data",
        "media_dir": "",
        "dataloader_num_workers": 0,
        "train_sampling_strategy": "random",
    },
    always={"(loss)": MICRO_BATCH, "(decay)": DECAY},
)
