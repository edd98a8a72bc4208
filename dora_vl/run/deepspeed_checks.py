"""Reads a DeepSpeed JSON and refuses what would train something else than the recipe says, in silence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_vl.errors import UserError
from dora_vl.run.recipe_file import shipped_folder

SAID_TWICE = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
"""DeepSpeed's name -> the field of the `training:` section that says the same."""
SHORT_NAMES = ("zero0", "zero2", "zero3", "zero3_offload")


def read_deepspeed(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a short name (`zero2`), of a file (as given, or below a checkout), or of a mapping."""
    if isinstance(value, Mapping):
        return dict(value)
    path = _find(value)
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: a DeepSpeed config is a JSON object, this is a {type(loaded).__name__}")
    return loaded


def _find(value: str) -> Path:
    shipped = shipped_folder()
    tried = [shipped / "deepspeed" / f"{value}.json"] if value in SHORT_NAMES else [Path(value), shipped.parent / value]
    for path in tried:
        if path.is_file():
            return path
    raise UserError(f"training.deepspeed: {value} is neither a file nor one of {', '.join(SHORT_NAMES)}")


def zero_stage(config: Mapping[str, Any] | None) -> int:
    """ZeRO stage of a DeepSpeed config; 0 without one."""
    return 0 if config is None else int(config.get("zero_optimization", {}).get("stage", 0))


def check_deepspeed(config: Mapping[str, Any], *, method: str, bf16: bool) -> None:
    """Refuses blocks that override the recipe.

    Raises:
        UserError: `optimizer` or `scheduler` (per-part learning rates and the schedule would be dropped without
            a word), or half precision of the trained float32 parameters.
    """
    if "optimizer" in config:
        raise UserError(
            'DeepSpeed config: remove the "optimizer" block; with it one learning rate is used for every part '
            "(projector and magnitudes too) and training.optim is not used"
        )
    if "scheduler" in config:
        raise UserError(
            'DeepSpeed config: remove the "scheduler" block; with it training.lr_scheduler_type and '
            "training.warmup_steps are not used"
        )
    for name in ("bf16", "fp16"):
        enabled = config.get(name, {}).get("enabled", False)
        if enabled is True and method != "full":
            raise UserError(
                f'DeepSpeed config: "{name}": enabled casts the trained float32 parameters of adapter.method {method}; '
                'write "auto" and set model.dtype for the frozen weights'
            )
    if "torch_autocast" in config and config["torch_autocast"].get("enabled") and method != "full":
        raise UserError('DeepSpeed config: remove "torch_autocast"; adapters set their own number types')
    if method == "full" and bf16 and config.get("bf16", {}).get("enabled") is False:
        raise UserError('DeepSpeed config: "bf16": enabled is false, but training.bf16 is true; write "auto"')


def check_agreement(config: Mapping[str, Any], section: Any) -> None:
    """Refuses a number that the `training:` section says otherwise; "auto" takes the section's.

    Args:
        section: transformers' TrainingArguments.

    Raises:
        UserError: they differ; transformers says so only when training starts, in a traceback.
    """
    parts = section.gradient_accumulation_steps * section.world_size
    whole = section.per_device_train_batch_size * parts
    if config.get("train_batch_size", "auto") not in ("auto", whole):
        raise UserError(
            f'DeepSpeed config: "train_batch_size" is {config["train_batch_size"]!r}, but training says {whole} '
            '(per_device_train_batch_size x gradient_accumulation_steps x ranks); write "auto"'
        )
    for name, field in SAID_TWICE.items():
        stated, ours = config.get(name, "auto"), getattr(section, field)
        if stated not in ("auto", ours):
            raise UserError(
                f'DeepSpeed config: "{name}" is {stated!r}, but training.{field} is {ours!r}; write "auto" and set '
                f"training.{field}"
            )
