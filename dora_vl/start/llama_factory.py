"""LLaMA-Factory's YAML: what `llamafactory-cli train` takes for supervised fine-tuning, and its `dataset_info.json`.

Names and defaults: `src/llamafactory/hparams` of 0.9.5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dora_vl.errors import UserError, shown_names
from dora_vl.start import tool_rules as shared
from dora_vl.start.rules import (
    Counterpart,
    Setting,
    Tool,
    globs_of_endings,
    lost,
    missing,
    of_adapters,
    only,
    same,
    to,
    unless,
    where_on,
)

FREEZES: shared.Freezes = {
    "language": ("freeze_language_model", False),
    "vision": ("freeze_vision_tower", True),
    "projector": ("freeze_multi_modal_projector", True),
}


@of_adapters
def _targets(setting: Setting) -> Counterpart:
    """Of a model with pictures: the parts that are not frozen; its projector is never a LoRA's target by `all`."""
    names = setting.words
    places = [place for place in shared.chosen_places(setting, FREEZES) if place != "projector"]
    if names == ["all"]:
        return Counterpart({"adapter.targets": places})
    if len(places) == 2:
        return Counterpart({"adapter.targets": globs_of_endings(names)})
    if "language" in places:
        where, note = "*language_model*", "of the language model alone: the tower is frozen"
    else:
        where, note = "*vis*", "of the tower alone"
    return Counterpart({"adapter.targets": [f"{where}.{name}" for name in names]}, note)


def _projector(setting: Setting) -> Counterpart:
    if any(map(shared.is_projector, str(setting.settings.get("additional_target") or "").split(","))):
        return Counterpart(note="said by additional_target")
    return Counterpart({"adapter.train_projector": False}, "LoRA leaves it as it is, frozen or not")


def _additional(setting: Setting) -> Counterpart:
    projector = {"adapter.train_projector": True} if any(map(shared.is_projector, setting.words)) else {}
    return Counterpart({**projector, **shared.whole_modules(setting.words)}, "whole")


def _alpha(setting: Setting) -> Counterpart:
    if setting.value != "":
        return Counterpart({"adapter.alpha": setting.number})
    rank = replace(setting, key="lora_rank", value=setting.settings["lora_rank"]).number
    return Counterpart({"adapter.alpha": 2.0 * rank}, "twice the rank")


def _template(setting: Setting) -> Counterpart:
    base = str(setting.settings.get("model_name_or_path", "")).lower()
    if not any(part in base for part in ("llava-1.5", "llava_1.5", "llava-v1.5")):
        return Counterpart(note="the base's own chat template; compare with dora-vl show batch")
    if setting.value in ("llava", "vicuna"):
        return Counterpart({"model.template": "vicuna_v1"})
    return missing("formats of a LLaVA-1.5 are listed in docs/training.md")


# -- dataset_info.json --------------------------------------------------------------------------------------------

INFO = "dataset_info.json"
ROLES = {"prompt": "instruction", "query": "input", "response": "output"} | {
    name: name for name in ("history", "system", "images", "videos")
}
"""What `columns` of a set calls a column -> its role in `data.columns`."""
TURNS = {("from", "value"): "conversations", ("role", "content"): "messages"}
"""What the turns call the speaker and the words -> the role of their column."""


DataSet = tuple[str, Mapping[str, str], list[str]]
"""Where a set is, the roles of its columns, and what of it has no counterpart."""


def _folder(setting: Setting) -> str:
    return str(setting.settings.get("dataset_dir") or "data")


def _files(target: str, setting: Setting) -> Counterpart:
    """`dataset` or `eval_dataset`: names of sets, as paths and the roles of their columns."""
    info = _read_info(setting)
    if info is None:
        return missing(f"{_folder(setting)}/{INFO}, which says what file that is, is not there; put the file here")
    if unknown := [given for given in setting.words if given not in info]:
        raise UserError(f"{setting.file}: {setting.key} names {unknown[0]}, which {INFO} has not: {shown_names(info)}")
    sets = {name: _data_set(info[name], _folder(setting)) for name in setting.words}
    trouble = [f"{name}: {'; '.join(reasons)}" for name, (_, _, reasons) in sets.items() if reasons]
    columns = {column: role for _, roles, _ in sets.values() for column, role in roles.items()}
    for name, (_, roles, _) in sets.items():
        if clash := [column for column, role in roles.items() if columns[column] != role]:
            trouble.append(f"{name}: its column {clash[0]} is {roles[clash[0]]} here; rename one")
    paths = [path for path, _, _ in sets.values()]
    if not all(paths):
        return missing("; ".join(trouble))
    files = shared.sources(target, paths, "; ".join(trouble), is_lost=bool(trouble))
    return replace(files, settings={**files.settings, "data.columns": columns}) if files.settings and columns else files


def _read_info(setting: Setting) -> Mapping[str, Any] | None:
    folder = Path(_folder(setting))
    beside = (setting.file.parent, *setting.file.resolve().parents[:4])
    paths = [folder / INFO, *(parent / folder / INFO for parent in beside)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: no object of data sets")
    return content


def _data_set(entry: Any, folder: str) -> DataSet:
    if not isinstance(entry, Mapping):
        return "", {}, ["its entry is no object"]
    if entry.get("ranking"):
        return "", {}, ["pairs of a better and a worse answer are no samples"]
    if name := entry.get("file_name"):
        path = str(Path(folder) / str(name))
    elif name := entry.get("hf_hub_url"):
        path = shared.hub(str(name), str(entry.get("split") or "train"))
    else:
        return "", {}, ["it is loaded by a script, or from another hub; put its rows into a file"]
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
    return path, {column: role for column, role in roles.items() if column != role}, trouble


LLAMA_FACTORY_DEFAULTS: Mapping[str, Any] = {
    "finetuning_type": "lora", "use_dora": False, "lora_rank": 8, "lora_alpha": "", "lora_dropout": 0.0,
    "lora_target": "all", "freeze_vision_tower": True, "freeze_multi_modal_projector": True, "cutoff_len": 2048,
    "disable_gradient_checkpointing": False, "image_max_pixels": 768 * 768, "dataset_dir": "data", "media_dir": "",
    "dataloader_num_workers": 0, "train_sampling_strategy": "random",
}  # fmt: skip
LLAMA_FACTORY = Tool(
    name="LLaMA-Factory",
    method=lambda settings: "full" if settings["finetuning_type"] == "full" else shared.lora_or_dora(settings),
    otherwise=shared.otherwise("LLaMA-Factory"),
    table={
        **shared.COMMON,
        "stage": only(("sft",), same("supervised fine-tuning")),
        "finetuning_type": only(("lora", "full"), shared.which_method),
        "use_dora": shared.which_method,
        "lora_rank": to("adapter.rank"),
        "lora_alpha": _alpha,
        "lora_dropout": shared.dropout,
        "lora_target": _targets,
        "use_rslora": shared.scaling,
        "loraplus_lr_ratio": to("optim.b_learning_rate_ratio"),
        "pissa_init": where_on({"adapter.init": "pissa"}),
        "additional_target": _additional,
        "freeze_vision_tower": partial(shared.whole_places, freezes=FREEZES),
        "freeze_language_model": partial(shared.whole_places, freezes=FREEZES),
        "freeze_multi_modal_projector": of_adapters(_projector, "said by adapter.targets"),
        "pure_bf16": where_on({"model.dtype": "bfloat16"}, "what trains is float32 all the same"),
        "model_name_or_path": to("model.base"),
        "model_revision": to("model.revision"),
        "adapter_name_or_path": to("adapter.initial", note="a folder of PEFT's with the same rank and layers"),
        "flash_attn": shared.attention(fa2="flash_attention_2", disabled="eager", off="eager"),
        "disable_gradient_checkpointing": to(
            "training.gradient_checkpointing", lambda setting: not setting.is_on, note="on unless it is disabled"
        ),
        "quantization_bit": shared.quantised("quantization_method"),
        "template": _template,
        "dataset": partial(_files, "data.train"),
        "dataset_dir": same("said by data.train"),
        "media_dir": to("data.image_folder", lambda setting: setting.value or _folder(setting)),
        "eval_dataset": partial(_files, "data.validation"),
        "val_size": shared.held_out_share,
        "cutoff_len": to("data.max_tokens", note="here the end is cut, there questions and answers in proportion"),
        "max_samples": to("data.limit", note="of each file, as there"),
        "streaming": shared.streaming,
        "buffer_size": to("data.shuffle_buffer"),
        "interleave_probs": lost("weights say how often an epoch sees each sample: data.train with {path, weight}"),
        "mix_strategy": unless("concat", "files are mixed by weights: data.train with {path, weight}"),
        **{f"{kind}_{limit}_pixels": shared.PIXELS for kind in ("image", "video") for limit in ("max", "min")},
        "video_fps": to("data.video_fps"),
        "video_maxlen": to("data.video_frames"),
        "hf_hub_token": lost("the environment's HF_TOKEN"),
    },
    defaults=LLAMA_FACTORY_DEFAULTS,
    always={"(loss)": shared.MICRO_BATCH, "(decay)": shared.DECAY},
)
