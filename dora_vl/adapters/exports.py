"""Adapters for tools that cannot serve all of one: the nearest plain LoRA, its error stated.

The change of a DoRA layer, W' - W = (g - 1) W + g s B A, has full rank, so no LoRA below full rank equals it. The
nearest one of rank R is the change's truncated SVD (Eckart-Young); what is lost is measured, layer by layer.

And an adapter as vLLM serves it: its slots hold A and B of the language model's linear layers (and, with a plugin,
magnitudes); all else that was trained is folded into the base beside it. Both together are exactly the trained model.

And a VL-BART's adapter as the whole dictionary that NVlabs' DoRA or VL-Adapter's LoRA saves: what the adapter does not
hold comes from its base, beside each adapted weight stand the factors, and the token embedding has all five names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dora_vl.adapters.adapter import Adapter, Factors, content_hash, is_extra, write_adapter
from dora_vl.adapters.agreement import PEFT_PREFIX, split_key
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.files import refuse_to_replace
from dora_vl.adapters.merge import Merged, MergedWeights, merge_to_folder, planned_factors
from dora_vl.adapters.settings import new_config, own_recipe, peft_fields
from dora_vl.errors import UserError
from dora_vl.files import whole_folder

EXACT_SVD_UP_TO = 1024
"""Shorter side of a change up to which the whole SVD is taken; beyond it a randomised one of the leading part."""


@dataclass(frozen=True)
class LayerExport:
    """One layer as LoRA, and what it lost."""

    layer: str
    lora_A: Float[Tensor, "rank in_"]
    lora_B: Float[Tensor, "out rank"]
    relative_error: float
    """||change - B A|| / ||change||, Frobenius norms, measured on the result; 0 where nothing changed."""


def export_layers(adapter: Adapter, base: BaseWeights, rank: int) -> Iterator[LayerExport]:
    """Yields each layer's nearest LoRA of rank `rank`, one layer in memory at a time."""
    if not adapter.layers:
        raise UserError(
            f"{adapter.source} (method: {adapter.method}) adapts no layer, so there is no LoRA; use dora-vl merge"
        )
    factors = planned_factors(base, adapter)
    for layer, own in factors.items():
        weight = base.weight_of(layer)
        merged = own.merged(weight)
        change = own.as_matrix(merged - weight.to(merged.dtype))
        a, b = truncated(change, rank)
        norm = float(change.norm())
        error = float((change - b @ a).norm()) / norm if norm else 0.0
        yield LayerExport(layer, a, b, error)


def truncated(
    change: Float[Tensor, "out in_"], rank: int
) -> tuple[Float[Tensor, "rank in_"], Float[Tensor, "out rank"]]:
    """Returns A and B of the nearest product of rank `rank` (less where the matrix is smaller), scale 1."""
    rank = min(rank, *change.shape)
    if min(change.shape) <= EXACT_SVD_UP_TO or 4 * rank >= min(change.shape):
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
    else:
        # The generator's state is put back: an export must not change what a program draws next.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, columns = torch.svd_lowrank(change, q=min(rank + 16, *change.shape), niter=6)
        u, s, v = u[:, :rank], s[:rank], columns[:, :rank].t()
    root = s.sqrt()
    return (root.unsqueeze(1) * v).contiguous(), (u * root).contiguous()


def as_lora(adapter: Adapter, exports: list[LayerExport], max_error: float) -> Adapter:
    """Makes a LoRA adapter of the exported layers, with the adapter's other tensors beside them."""
    above = sorted((e for e in exports if e.relative_error > max_error), key=lambda e: -e.relative_error)
    if above:
        raise UserError(
            f"{len(above)} of {len(exports)} layers lose more than {max_error:g} of their change, most "
            f"{above[0].layer} ({above[0].relative_error:.3g}); raise --rank or --max-error, or use dora-vl merge"
        )
    if adapter.not_linear:
        raise UserError(f"{adapter.source}: {min(adapter.not_linear)} is no linear layer; only linears are exported")
    tensors = {key: tensor for key, tensor in adapter.tensors.items() if is_extra(key)}
    for export in exports:
        tensors[f"{PEFT_PREFIX}{export.layer}.lora_A.weight"] = export.lora_A
        tensors[f"{PEFT_PREFIX}{export.layer}.lora_B.weight"] = export.lora_B
    carried = {
        field: adapter.config[field]
        for field in ("base_model_name_or_path", "modules_to_save", "task_type", "revision", "fan_in_fan_out", "bias")
        if field in adapter.config
    }
    ranks = {export.layer: len(export.lora_A) for export in exports}
    config = new_config(ranks, dict.fromkeys(ranks, 1.0), use_dora=False, **carried)
    kept = adapter.extras.keys() & adapter.recipe.get("adapter", {}).get("kept", ())
    own = own_recipe(config, adapter.extras, kept) if adapter.recipe else {}
    return Adapter(tensors, config, {**adapter.recipe, **own}, adapter.source)


BASE, ADAPTER = "base", "adapter"
"""An export writes these two folders."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's `--max-lora-rank` takes one of these."""
WHOLE = "dora-vl merge writes the whole model as plain weights instead"


@dataclass(frozen=True)
class Exported:
    """Says what an export wrote."""

    layers: int
    """So many layers stay an adapter."""
    base: Path
    """The adapter is served on this folder: a new one, or the given one where nothing had to change in it."""
    folded: Merged | None
    """Counts what was folded into a new base; None where it is the given one."""
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
            recipe = {
                **recipe,
                "base": str(base_of_result),
                "revision": None,
                "base_sha256": digest,
                "quantisation": None,
            }
        config = {**served.config, "base_model_name_or_path": str(base_of_result)}
        write_adapter(replace(served, config=config, recipe=recipe), staging / ADAPTER)
    rank = next(rank for rank in RANKS if rank >= served.config["r"])
    return Exported(len(served.layers), base_of_result, merged, rank, bool(served.config["use_dora"]))


def refuse_unserved_base(config: Mapping[str, Any], folder: Path) -> None:
    """Raises a `UserError` where vLLM has no class for a base's tower, by the base's configuration."""
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
            "is an embedding or a convolution": name in adapter.not_linear,
            "has a magnitude alone": "lora_A" not in layer,
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

    vLLM reads `r` and `lora_alpha` alone, PEFT the patterns too: where a layer's scale is another, B takes it up.
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
