"""What a trained VL-BART was trained on: its tasks, and what computes the features that it reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dora_vl.errors import UserError
from dora_vl.tasks.subtask import Subtask
from dora_vl.vision.feature_encoder import FeatureEncoder, FeatureSettings

TASK_FILES = {"vlbart_image": "dora_vl.tasks.vlbart_image", "vlbart_video": "dora_vl.tasks.vlbart_video"}


def subtasks_of(task: str, *, task_prompt: bool) -> Mapping[str, Subtask]:
    """Every task of a VL-BART task file, by the file's name; `task_prompt` as in training.

    Raises:
        UserError: no such task file.
    """
    if task not in TASK_FILES:
        raise UserError(f"the adapter was trained by {task!r}; there are {', '.join(TASK_FILES)}")
    return import_module(TASK_FILES[task]).subtasks(task_prompt=task_prompt)


HASH = "sha256"


def open_encoders(
    adapter: Path, recipe: Mapping[str, Any], *, device: torch.device, any_tower: bool = False
) -> dict[str, FeatureEncoder]:
    """An encoder for each task of the recipe whose features say how they were made; equal settings share one.

    Args:
        any_tower: accepts a tower with other weights than those that made the features.

    Raises:
        UserError: no task's features say it, or a tower cannot be loaded, or has other weights or another preparation.
    """
    stated = {name: recipe["features"].get(name) for name in recipe["tasks"]}
    if not any(stated.values()):
        raise UserError(
            f"{adapter} does not say how the features of {', '.join(stated)} were computed (data_prep.features did "
            "not make them), so it cannot be asked about raw pictures"
        )
    opened: dict[str, FeatureEncoder] = {}
    encoders: dict[str, FeatureEncoder] = {}
    for name, record in stated.items():
        if record is None:
            continue
        key = json.dumps(record, sort_keys=True)
        if key not in opened:
            opened[key] = _open(record, device)
            if not any_tower:
                check_tower(opened[key], record, f"{adapter}: {name}")
        encoders[name] = opened[key]
    return encoders


def _open(record: Mapping[str, Any], device: torch.device) -> FeatureEncoder:
    settings = FeatureSettings.from_record({name: value for name, value in record.items() if name != HASH})
    return FeatureEncoder(settings, device=device)


def check_tower(encoder: FeatureEncoder, record: Mapping[str, Any], trained: str) -> None:
    """Refuses a tower that is not the one that the record of a folder's features names.

    Args:
        trained: what was trained on those features, for the message.

    Raises:
        UserError: its hash is another; both are named.
    """
    if HASH not in record:  # made before hashes were kept
        return
    found, tower = encoder.fingerprint(), encoder.settings.tower
    if found != record[HASH]:
        raise UserError(
            f"{trained} was trained on features of a vision tower with sha256 {record[HASH][:12]}…, {tower.library}'s "
            f"{tower.name} with weights {tower.weights!r} has {found[:12]}… here; put the same weights there, or add "
            "--any-base to try it all the same"
        )
