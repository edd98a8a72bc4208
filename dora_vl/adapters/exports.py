"""An adapter as vLLM serves it, exactly the trained model.

vLLM's slots hold A and B of the language model's linear layers (and, with a plugin, magnitudes); all else that was
trained is folded into the base beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_vl.adapters.adapter import Adapter, Factors, content_hash, is_extra, write_adapter
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.compatibility import split_key
from dora_vl.adapters.files import refuse_to_replace
from dora_vl.adapters.merge import MergeCounts, MergedWeights, merge_to_folder
from dora_vl.adapters.settings import own_recipe, peft_fields
from dora_vl.errors import UserError
from dora_vl.files import whole_folder

BASE, ADAPTER = "base", "adapter"
"""An export writes these two folders."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's `--max-lora-rank` takes one of these."""
WHOLE = "dora-vl merge writes the whole model as plain weights instead"


@dataclass(frozen=True)
class Exported:
    """Says what an export wrote."""

    layers: int
    """Counts the layers that stay an adapter."""
    base: Path
    """The adapter is served on this folder: a new one, or the given one where nothing had to change in it."""
    folded: MergeCounts | None
    """Counts what was folded into a new base; None if it is the given one."""
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
    """Writes `target/adapter`, and `target/base` where something has to be folded in or renamed for vLLM."""
    refuse_to_replace(target, ())
    with open_base(base_folder) as base:
        refuse_unserved(adapter, base, language, head)
        MergedWeights(base, adapter)  # everything fits
        is_plain = type(base) is BaseWeights and dtype is None
        renamed = any(name != key for key, name in base.hub_keys.items())
    served, folded = split(adapter, language)
    with whole_folder(target) as staging:
        merged = None
        if folded.tensors or renamed or not is_plain:
            merged = merge_to_folder(folded, base_folder, staging / BASE, dtype=dtype, open_base=open_base)
        base_of_result = base_folder if merged is None else target / BASE
        recipe = served.recipe
        if "base" in recipe:
            digest = content_hash(base_folder if merged is None else staging / BASE)
            own = {"base": str(base_of_result), "revision": None, "base_sha256": digest, "quantisation": None}
            recipe = {**recipe, **own}
        config = {**served.config, "base_model_name_or_path": str(base_of_result)}
        write_adapter(replace(served, config=config, recipe=recipe), staging / ADAPTER)
    rank = next(rank for rank in RANKS if rank >= served.config["r"])
    return Exported(len(served.layers), base_of_result, merged, rank, bool(served.config["use_dora"]))


def refuse_unserved_base(config: Mapping[str, Any], folder: Path) -> None:
    """Raises a `UserError` if vLLM has no class for a base's tower, by the base's configuration."""
    tower = config.get("vision_config")
    if isinstance(tower, Mapping) and tower.get("model_type") == "dora_grid_tower":  # of timm or open_clip, or pooled
        raise UserError(
            f"{folder} has a tower of {tower.get('library')} ({tower.get('architecture') or 'pooled'}), which vLLM has "
            "no class for: its LLaVA takes CLIP, SigLIP and Pixtral; dora-vl merge --to FOLDER writes plain weights, "
            "which dora-vl serve --model FOLDER serves in the same protocol"
        )


def refuse_unserved(adapter: Adapter, base: BaseWeights, language: Collection[str], head: str | None) -> None:
    """Raises a `UserError` that says what vLLM cannot serve, why, and what to do."""
    refuse_unserved_base(base.config, base.folder)
    if adapter.method not in ("dora", "lora"):
        raise UserError(
            f"{adapter.source}: vLLM's slots hold A and B, and a {adapter.method} adapter has none; {WHOLE}"
        )
    for name, layer in adapter.layers.items():
        reasons = {
            "is the output head": name == head,
            "is experts in one tensor": name in adapter.experts,
            "is an embedding": name in adapter.embeddings,
            "is a convolution": "lora_A" in layer and layer["lora_A"].ndim > 2,
            "has only a magnitude": "lora_A" not in layer,
            "is a Conv1D": name in base.transposed_layers,
        }
        if (reason := next((reason for reason, holds in reasons.items() if holds), None)) is not None:
            raise UserError(f"{adapter.source}: {name} {reason}, which vLLM serves no adapter of; {WHOLE}")
    inside = [name for name in adapter.layers if name in language]
    if not inside:
        raise UserError(
            f"{adapter.source}: no linear layer of the language model is adapted, nothing to serve; {WHOLE}"
        )
    highest = max(factors.rank for factors in adapter.factors.values())
    if highest > RANKS[-1]:
        raise UserError(f"{adapter.source}: rank {highest} is above vLLM's largest, {RANKS[-1]}; {WHOLE}")


def split(adapter: Adapter, language: Collection[str]) -> tuple[Adapter, Adapter]:
    """Splits an adapter into what is served, all layers with one scale, and what is folded into the base."""
    served = {name: factors for name, factors in adapter.factors.items() if name in language}
    rest = {key: tensor for key, tensor in adapter.tensors.items() if is_extra(key) or split_key(key)[0] not in served}
    recipe = {name: value for name, value in adapter.recipe.items() if name != "adapter"}
    return _of_one_scale(adapter, served), replace(adapter, tensors=rest, recipe=recipe)


def _of_one_scale(adapter: Adapter, served: Mapping[str, Factors]) -> Adapter:
    """Makes an adapter of the served layers in which alpha / r is each layer's scale.

    vLLM only reads `r` and `lora_alpha`, PEFT the patterns too: B absorbs a layer's scale that differs.
    """
    scale = Counter(factors.scale for factors in served.values()).most_common(1)[0][0]
    ranks = {name: factors.rank for name, factors in served.items()}
    highest, use_dora = max(ranks.values()), bool(adapter.config.get("use_dora"))
    tensors: dict[str, Tensor] = {}
    for name, factors in served.items():
        assert factors.lora_B is not None  # refused before
        share = factors.scale / scale
        tensors |= replace(factors, lora_B=factors.lora_B if share == 1 else share * factors.lora_B).tensors(name)
    others = {name: rank for name, rank in ranks.items() if rank != highest}
    config = peft_fields(
        ranks,
        {},
        r=highest,
        lora_alpha=scale * highest,
        rank_pattern=others,
        alpha_pattern={name: scale * rank for name, rank in others.items()},
        lora_dropout=float(adapter.config.get("lora_dropout") or 0.0),
        task_type=adapter.config.get("task_type"),
        use_dora=use_dora,
    )
    recipe = {**adapter.recipe, **own_recipe(config)} if adapter.recipe else {}
    return Adapter(tensors, config, recipe, adapter.source)
