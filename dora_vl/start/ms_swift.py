"""ms-swift's `swift sft`: its YAML, or a script's command line.

Names and defaults: `swift/arguments` of ms-swift 4.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from dora_vl.core.config import Method
from dora_vl.errors import UserError, shown
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
    whole,
    words,
)
from dora_vl.start.tool_rules import (
    ATTENTION,
    COMMON,
    DECAY,
    PIXELS,
    STEP_TOKENS,
    adapters_alone,
    chosen_places,
    dropout,
    expression,
    held_out_share,
    modules_to_save,
    otherwise,
    quantised,
    scaling,
    start,
    streaming,
    which_method,
    whole_places,
)

METHOD_KEYS = ("tuner_type", "train_type")
LONGEST = 32768
FREEZES = {"language": ("freeze_llm", False), "vision": ("freeze_vit", True), "projector": ("freeze_aligner", True)}
FILE_ENDINGS = ("json", "jsonl", "csv", "parquet", "arrow", "tsv")


def method(settings: Mapping[str, Any]) -> Method:
    """`full`, or LoRA with or without DoRA."""
    kind = next((settings[key] for key in METHOD_KEYS if settings.get(key)), "lora")
    if kind == "full":
        return "full"
    return "dora" if is_on(settings["use_dora"]) else "lora"


def _kind(setting: Setting) -> Counterpart:
    if setting.value not in ("lora", "full"):
        raise UserError(f"{setting.file}: {setting.key} is {shown(setting.value)}; lora and full have a counterpart")
    return which_method(setting)


def _stage(setting: Setting) -> Counterpart:
    if setting.key == "task_type" and setting.value == "causal_lm":
        return Counterpart(note="answers are text")
    raise UserError(
        f"{setting.file}: {setting.key} is {shown(setting.value)}; supervised fine-tuning alone has a counterpart"
    )


def _targets(setting: Setting) -> Counterpart:
    if setting.settings.get("target_regex"):
        return Counterpart(note="target_regex wins over it")
    names = words(setting)
    places = chosen_places(setting, FREEZES) if "all-linear" in names else globs_of_endings(names)
    return Counterpart(settings={"adapter.targets": places})


def _rate(part: str) -> Rule:
    """A rate of a place of its own; ours are by the part that trains."""
    return lost(f"make the place a part of its own, with its rate: adapter.parts.{part}, optim.rates.{part}")


def _data(name: str, setting: Setting) -> Counterpart:
    """Files, or ids, each perhaps with `#N` behind it."""
    given = [setting.value] if isinstance(setting.value, str) else setting.value
    if not isinstance(given, list) or not all(isinstance(entry, str) for entry in given):
        raise UserError(f"{setting.file}: {setting.key} is {shown(setting.value)}, no list of names")
    paths = [_path(entry) for entry in given]
    counts = [entry for entry in given if "#" in entry]
    note = f"{', '.join(counts)}: so many samples; data.limit takes the first of each file" if counts else ""
    if name == "data.validation" and len(paths) > 1:
        return Counterpart(note="one file of validation samples; put them together", is_lost=True)
    return Counterpart(settings={name: paths[0] if len(paths) == 1 else paths}, note=note)


def _path(name: str) -> str:
    """A file as it is; an id, with its hub and its count taken off, as `hub:OWNER/NAME`."""
    name = name.partition("#")[0]
    if name.rpartition(".")[2] in FILE_ENDINGS or name.startswith(("/", ".")):
        return name
    return f"hub:{name.removeprefix('HF::').removeprefix('MS::').partition(':')[0]}"


def _accumulation(setting: Setting) -> Counterpart:
    """Without it ms-swift makes a step of at least 16 samples, of all GPUs."""
    if setting.value != "":
        return Counterpart(settings={"training.gradient_accumulation_steps": whole(setting)})
    each = int(setting.settings.get("per_device_train_batch_size") or 1)
    ranks = int(setting.settings.get("NPROC_PER_NODE") or 1)
    settings = {"training.gradient_accumulation_steps": -(-16 // (each * ranks))}
    return Counterpart(settings=settings, note=f"16 samples a step on {ranks} GPU")


def _learning_rate(setting: Setting) -> Counterpart:
    value = (1e-5 if setting.method == "full" else 1e-4) if setting.value == "" else number(setting)
    return Counterpart(settings={"training.learning_rate": float(value)})


def _dtype(setting: Setting) -> Counterpart:
    value = str(setting.value).removeprefix("torch.")
    value = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(value, value)
    if value not in ("bfloat16", "float16", "float32"):
        return Counterpart(note="bfloat16, float16 and float32 are there", is_lost=True)
    settings: dict[str, Any] = {"model.dtype": value}
    if setting.method == "full" and value != "float32":
        settings |= {f"training.{'bf16' if value == 'bfloat16' else 'fp16'}": True}
    return Counterpart(settings=settings)


def _length(setting: Setting) -> Counterpart:
    if setting.value == "":
        note = "the model's own length, which cuts before that"
        return Counterpart(settings={"data.max_tokens": LONGEST}, note=note)
    return Counterpart(settings={"data.max_tokens": whole(setting)}, note="pictures are never cut")


_PLACES: Rule = partial(whole_places, freezes=FREEZES)
PIXEL_LIMITS = ("max_pixels", "MAX_PIXELS", "IMAGE_MAX_TOKEN_NUM", "VIDEO_MAX_PIXELS", "VIDEO_MAX_TOKEN_NUM")
TABLE: Mapping[str, Rule] = {
    **COMMON,
    "model": to("model.base"),
    "model_revision": to("model.revision"),
    "torch_dtype": _dtype,
    "attn_impl": one_of(
        "model.attn_implementation",
        {**ATTENTION, "flash_attn": "flash_attention_2"},
        f"there are {', '.join(ATTENTION)}",
    ),
    "rlhf_type": _stage,
    "task_type": _stage,
    "tuner_type": _kind,
    "train_type": _kind,
    "use_dora": adapters_alone(which_method),
    "lora_rank": adapters_alone(to("adapter.rank", whole)),
    "lora_alpha": adapters_alone(to("adapter.alpha", number)),
    "lora_dropout": adapters_alone(dropout),
    "use_rslora": adapters_alone(scaling),
    "lorap_lr_ratio": adapters_alone(to("optim.b_learning_rate_ratio", number)),
    "lora_bias": unless("none", "biases do not train beside adapters; adapter.also_train names parameters"),
    "lora_dtype": same("what trains is float32"),
    "init_weights": adapters_alone(start),
    "target_modules": adapters_alone(_targets),
    "target_regex": adapters_alone(expression),
    "modules_to_save": adapters_alone(modules_to_save),
    "freeze_llm": _PLACES,
    "freeze_vit": _PLACES,
    "freeze_aligner": _PLACES,
    "vit_lr": _rate("vision"),
    "aligner_lr": _rate("projector"),
    "adapters": to(
        "adapter.initial", lambda setting: setting.value[0] if isinstance(setting.value, list) else setting.value
    ),
    "dataset": partial(_data, "data.train"),
    "val_dataset": partial(_data, "data.validation"),
    "split_dataset_ratio": held_out_share,
    "max_length": _length,
    "truncation_strategy": unless(
        "right", "here the end of a text that is too long is cut, pictures never, and counted"
    ),
    "template": same("the base's own chat template; compare with dora-vl show batch"),
    **{name: lost(PIXELS) for name in PIXEL_LIMITS},
    "FPS_MAX_FRAMES": to("data.video_frames", whole),
    "NFRAMES": to("data.video_frames", whole),
    "FPS": to("data.video_fps", number),
    "ROOT_IMAGE_DIR": to("data.image_folder"),
    "loss_scale": unless("default", "labels are on the answers alone, all alike"),
    "quant_bits": quantised("quant_method"),
    "quant_method": same("said by model.quantisation"),
    "streaming": streaming,
    "shuffle_buffer_size": to("data.shuffle_buffer", whole),
    "strict": lost("data.max_bad_share: how many bad samples are passed over"),
    "learning_rate": _learning_rate,
    "gradient_accumulation_steps": _accumulation,
    "model_author": same("of self-cognition data alone"),
    "model_name": same("of self-cognition data alone"),
}

MS_SWIFT = Tool(
    name="ms-swift",
    table=TABLE,
    otherwise=otherwise("ms-swift"),
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
    always={"(loss)": STEP_TOKENS, "(decay)": DECAY},
)
