"""PEFT's `adapter_config.json`: where an adapter goes and what it is, as an `adapter:` section.

Names and defaults: `LoraConfig` of PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dora_vl.core.config import Method
from dora_vl.errors import UserError
from dora_vl.translation.rules import Asked, Found, Rule, Tool, is_on, number, same, to, unless, whole
from dora_vl.translation.target_patterns import ALL_LINEAR, globs_of_endings, globs_of_expression

NAME = "PEFT"
WITH_DORA = "dropout before the frozen product too, as PEFT's DoRA"


def method(settings: Mapping[str, Any]) -> Method:
    """LoRA, or DoRA."""
    return "dora" if is_on(settings.get("use_dora")) else "lora"


def targets(asked: Asked) -> Found:
    """`all-linear`, a list of endings, or an expression for whole names."""
    value = asked.value
    if isinstance(value, str) and value.lower() == ALL_LINEAR:
        return Found(settings={"adapter.targets": [ALL_LINEAR]})
    if isinstance(value, str):
        try:
            return Found(settings={"adapter.targets": globs_of_expression(value)})
        except ValueError as error:
            return Found(note=f"{error} has no counterpart among patterns; write adapter.targets", is_lost=True)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UserError(f"{asked.file}: {asked.key} is neither a list of names nor an expression")
    return Found(settings={"adapter.targets": globs_of_endings(sorted(value))})


def by_pattern(name: str) -> Rule:
    """`rank_pattern` and `alpha_pattern`: an expression at a name's end -> a number."""

    def rule(asked: Asked) -> Found:
        if not isinstance(asked.value, Mapping):
            raise UserError(f"{asked.file}: {asked.key} is no mapping of names to numbers")
        if not asked.value:
            return Found(note="empty")
        made: dict[str, Any] = {}
        for expression, value in asked.value.items():
            try:
                globs = globs_of_expression(expression.removeprefix("^"))
            except ValueError as error:
                return Found(note=f"{error} has no counterpart among patterns; write adapter.{name}", is_lost=True)
            made |= {glob if glob.startswith("*") else globs_of_endings([glob])[0]: value for glob in globs}
        return Found(settings={f"adapter.{name}": made})

    return rule


def modules_to_save(asked: Asked) -> Found:
    """Modules that train whole: the projector, and any others as parts of their names."""
    from dora_vl.backbones.families import PROJECTORS  # transformers: not before the file was read

    names = asked.value or []
    projectors = [one for one in names if one.rpartition(".")[2] in PROJECTORS]
    others = {one.rpartition(".")[2]: [f"*{one}.*"] for one in names if one not in projectors}
    settings: dict[str, Any] = {"adapter.train_projector": bool(projectors)}
    if others:
        settings["adapter.also_train"] = others
    return Found(settings=settings, note="none" if not names else "")


def dropout(asked: Asked) -> Found:
    """The probability, and with DoRA PEFT's place of it."""
    settings: dict[str, Any] = {"adapter.dropout": number(asked)}
    if asked.method != "dora" or not settings["adapter.dropout"]:
        return Found(settings=settings)
    return Found(settings={**settings, "adapter.dropout_mode": "whole_change"}, note=f"{WITH_DORA}; low_rank is faster")


def scaling(asked: Asked) -> Found:
    """rsLoRA."""
    return Found(settings={"adapter.rank_scaling": "sqrt" if is_on(asked.value) else "linear"})


def start(asked: Asked) -> Found:
    """How A and B begin."""
    from dora_vl.adapters.settings import STARTS_BESIDE_THE_BASE

    value = str(asked.value).lower()
    if value in ("true", "gaussian", "orthogonal"):
        return Found(settings={"adapter.init": {"true": "kaiming"}.get(value, value)})
    if value.startswith("pissa"):
        return Found(settings={"adapter.init": "pissa"}, note="by an exact decomposition")
    if asked.value in STARTS_BESIDE_THE_BASE:
        return Found(note="starts are kaiming, gaussian, orthogonal and pissa", is_lost=True)
    return Found(note="it changes the base's weights; starts are kaiming, gaussian, orthogonal and pissa", is_lost=True)


def which_method(asked: Asked) -> Found:
    """DoRA or LoRA."""
    return Found(settings={"adapter.method": asked.method})


NOT_ADAPTED = "only layers that a pattern names are adapted; patterns can leave out by not naming"
_EMPTY = "such layers have no counterpart"


def unless_empty(why: str) -> Rule:
    """Nothing to set where it is empty or off."""
    return lambda asked: Found(note="off") if not asked.value else Found(note=why, is_lost=True)


def _kind(asked: Asked) -> Found:
    if asked.value != "LORA":
        raise UserError(f"{asked.file}: peft_type is {asked.value}; only LORA (with or without DoRA) has a counterpart")
    return Found(note="said by adapter.method")


TABLE: Mapping[str, Rule] = {
    "peft_type": _kind,
    "use_dora": which_method,
    "r": to("adapter.rank", whole),
    "lora_alpha": to("adapter.alpha", number),
    "lora_dropout": dropout,
    "use_rslora": scaling,
    "target_modules": targets,
    "exclude_modules": unless_empty(NOT_ADAPTED),
    "rank_pattern": by_pattern("rank_pattern"),
    "alpha_pattern": by_pattern("alpha_pattern"),
    "modules_to_save": modules_to_save,
    "init_lora_weights": start,
    "base_model_name_or_path": to("model.base"),
    "revision": to("model.revision"),
    "bias": unless("none", "biases do not train beside adapters; adapter.also_train names parameters"),
    "layers_to_transform": unless_empty("write the layers' numbers into adapter.targets: *.layers.[0-3].*.q_proj"),
    "layers_pattern": unless_empty("write the layers' numbers into adapter.targets"),
    "target_parameters": unless_empty("experts that are one tensor: adapter.targets: [experts]"),
    "lora_bias": unless_empty("adapters have no bias of their own"),
    "fan_in_fan_out": same("seen from the layer itself"),
    "task_type": same("seen from the base"),
    "inference_mode": same("a run trains"),
    "peft_version": same("of the file"),
    "auto_mapping": same("of the file"),
    "ensure_weight_tying": unless_empty("tied weights that train whole stay tied"),
    "megatron_config": unless_empty("no Megatron layers"),
    "megatron_core": same("Megatron's alone"),
    "loftq_config": unless_empty("model.quantisation quantises; starts are kaiming, gaussian, orthogonal and pissa"),
    "corda_config": unless_empty("starts are kaiming, gaussian, orthogonal and pissa"),
    "eva_config": unless_empty("starts are kaiming, gaussian, orthogonal and pissa"),
    "lora_ga_config": unless_empty("starts are kaiming, gaussian, orthogonal and pissa"),
    "qalora_group_size": same("read with use_qalora alone"),
    "runtime_config": same("of the process, not of the adapter"),
    "layer_replication": unless_empty(_EMPTY),
    "trainable_token_indices": unless_empty("adapter.also_train trains an embedding whole"),
}


def _unknown(asked: Asked) -> Found:
    """Fields of later versions are written as null or false where they are not used."""
    if not asked.value:
        return Found(note="off")
    return Found(note="no field of PEFT that is known here", is_lost=True)


PEFT = Tool(
    name=NAME,
    table=TABLE,
    otherwise=_unknown,
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
    needed={"model.base": "BASE", "data.train": "train.json", "training.output_dir": "runs/translated"},
)
