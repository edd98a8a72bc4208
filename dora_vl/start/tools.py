"""What the settings of each tool are here: `tables.yaml`, and what of them must be computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dora_vl.core.config import Method
from dora_vl.errors import UserError, shown_names
from dora_vl.files import read_json
from dora_vl.run.arguments import OWNED, RENAMED, check_training_section, training_fields
from dora_vl.start import tool_rules as shared
from dora_vl.start.rules import (
    COMPUTED,
    Counterpart,
    Rule,
    Setting,
    Tool,
    computed,
    globs_of_endings,
    is_llava,
    is_on,
    missing,
    of_adapters,
    rule_of,
)

# -- LLaMA-Factory --------------------------------------------------------------------------------------------------

FACTORY_FREEZES: shared.Freezes = {
    "language": ("freeze_language_model", False),
    "vision": ("freeze_vision_tower", True),
    "projector": ("freeze_multi_modal_projector", True),
}


@computed
@of_adapters
def _factory_targets(setting: Setting) -> Counterpart:
    """Of a model with pictures: the parts that are not frozen; its projector is never a LoRA's target by `all`."""
    names = setting.words
    parts = [part for part in shared.chosen_places(setting, FACTORY_FREEZES) if part != "projector"]
    if names == ["all"]:
        return Counterpart({"adapter.targets": parts})
    if len(parts) == 2:
        return Counterpart({"adapter.targets": globs_of_endings(names)})
    if "language" in parts:
        where, note = "*language_model*", "of the language model alone: the tower is frozen"
    else:
        where, note = "*vis*", "of the tower alone"
    return Counterpart({"adapter.targets": [f"{where}.{name}" for name in names]}, note)


@computed
@partial(of_adapters, otherwise="said by adapter.targets")
def _factory_projector(setting: Setting) -> Counterpart:
    if any(map(shared.is_projector, str(setting.settings.get("additional_target") or "").split(","))):
        return Counterpart(note="said by additional_target")
    return Counterpart({"adapter.train_projector": False}, "LoRA leaves it as it is, frozen or not")


@computed
def _factory_additional(setting: Setting) -> Counterpart:
    projector = {"adapter.train_projector": True} if any(map(shared.is_projector, setting.words)) else {}
    return Counterpart({**projector, **shared.whole_modules(setting.words)}, "whole")


@computed
def _factory_alpha(setting: Setting) -> Counterpart:
    if setting.value != "":
        return Counterpart({"adapter.alpha": setting.number})
    rank = replace(setting, key="lora_rank", value=setting.settings["lora_rank"]).number
    return Counterpart({"adapter.alpha": 2.0 * rank}, "twice the rank")


@computed
def _factory_template(setting: Setting) -> Counterpart:
    base = str(setting.settings.get("model_name_or_path", "")).lower()
    if not any(part in base for part in ("llava-1.5", "llava_1.5", "llava-v1.5")):
        return Counterpart(note="the base's own chat template; compare with dora-vl show batch")
    if setting.value in ("llava", "vicuna"):
        return Counterpart({"model.template": "vicuna_v1"})
    return missing("formats of a LLaVA-1.5 are listed in docs/training.md")


# -- dataset_info.json --------------------------------------------------------------------------------------------

INFO = "dataset_info.json"
COLUMN_ROLES = {"prompt": "instruction", "query": "input", "response": "output"} | {
    name: name for name in ("history", "system", "images", "videos")
}
"""What `columns` of a set calls a column -> its role in `data.columns`."""
TURNS = {("from", "value"): "conversations", ("role", "content"): "messages"}
"""What the turns call the speaker and the words -> the role of their column."""


DataSet = tuple[str, Mapping[str, str], list[str]]
"""Where a set is, the roles of its columns, and what of it has no counterpart."""


def _set_folder(setting: Setting) -> str:
    return str(setting.settings.get("dataset_dir") or "data")


def _files(target: str, setting: Setting) -> Counterpart:
    """`dataset` or `eval_dataset`: names of sets, as paths and the roles of their columns."""
    info = _read_info(setting)
    if info is None:
        return missing(f"{_set_folder(setting)}/{INFO}, which says what file that is, is not there; put the file here")
    if unknown := [name for name in setting.words if name not in info]:
        raise UserError(f"{setting.file}: {setting.key} names {unknown[0]}, which {INFO} has not: {shown_names(info)}")
    sets = {name: _data_set(info[name], _set_folder(setting)) for name in setting.words}
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
    folder = Path(_set_folder(setting))
    beside = (setting.file.parent, *setting.file.resolve().parents[:4])
    paths = [folder / INFO, *(parent / folder / INFO for parent in beside)]
    path = next((path for path in paths if path.is_file()), None)
    return None if path is None else read_json(path)


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
    roles = {str(columns[name]): role for name, role in COLUMN_ROLES.items() if columns.get(name)}
    if entry.get("formatting", "alpaca") != "alpaca":
        role = TURNS.get((tags.get("role_tag", "from"), tags.get("content_tag", "value")))
        if role is None:
            trouble.append("its turns' keys: rename them to from and value, or role and content")
        roles[str(columns.get("messages") or "conversations")] = role or "conversations"
    return path, {column: role for column, role in roles.items() if column != role}, trouble


@computed
def _factory_media(setting: Setting) -> Counterpart:
    """Where the pictures are: with the sets, unless it is said."""
    return Counterpart({"data.image_folder": setting.value or _set_folder(setting)})


COMPUTED["factory_dataset"] = partial(_files, "data.train")
COMPUTED["factory_eval_dataset"] = partial(_files, "data.validation")
COMPUTED["factory_whole_places"] = partial(shared.whole_places, freezes=FACTORY_FREEZES)

# -- TRL -------------------------------------------------------------------------------------------------------------


@computed
def _trl_method(setting: Setting) -> Counterpart:
    if setting.method != "full":
        return shared.which_method(setting)
    settings = {"adapter.method": "full", "adapter.targets": [*shared.DECODER, "vision", "projector"]}
    return Counterpart(settings, "all weights train")


@computed
def _trl_targets(setting: Setting) -> Counterpart:
    if setting.value == "" and setting.method != "full":
        return missing("PEFT chooses by the model's type; here the language model's linears are taken: name them to be "
                       "sure")  # fmt: skip
    value = setting.value.split(",") if isinstance(setting.value, str) and "," in setting.value else setting.value
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    is_name = isinstance(value, str) and value.lower() != "all-linear" and value.replace("_", "").isalnum()
    return shared.targets(replace(setting, value=[value] if is_name else value))


@computed
def _trl_file(setting: Setting) -> Counterpart:
    if setting.settings.get("dataset_config"):
        return missing("a configuration of a set: `dora-vl prepare hugging-face` takes one (--set config=...)")
    split = setting.settings.get("dataset_train_split") or "train"
    return Counterpart({"data.train": shared.hub(str(setting.value), split)})


@computed
def _trl_files(setting: Setting) -> Counterpart:
    """`datasets`: a mixture, of the hub's sets or of files."""
    entries = setting.value
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise setting.wrong(", no list of sets")
    paths: list[str] = []
    for entry in entries:
        if (files := entry.get("data_files")) is not None:
            paths += [files] if isinstance(files, str) else list(files)
        elif entry.get("path"):
            paths.append(shared.hub(str(entry["path"]), str(entry.get("split") or "train")))
    more = sorted({key for entry in entries for key in entry} - {"path", "data_files", "split"})
    note = f"{', '.join(more)} of its sets: no counterpart" if more else ""
    return shared.sources("data.train", paths, note, is_lost=not paths)


@computed
def _trl_held_out(setting: Setting) -> Counterpart:
    name = setting.settings.get("dataset_name")
    if setting.settings.get("eval_strategy", "no") in ("no", False) or not name:
        return Counterpart(note="read only where it evaluates")
    return Counterpart({"data.validation": f"hub:{name}:{setting.value}"})


@computed
def _trl_dtype(setting: Setting) -> Counterpart:
    value = str(setting.value).removeprefix("torch.")
    if value == "float32" and setting.method != "full" and setting.settings.get("bf16") is not False:
        note = "TRL holds float32 and computes in bfloat16; what trains is float32"
        return Counterpart({"model.dtype": "bfloat16"}, note)
    if value in ("bfloat16", "float16", "float32"):
        return Counterpart({"model.dtype": value}, "of the frozen weights; what trains is float32")
    note = "auto is the file's own number type, which most have in bfloat16"
    return Counterpart({"model.dtype": "bfloat16"}, note)


@computed
def _trl_arithmetic(setting: Setting) -> Counterpart:
    """With adapters the weights' own type counts, `dtype`; with all weights masters are float32."""
    if setting.method != "full":
        return Counterpart(note="said by model.dtype: what is frozen keeps it, what trains is float32")
    return shared.precision(setting)


@computed
def _trl_labels(setting: Setting) -> Counterpart:
    if setting.is_on:
        return Counterpart(note=shared.ON_ANSWERS)
    return missing(f"TRL labels the questions' tokens too; here {shared.ON_ANSWERS}")


# -- ms-swift --------------------------------------------------------------------------------------------------------

SWIFT_FREEZES: shared.Freezes = {
    "language": ("freeze_llm", False),
    "vision": ("freeze_vit", True),
    "projector": ("freeze_aligner", True),
}
FILE_ENDINGS = ("json", "jsonl", "csv", "parquet", "arrow", "tsv")


def _swift_method(settings: Mapping[str, Any]) -> Method:
    kind = settings.get("tuner_type") or settings.get("train_type")
    return "full" if kind == "full" else shared.lora_or_dora(settings)


@computed
@of_adapters
def _swift_targets(setting: Setting) -> Counterpart:
    if setting.settings.get("target_regex"):
        return Counterpart(note="target_regex wins over it")
    if "all-linear" in setting.words:
        return Counterpart({"adapter.targets": shared.chosen_places(setting, SWIFT_FREEZES)})
    return Counterpart({"adapter.targets": globs_of_endings(setting.words)})


def _swift_data(name: str, setting: Setting) -> Counterpart:
    """Files as they are; ids, with their hub and their count (`#N`) taken off, as `hub:OWNER/NAME`."""
    entries = [setting.value] if isinstance(setting.value, str) else setting.words
    paths = [
        path
        if (path := entry.partition("#")[0]).rpartition(".")[2] in FILE_ENDINGS or path.startswith(("/", "."))
        else f"hub:{path.removeprefix('HF::').removeprefix('MS::').partition(':')[0]}"
        for entry in entries
    ]
    counts = [entry for entry in entries if "#" in entry]
    note = f"{', '.join(counts)}: so many samples; data.limit takes the first of each file" if counts else ""
    return shared.sources(name, paths, note)


@computed
def _swift_accumulation(setting: Setting) -> Counterpart:
    """Without it ms-swift makes a step of at least 16 samples, of all GPUs."""
    if setting.value != "":
        return Counterpart({"training.gradient_accumulation_steps": setting.value})
    each = int(setting.settings.get("per_device_train_batch_size") or 1)
    ranks = int(setting.settings.get("NPROC_PER_NODE") or 1)
    settings = {"training.gradient_accumulation_steps": -(-16 // (each * ranks))}
    return Counterpart(settings, f"16 samples a step on {ranks} GPU")


@computed
def _swift_learning_rate(setting: Setting) -> Counterpart:
    usual = 1e-5 if setting.method == "full" else 1e-4
    return Counterpart({"training.learning_rate": usual if setting.value == "" else setting.number})


@computed
def _swift_dtype(setting: Setting) -> Counterpart:
    value = str(setting.value).removeprefix("torch.")
    value = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(value, value)
    if value not in ("bfloat16", "float16", "float32"):
        return missing("bfloat16, float16 and float32 are there")
    arithmetic = {"bfloat16": "bf16", "float16": "fp16"}.get(value) if setting.method == "full" else None
    return Counterpart({"model.dtype": value, **({f"training.{arithmetic}": True} if arithmetic else {})})


@computed
def _swift_length(setting: Setting) -> Counterpart:
    if setting.value == "":
        return Counterpart({"data.max_tokens": 32768}, "the model's own length, which cuts before that")
    return Counterpart({"data.max_tokens": setting.value}, "pictures are never cut")


@computed
def _swift_adapters(setting: Setting) -> Counterpart:
    """The first of a list."""
    return Counterpart({"adapter.initial": setting.value[0] if isinstance(setting.value, list) else setting.value})


COMPUTED["swift_dataset"] = partial(_swift_data, "data.train")
COMPUTED["swift_val_dataset"] = partial(_swift_data, "data.validation")
COMPUTED["swift_whole_places"] = partial(shared.whole_places, freezes=SWIFT_FREEZES)

# -- LLaVA -----------------------------------------------------------------------------------------------------------

HUB_NAMES = {f"llava-v1.5-{size}": f"llava-hf/llava-1.5-{size}-hf" for size in ("7b", "13b")}
"""Their checkpoints -> the same weights in transformers' format."""
PROJECTOR_ALONE = ("model.multi_modal_projector*",)


@computed
def _llava_what_trains(setting: Setting) -> Counterpart:
    if setting.method != "full":
        return Counterpart({"adapter.method": setting.method}, "all linears of the language model")
    if is_on(setting.settings.get("tune_mm_mlp_adapter")):
        targets = PROJECTOR_ALONE
    elif is_on(setting.settings.get("freeze_backbone")):
        raise UserError(
            f"{setting.file}: freeze_backbone without tune_mm_mlp_adapter trains nothing that is known here"
        )
    else:
        projector = () if is_on(setting.settings.get("freeze_mm_mlp_adapter")) else PROJECTOR_ALONE
        targets = (*shared.DECODER, *projector)
    return Counterpart({"adapter.method": "full", "adapter.targets": targets})


@computed
def _llava_base(setting: Setting) -> Counterpart:
    name = PurePosixPath(str(setting.value)).name
    if name in HUB_NAMES:
        return Counterpart({"model.base": HUB_NAMES[name]}, "the same weights in transformers' format")
    if is_llava(name):
        return missing("a checkpoint in LLaVA's format; name one in transformers' (llava-hf/...)")
    folder = f"{setting.settings.get('output_dir', 'runs/llava')}-base"
    settings = {"model.compose.language_model": setting.value, "model.base": folder}
    return Counterpart(settings, "tower and language model are put together there by the first run")


@computed
def _llava_tower(setting: Setting) -> Counterpart:
    """Of a base that the run puts together."""
    return Counterpart({"model.compose.vision_library": "transformers", "model.compose.vision_name": setting.value})


@computed
@partial(of_adapters, otherwise="said by adapter.targets")
def _llava_projector(setting: Setting) -> Counterpart:
    """It trains unless it is frozen."""
    return Counterpart({"adapter.train_projector": not setting.is_on})


@computed
def _llava_bits(setting: Setting) -> Counterpart:
    name = {4: "nf4", 8: "int8"}.get(int(setting.number))
    return Counterpart({"model.quantisation": name}) if name else Counterpart(note="not quantised")


# -- the tools -------------------------------------------------------------------------------------------------------

TABLES = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8"))


def _table(key: str) -> dict[str, Rule]:
    """The rules of a part of the tables, by a setting's name."""
    return {name: rule_of(entry) for names, entry in TABLES[key].items() for name in names.split()}


COMMON = _table("common")


def _otherwise(tool: str, setting: Setting) -> Counterpart:
    """A setting that no table names: a field of `training:` where transformers has it, else one without counterpart."""
    if setting.key in OWNED:
        return missing(OWNED[setting.key]) if setting.is_on else Counterpart(note="off")
    if setting.key in training_fields():
        return _field(setting)
    if setting.key in RENAMED:
        return missing(f"transformers has it no longer; here {RENAMED[setting.key]}")
    return missing(f"a setting of {tool}'s own, or none") if setting.is_on else Counterpart(note="off")


def _field(setting: Setting) -> Counterpart:
    """A field of `training:` under its own name, if a run takes this value of it."""
    fields = set(training_fields()) - COMMON.keys()
    together = {name: value for name, value in setting.settings.items() if name in fields}
    if _refusal(json.dumps(together, default=str)) is not None:  # taking one by one is slow
        refusal = _refusal(json.dumps({setting.key: setting.value}, default=str))
        if refusal is not None:
            return missing(refusal)
    return Counterpart({f"training.{setting.key}": setting.value})


@cache
def _refusal(section: str) -> str | None:
    """Why a run does not take a `training:` section, given as JSON; None where it does."""
    try:
        check_training_section(json.loads(section))
    except UserError as error:
        return str(error)
    return None


def _tool(key: str, name: str, method: Any, **more: Any) -> Tool:
    table, otherwise = {**COMMON, **_table(key)}, partial(_otherwise, name)
    return Tool(name=name, table=table, otherwise=otherwise, method=method, defaults=TABLES["defaults"][key], **more)


STEP_TOKENS = Counterpart({"optim.loss_normalisation": "step_tokens"}, "one mean over the step's tokens")
MICRO_BATCH = Counterpart({"optim.loss_normalisation": "micro_batch"}, "the mean of each micro-batch")
DECAY = Counterpart({"optim.weight_decay_on": "all_but_biases"}, "magnitudes decay as all else does")
LLAVA_NEEDS = {"model.base": "llava-hf/llava-1.5-7b-hf", "data.train": "train.json"}
TOOLS: Mapping[str, Tool] = {
    "llama-factory": _tool(
        "llama-factory",
        "LLaMA-Factory",
        lambda settings: "full" if settings["finetuning_type"] == "full" else shared.lora_or_dora(settings),
        always={"(loss)": MICRO_BATCH, "(decay)": DECAY},
    ),
    "trl": _tool(
        "trl",
        "TRL",
        lambda settings: shared.lora_or_dora(settings) if is_on(settings["use_peft"]) else "full",
        always={"(loss)": STEP_TOKENS, "(decay)": DECAY},
    ),
    "ms-swift": _tool("ms-swift", "ms-swift", _swift_method, always={"(loss)": STEP_TOKENS, "(decay)": DECAY}),
    "llava": _tool(
        "llava",
        "LLaVA",
        lambda settings: shared.lora_or_dora(settings) if is_on(settings.get("lora_enable")) else "full",
        always={"(loss)": MICRO_BATCH},
        needed={**LLAVA_NEEDS, "training.output_dir": "runs/llava"},
    ),
    "peft": Tool(
        name="PEFT",
        table=_table("peft"),
        otherwise=rule_of({"unless_off": "no counterpart among adapters here"}),
        method=shared.lora_or_dora,
        defaults=TABLES["defaults"]["peft"],
    ),
}
