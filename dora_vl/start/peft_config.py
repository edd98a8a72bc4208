"""PEFT's `adapter_config.json`: where an adapter goes and what it is, as an `adapter:` section.

Names and defaults: `LoraConfig` of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dora_vl.core.config import Method
from dora_vl.errors import UserError
from dora_vl.start.rules import Counterpart, Rule, Setting, Tool, is_on, number, same, to, unless, unless_off, whole
from dora_vl.start.tool_rules import STARTS, by_pattern, dropout, modules_to_save, scaling, start, targets, which_method


def method(settings: Mapping[str, Any]) -> Method:
    """LoRA, or DoRA."""
    return "dora" if is_on(settings.get("use_dora")) else "lora"


def _kind(setting: Setting) -> Counterpart:
    if setting.value != "LORA":
        raise UserError(
            f"{setting.file}: peft_type is {setting.value}; only LORA (with or without DoRA) has a counterpart"
        )
    return Counterpart(note="said by adapter.method")


OF_THE_FILE = ("fan_in_fan_out", "task_type", "inference_mode", "peft_version", "auto_mapping", "runtime_config",
               "megatron_core", "qalora_group_size")  # fmt: skip
OWN_STARTS = ("loftq_config", "corda_config", "eva_config", "lora_ga_config")
TABLE: Mapping[str, Rule] = {
    "peft_type": _kind,
    "use_dora": which_method,
    "r": to("adapter.rank", whole),
    "lora_alpha": to("adapter.alpha", number),
    "lora_dropout": dropout,
    "use_rslora": scaling,
    "target_modules": targets,
    "exclude_modules": unless_off("only layers that a pattern names are adapted; leave out by not naming"),
    "rank_pattern": by_pattern("rank_pattern"),
    "alpha_pattern": by_pattern("alpha_pattern"),
    "modules_to_save": modules_to_save,
    "init_lora_weights": start,
    "base_model_name_or_path": to("model.base"),
    "revision": to("model.revision"),
    "bias": unless("none", "biases do not train beside adapters; adapter.also_train names parameters"),
    "layers_to_transform": unless_off("write the layers' numbers into adapter.targets: *.layers.[0-3].*.q_proj"),
    "target_parameters": unless_off("experts that are one tensor: adapter.targets: [experts]"),
    "lora_bias": unless_off("adapters have no bias of their own"),
    "trainable_token_indices": unless_off("adapter.also_train trains an embedding whole"),
    **{name: same("of the file, or seen from the base") for name in OF_THE_FILE},
    **{name: unless_off(STARTS) for name in OWN_STARTS},
}

PEFT = Tool(
    name="PEFT",
    table=TABLE,
    otherwise=unless_off("no counterpart among adapters here"),
    method=method,
    defaults={
        "use_dora": False,
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "modules_to_save": [],
        "init_lora_weights": True,
    },
)
