"""An adapter as vLLM serves it: what its LoRA slots hold stays an adapter, all else is folded into the base beside it.

The slots hold A and B of the language model's linear layers (and, with a plugin, magnitudes); a trained projector, and
adapted layers of the vision tower, are no adapter there. Base and adapter together are exactly the trained model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dora_vl.adapters.adapter import Adapter, is_extra, split_key, write_adapter
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.checkpoints import refuse_to_replace, written_whole
from dora_vl.adapters.factors import Factors
from dora_vl.adapters.folder import PEFT_PREFIX
from dora_vl.adapters.merge_folder import Merged, merge_to_folder
from dora_vl.adapters.merged_weights import MergedWeights
from dora_vl.adapters.peft_config import own_recipe
from dora_vl.adapters.provenance import content_hash
from dora_vl.errors import UserError

BASE, ADAPTER = "base", "adapter"
"""The two folders of an export."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` may be."""
GRID_TOWER = "dora_grid_tower"
"""`model_type` of a tower of timm or open_clip, or of a pooled one."""
WHOLE = "dora-vl merge writes the whole model as plain weights instead"


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    layers: int
    """That stay an adapter."""
    base: Path
    """What the adapter is to be served on: a new folder, or the given one where nothing had to change in it."""
    folded: Merged | None
    """What was folded into it; None where it is the given one."""
    max_lora_rank: int
    use_dora: bool


def export_for_vllm(
    adapter: Adapter,
    base_folder: Path,
    target: Path,
    language: Collection[str],
    *,
    head: str | None = None,
    dtype: torch.dtype | None = None,
    open_base: Callable[[Path], BaseWeights] = BaseWeights,
) -> Exported:
    """Writes `target/adapter`, and `target/base` where something has to be folded in or renamed for vLLM.

    Args:
        language: full names of the language model's linear layers, without the output head.
        head: full name of the output head.
        dtype: of the new base; None keeps each tensor's own.
        open_base: gives the values that the adapter was trained on, where they are not the stored ones.

    Raises:
        UserError: something that vLLM cannot serve, a base that does not fit, or a target that is there already.
            Nothing is written then.
    """
    refuse_to_replace(target, ())
    with open_base(base_folder) as base:
        refuse_unserved(adapter, base, language, head)
        MergedWeights(base, adapter)  # everything fits
        is_plain = type(base) is BaseWeights and dtype is None
        renamed = any(name != key for key, name in base.hub_keys.items())
    served, folded = split(adapter, language)
    with written_whole(target) as staging:
        merged = None
        if folded.tensors or renamed or not is_plain:
            merged = merge_to_folder(folded, base_folder, staging / BASE, dtype=dtype, open_base=open_base)
        base_of_result = base_folder if merged is None else target / BASE
        digest = content_hash(base_folder if merged is None else staging / BASE)
        write_adapter(_on_base(served, base_of_result, digest), staging / ADAPTER)
    rank = next(one for one in RANKS if one >= served.config["r"])
    return Exported(len(served.layers), base_of_result, merged, rank, bool(served.config["use_dora"]))


def refuse_unserved_base(config: Mapping[str, Any], folder: Path) -> None:
    """Raises a `UserError` where vLLM has no class for a base's tower, by the base's configuration."""
    tower = config.get("vision_config")
    if isinstance(tower, Mapping) and tower.get("model_type") == GRID_TOWER:
        raise UserError(
            f"{folder} has a tower of {tower.get('library')} ({tower.get('architecture') or 'pooled'}) as grid "
            "tokens, which vLLM has no class for: its LLaVA takes CLIP, SigLIP and Pixtral; dora-vl merge writes the "
            "whole model for transformers instead"
        )


def refuse_unserved(adapter: Adapter, base: BaseWeights, language: Collection[str], head: str | None) -> None:
    """Raises a `UserError` that says what vLLM cannot serve, why, and what to do."""
    refuse_unserved_base(base.config, base.folder)
    if adapter.method not in ("dora", "lora"):
        raise UserError(
            f"{adapter.source}: vLLM's slots hold A and B, and a {adapter.method} adapter has none; {WHOLE}"
        )
    for name, layer in adapter.layers.items():
        reason = "is the output head" if name == head else _unserved(name, layer, adapter, base)
        if reason is not None:
            raise UserError(f"{adapter.source}: {name} {reason}, which vLLM serves no adapter of; {WHOLE}")
    inside = [name for name in adapter.layers if name in language]
    if not inside:
        raise UserError(
            f"{adapter.source}: no linear layer of the language model is adapted, nothing to serve; {WHOLE}"
        )
    highest = max(found.rank for found in adapter.factors.values())
    if highest > RANKS[-1]:
        raise UserError(f"{adapter.source}: rank {highest} is above vLLM's largest, {RANKS[-1]}; {WHOLE}")


def _unserved(name: str, layer: Mapping[str, Any], adapter: Adapter, base: BaseWeights) -> str | None:
    if name in adapter.experts:
        return "is experts in one tensor"
    if "embedding_A" in layer:
        return "is an embedding"
    if "A" in layer and layer["A"].ndim > 2:
        return "is a convolution"
    if "A" not in layer:
        return "has a magnitude alone"
    if name in adapter.input_axis:
        return "has a magnitude for each input column"
    if name in base.transposed_layers:
        return "is a Conv1D"
    return None


def split(adapter: Adapter, language: Collection[str]) -> tuple[Adapter, Adapter]:
    """The part that is served, every layer with one scale, and the part that is folded into the base."""
    served = {name: found for name, found in adapter.factors.items() if name in language}
    rest = {key: tensor for key, tensor in adapter.tensors.items() if is_extra(key) or split_key(key)[0] not in served}
    recipe = {name: value for name, value in adapter.recipe.items() if name != "adapter"}
    return _of_one_scale(adapter, served), replace(adapter, tensors=rest, recipe=recipe)


def _of_one_scale(adapter: Adapter, served: Mapping[str, Factors]) -> Adapter:
    """Served layers as PEFT's files, such that alpha / r is each layer's scale.

    vLLM reads `r` and `lora_alpha` alone, PEFT the patterns too: where a layer's scale is another, B takes it up.
    """
    scale = Counter(found.scale for found in served.values()).most_common(1)[0][0]
    highest = max(found.rank for found in served.values())
    use_dora = bool(adapter.config.get("use_dora"))
    tensors = {}
    for name, found in served.items():
        assert found.lora_A is not None  # refused before
        assert found.lora_B is not None
        factor = found.scale / scale
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = found.lora_A
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = found.lora_B if factor == 1 else factor * found.lora_B
        if found.magnitude is not None:
            tensors[f"{PEFT_PREFIX}{name}.lora_magnitude_vector"] = found.magnitude
    ranks = {name: found.rank for name, found in served.items() if found.rank != highest}
    config = {
        "alpha_pattern": {name: scale * rank for name, rank in ranks.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": scale * highest,
        "lora_dropout": float(adapter.config.get("lora_dropout") or 0.0),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": highest,
        "rank_pattern": ranks,
        "target_modules": sorted(served),
        "task_type": adapter.config.get("task_type"),
        "use_dora": use_dora,
        "use_rslora": False,
    }
    recipe = {**adapter.recipe, **own_recipe(config)} if adapter.recipe else {}
    return Adapter(tensors, config, recipe, adapter.source)


def _on_base(served: Adapter, base: Path, digest: str) -> Adapter:
    """The same for another base, whose values are those that it was trained on."""
    recipe = served.recipe
    if "base" in recipe:
        recipe = {**recipe, "base": str(base), "revision": None, "base_sha256": digest, "quantisation": None}
    return replace(served, config={**served.config, "base_model_name_or_path": str(base)}, recipe=recipe)
