"""Settings under other tools' names: whose file it is, and what its names are called here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from dora_vl.errors import UserError

NAMES: Mapping[str, str] = {
    "model_name_or_path": "model.base",
    "base_model": "model.base",
    "model_id": "model.base",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "data_path": "data.train",
    "train_file": "data.train",
    "media_dir": "data.image_folder",
    "image_dir": "data.image_folder",
    "image_folder": "data.image_folder",
    "val_size": "data.validation_share",
    "val_set_size": "data.validation_share",
    "split_dataset_ratio": "data.validation_share",
    "cutoff_len": "data.max_tokens",
    "sequence_len": "data.max_tokens",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "model_max_length": "data.max_tokens",
    "max_samples": "data.limit",
    "template": "model.template",
    "version": "model.template",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "target_modules": "adapter.targets",
    "finetuning_type": "adapter.method",
    "train_type": "adapter.method",
    "tuner_type": "adapter.method",
    "use_dora": "adapter.method",
    "peft_use_dora": "adapter.method",
    "quantization_bit": "model.quantisation",
    "load_in_4bit": "model.quantisation",
    "load_in_8bit": "model.quantisation",
    "mm_projector_lr": "optim.projector_learning_rate",
    "micro_batch_size": "training.per_device_train_batch_size",
    "num_epochs": "training.num_train_epochs",
}
"""What other tools call a setting -> its name here."""

TELLING: Mapping[str, frozenset[str]] = {
    "llama-factory": frozenset(
        {"finetuning_type", "stage", "cutoff_len", "dataset_dir", "lora_target", "freeze_vision_tower"}
    ),
    "trl": frozenset(
        {
            "dataset_name",
            "use_peft",
            "lora_r",
            "lora_target_modules",
            "lora_task_type",
            "assistant_only_loss",
            "datasets",
        }
    ),
    "ms-swift": frozenset(
        {"train_type", "tuner_type", "sft_type", "freeze_vit", "freeze_aligner", "split_dataset_ratio", "vit_lr"}
    ),
    "llava": frozenset({"mm_projector_lr", "lora_enable", "mm_projector_type", "vision_tower", "image_aspect_ratio"}),
    "peft": frozenset({"peft_type", "target_modules", "inference_mode", "init_lora_weights", "modules_to_save"}),
    "Axolotl": frozenset({"base_model", "datasets", "micro_batch_size", "sequence_len", "val_set_size"}),
}
"""Names that tell whose file it is."""
UNTRANSLATED = ("Axolotl", "another tool")
"""Whose settings `dora-vl translate` has no table of."""
SHOWN = 6
LEAST = 2
"""Of other tools' names, so many make a file another tool's."""


def refuse_other_tools(path: Path, settings: Mapping[str, object], sections: Iterable[str]) -> None:
    """Refuses a settings file of another tool, with what its settings are called here.

    Args:
        settings: the file's content.
        sections: names of ours, each of which holds a mapping.

    Raises:
        UserError: it has names of theirs at its top level, and no section of ours.
    """
    theirs = [name for name in settings if name in NAMES]
    if any(isinstance(settings.get(name), Mapping) for name in sections) or len(theirs) < LEAST:
        return
    likely = max(TELLING, key=lambda tool: len(TELLING[tool] & settings.keys()))
    whose = likely if TELLING[likely] & settings.keys() else "another tool"
    names = ", ".join(f"{name} is {NAMES[name]}" for name in theirs[:SHOWN])
    more = f" and {len(theirs) - SHOWN} more" if len(theirs) > SHOWN else ""
    is_translated = whose not in UNTRANSLATED
    way = f"`dora-vl translate {path}`" if is_translated else "`dora-vl init FOLDER` writes a file for your pictures"
    raise UserError(
        f"{path}: settings of {whose}, which are laid out otherwise here: {names}{more}; sections model, adapter, "
        f"data, training; {way}"
    )


def refuse_untranslated(path: Path, settings: Mapping[str, object]) -> None:
    """Refuses the settings of a tool that is known here, but has no table.

    Raises:
        UserError: its names are theirs.
    """
    counts = {tool: len(names & settings.keys()) for tool, names in TELLING.items()}
    if max(counts.values()) and max(counts, key=lambda tool: counts[tool]) in UNTRANSLATED:
        refuse_other_tools(path, settings, ())
