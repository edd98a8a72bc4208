"""The `adapter:` section of a run as PEFT's `LoraConfig`, the content of an `adapter_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dora_vl.errors import UserError
from dora_vl.translation.own_settings import (
    LANGUAGE,
    OURS_ALONE,
    PRESETS,
    defaults,
    method,
    modules_of,
    projector_of,
    targets_of,
)
from dora_vl.translation.rules import Asked, Found, Rule, Tool, lost, number, to, whole
from dora_vl.translation.target_patterns import ALL_LINEAR, endings_of, expression_of

NAME = "PEFT"
KEPT = ("adapter.method", "adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.dropout_mode", "adapter.targets",
        "adapter.train_projector")  # fmt: skip
"""Of our defaults those that an adapter's configuration holds."""


def which_method(asked: Asked) -> Found:
    """DoRA or LoRA.

    Raises: UserError for the others.
    """
    if asked.value not in ("dora", "lora"):
        raise UserError(
            f"{asked.file}: adapter.method is {asked.value}, which {NAME} has not; dora and lora are both's"
        )
    return Found(settings={"peft_type": "LORA", "use_dora": asked.value == "dora"})


def dropout_mode(asked: Asked) -> Found:
    """PEFT's DoRA drops elements of the frozen product's input as well."""
    if asked.method != "dora" or not float(asked.settings["adapter.dropout"]) or asked.value == "whole_change":
        return Found(note="so there too")
    return Found(note="PEFT's DoRA drops the frozen product's input too (whole_change)", is_lost=True)


def target_modules(asked: Asked) -> Found:
    """A list of endings where the patterns are such, else one expression."""
    wanted = targets_of(asked)
    if wanted == [ALL_LINEAR]:
        return Found(settings={"target_modules": ALL_LINEAR})
    if wanted == ["language"]:
        return Found(settings={"target_modules": LANGUAGE}, note="the decoder's linears, in LLaMA's names")
    if presets := [one for one in wanted if one in PRESETS]:
        return Found(note=f"{', '.join(presets)}: PEFT knows no such places; write the layers' names", is_lost=True)
    endings = endings_of(wanted)
    return Found(settings={"target_modules": expression_of(wanted) if endings is None else endings})


def by_pattern(name: str) -> Rule:
    """`rank_pattern`, `alpha_pattern`: patterns as expressions."""

    def rule(asked: Asked) -> Found:
        made = {expression_of([glob.removeprefix("*.")]): value for glob, value in asked.value.items()}
        return Found(settings={name: made}) if made else Found(note="empty")

    return rule


def train_projector(asked: Asked) -> Found:
    """A module that trains whole."""
    if not asked.value:
        return Found(note="it trains nothing whole")
    name = projector_of(asked)
    if name is None:
        return Found(note="name the base's projector in modules_to_save", is_lost=True)
    return Found(settings={"modules_to_save": [name, *_whole(asked.settings.get("adapter.also_train") or {})]})


def _whole(also: Mapping[str, Any]) -> list[str]:
    return [name for globs in also.values() if (name := modules_of(globs)) is not None]


def also_train(asked: Asked) -> Found:
    """Further modules that train whole."""
    lost_parts = [part for part, globs in asked.value.items() if modules_of(globs) is None]
    if lost_parts:
        return Found(note=f"{', '.join(lost_parts)}: PEFT trains whole modules, not single parameters", is_lost=True)
    modules = _whole(asked.value)
    if asked.settings.get("adapter.train_projector") and (projector := projector_of(asked)) is not None:
        modules = [projector, *modules]
    return Found(settings={"modules_to_save": modules}) if modules else Found(note="none")


def start(asked: Asked) -> Found:
    """How A and B begin."""
    return Found(settings={"init_lora_weights": {"kaiming": True}.get(asked.value, asked.value)})


ADAPTER: Mapping[str, Rule] = {
    "adapter.method": which_method,
    "adapter.rank": to("r", whole),
    "adapter.alpha": to(
        "lora_alpha", lambda asked: int(number(asked)) if number(asked) == int(number(asked)) else number(asked)
    ),
    "adapter.dropout": to("lora_dropout", number),
    "adapter.dropout_mode": dropout_mode,
    "adapter.rank_scaling": to("use_rslora", lambda asked: asked.value == "sqrt"),
    "adapter.targets": target_modules,
    "adapter.rank_pattern": by_pattern("rank_pattern"),
    "adapter.alpha_pattern": by_pattern("alpha_pattern"),
    "adapter.train_projector": train_projector,
    "adapter.also_train": also_train,
    "adapter.init": start,
    "adapter.initial": lost("PeftModel.from_pretrained(base, FOLDER, is_trainable=True) opens that folder"),
}


def _of_the_run(asked: Asked) -> Found:
    return Found(note="of the run: an adapter's configuration does not hold it", is_lost=True)


TO_PEFT = Tool(
    name=NAME,
    table={**OURS_ALONE, **ADAPTER, "model.base": to("base_model_name_or_path"), "model.revision": to("revision")},
    otherwise=_of_the_run,
    method=method,
    defaults={name: value for name, value in defaults().items() if name in KEPT},
    always={
        "(bias)": Found(settings={"bias": "none"}, note="biases stay as they are"),
        "(layout)": Found(settings={"fan_in_fan_out": False}, note="linear layers of torch"),
        "(kind)": Found(settings={"task_type": None, "inference_mode": False}),
    },
)
