"""The base that a run adapts: made where its settings say so, and loaded as its model section says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dora_vl.adapters.quantised_base import check_runs_here
from dora_vl.backbones.loading import check_made_from
from dora_vl.errors import SettingError
from dora_vl.run.launch import loading_in, without_sharding
from dora_vl.run.settings import LoadedModelConfig

DECODER = "decoder"
"""What `recipe.json` calls the backbone of a vision-language model or a plain language model."""
VLBART = "vlbart"
"""An encoder-decoder over visual features."""

Backbone = TypeVar("Backbone")


def make_base(make: Callable[[Any, Path], None], spec: Any, base: str, arguments: TrainingArguments) -> None:
    """Writes the base that a run's `model.compose` or `model.source` describes, where it is not there yet.

    For one rank alone.

    Args:
        make: writes a folder by such settings.
        spec: the settings; None is a run whose base is there.
    """
    if spec is None:
        return
    if Path(base).exists():
        check_made_from(Path(base), spec)
        return
    with without_sharding(arguments):
        make(spec, Path(base))


def check_quantisation(model: LoadedModelConfig) -> None:
    """Refuses `model.quantisation` where it cannot work, before any weight is read."""
    if model.quantisation is None:
        return
    if is_deepspeed_zero3_enabled():
        raise SettingError(
            "model.quantisation",
            f": {model.quantisation} with ZeRO-3: packed weights cannot be split among ranks; set "
            "training.deepspeed: zero2, under which each GPU holds the quantised base whole",
        )
    check_runs_here(model.quantisation, getattr(torch, model.dtype))


def load_base(load: Callable[..., Backbone], model: LoadedModelConfig, **more: Any) -> Backbone:
    """The base with its weights in `model.dtype`, sharded while loading under ZeRO-3.

    Args:
        load: the backbone's own loader.
        model: the run's model section.
        more: what that loader takes besides.
    """
    if model.attn_implementation == "flash_attention_2" and not torch.cuda.is_available():
        raise SettingError("model.attn_implementation", ": flash_attention_2 needs CUDA; sdpa runs everywhere")
    check_quantisation(model)
    dtype = getattr(torch, model.dtype)
    with loading_in(dtype):
        return load(
            model.base,
            dtype=dtype,
            attn_implementation=model.attn_implementation,
            revision=model.revision,
            quantisation=model.quantisation,
            **more,
        )
