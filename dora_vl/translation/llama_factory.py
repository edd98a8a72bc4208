"""LLaMA-Factory's YAML: what `llamafactory-cli train` takes for supervised fine-tuning.

Names and defaults: `src/llamafactory/hparams` of 0.9.5. Its data files are named in `dataset_info.json`
(`llama_factory_data`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dora_vl.core.config import Method
from dora_vl.errors import UserError, shown
from dora_vl.translation.llama_factory_data import dataset, eval_dataset, media_folder
from dora_vl.translation.llama_factory_others import ELSEWHERE, OFF, PIXELS, SAME
from dora_vl.translation.peft_adapter import dropout, scaling, unless_empty
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
from dora_vl.translation.target_patterns import globs_of_endings
from dora_vl.translation.training_arguments import COMMON, otherwise

NAME = "LLaMA-Factory"
LLAVA_TEMPLATES: Mapping[str, str] = {"llava": "vicuna_v1", "vicuna": "vicuna_v1"}
TEMPLATES_OF_LLAVA = ("llava-1.5", "llava_1.5", "llava-v1.5")
OTHER_STAGES = "another stage"


def method(settings: Mapping[str, Any]) -> Method:
    """`full`, or LoRA with or without DoRA."""
    if settings["finetuning_type"] == "full":
        return "full"
    return "dora" if is_on(settings["use_dora"]) else "lora"


def _stage(asked: Asked) -> Found:
    if asked.value != "sft":
        raise UserError(
            f"{asked.file}: stage is {shown(asked.value)}; supervised fine-tuning alone (sft) has a counterpart"
        )
    return Found(note="supervised fine-tuning")


def _method(asked: Asked) -> Found:
    if asked.value not in ("lora", "full"):
        raise UserError(f"{asked.file}: finetuning_type is {shown(asked.value)}; lora and full have a counterpart")
    return Found(settings={"adapter.method": asked.method})


def _freezes(asked: Asked, name: str, *, usual: bool) -> bool:
    value = asked.settings.get(name)
    return usual if value is None else is_on(value)


def _targets(asked: Asked) -> Found:
    """Of a model with pictures: the parts that are not frozen; its projector is never a LoRA's target by `all`."""
    if asked.method == "full":
        return Found(note="not read by full")
    names = words(asked)
    language = not _freezes(asked, "freeze_language_model", usual=False)
    vision = not _freezes(asked, "freeze_vision_tower", usual=True)
    if names == ["all"]:
        chosen = [name for name, wanted in (("language", language), ("vision", vision)) if wanted]
        return Found(settings={"adapter.targets": chosen})
    if vision and language:
        return Found(settings={"adapter.targets": globs_of_endings(names)})
    where = "*language_model*" if language else "*vis*"
    note = "of the language model alone: the tower is frozen" if language else "of the tower alone"
    return Found(settings={"adapter.targets": [f"{where}.{name}" for name in names]}, note=note)


def _frozen(asked: Asked) -> Found:
    """Said by the targets of an adapter; of all weights by what is listed."""
    if asked.method != "full":
        return Found(note="said by adapter.targets")
    if asked.key != "freeze_vision_tower":
        return Found(note="said by adapter.targets")
    chosen = [] if _freezes(asked, "freeze_language_model", usual=False) else ["model.language_model*", "lm_head"]
    chosen += [] if _freezes(asked, "freeze_vision_tower", usual=True) else ["vision"]
    chosen += [] if _freezes(asked, "freeze_multi_modal_projector", usual=True) else ["projector"]
    return Found(settings={"adapter.targets": chosen})


def _projector(asked: Asked) -> Found:
    if asked.method == "full":
        return Found(note="said by adapter.targets")
    also = str(asked.settings.get("additional_target") or "").split(",")
    if any("projector" in one or one in ("merger", "connector") for one in also):
        return Found(note="said by additional_target")
    return Found(settings={"adapter.train_projector": False}, note="LoRA leaves it as it is, frozen or not")


def _additional(asked: Asked) -> Found:
    names = words(asked)
    projectors = [one for one in names if "projector" in one or one in ("merger", "connector")]
    others = {one.rpartition(".")[2]: [f"*{one}.*"] for one in names if one not in projectors}
    settings: dict[str, Any] = {"adapter.train_projector": True} if projectors else {}
    return Found(settings={**settings, **({"adapter.also_train": others} if others else {})}, note="whole")


def _alpha(asked: Asked) -> Found:
    if asked.method == "full":
        return Found(note="not read by full")
    twice = 2 * whole(replace(asked, key="lora_rank", value=asked.settings["lora_rank"]))
    value = twice if asked.value == "" else number(asked)
    return Found(settings={"adapter.alpha": float(value)}, note="twice the rank" if asked.value == "" else "")


def _adapters_alone(rule: Rule) -> Rule:
    return lambda asked: Found(note="not read by full") if asked.method == "full" else rule(asked)


def _template(asked: Asked) -> Found:
    base = str(asked.settings.get("model_name_or_path", "")).lower()
    if any(part in base for part in TEMPLATES_OF_LLAVA):
        if asked.value in LLAVA_TEMPLATES:
            return Found(settings={"model.template": LLAVA_TEMPLATES[asked.value]})
        return Found(note="formats of a LLaVA-1.5 are listed in docs/training.md", is_lost=True)
    return Found(note="the base's own chat template; compare with dora-vl show batch")


def _quantised(asked: Asked) -> Found:
    kind = str(asked.settings.get("quantization_method") or "bnb").lower()
    found = {("bnb", 4): "nf4", ("bnb", 8): "int8", ("hqq", 4): "hqq", ("bitsandbytes", 4): "nf4"}.get(
        (kind, whole(asked))
    )
    if found is None:
        return Found(note=f"{kind} of {asked.value} bits; there are nf4, int8 and hqq (4 bits)", is_lost=True)
    return Found(settings={"model.quantisation": found})


def _validation_share(asked: Asked) -> Found:
    value = number(asked)
    if value <= 0:
        return Found(note="none is held out")
    if value < 1:
        return Found(settings={"data.validation_share": value}, note="whole pictures at a time")
    return Found(settings={"data.validation_size": int(value)})


def _streaming(asked: Asked) -> Found:
    if not is_on(asked.value):
        return Found(note="read whole")
    return Found(settings={"data.streaming": True, "data.group_by_modality_length": False})


def _pissa(asked: Asked) -> Found:
    return Found(settings={"adapter.init": "pissa"}) if is_on(asked.value) else Found(note="off")


def _checkpointing(asked: Asked) -> Found:
    return Found(settings={"training.gradient_checkpointing": not is_on(asked.value)}, note="on unless it is disabled")


def _pure_bf16(asked: Asked) -> Found:
    if not is_on(asked.value):
        return Found(note="off")
    return Found(settings={"model.dtype": "bfloat16"}, note="what trains is float32 all the same")


TABLE: Mapping[str, Rule] = {
    **COMMON,
    **{key: unless_empty(why) for key, why in OFF.items()},
    **{key: same(why) for key, why in SAME.items()},
    "stage": _stage,
    "finetuning_type": _method,
    "use_dora": _adapters_alone(lambda asked: Found(settings={"adapter.method": asked.method})),
    "lora_rank": _adapters_alone(to("adapter.rank", whole)),
    "lora_alpha": _alpha,
    "lora_dropout": _adapters_alone(dropout),
    "lora_target": _targets,
    "use_rslora": _adapters_alone(scaling),
    "loraplus_lr_ratio": _adapters_alone(to("optim.b_learning_rate_ratio", number)),
    "pissa_init": _adapters_alone(_pissa),
    "additional_target": _additional,
    "freeze_vision_tower": _frozen,
    "freeze_language_model": _frozen,
    "freeze_multi_modal_projector": _projector,
    "pure_bf16": _pure_bf16,
    "model_name_or_path": to("model.base"),
    "model_revision": to("model.revision"),
    "adapter_name_or_path": to("adapter.initial", note="a folder of PEFT's with the same rank and layers"),
    "flash_attn": one_of(
        "model.attn_implementation",
        {
            "auto": "sdpa",
            "sdpa": "sdpa",
            "fa2": "flash_attention_2",
            "disabled": "eager",
            "off": "eager",
            False: "eager",
        },
        "sdpa, flash_attention_2 and eager are there",
    ),
    "disable_gradient_checkpointing": _checkpointing,
    "quantization_bit": _quantised,
    "template": _template,
    "dataset": dataset,
    "dataset_dir": same("said by data.train"),
    "media_dir": media_folder,
    "eval_dataset": eval_dataset,
    "val_size": _validation_share,
    "cutoff_len": to("data.max_tokens", whole, note="here the end is cut, there questions and answers in proportion"),
    "max_samples": to("data.limit", whole, note="of each file, as there"),
    "streaming": _streaming,
    "buffer_size": to("data.shuffle_buffer", whole),
    "interleave_probs": lost("weights say how often an epoch sees each sample: data.train with {path, weight}"),
    "mix_strategy": unless("concat", "files are mixed by weights: data.train with {path, weight}"),
    "image_max_pixels": lost(PIXELS),
    "image_min_pixels": lost(PIXELS),
    "video_max_pixels": lost(PIXELS),
    "video_min_pixels": lost(PIXELS),
    "video_fps": to("data.video_fps", number),
    "video_maxlen": to("data.video_frames", whole),
    "cache_dir": lost("the environment's HF_HOME"),
    "hf_hub_token": lost("the environment's HF_TOKEN"),
    "neftune_noise_alpha": unless_empty("adapter.dropout"),
    "ddp_timeout": to("training.ddp_timeout", whole),
}

LLAMA_FACTORY = Tool(
    name=NAME,
    table=TABLE,
    otherwise=otherwise(NAME, ELSEWHERE),
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
    always={
        "(loss)": Found(settings={"optim.loss_normalisation": "micro_batch"}, note="the mean of each micro-batch"),
        "(decay)": Found(
            settings={"optim.weight_decay_on": "all_but_biases"}, note="magnitudes decay as all else does"
        ),
    },
    needed={"model.base": "BASE", "data.train": "train.json", "training.output_dir": "runs/translated"},
)
