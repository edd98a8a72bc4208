"""TRL's `trl sft`: its YAML, or the command line of `trl sft`, `sft.py` and `sft_vlm.py`.

Names and defaults: `ScriptArguments`, `SFTConfig` and `ModelConfig` of TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dora_vl.core.config import Method
from dora_vl.errors import UserError
from dora_vl.start.rules import (
    Counterpart,
    Rule,
    Setting,
    Tool,
    is_on,
    lost,
    number,
    one_of,
    same,
    to,
    unless,
    where_on,
    whole,
)
from dora_vl.start.tool_rules import (
    ATTENTION,
    COMMON,
    DECAY,
    DECODER,
    STEP_TOKENS,
    adapters_alone,
    dropout,
    modules_to_save,
    otherwise,
    scaling,
    streaming,
    targets,
    which_method,
)


def method(settings: Mapping[str, Any]) -> Method:
    """All weights, unless `use_peft` is set."""
    if not is_on(settings["use_peft"]):
        return "full"
    return "dora" if is_on(settings["use_dora"]) else "lora"


def _method(setting: Setting) -> Counterpart:
    if setting.method != "full":
        return which_method(setting)
    settings = {"adapter.method": "full", "adapter.targets": [*DECODER, "vision", "projector"]}
    return Counterpart(settings=settings, note="all weights train")


def _targets(setting: Setting) -> Counterpart:
    if setting.value == "":
        why = "PEFT chooses by the model's type; here the language model's linears are taken: name them to be sure"
        return Counterpart(note=why, is_lost=True)
    value = setting.value.split(",") if isinstance(setting.value, str) and "," in setting.value else setting.value
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    is_name = isinstance(value, str) and value.lower() != "all-linear" and value.replace("_", "").isalnum()
    return targets(replace(setting, value=[value] if is_name else value))


def _file(setting: Setting) -> Counterpart:
    split = setting.settings.get("dataset_train_split") or "train"
    if setting.settings.get("dataset_config"):
        note = "a configuration of a set: `dora-vl prepare hugging-face` takes one (--set config=...)"
        return Counterpart(note=note, is_lost=True)
    return Counterpart(settings={"data.train": _hub(str(setting.value), split)})


def _hub(name: str, split: str) -> str:
    return f"hub:{name}" if split == "train" else f"hub:{name}:{split}"


def _files(setting: Setting) -> Counterpart:
    """`datasets`: a mixture, of the hub's sets or of files."""
    entries = setting.value
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise UserError(f"{setting.file}: datasets is no list of sets")
    paths: list[str] = []
    for entry in entries:
        files = entry.get("data_files")
        if files is not None:
            paths += [files] if isinstance(files, str) else list(files)
        elif entry.get("path"):
            paths.append(_hub(str(entry["path"]), str(entry.get("split") or "train")))
    more = sorted({key for entry in entries for key in entry} - {"path", "data_files", "split"})
    note = f"{', '.join(more)} of its sets: no counterpart" if more else ""
    return Counterpart(settings={"data.train": paths[0] if len(paths) == 1 else paths}, note=note, is_lost=not paths)


def _held_out(setting: Setting) -> Counterpart:
    name = setting.settings.get("dataset_name")
    if setting.settings.get("eval_strategy", "no") in ("no", False) or not name:
        return Counterpart(note="read only where it evaluates")
    return Counterpart(settings={"data.validation": f"hub:{name}:{setting.value}"})


def _dtype(setting: Setting) -> Counterpart:
    value = str(setting.value).removeprefix("torch.")
    if value == "float32" and setting.method != "full" and setting.settings.get("bf16") is not False:
        note = "TRL holds float32 and computes in bfloat16; what trains is float32"
        return Counterpart(settings={"model.dtype": "bfloat16"}, note=note)
    if value in ("bfloat16", "float16", "float32"):
        return Counterpart(settings={"model.dtype": value}, note="of the frozen weights; what trains is float32")
    note = "auto is the file's own number type, which most have in bfloat16"
    return Counterpart(settings={"model.dtype": "bfloat16"}, note=note)


def _arithmetic(setting: Setting) -> Counterpart:
    """With adapters the weights' own type counts, `dtype`; with all weights masters are float32."""
    if setting.method != "full":
        return Counterpart(note="said by model.dtype: what is frozen keeps it, what trains is float32")
    return COMMON[setting.key](setting)


def _labels(setting: Setting) -> Counterpart:
    note = "labels are on the answers alone"
    if is_on(setting.value):
        return Counterpart(note=note)
    return Counterpart(note=f"TRL labels the questions' tokens too; here {note}", is_lost=True)


TABLE: Mapping[str, Rule] = {
    **COMMON,
    "model_name_or_path": to("model.base"),
    "model_revision": to("model.revision"),
    "dtype": _dtype,
    "torch_dtype": _dtype,
    "bf16": _arithmetic,
    "fp16": _arithmetic,
    "attn_implementation": one_of("model.attn_implementation", ATTENTION, f"there are {', '.join(ATTENTION)}"),
    "use_peft": _method,
    "use_dora": adapters_alone(which_method),
    "lora_r": adapters_alone(to("adapter.rank", whole)),
    "lora_alpha": adapters_alone(to("adapter.alpha", number)),
    "lora_dropout": adapters_alone(dropout),
    "lora_target_modules": adapters_alone(_targets),
    "lora_modules_to_save": adapters_alone(modules_to_save),
    "use_rslora": adapters_alone(scaling),
    "load_in_4bit": where_on({"model.quantisation": "nf4"}),
    "load_in_8bit": where_on({"model.quantisation": "int8"}),
    "bnb_4bit_quant_type": unless("nf4", "4 bits are nf4 here, or hqq"),
    "use_bnb_nested_quant": same("nf4 has its scales quantised in any case"),
    "dataset_name": _file,
    "dataset_config": same("see dataset_name"),
    "dataset_train_split": same("said by data.train"),
    "dataset_test_split": _held_out,
    "dataset_streaming": streaming,
    "datasets": _files,
    "dataset_text_field": same("rows are read by their own keys"),
    "max_length": to("data.max_tokens", whole, note="pictures are never cut"),
    "max_seq_length": to("data.max_tokens", whole, note="pictures are never cut"),
    "truncation_mode": unless("keep_start", "the end is cut"),
    "assistant_only_loss": _labels,
    "completion_only_loss": same("labels are on the answers alone"),
    "loss_type": one_of(
        "optim.loss_normalisation", {"nll": "step_tokens", "chunked_nll": "step_tokens"}, "cross-entropy alone"
    ),
    "model_init_kwargs": lost("model.dtype, model.attn_implementation and model.revision say what there is"),
}

TRL = Tool(
    name="TRL",
    table=TABLE,
    otherwise=otherwise("TRL"),
    method=method,
    defaults={
        "use_peft": False,
        "use_dora": False,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_modules": "",
        "lora_modules_to_save": [],
        "dtype": "float32",
        "learning_rate": 2e-5,
        "gradient_checkpointing": True,
        "max_length": 1024,
        "assistant_only_loss": False,
        "dataloader_num_workers": 0,
        "train_sampling_strategy": "random",
    },
    always={"(loss)": STEP_TOKENS, "(decay)": DECAY},
)
