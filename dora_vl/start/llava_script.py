"""LLaVA's own scripts (`finetune_lora.sh`: `deepspeed llava/train/train_mem.py --lora_enable True ...`), and NVlabs'.

Names and defaults: `llava/train/train.py` of LLaVA c121f04. NVlabs' DoRA starts `train_mem_dora.py` with the same
options.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from dora_vl.core.config import Method
from dora_vl.errors import UserError
from dora_vl.start.rules import Counterpart, Rule, Setting, Tool, is_on, lost, number, one_of, same, to, unless, whole
from dora_vl.start.settings_file import PROGRAM
from dora_vl.start.tool_rules import COMMON, DECODER, MICRO_BATCH, adapters_alone, otherwise

HUB_NAMES: Mapping[str, str] = {
    "llava-v1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-v1.5-13b": "llava-hf/llava-1.5-13b-hf",
}
"""Their checkpoints -> the same weights in transformers' format."""
FORMATS = ("vicuna_v1", "llava_v1", "v1_mmtag", "llama_2", "llava_llama_2", "mistral_instruct", "chatml_direct", "mpt",
           "v0", "v0_mmtag", "plain")  # fmt: skip
TEMPLATES: Mapping[str, str] = {name: name for name in FORMATS} | {
    "v1": "vicuna_v1",
    "llava_v1_mmtag": "v1_mmtag",
    "mistral_direct": "chatml_direct",
    "llava_v0": "v0",
    "llava_v0_mmtag": "v0_mmtag",
    "v0_plain": "plain",
}
PROJECTOR_ALONE = ("model.multi_modal_projector*",)


def method(settings: Mapping[str, Any]) -> Method:
    """An adapter where `lora_enable` is set; NVlabs' program makes it a DoRA."""
    if not is_on(settings.get("lora_enable")):
        return "full"
    return "dora" if "dora" in str(settings.get(PROGRAM, "")) else "lora"


def _what_trains(setting: Setting) -> Counterpart:
    if setting.method != "full":
        return Counterpart(settings={"adapter.method": setting.method}, note="all linears of the language model")
    if is_on(setting.settings.get("tune_mm_mlp_adapter")):
        targets = PROJECTOR_ALONE
    elif is_on(setting.settings.get("freeze_backbone")):
        raise UserError(
            f"{setting.file}: freeze_backbone without tune_mm_mlp_adapter trains nothing that is known here"
        )
    else:
        targets = DECODER if is_on(setting.settings.get("freeze_mm_mlp_adapter")) else (*DECODER, *PROJECTOR_ALONE)
    return Counterpart(settings={"adapter.method": "full", "adapter.targets": list(targets)})


def _base(setting: Setting) -> Counterpart:
    name = PurePosixPath(str(setting.value)).name
    if name in HUB_NAMES:
        return Counterpart(settings={"model.base": HUB_NAMES[name]}, note="the same weights in transformers' format")
    if "llava" in name.lower():
        return Counterpart(
            note="a checkpoint in LLaVA's format; name one in transformers' (llava-hf/...)", is_lost=True
        )
    folder = f"{setting.settings.get('output_dir', 'runs/llava')}-base"
    settings = {"model.compose.language_model": setting.value, "model.base": folder}
    return Counterpart(settings=settings, note="tower and language model are put together there by the first run")


def _is_composed(setting: Setting) -> bool:
    return "llava" not in PurePosixPath(str(setting.settings.get("model_name_or_path", ""))).name.lower()


def _tower(setting: Setting) -> Counterpart:
    if not _is_composed(setting):
        return Counterpart(note="the base has its tower")
    return Counterpart(
        settings={"model.compose.vision_library": "transformers", "model.compose.vision_name": setting.value}
    )


def _layer(setting: Setting) -> Counterpart:
    return (
        Counterpart(settings={"model.compose.vision_layer": whole(setting)})
        if _is_composed(setting)
        else Counterpart(note="the base's")
    )


def _projector(setting: Setting) -> Counterpart:
    if setting.value == "mlp2x_gelu" or not _is_composed(setting):
        return Counterpart()
    return Counterpart(note="a composed base has mlp2x_gelu, LLaVA-1.5's", is_lost=True)


def _bits(setting: Setting) -> Counterpart:
    if whole(setting) in (4, 8):
        return Counterpart(settings={"model.quantisation": "nf4" if whole(setting) == 4 else "int8"})
    return Counterpart(note="not quantised")


def _train_projector(setting: Setting) -> Counterpart:
    if setting.method == "full":
        return Counterpart(note="said by adapter.targets")
    return Counterpart(settings={"adapter.train_projector": not is_on(setting.value)})


TABLE: Mapping[str, Rule] = {
    **COMMON,
    "lora_enable": _what_trains,
    "lora_r": adapters_alone(to("adapter.rank", whole)),
    "lora_alpha": adapters_alone(to("adapter.alpha", number)),
    "lora_dropout": adapters_alone(to("adapter.dropout", number)),
    "lora_bias": unless("none", "biases do not train beside adapters; adapter.also_train names parameters"),
    "lora_weight_path": unless("", "adapter.initial takes an adapter folder"),
    "mm_projector_lr": to("optim.projector_learning_rate", number),
    "tune_mm_mlp_adapter": same("said by adapter.targets"),
    "freeze_mm_mlp_adapter": _train_projector,
    "freeze_backbone": same("said by adapter.method"),
    "model_name_or_path": _base,
    "version": one_of("model.template", TEMPLATES, "no prompt format of this name; LLaVA takes vicuna_v1 for it"),
    "data_path": to("data.train"),
    "image_folder": to("data.image_folder"),
    "vision_tower": _tower,
    "mm_vision_select_layer": _layer,
    "mm_vision_select_feature": unless("patch", "the class token is left out"),
    "mm_projector_type": _projector,
    "pretrain_mm_mlp_adapter": lost(
        "a .bin of the projector, which begins anew without it: train stage 1 here (llava/llava15, 7b_pretrain), set "
        "adapter.initial to its adapter folder"
    ),
    "mm_use_im_start_end": unless(False, "no tokens around a picture"),
    "mm_use_im_patch_token": unless(False, "it would add a token that is not used"),
    "mm_patch_merge_type": unless(
        "flat", "LLaVA-1.6's pictures: take a llava-hf base of it, through its own processor"
    ),
    "image_aspect_ratio": one_of(
        "model.image_aspect", {"pad": "pad", "square": "square"}, "anyres is LLaVA-1.6's: take a llava-hf base of it"
    ),
    "image_grid_pinpoints": lost("LLaVA-1.6's; a llava-hf base of it has its own"),
    "is_multimodal": same("samples with pictures and without may be mixed"),
    "group_by_modality_length": to("data.group_by_modality_length", lambda setting: is_on(setting.value)),
    "model_max_length": to("data.max_tokens", whole),
    "bits": _bits,
    "double_quant": unless(True, "nf4 here has its scales quantised"),
    "quant_type": unless("nf4", "4 bits are nf4 here, or hqq"),
    "mpt_attn_impl": lost("model.attn_implementation, for any language model"),
}

LLAVA = Tool(
    name="LLaVA",
    table=TABLE,
    otherwise=otherwise("LLaVA"),
    method=method,
    defaults={
        "lora_enable": False,
        "lora_r": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "version": "v0",
        "freeze_mm_mlp_adapter": False,
        "mm_vision_select_layer": -1,
        "mm_projector_type": "linear",
        "mm_use_im_patch_token": True,
        "image_aspect_ratio": "square",
        "group_by_modality_length": False,
        "model_max_length": 512,
        "optim": "adamw_torch",
        "bf16": False,
        "dataloader_num_workers": 0,
    },
    always={"(loss)": MICRO_BATCH},
    needed={"model.base": "llava-hf/llava-1.5-7b-hf", "data.train": "train.json", "training.output_dir": "runs/llava"},
)
