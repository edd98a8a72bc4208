"""What the tables that write a run for other tools share: our defaults, and our settings that are ours alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dora_vl.core.config import Method
from dora_vl.run.recipe import AdapterConfig, DataConfig, ModelConfig
from dora_vl.translation.rules import Asked, Found, Rule, lost, same
from dora_vl.translation.target_patterns import ALL_LINEAR

PRESETS = ("language", "vision", "projector", "experts", ALL_LINEAR)
LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""The linears of a decoder in LLaMA's names, which most have."""
PROJECTOR_OF: Mapping[str, str] = {
    "llava": "multi_modal_projector",
    "gemma-3": "multi_modal_projector",
    "paligemma": "multi_modal_projector",
    "internvl": "multi_modal_projector",
    "smolvlm": "connector",
    "idefics": "connector",
    "qwen2-vl": "merger",
    "qwen2.5-vl": "merger",
    "qwen3-vl": "merger",
}
"""A part of a base's name -> what its projector is called in transformers."""


def defaults() -> dict[str, Any]:
    """Ours, of settings whose default is another one elsewhere."""
    adapter = {one.name: one.default for one in dataclasses.fields(AdapterConfig)}
    data = {one.name: one.default for one in dataclasses.fields(DataConfig)}
    model = {one.name: one.default for one in dataclasses.fields(ModelConfig)}
    shown = ("method", "rank", "alpha", "dropout", "dropout_mode", "targets", "train_projector")
    return {
        "model.dtype": model["dtype"],
        **{f"adapter.{name}": "" if name == "targets" else adapter[name] for name in shown},
        "data.max_tokens": data["max_tokens"],
        "training.learning_rate": 5e-5,
        "training.num_train_epochs": 3.0,
        "training.per_device_train_batch_size": 8,
        "training.gradient_accumulation_steps": 1,
        "training.lr_scheduler_type": "linear",
        "training.weight_decay": 0.0,
    }


def method(settings: Mapping[str, Any]) -> Method:
    """The run's own."""
    return settings["adapter.method"]


def targets_of(asked: Asked) -> list[str]:
    """Presets and patterns; without any, the language model's linears."""
    value = asked.value
    return ["language"] if not value else [value] if isinstance(value, str) else list(value)


def projector_of(asked: Asked) -> str | None:
    """What the base's projector is called; None where its name does not say it."""
    base = str(asked.settings.get("model.base", "")).lower()
    composed = asked.settings.get("model.compose")
    found = (name for part, name in PROJECTOR_OF.items() if part in base)
    return "multi_modal_projector" if composed else next(found, None)


def modules_of(globs: Sequence[str]) -> str | None:
    """The module that patterns of parameters name: `*embed_tokens.weight`; None where they say more."""
    names = {glob.removesuffix(".*").removesuffix(".weight").removeprefix("*").removeprefix(".") for glob in globs}
    (name,) = names if len(names) == 1 else ("",)
    return name if name and not any(sign in name for sign in "*?[") else None


def _rates(asked: Asked) -> Found:
    return Found(note="empty") if not asked.value else Found(note="it has one rate, and LoRA+'s ratio", is_lost=True)


def _empty(why: str) -> Rule:
    return lambda asked: Found(note="empty") if not asked.value else Found(note=why, is_lost=True)


def _one_rate(asked: Asked) -> Found:
    return Found(note="its rate has no counterpart: every part would train at learning_rate", is_lost=True)


OURS_ALONE: Mapping[str, Rule] = {
    "variant": same("already chosen"),
    "model.compose": lost("the first run here writes model.base; the folder is a LLaVA of transformers"),
    "model.image_aspect": lost("pictures are prepared by the base's own processor"),
    "adapter.detach_norm": lambda asked: (
        Found(note="so there too") if asked.value else Found(note="PEFT's norm has no gradient", is_lost=True)
    ),
    "adapter.kinds": same("said by the names of layers"),
    "adapter.magnitude_targets": _empty("no magnitudes alone"),
    "adapter.parts": _empty("no parts with a rank and rate of their own"),
    "adapter.also_keep": _empty("frozen tensors are not carried"),
    "adapter.opaque_layers": _empty("PEFT has a list of its own"),
    "adapter.random_seed": same("of dvora alone"),
    "data.share_pictures": _empty("no sharing of pictures"),
    "data.cache_features": _empty("no stored features; the tower runs in every step"),
    "data.feature_cache": _empty("no stored features"),
    "data.follow_links": same("links are followed there"),
    "data.as_published": same("pictures are read so there"),
    "data.max_bad_share": lost("bad samples end the run there, or are passed over"),
    "optim.rates": _rates,
    "optim.projector_learning_rate": _one_rate,
    "optim.magnitude_learning_rate": _one_rate,
    "optim.weight_decay_on": lost("magnitudes decay there as all else does, if weight_decay is not 0"),
    "watch": lost("no fixed questions through training"),
    "try_largest_batch": lost("nothing is tried before the first step"),
    "test_only": lost("no test after training"),
}
"""Settings that the other tools have no word for, or need none."""
EVALUATION = "no test after training; score the adapter here: dora-vl evaluate --adapter FOLDER"


def otherwise(asked: Asked) -> Found:
    """A setting that no table names."""
    section, _, name = asked.key.partition(".")
    if section == "evaluation":
        return Found(note=EVALUATION, is_lost=True)
    if section == "training":
        return Found(settings={name: asked.value})
    return Found(note="no setting of it does this", is_lost=True)
