"""A plain LoRA that comes nearest to an adapter, for tools that cannot serve magnitudes; its error is stated.

The change of a DoRA layer, W' - W = (g - 1) W + g s B A, has full rank, so no LoRA below full rank equals it. The
nearest one of rank R is the change's truncated SVD (Eckart-Young); what is lost is measured, layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dora_vl.adapters.adapter import Adapter, is_extra
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.factors import Factors
from dora_vl.adapters.folder import PEFT_PREFIX
from dora_vl.adapters.merged_weights import planned_factors
from dora_vl.adapters.peft_config import new_config, own_recipe
from dora_vl.errors import UserError

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
    """Each layer's nearest LoRA of rank `rank`, one layer in memory at a time.

    Raises:
        UserError: the adapter changes no layer, only whole tensors, or does not fit the base.
    """
    if not adapter.layers:
        raise UserError(
            f"{adapter.source} (method: {adapter.method}) holds whole tensors and no adapted layer, so there is "
            "nothing to write as a LoRA; dora-vl merge writes it with its base as a model"
        )
    factors = planned_factors(base, adapter)
    for layer, found in factors.items():
        change = change_of(found, base.weight_of(layer))
        a, b = truncated(change, rank)
        norm = float(change.norm())
        error = float((change - b @ a).norm()) / norm if norm else 0.0
        yield LayerExport(layer, a, b, error)


def change_of(factors: Factors, weight: Tensor) -> Float[Tensor, "out in_"]:
    """W' - W as [out, in], in float32."""
    merged = factors.merged(weight)
    return factors.as_matrix(merged - weight.to(merged.dtype))


def truncated(
    change: Float[Tensor, "out in_"], rank: int
) -> tuple[Float[Tensor, "rank in_"], Float[Tensor, "out rank"]]:
    """A and B of the nearest product of rank `rank` (less where the matrix is smaller), scale 1."""
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
    """The exported layers as a LoRA adapter, with the adapter's other tensors beside them.

    Raises:
        UserError: some layer lost more than `max_error`, or the adapter is no linear layers' alone.
    """
    above = sorted((e for e in exports if e.relative_error > max_error), key=lambda e: -e.relative_error)
    if above:
        raise UserError(
            f"{len(above)} of {len(exports)} layers lose more than {max_error:g} of their change, most "
            f"{above[0].layer} ({above[0].relative_error:.3g}); nothing written. Raise --rank or --max-error, or "
            "merge instead (dora-vl merge), which is exact"
        )
    special = [name for name, layer in adapter.layers.items() if "embedding_A" in layer or _kernel(layer)]
    if special:
        raise UserError(f"{adapter.source}: {special[0]} is no linear layer; only linears are exported")
    tensors = {key: tensor for key, tensor in adapter.tensors.items() if is_extra(key)}
    for export in exports:
        tensors[f"{PEFT_PREFIX}{export.layer}.lora_A.weight"] = export.lora_A
        tensors[f"{PEFT_PREFIX}{export.layer}.lora_B.weight"] = export.lora_B
    fresh = new_config(
        ranks={e.layer: len(e.lora_A) for e in exports}, scales={e.layer: 1.0 for e in exports}, use_dora=False
    )
    carried = {
        field: adapter.config[field]
        for field in ("base_model_name_or_path", "modules_to_save", "task_type", "revision", "fan_in_fan_out", "bias")
        if field in adapter.config
    }
    config = {**fresh, **carried}
    kept = adapter.extras.keys() & adapter.recipe.get("adapter", {}).get("kept", ())
    own = own_recipe(config, adapter.extras, kept) if adapter.recipe else {}
    return Adapter(tensors, config, {**adapter.recipe, **own}, adapter.source)


def _kernel(layer: dict[str, Tensor]) -> bool:
    return "A" in layer and layer["A"].ndim > 2
