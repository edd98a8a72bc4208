"""What the settings of TRL, ms-swift, LLaVA's scripts and PEFT's `adapter_config.json` are here: a table each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from dora_vl.core.config import Method
from dora_vl.errors import UserError
from dora_vl.start import tool_rules as shared
from dora_vl.start.llama_factory import LLAMA_FACTORY
from dora_vl.start.rules import (
    Counterpart,
    Rule,
    Setting,
    Tool,
    globs_of_endings,
    is_on,
    lost,
    missing,
    of_adapters,
    one_of,
    only,
    same,
    switch,
    to,
    unless,
    unless_off,
    where_on,
)

# -- TRL's `trl sft`: `ScriptArguments`, `SFTConfig` and `ModelConfig` of TRL 1.16 ---------------------------------


def _trl_method(setting: Setting) -> Counterpart:
    if setting.method != "full":
        return shared.which_method(setting)
    settings = {"adapter.method": "full", "adapter.targets": [*shared.DECODER, "vision", "projector"]}
    return Counterpart(settings, "all weights train")


def _trl_targets(setting: Setting) -> Counterpart:
    if setting.value == "" and setting.method != "full":
        return missing("PEFT chooses by the model's type; here the language model's linears are taken: name them to be "
                       "sure")  # fmt: skip
    value = setting.value.split(",") if isinstance(setting.value, str) and "," in setting.value else setting.value
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    is_name = isinstance(value, str) and value.lower() != "all-linear" and value.replace("_", "").isalnum()
    return shared.targets(replace(setting, value=[value] if is_name else value))


def _trl_file(setting: Setting) -> Counterpart:
    if setting.settings.get("dataset_config"):
        return missing("a configuration of a set: `dora-vl prepare hugging-face` takes one (--set config=...)")
    split = setting.settings.get("dataset_train_split") or "train"
    return Counterpart({"data.train": shared.hub(str(setting.value), split)})


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


def _trl_held_out(setting: Setting) -> Counterpart:
    name = setting.settings.get("dataset_name")
    if setting.settings.get("eval_strategy", "no") in ("no", False) or not name:
        return Counterpart(note="read only where it evaluates")
    return Counterpart({"data.validation": f"hub:{name}:{setting.value}"})


def _trl_dtype(setting: Setting) -> Counterpart:
    value = str(setting.value).removeprefix("torch.")
    if value == "float32" and setting.method != "full" and setting.settings.get("bf16") is not False:
        note = "TRL holds float32 and computes in bfloat16; what trains is float32"
        return Counterpart({"model.dtype": "bfloat16"}, note)
    if value in ("bfloat16", "float16", "float32"):
        return Counterpart({"model.dtype": value}, "of the frozen weights; what trains is float32")
    note = "auto is the file's own number type, which most have in bfloat16"
    return Counterpart({"model.dtype": "bfloat16"}, note)


def _trl_arithmetic(setting: Setting) -> Counterpart:
    """With adapters the weights' own type counts, `dtype`; with all weights masters are float32."""
    if setting.method != "full":
        return Counterpart(note="said by model.dtype: what is frozen keeps it, what trains is float32")
    return shared.COMMON[setting.key](setting)


def _trl_labels(setting: Setting) -> Counterpart:
    if setting.is_on:
        return Counterpart(note=shared.ON_ANSWERS)
    return missing(f"TRL labels the questions' tokens too; here {shared.ON_ANSWERS}")


TRL_DEFAULTS: Mapping[str, Any] = {
    "use_peft": False, "use_dora": False, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05,
    "lora_target_modules": "", "lora_modules_to_save": [], "dtype": "float32", "learning_rate": 2e-5,
    "gradient_checkpointing": True, "max_length": 1024, "assistant_only_loss": False, "dataloader_num_workers": 0,
    "train_sampling_strategy": "random",
}  # fmt: skip
TRL = Tool(
    name="TRL",
    method=lambda settings: shared.lora_or_dora(settings) if is_on(settings["use_peft"]) else "full",
    otherwise=shared.otherwise("TRL"),
    table={
        **shared.COMMON,
        "model_name_or_path": to("model.base"),
        "model_revision": to("model.revision"),
        **dict.fromkeys(("dtype", "torch_dtype"), _trl_dtype),
        **dict.fromkeys(("bf16", "fp16"), _trl_arithmetic),
        "attn_implementation": shared.attention(),
        "use_peft": _trl_method,
        "use_dora": _trl_method,
        "lora_r": to("adapter.rank"),
        "lora_alpha": to("adapter.alpha"),
        "lora_dropout": shared.dropout,
        "lora_target_modules": _trl_targets,
        "lora_modules_to_save": shared.modules_to_save,
        "use_rslora": shared.scaling,
        "load_in_4bit": where_on({"model.quantisation": "nf4"}),
        "load_in_8bit": where_on({"model.quantisation": "int8"}),
        "bnb_4bit_quant_type": unless("nf4", "4 bits are nf4 here, or hqq"),
        "use_bnb_nested_quant": same("nf4 has its scales quantised in any case"),
        "dataset_name": _trl_file,
        "dataset_config": same("see dataset_name"),
        "dataset_train_split": same("said by data.train"),
        "dataset_test_split": _trl_held_out,
        "dataset_streaming": shared.streaming,
        "datasets": _trl_files,
        "dataset_text_field": same("rows are read by their own keys"),
        **dict.fromkeys(("max_length", "max_seq_length"), to("data.max_tokens", note="pictures are never cut")),
        "truncation_mode": unless("keep_start", "the end is cut"),
        "assistant_only_loss": _trl_labels,
        "completion_only_loss": same(shared.ON_ANSWERS),
        "loss_type": one_of(
            "optim.loss_normalisation", dict.fromkeys(("nll", "chunked_nll"), "step_tokens"), "cross-entropy alone"
        ),
        "model_init_kwargs": lost("model.dtype, model.attn_implementation and model.revision say what there is"),
    },
    defaults=TRL_DEFAULTS,
    always={"(loss)": shared.STEP_TOKENS, "(decay)": shared.DECAY},
)

# -- ms-swift's `swift sft`: `swift/arguments` of ms-swift 4.6 -----------------------------------------------------

SWIFT_FREEZES: shared.Freezes = {
    "language": ("freeze_llm", False),
    "vision": ("freeze_vit", True),
    "projector": ("freeze_aligner", True),
}
FILE_ENDINGS = ("json", "jsonl", "csv", "parquet", "arrow", "tsv")
PIXEL_LIMITS = ("max_pixels", "MAX_PIXELS", "IMAGE_MAX_TOKEN_NUM", "VIDEO_MAX_PIXELS", "VIDEO_MAX_TOKEN_NUM")


def _swift_method(settings: Mapping[str, Any]) -> Method:
    kind = settings.get("tuner_type") or settings.get("train_type")
    return "full" if kind == "full" else shared.lora_or_dora(settings)


@of_adapters
def _swift_targets(setting: Setting) -> Counterpart:
    if setting.settings.get("target_regex"):
        return Counterpart(note="target_regex wins over it")
    if "all-linear" in setting.words:
        return Counterpart({"adapter.targets": shared.chosen_places(setting, SWIFT_FREEZES)})
    return Counterpart({"adapter.targets": globs_of_endings(setting.words)})


def _swift_rate(part: str) -> Rule:
    return lost(f"make the place a part of its own, with its rate: adapter.parts.{part}, optim.rates.{part}")


def _swift_data(name: str, setting: Setting) -> Counterpart:
    """Files as they are; ids, with their hub and their count (`#N`) taken off, as `hub:OWNER/NAME`."""
    given = [setting.value] if isinstance(setting.value, str) else setting.words
    paths = [
        path
        if (path := entry.partition("#")[0]).rpartition(".")[2] in FILE_ENDINGS or path.startswith(("/", "."))
        else f"hub:{path.removeprefix('HF::').removeprefix('MS::').partition(':')[0]}"
        for entry in given
    ]
    counts = [entry for entry in given if "#" in entry]
    note = f"{', '.join(counts)}: so many samples; data.limit takes the first of each file" if counts else ""
    return shared.sources(name, paths, note)


def _swift_accumulation(setting: Setting) -> Counterpart:
    """Without it ms-swift makes a step of at least 16 samples, of all GPUs."""
    if setting.value != "":
        return Counterpart({"training.gradient_accumulation_steps": setting.value})
    each = int(setting.settings.get("per_device_train_batch_size") or 1)
    ranks = int(setting.settings.get("NPROC_PER_NODE") or 1)
    settings = {"training.gradient_accumulation_steps": -(-16 // (each * ranks))}
    return Counterpart(settings, f"16 samples a step on {ranks} GPU")


def _swift_learning_rate(setting: Setting) -> Counterpart:
    usual = 1e-5 if setting.method == "full" else 1e-4
    return Counterpart({"training.learning_rate": usual if setting.value == "" else setting.number})


def _swift_dtype(setting: Setting) -> Counterpart:
    value = str(setting.value).removeprefix("torch.")
    value = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(value, value)
    if value not in ("bfloat16", "float16", "float32"):
        return missing("bfloat16, float16 and float32 are there")
    arithmetic = {"bfloat16": "bf16", "float16": "fp16"}.get(value) if setting.method == "full" else None
    return Counterpart({"model.dtype": value, **({f"training.{arithmetic}": True} if arithmetic else {})})


def _swift_length(setting: Setting) -> Counterpart:
    if setting.value == "":
        return Counterpart({"data.max_tokens": 32768}, "the model's own length, which cuts before that")
    return Counterpart({"data.max_tokens": setting.value}, "pictures are never cut")


MS_SWIFT_DEFAULTS: Mapping[str, Any] = {
    "use_dora": False, "lora_rank": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear",
    "modules_to_save": [], "torch_dtype": "bfloat16", "learning_rate": "", "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": "", "gradient_checkpointing": True, "lr_scheduler_type": "cosine",
    "weight_decay": 0.1, "adam_beta2": 0.95, "max_length": "", "truncation_strategy": "delete",
    "dataloader_num_workers": 1, "train_sampling_strategy": "random",
}  # fmt: skip
MS_SWIFT = Tool(
    name="ms-swift",
    method=_swift_method,
    otherwise=shared.otherwise("ms-swift"),
    table={
        **shared.COMMON,
        "model": to("model.base"),
        "model_revision": to("model.revision"),
        "torch_dtype": _swift_dtype,
        "attn_impl": shared.attention(flash_attn="flash_attention_2"),
        "rlhf_type": only((), same("")),
        "task_type": only(("causal_lm",), same("answers are text")),
        **dict.fromkeys(("tuner_type", "train_type"), only(("lora", "full"), shared.which_method)),
        "use_dora": shared.which_method,
        "lora_rank": to("adapter.rank"),
        "lora_alpha": to("adapter.alpha"),
        "lora_dropout": shared.dropout,
        "use_rslora": shared.scaling,
        "lorap_lr_ratio": to("optim.b_learning_rate_ratio"),
        "lora_bias": unless("none", shared.NO_BIASES),
        "lora_dtype": same("what trains is float32"),
        "init_weights": shared.start,
        "target_modules": _swift_targets,
        "target_regex": shared.expression,
        "modules_to_save": shared.modules_to_save,
        **{name: partial(shared.whole_places, freezes=SWIFT_FREEZES) for name, _ in SWIFT_FREEZES.values()},
        "vit_lr": _swift_rate("vision"),
        "aligner_lr": _swift_rate("projector"),
        "adapters": to(
            "adapter.initial", lambda setting: setting.value[0] if isinstance(setting.value, list) else setting.value
        ),
        "dataset": partial(_swift_data, "data.train"),
        "val_dataset": partial(_swift_data, "data.validation"),
        "split_dataset_ratio": shared.held_out_share,
        "max_length": _swift_length,
        "truncation_strategy": unless(
            "right", "here the end of a text that is too long is cut, pictures never, and counted"
        ),
        "template": same("the base's own chat template; compare with dora-vl show batch"),
        **dict.fromkeys(PIXEL_LIMITS, shared.PIXELS),
        **dict.fromkeys(("FPS_MAX_FRAMES", "NFRAMES"), to("data.video_frames")),
        "FPS": to("data.video_fps"),
        "ROOT_IMAGE_DIR": to("data.image_folder"),
        "loss_scale": unless("default", f"{shared.ON_ANSWERS}, all alike"),
        "quant_bits": shared.quantised("quant_method"),
        "quant_method": same("said by model.quantisation"),
        "streaming": shared.streaming,
        "shuffle_buffer_size": to("data.shuffle_buffer"),
        "strict": lost("data.max_bad_share: how many bad samples are passed over"),
        "learning_rate": _swift_learning_rate,
        "gradient_accumulation_steps": _swift_accumulation,
        **dict.fromkeys(("model_author", "model_name"), same("of self-cognition data alone")),
    },
    defaults=MS_SWIFT_DEFAULTS,
    always={"(loss)": shared.STEP_TOKENS, "(decay)": shared.DECAY},
)

# -- LLaVA's own scripts, and NVlabs' `train_mem_dora.py` with the same options: `llava/train/train.py` of c121f04 ---

HUB_NAMES = {f"llava-v1.5-{size}": f"llava-hf/llava-1.5-{size}-hf" for size in ("7b", "13b")}
"""Their checkpoints -> the same weights in transformers' format."""
FORMATS = (
    "vicuna_v1", "llava_v1", "v1_mmtag", "llama_2", "llava_llama_2", "mistral_instruct", "chatml_direct", "mpt", "v0",
    "v0_mmtag", "plain",
)  # fmt: skip
TEMPLATES = {name: name for name in FORMATS} | {
    "v1": "vicuna_v1",
    "llava_v1_mmtag": "v1_mmtag",
    "mistral_direct": "chatml_direct",
    "llava_v0": "v0",
    "llava_v0_mmtag": "v0_mmtag",
    "v0_plain": "plain",
}
PROJECTOR_ALONE = ("model.multi_modal_projector*",)


def _llava_method(settings: Mapping[str, Any]) -> Method:
    """An adapter where `lora_enable` is set; NVlabs' program sets `use_dora`."""
    return shared.lora_or_dora(settings) if is_on(settings.get("lora_enable")) else "full"


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


def _llava_base(setting: Setting) -> Counterpart:
    name = PurePosixPath(str(setting.value)).name
    if name in HUB_NAMES:
        return Counterpart({"model.base": HUB_NAMES[name]}, "the same weights in transformers' format")
    if "llava" in name.lower():
        return missing("a checkpoint in LLaVA's format; name one in transformers' (llava-hf/...)")
    folder = f"{setting.settings.get('output_dir', 'runs/llava')}-base"
    settings = {"model.compose.language_model": setting.value, "model.base": folder}
    return Counterpart(settings, "tower and language model are put together there by the first run")


def _if_composed(rule: Rule, note: str = "the base's") -> Rule:
    """For settings of a base that the run puts together; a published LLaVA has its own."""

    def checked(setting: Setting) -> Counterpart:
        name = PurePosixPath(str(setting.settings.get("model_name_or_path", ""))).name
        return Counterpart(note=note) if "llava" in name.lower() else rule(setting)

    return checked


def _llava_bits(setting: Setting) -> Counterpart:
    name = {4: "nf4", 8: "int8"}.get(int(setting.number))
    return Counterpart({"model.quantisation": name}) if name else Counterpart(note="not quantised")


LLAVA_DEFAULTS: Mapping[str, Any] = {
    "lora_enable": False, "lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.05, "version": "v0",
    "freeze_mm_mlp_adapter": False, "mm_vision_select_layer": -1, "mm_projector_type": "linear",
    "mm_use_im_patch_token": True, "image_aspect_ratio": "square", "group_by_modality_length": False,
    "model_max_length": 512, "optim": "adamw_torch", "bf16": False, "dataloader_num_workers": 0,
}  # fmt: skip
LLAVA = Tool(
    name="LLaVA",
    method=_llava_method,
    otherwise=shared.otherwise("LLaVA"),
    table={
        **shared.COMMON,
        **dict.fromkeys(("lora_enable", "use_dora"), _llava_what_trains),
        "lora_r": to("adapter.rank"),
        "lora_alpha": to("adapter.alpha"),
        "lora_dropout": to("adapter.dropout"),
        "lora_bias": unless("none", shared.NO_BIASES),
        "lora_weight_path": unless("", "adapter.initial takes an adapter folder"),
        "mm_projector_lr": to("optim.projector_learning_rate"),
        "tune_mm_mlp_adapter": same("said by adapter.targets"),
        "freeze_mm_mlp_adapter": of_adapters(
            to("adapter.train_projector", lambda setting: not setting.is_on), "said by adapter.targets"
        ),
        "freeze_backbone": same("said by adapter.method"),
        "model_name_or_path": _llava_base,
        "version": one_of("model.template", TEMPLATES, "no prompt format of this name; LLaVA takes vicuna_v1 for it"),
        "data_path": to("data.train"),
        "image_folder": to("data.image_folder"),
        "vision_tower": _if_composed(
            lambda setting: Counterpart(
                {"model.compose.vision_library": "transformers", "model.compose.vision_name": setting.value}
            ),
            "the base has its tower",
        ),
        "mm_vision_select_layer": _if_composed(to("model.compose.vision_layer")),
        "mm_vision_select_feature": unless("patch", "the class token is left out"),
        "mm_projector_type": _if_composed(unless("mlp2x_gelu", "a composed base has mlp2x_gelu, LLaVA-1.5's"), ""),
        "pretrain_mm_mlp_adapter": lost(
            "a .bin of the projector, which begins anew without it: train stage 1 here (llava/llava15, 7b_pretrain), "
            "set adapter.initial to its adapter folder"
        ),
        "mm_use_im_start_end": unless(False, "no tokens around a picture"),
        "mm_use_im_patch_token": unless(False, "it would add a token that is not used"),
        "mm_patch_merge_type": unless(
            "flat", "LLaVA-1.6's pictures: take a llava-hf base of it, through its own processor"
        ),
        "image_aspect_ratio": one_of(
            "model.image_aspect",
            {"pad": "pad", "square": "square"},
            "anyres is LLaVA-1.6's: take a llava-hf base of it",
        ),
        "image_grid_pinpoints": lost("LLaVA-1.6's; a llava-hf base of it has its own"),
        "is_multimodal": same("samples with pictures and without may be mixed"),
        "group_by_modality_length": switch("data.group_by_modality_length"),
        "model_max_length": to("data.max_tokens"),
        "bits": _llava_bits,
        "double_quant": unless(True, "nf4 here has its scales quantised"),
        "quant_type": unless("nf4", "4 bits are nf4 here, or hqq"),
        "mpt_attn_impl": lost("model.attn_implementation, for any language model"),
    },
    defaults=LLAVA_DEFAULTS,
    always={"(loss)": shared.MICRO_BATCH},
    needed={"model.base": "llava-hf/llava-1.5-7b-hf", "data.train": "train.json", "training.output_dir": "runs/llava"},
)

# -- PEFT's `adapter_config.json`: `LoraConfig` of PEFT 0.21 -------------------------------------------------------


OF_THE_FILE = (
    "fan_in_fan_out", "task_type", "inference_mode", "peft_version", "auto_mapping", "runtime_config",
    "megatron_core", "qalora_group_size",
)  # fmt: skip
OTHER_STARTS = ("loftq_config", "corda_config", "eva_config", "lora_ga_config")
PEFT_DEFAULTS: Mapping[str, Any] = {
    "use_dora": False, "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "modules_to_save": [],
    "init_lora_weights": True,
}  # fmt: skip
PEFT = Tool(
    name="PEFT",
    method=shared.lora_or_dora,
    otherwise=unless_off("no counterpart among adapters here"),
    table={
        "peft_type": only(("LORA",), same("said by adapter.method")),
        "use_dora": shared.which_method,
        "r": to("adapter.rank"),
        "lora_alpha": to("adapter.alpha"),
        "lora_dropout": shared.dropout,
        "use_rslora": shared.scaling,
        "target_modules": shared.targets,
        "exclude_modules": unless_off("only layers that a pattern names are adapted; leave out by not naming"),
        **dict.fromkeys(("rank_pattern", "alpha_pattern"), shared.by_pattern),
        "modules_to_save": shared.modules_to_save,
        "init_lora_weights": shared.start,
        "base_model_name_or_path": to("model.base"),
        "revision": to("model.revision"),
        "bias": unless("none", shared.NO_BIASES),
        "layers_to_transform": unless_off("write the layers' numbers into adapter.targets: *.layers.[0-3].*.q_proj"),
        "target_parameters": unless_off("experts that are one tensor: adapter.targets: [experts]"),
        "lora_bias": unless_off("adapters have no bias of their own"),
        "trainable_token_indices": unless_off("adapter.also_train trains an embedding whole"),
        **dict.fromkeys(OF_THE_FILE, same("of the file, or seen from the base")),
        **dict.fromkeys(OTHER_STARTS, unless_off(shared.STARTS)),
    },
    defaults=PEFT_DEFAULTS,
)
TOOLS: Mapping[str, Tool] = {
    "llama-factory": LLAMA_FACTORY,
    "trl": TRL,
    "ms-swift": MS_SWIFT,
    "llava": LLAVA,
    "peft": PEFT,
}
