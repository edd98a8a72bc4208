"""TRL's `trl sft`: its YAML, or the command line of `trl sft`, `sft.py` and `sft_vlm.py`.

Names and defaults: `ScriptArguments`, `SFTConfig` and `ModelConfig` of TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dora_vl.core.config import Method
from dora_vl.errors import UserError
from dora_vl.translation.peft_adapter import dropout, modules_to_save, scaling, targets, unless_empty
from dora_vl.translation.rules import (
    Asked,
    Found,
    Rule,
    Tool,
    is_on,
    lost,
    number,
    one_of,
    same,
    to,
    unless,
    whole,
    words,
)
from dora_vl.translation.training_arguments import COMMON, otherwise

NAME = "TRL"
TEMPLATE = "the base's own chat template"


def method(settings: Mapping[str, Any]) -> Method:
    """All weights, unless `use_peft` is set."""
    if not is_on(settings["use_peft"]):
        return "full"
    return "dora" if is_on(settings["use_dora"]) else "lora"


def _method(asked: Asked) -> Found:
    if asked.method != "full":
        return Found(settings={"adapter.method": asked.method})
    targets = ["model.language_model*", "lm_head", "vision", "projector"]
    return Found(settings={"adapter.method": "full", "adapter.targets": targets}, note="all weights train")


def _adapters_alone(rule: Rule) -> Rule:
    return lambda asked: Found(note="not read without use_peft") if asked.method == "full" else rule(asked)


def _targets(asked: Asked) -> Found:
    value = asked.value
    if value == "":
        why = "PEFT chooses by the model's type; here the language model's linears are taken: name them to be sure"
        return Found(note=why, is_lost=True)
    listed = value.split(",") if isinstance(value, str) and "," in value else value
    if isinstance(listed, list) and len(listed) == 1:
        listed = listed[0]
    is_name = isinstance(listed, str) and listed.lower() != "all-linear" and listed.replace("_", "").isalnum()
    return targets(replace(asked, value=[listed] if is_name else listed))


def _saved(asked: Asked) -> Found:
    listed = words(asked) if asked.value else []
    return modules_to_save(replace(asked, value=listed))


def _file(asked: Asked) -> Found:
    split = asked.settings.get("dataset_train_split") or "train"
    if asked.settings.get("dataset_config"):
        return Found(
            note="a configuration of a set: `dora-vl prepare hugging-face` takes one (--set config=...)", is_lost=True
        )
    return Found(settings={"data.train": f"hub:{asked.value}" if split == "train" else f"hub:{asked.value}:{split}"})


def _files(asked: Asked) -> Found:
    """`datasets`: a mixture, of the hub's sets or of files."""
    if not isinstance(asked.value, list) or not all(isinstance(one, Mapping) for one in asked.value):
        raise UserError(f"{asked.file}: datasets is no list of sets")
    paths: list[str] = []
    for one in asked.value:
        files = one.get("data_files")
        if files is not None:
            paths += [files] if isinstance(files, str) else list(files)
        elif one.get("path"):
            paths.append(f"hub:{one['path']}" + (f":{one['split']}" if one.get("split", "train") != "train" else ""))
    more = sorted({key for one in asked.value for key in one} - {"path", "data_files", "split"})
    note = f"{', '.join(more)} of its sets: no counterpart" if more else ""
    return Found(settings={"data.train": paths[0] if len(paths) == 1 else paths}, note=note, is_lost=not paths)


def _held_out(asked: Asked) -> Found:
    strategy = asked.settings.get("eval_strategy", "no")
    name = asked.settings.get("dataset_name")
    if strategy in ("no", False) or not name:
        return Found(note="read only where it evaluates")
    return Found(settings={"data.validation": f"hub:{name}:{asked.value}"})


def _dtype(asked: Asked) -> Found:
    value = str(asked.value).removeprefix("torch.")
    if value == "float32" and asked.method != "full" and asked.settings.get("bf16") is not False:
        note = "TRL holds float32 and computes in bfloat16; what trains is float32"
        return Found(settings={"model.dtype": "bfloat16"}, note=note)
    if value in ("bfloat16", "float16", "float32"):
        return Found(settings={"model.dtype": value}, note="of the frozen weights; what trains is float32")
    return Found(
        settings={"model.dtype": "bfloat16"}, note="auto is the file's own number type, which most have in bfloat16"
    )


def _arithmetic(asked: Asked) -> Found:
    """With adapters the weights' own type counts, `dtype`; with all weights masters are float32."""
    if asked.method != "full":
        return Found(note="said by model.dtype: what is frozen keeps it, what trains is float32")
    return COMMON[asked.key](asked)


def _quantised(kind: str) -> Rule:
    return lambda asked: Found(settings={"model.quantisation": kind}) if is_on(asked.value) else Found(note="off")


_OFF = {
    "packing": "packing is for plain language models here (tasks/commonsense.py)",
    "padding_free": "rows are padded to the longest; data.share_pictures saves more",
    "eval_packing": "no packing",
    "pad_to_multiple_of": "rows are padded to the longest",
    "chat_template_path": "the base's own chat template; put the other one into its folder",
    "lora_target_parameters": "experts that are one tensor: adapter.targets: [experts]",
    "lora_task_type": "seen from the base",
    "trust_remote_code": "models are transformers' own code",
    "use_bnb_nested_quant": "nf4 has its scales quantised in any case",
    "activation_offloading": "training.gradient_checkpointing; training.deepspeed: zero3_offload",
    "eos_token": "the template's closing token",
    "pad_token": "the tokenizer's own",
    "dataset_kwargs": "rows are read by their own keys",
    "ignore_bias_buffers": "no buffers are shared",
    "gradient_checkpointing_kwargs": "checkpoints are not reentrant",
    "router_aux_loss_coef": "the loss is cross-entropy",
}
TABLE: Mapping[str, Rule] = {
    **COMMON,
    **{key: unless_empty(why) for key, why in _OFF.items()},
    "model_name_or_path": to("model.base"),
    "model_revision": to("model.revision"),
    "dtype": _dtype,
    "torch_dtype": _dtype,
    "bf16": _arithmetic,
    "fp16": _arithmetic,
    "attn_implementation": one_of(
        "model.attn_implementation",
        {name: name for name in ("sdpa", "flash_attention_2", "eager")},
        "sdpa, flash_attention_2 and eager are there",
    ),
    "use_peft": _method,
    "use_dora": _adapters_alone(lambda asked: Found(settings={"adapter.method": asked.method})),
    "lora_r": _adapters_alone(to("adapter.rank", whole)),
    "lora_alpha": _adapters_alone(to("adapter.alpha", number)),
    "lora_dropout": _adapters_alone(dropout),
    "lora_target_modules": _adapters_alone(_targets),
    "lora_modules_to_save": _adapters_alone(_saved),
    "use_rslora": _adapters_alone(scaling),
    "load_in_4bit": _quantised("nf4"),
    "load_in_8bit": _quantised("int8"),
    "bnb_4bit_quant_type": unless("nf4", "4 bits are nf4 here, or hqq"),
    "bnb_4bit_quant_storage": lost("packed weights are kept as bitsandbytes does"),
    "dataset_name": _file,
    "dataset_config": same("see dataset_name"),
    "dataset_train_split": same("said by data.train"),
    "dataset_test_split": _held_out,
    "dataset_streaming": lambda asked: (
        Found(settings={"data.streaming": True, "data.group_by_modality_length": False})
        if is_on(asked.value)
        else Found(note="read whole")
    ),
    "datasets": _files,
    "dataset_text_field": same("rows are read by their own keys"),
    "dataset_num_proc": same("samples are made as they are needed, by data.workers processes"),
    "max_length": to("data.max_tokens", whole, note="pictures are never cut"),
    "max_seq_length": to("data.max_tokens", whole, note="pictures are never cut"),
    "truncation_mode": unless("keep_start", "the end is cut"),
    "shuffle_dataset": same("samples come in a new order in every epoch"),
    "packing_strategy": same("no packing"),
    "assistant_only_loss": lambda asked: (
        Found(note="labels are on the answers alone")
        if is_on(asked.value)
        else Found(note="TRL labels the questions' tokens too; here labels are on the answers alone", is_lost=True)
    ),
    "completion_only_loss": same("labels are on the answers alone"),
    "loss_type": one_of(
        "optim.loss_normalisation", {"nll": "step_tokens", "chunked_nll": "step_tokens"}, "cross-entropy alone"
    ),
    "model_init_kwargs": lost("model.dtype, model.attn_implementation and model.revision say what there is"),
}

TRL = Tool(
    name=NAME,
    table=TABLE,
    otherwise=otherwise(NAME),
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
    always={
        "(loss)": Found(settings={"optim.loss_normalisation": "step_tokens"}, note="one mean over the step's tokens"),
        "(decay)": Found(
            settings={"optim.weight_decay_on": "all_but_biases"}, note="magnitudes decay as all else does"
        ),
    },
    needed={"model.base": "BASE", "data.train": "train.json", "training.output_dir": "runs/translated"},
)
