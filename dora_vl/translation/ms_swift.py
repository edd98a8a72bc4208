"""ms-swift's `swift sft`: its YAML, or a script's command line.

Names and defaults: `swift/arguments` of ms-swift 4.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dora_vl.core.config import Method
from dora_vl.errors import UserError, shown
from dora_vl.translation.ms_swift_others import ELSEWHERE, OFF, SAME
from dora_vl.translation.peft_adapter import dropout, modules_to_save, scaling, start, unless_empty
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
from dora_vl.translation.target_patterns import globs_of_endings, globs_of_expression
from dora_vl.translation.training_arguments import COMMON, otherwise

NAME = "ms-swift"
METHOD_KEYS = ("tuner_type", "train_type")
LONGEST = 32768
PIXELS = "the base's own processor has the limits (preprocessor_config.json)"


def method(settings: Mapping[str, Any]) -> Method:
    """`full`, or LoRA with or without DoRA."""
    kind = next((settings[key] for key in METHOD_KEYS if settings.get(key)), "lora")
    if kind == "full":
        return "full"
    return "dora" if is_on(settings["use_dora"]) else "lora"


def _kind(asked: Asked) -> Found:
    if asked.value not in ("lora", "full"):
        raise UserError(f"{asked.file}: {asked.key} is {shown(asked.value)}; lora and full have a counterpart")
    return Found(settings={"adapter.method": asked.method})


def _stage(asked: Asked) -> Found:
    raise UserError(
        f"{asked.file}: {asked.key} is {shown(asked.value)}; supervised fine-tuning alone has a counterpart"
    )


def _adapters_alone(rule: Rule) -> Rule:
    return lambda asked: Found(note="not read by full") if asked.method == "full" else rule(asked)


def _free(asked: Asked) -> dict[str, bool]:
    """Which places of the model train."""
    usual = {"freeze_llm": False, "freeze_vit": True, "freeze_aligner": True}
    return {name: not (usual[name] if (value := asked.settings.get(name)) is None else is_on(value)) for name in usual}


def _targets(asked: Asked) -> Found:
    if asked.settings.get("target_regex"):
        return Found(note="target_regex wins over it")
    names, free = words(asked), _free(asked)
    if "all-linear" not in names:
        return Found(settings={"adapter.targets": globs_of_endings(names)})
    places = {"language": "freeze_llm", "vision": "freeze_vit", "projector": "freeze_aligner"}
    return Found(settings={"adapter.targets": [place for place, key in places.items() if free[key]]})


def _expression(asked: Asked) -> Found:
    try:
        return Found(settings={"adapter.targets": globs_of_expression(str(asked.value))})
    except ValueError as error:
        return Found(note=f"{error} has no counterpart among patterns; write adapter.targets", is_lost=True)


def _frozen(asked: Asked) -> Found:
    if asked.method != "full" or asked.key != "freeze_llm":
        return Found(note="said by adapter.targets")
    free = _free(asked)
    chosen = ["model.language_model*", "lm_head"] if free["freeze_llm"] else []
    chosen += ["vision"] if free["freeze_vit"] else []
    return Found(settings={"adapter.targets": chosen + (["projector"] if free["freeze_aligner"] else [])})


def _saved(asked: Asked) -> Found:
    if asked.method == "full":
        return Found(note="said by adapter.targets")
    return modules_to_save(replace(asked, value=words(asked) if asked.value else []))


def _rate(part: str) -> Rule:
    """A rate of a place of its own; ours are by the part that trains."""

    def rule(asked: Asked) -> Found:
        return Found(
            note=f"make the place a part of its own, with its rate: adapter.parts.{part}, optim.rates.{part}",
            is_lost=True,
        )

    return rule


def _train(asked: Asked) -> Found:
    """`dataset`: files, or ids, each perhaps with `#N` behind it."""
    return _data(asked, "data.train")


def _validation(asked: Asked) -> Found:
    return _data(asked, "data.validation")


def _data(asked: Asked, name: str) -> Found:
    given = [asked.value] if isinstance(asked.value, str) else asked.value
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise UserError(f"{asked.file}: {asked.key} is {shown(asked.value)}, no list of names")
    found = [_place(one) for one in given]
    counts = [one for one in given if "#" in one]
    note = f"{', '.join(counts)}: so many samples; data.limit takes the first of each file" if counts else ""
    if name == "data.validation" and len(found) > 1:
        return Found(note="one file of validation samples; put them together", is_lost=True)
    return Found(settings={name: found[0] if len(found) == 1 else found}, note=note)


def _place(name: str) -> str:
    """A file as it is; an id, with its hub and its count taken off, as `hub:OWNER/NAME`."""
    name = name.partition("#")[0]
    if name.rpartition(".")[2] in ("json", "jsonl", "csv", "parquet", "arrow", "tsv") or name.startswith(("/", ".")):
        return name
    return f"hub:{name.removeprefix('HF::').removeprefix('MS::').partition(':')[0]}"


def _share(asked: Asked) -> Found:
    if number(asked) <= 0:
        return Found(note="none is held out")
    return Found(settings={"data.validation_share": number(asked)}, note="whole pictures at a time")


def _accumulated(asked: Asked) -> Found:
    """Without it ms-swift makes a step of at least 16 samples, of all GPUs."""
    if asked.value != "":
        return Found(settings={"training.gradient_accumulation_steps": whole(asked)})
    each = int(asked.settings.get("per_device_train_batch_size") or 1)
    ranks = int(asked.settings.get("NPROC_PER_NODE") or 1)
    steps = -(-16 // (each * ranks))
    return Found(settings={"training.gradient_accumulation_steps": steps}, note=f"16 samples a step on {ranks} GPU")


def _learning_rate(asked: Asked) -> Found:
    value = (1e-5 if asked.method == "full" else 1e-4) if asked.value == "" else number(asked)
    return Found(settings={"training.learning_rate": float(value)})


def _dtype(asked: Asked) -> Found:
    value = str(asked.value).removeprefix("torch.")
    value = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(value, value)
    if value not in ("bfloat16", "float16", "float32"):
        return Found(note="bfloat16, float16 and float32 are there", is_lost=True)
    settings: dict[str, Any] = {"model.dtype": value}
    if asked.method == "full" and value != "float32":
        settings |= {f"training.{'bf16' if value == 'bfloat16' else 'fp16'}": True}
    return Found(settings=settings)


def _quantised(asked: Asked) -> Found:
    kind = str(asked.settings.get("quant_method") or "bnb")
    found = {("bnb", 4): "nf4", ("bnb", 8): "int8", ("hqq", 4): "hqq"}.get((kind, whole(asked)))
    if found is None:
        return Found(note=f"{kind} of {asked.value} bits; there are nf4, int8 and hqq (4 bits)", is_lost=True)
    return Found(settings={"model.quantisation": found})


def _length(asked: Asked) -> Found:
    if asked.value == "":
        return Found(settings={"data.max_tokens": LONGEST}, note="the model's own length, which cuts before that")
    return Found(settings={"data.max_tokens": whole(asked)}, note="pictures are never cut")


TABLE: Mapping[str, Rule] = {
    **COMMON,
    **{key: unless_empty(why) for key, why in OFF.items()},
    **{key: same(why) for key, why in SAME.items()},
    "model": to("model.base"),
    "model_revision": to("model.revision"),
    "torch_dtype": _dtype,
    "attn_impl": one_of(
        "model.attn_implementation",
        {"sdpa": "sdpa", "eager": "eager", "flash_attn": "flash_attention_2", "flash_attention_2": "flash_attention_2"},
        "sdpa, flash_attention_2 and eager are there",
    ),
    "rlhf_type": _stage,
    "task_type": lambda asked: Found(note="answers are text") if asked.value == "causal_lm" else _stage(asked),
    "tuner_type": _kind,
    "train_type": _kind,
    "use_dora": _adapters_alone(lambda asked: Found(settings={"adapter.method": asked.method})),
    "lora_rank": _adapters_alone(to("adapter.rank", whole)),
    "lora_alpha": _adapters_alone(to("adapter.alpha", number)),
    "lora_dropout": _adapters_alone(dropout),
    "use_rslora": _adapters_alone(scaling),
    "lorap_lr_ratio": _adapters_alone(to("optim.b_learning_rate_ratio", number)),
    "lora_bias": unless("none", "biases do not train beside adapters; adapter.also_train names parameters"),
    "lora_dtype": same("what trains is float32"),
    "init_weights": _adapters_alone(start),
    "target_modules": _adapters_alone(_targets),
    "target_regex": _adapters_alone(_expression),
    "target_parameters": unless_empty("experts that are one tensor: adapter.targets: [experts]"),
    "modules_to_save": _saved,
    "freeze_llm": _frozen,
    "freeze_vit": _frozen,
    "freeze_aligner": _frozen,
    "vit_lr": _rate("vision"),
    "aligner_lr": _rate("projector"),
    "adapters": to("adapter.initial", lambda asked: asked.value[0] if isinstance(asked.value, list) else asked.value),
    "dataset": _train,
    "val_dataset": _validation,
    "split_dataset_ratio": _share,
    "max_length": _length,
    "truncation_strategy": unless(
        "right", "here the end of a text that is too long is cut, pictures never, and counted"
    ),
    "template": same("the base's own chat template; compare with dora-vl show batch"),
    "max_pixels": lost(PIXELS),
    "MAX_PIXELS": lost(PIXELS),
    "IMAGE_MAX_TOKEN_NUM": lost(PIXELS),
    "VIDEO_MAX_PIXELS": lost(PIXELS),
    "VIDEO_MAX_TOKEN_NUM": lost(PIXELS),
    "FPS_MAX_FRAMES": to("data.video_frames", whole),
    "FPS": to("data.video_fps", number),
    "ROOT_IMAGE_DIR": to("data.image_folder"),
    "NFRAMES": to("data.video_frames", whole),
    "loss_scale": unless("default", "labels are on the answers alone, all alike"),
    "quant_bits": _quantised,
    "streaming": lambda asked: (
        Found(settings={"data.streaming": True, "data.group_by_modality_length": False})
        if is_on(asked.value)
        else Found(note="read whole")
    ),
    "shuffle_buffer_size": to("data.shuffle_buffer", whole),
    "strict": lost("data.max_bad_share: how many bad samples are passed over"),
    "learning_rate": _learning_rate,
    "gradient_accumulation_steps": _accumulated,
    "vit_gradient_checkpointing": lost("training.gradient_checkpointing is for the whole model"),
}

MS_SWIFT = Tool(
    name=NAME,
    table=TABLE,
    otherwise=otherwise(NAME, ELSEWHERE),
    method=method,
    defaults={
        "use_dora": False,
        "lora_rank": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": "all-linear",
        "modules_to_save": [],
        "torch_dtype": "bfloat16",
        "learning_rate": "",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": "",
        "gradient_checkpointing": True,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_length": "",
        "truncation_strategy": "delete",
        "dataloader_num_workers": 1,
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
