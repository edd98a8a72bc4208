"""What computes the features that a trained VL-BART reads, each task's as the folder's that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dora_vl.errors import UserError
from dora_vl.vision.feature_encoder import FeatureEncoder, FeatureSettings

HASH = "sha256"


def open_encoders(adapter: Path, recipe: Mapping[str, Any], *, device: torch.device) -> dict[str, FeatureEncoder]:
    """An encoder for each task of the recipe whose features say how they were made; equal settings share one.

    Raises:
        UserError: no task's features say it, or a tower cannot be loaded.
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
        encoders[name] = opened[key]
    return encoders


def _open(record: Mapping[str, Any], device: torch.device) -> FeatureEncoder:
    settings = FeatureSettings.from_record({name: value for name, value in record.items() if name != HASH})
    return FeatureEncoder(settings, device=device)
